"""Made-up records pass before a site's first round: what cannot be trained privately is refused, unpaid.

Left to the round, such a model would be refused after the charge, at every retry again, and only when the
batch is not empty, which is nobody's business.
"""

from __future__ import annotations

import torch

from common.errors import MechanismError, ModelError
from common.examples import Example
from common.model import FederatedModel
from common.privacy.dpsgd import PrivateSteps
from common.privacy.plan import PrivacyPlan

RECORDS = (Example(text="one", label=0, completion=" two"), Example(text="one two three", label=1, completion=" four"))
_PLAN = PrivacyPlan(
    clip_norm=1.0, noise_multiplier=1.0, sample_rate=1.0, expected_batch_size=1.0, delta=1e-5, max_epsilon=1.0
)


def rehearse(model: FederatedModel) -> None:
    """Let ``model`` compute gradients of records that are no one's; nothing is released, nothing of the model changes.

    Raises:
        ModelError: it cannot be trained privately; the message says why.
    """
    trained = [p for p in model.module.parameters() if p.requires_grad]
    try:
        with PrivateSteps(model.module, torch.optim.SGD(trained, lr=0.0), _PLAN) as steps:
            steps.try_out(model.batch(model.tokenise(RECORDS)), model.losses)
    except MechanismError as error:
        raise ModelError(f"{model.base.name!r} cannot be trained privately with these settings: {error}") from error

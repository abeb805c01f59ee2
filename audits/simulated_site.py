"""The site's app inside the bundle that ``audits.simulation`` submits to Flower: the real one, on canary records.

A canary's text spells the axis along which its gradient lies (``audits.dirac``). Everything else, from the
decoding of the task to the reply's bytes, is the site's own.
"""

from __future__ import annotations

from unittest.mock import patch

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor

from audits.dirac import Dirac
from audits.faults import FAULTS, SOUND
from audits.tiny_models import FILLER
from fedveil.client import app as site
from fedveil.client import rehearsals
from fedveil.client.process import SiteProcess
from fedveil.client.timing import Timing
from fedveil.common.model.federated import FederatedModel
from fedveil.common.model.shapes import FixedBatch
from fedveil.common.tasks import Batch
from fedveil.common.tasks.text import tokens_of

DIGITS = 4
"""Words of a canary's text: the axis in base ``len(FILLER)``, highest digit first."""
LENGTH = 5.0
"""Of a canary's gradient; the run's clip norm is 1."""


def text_of(axis: int) -> str:
    """Return the text of the canary of an axis."""
    words = []
    for _ in range(DIGITS):
        axis, digit = divmod(axis, len(FILLER))
        words.append(FILLER[digit])
    return " ".join(reversed(words))


def axes_of(model: FederatedModel, batch: Batch) -> Tensor:
    """Return the axes that the records of a batch spell, shape (records,)."""
    first = int(model.base.processor.convert_tokens_to_ids(FILLER[0]))
    digits = tokens_of(batch)[:, 1 : 1 + DIGITS] - first  # behind the token that every text begins with
    return (digits * len(FILLER) ** torch.arange(DIGITS - 1, -1, -1)).sum(1)


def on_canaries(model: FederatedModel) -> FederatedModel:
    """Return the model with losses of canaries in place of its own."""
    canaries = Dirac(model.module, LENGTH)

    def losses(batch: Batch) -> Tensor:
        found = canaries(axes_of(model, batch).clamp(0, canaries.size - 1))  # filler spells none
        return found[: batch.records] if isinstance(batch, FixedBatch) else found

    model.losses = losses  # type: ignore[method-assign]
    return model


def app_with(fault: str) -> ClientApp:
    """Return an app that answers as the site's does, on canaries, with the ``fault`` of this name built in.

    Everything is patched for one message at a time: Ray's workers get the app as a pickle, so nothing that was
    patched when this module was imported would be patched there.
    """
    app, plant = ClientApp(), {planted.name: planted for planted in (SOUND, *FAULTS)}[fault].plant
    built = SiteProcess.model_of

    @app.train()
    def train(message: Message, context: Context) -> Message:
        with (
            plant(),
            patch.object(SiteProcess, "model_of", lambda own, job, here: on_canaries(built(own, job, here))),
            # Made-up records spell no axis.
            patch.object(rehearsals, "rehearse", lambda _: Timing({8: 0.0}, {8: 1}, 0.0, 0.0)),
        ):
            return site.train(message, context)

    return app

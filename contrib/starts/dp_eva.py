"""EVA from the sites' records, paid for: one clipped, noised release of the moments of what reaches the layers.

Paischer, Hauzenberger et al.: Parameter Efficient Fine-tuning via Explained Variance Adaptation. Theirs is an
incremental, centred decomposition without clip or noise, whose length depends on the records, and it spreads ranks by
the spectrum. Here every record has one vote of bounded length (``contrib.starts.inputs``), over all inputs; the
mean over sites is that of all their records, because moments add up; A follows from it by one eigendecomposition at the
server, which is post-processing. Moments are not centred, and every layer has the run's rank.

Noise of standard deviation τ on every number of the packed moment is noise of variance τ² / 2 beside the diagonal,
whose eigenvalues reach τ √(2 n): a direction of the records is found where its eigenvalue is above τ √(n / 2). Plain
upper triangles (Dwork, Talwar et al. 2014, "Analyze Gauss") would need √2 times that for the same price. Behind round 0
the server says how many are found, and their eigenvalues less their lift by noise (``contrib.nulls.without_lift``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fedveil.common.messages.state import AdapterState
from fedveil.common.model.federated import FederatedModel
from fedveil.common.starts.gradient import drawn, released
from fedveil.common.starts.paid import SampledStart
from fedveil.common.tasks import Record
from fedveil.contrib.nulls import without_lift
from fedveil.contrib.starts.inputs import OfInputs, open_moments, packed, unpacked
from fedveil.privacy.plan import PrivacyPlan

SHOWN = 6
"""Inputs that a line names."""


@dataclass(frozen=True)
class DPEVA(OfInputs, SampledStart):
    """The rows of A are the leading eigenvectors of the sites' noised moment of inputs; B is random, from the seed."""

    name: ClassVar[str] = "dp-eva"

    @property
    def unfit(self) -> str:
        """Name the start that other runs have."""
        return "is a release that privacy.mode 'dp-sgd' alone pays for: use 'eva', from public text"

    def opened(self, model: FederatedModel) -> AbstractContextManager[Any]:
        """Return the context in which the maps take a gradient of which a record's is its moment."""
        return open_moments(model)

    def privatise(
        self,
        model: FederatedModel,
        records: Sequence[Record],
        plan: PrivacyPlan,
        before_pass: Callable[[], None] = lambda: None,
    ) -> AdapterState:
        """Return the records' moments by the mechanism of a training step."""
        with open_moments(model) as maps:
            parts = drawn(model, records, plan)
            found = released(model, maps, parts, plan, before_pass)
        return {name: {"M": packed(M.detach().double().cpu()).float()} for name, M in found.items()}

    def found(self, statistic: AdapterState, rank: int, noise: float) -> str:
        """Return of each input the eigenvalues above the noise's edge, less what noise lifts them by."""
        said = []
        for name, factors in sorted(statistic.items()):
            moment = unpacked(factors["M"])
            values = without_lift(torch.linalg.eigvalsh(moment)[-rank:].flip(0), len(moment), noise)
            clear = [f"{value:.2g}" for value in values[values > 0].tolist()]
            reach = f" ({' to '.join(dict.fromkeys((clear[0], clear[-1])))})" if clear else ""
            said.append(f"{len(clear)}{reach} of {name}")
        more = f" and {len(said) - SHOWN} more" if len(said) > SHOWN else ""
        return (
            f"of the inputs' {rank} directions above the noise's edge, with eigenvalues less its lift: "
            f"{'; '.join(said[:SHOWN])}{more}"
        )

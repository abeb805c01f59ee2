"""LoRA-SB's start from a mean gradient, paid for: one clipped, noised sum of every site's gradients.

Without LoRA-SB's sign, because the sign of a noisy dense matrix is close to random, while a low-rank
signal survives noise. What the server makes of the release is post-processing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

from common.adapters import Place
from common.messages.state import AdapterState, Factors
from common.messages.wire import Layout
from common.model.federated import FederatedModel
from common.privacy.plan import PrivacyPlan
from common.starts.base import PaidStart, seeded
from common.starts.gradient import gradient_basis, gradient_layout, initial_shapes, private_gradient
from common.tasks import Record


@dataclass(frozen=True)
class DPGradient(PaidStart):
    """B and A span the leading singular vectors of the sites' noised gradient; no weight moves."""

    name: ClassVar[str] = "dp-gradient"

    @property
    def unfit(self) -> str:
        """Name the start that a run without privacy has."""
        return "is for a private run: without privacy use 'private-gradient'"

    def factors(self, place: Place, wanted: Collection[str]) -> Factors:
        """Return orthonormal directions, which hold until the gradient is there."""
        return seeded(place, wanted)

    def layout(self, model: FederatedModel) -> Layout:
        """Return ``G``, shape (out, in), of every adapted layer."""
        return gradient_layout(model)

    def privatise(
        self,
        model: FederatedModel,
        records: Sequence[Record],
        plan: PrivacyPlan,
        before_pass: Callable[[], None] = lambda: None,
    ) -> AdapterState:
        """Return the records' gradients by the mechanism of a training step."""
        parts = plan.parts(model, [records[i] for i in next(plan.draws(records))], initial_shapes(model))
        return private_gradient(model, parts, plan, before_pass)

    def from_statistic(self, statistic: Factors, rank: int) -> Factors:
        """Return B and A, and R = 0."""
        return gradient_basis(statistic["G"], rank, 0.0, sign=False)

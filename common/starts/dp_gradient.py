"""LoRA-SB's start from a mean gradient, paid for: one clipped, noised sum of every site's gradients.

Without LoRA-SB's sign, because the sign of a noisy dense matrix is close to random, while a low-rank
signal survives noise. What the server makes of the release is post-processing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedveil.common.messages.state import AdapterState, Factors
from fedveil.common.starts.gradient import drawn, gradient_basis, gradient_layout, private_gradient
from fedveil.common.starts.paid import PaidGradient
from fedveil.common.tasks import Record
from fedveil.privacy.plan import PrivacyPlan

if TYPE_CHECKING:
    from fedveil.common.messages.blocks import Layout
    from fedveil.common.model.federated import FederatedModel


@dataclass(frozen=True)
class DPGradient(PaidGradient):
    """B and A span the leading singular vectors of the sites' noised gradient; no weight moves."""

    name: ClassVar[str] = "dp-gradient"
    opens_weights: ClassVar[bool] = True

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
        parts = drawn(model, records, plan)
        return private_gradient(model, parts, plan, before_pass)

    def from_statistic(self, statistic: Factors, rank: int) -> Factors:
        """Return B and A, and R = 0."""
        return gradient_basis(statistic["G"], rank, 0.0, sign=False)

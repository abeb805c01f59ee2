"""LoRA-SB's start from a mean gradient as published: on raw private records, only without privacy.

Singhal, Ponkshe et al.: Initialization using Update Approximation is a Silver Bullet (LoRA-SB), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar

from fedveil.common.adapters import Place
from fedveil.common.check import POSITIVE
from fedveil.common.config.fields import RATIO
from fedveil.common.messages.blocks import Layout
from fedveil.common.messages.state import AdapterState, Factors
from fedveil.common.model.federated import FederatedModel
from fedveil.common.starts.base import seeded
from fedveil.common.starts.gradient import gradient_basis, gradient_layout, mean_gradient
from fedveil.common.starts.paid import UnpaidStart
from fedveil.common.tasks import Batch


@dataclass(frozen=True)
class NonprivateGradient(UnpaidStart):
    """B R A is the best rank-r part of one sign step down the sites' mean gradient."""

    name: ClassVar[str] = "nonprivate-gradient"
    opens_weights: ClassVar[bool] = True

    step: Annotated[float, POSITIVE, RATIO] = 1e-3
    """Length of the first sign step that is imitated: LoRA-SB's eta."""

    @property
    def unfit(self) -> str:
        """Name the starts that a private run has."""
        return (
            "sends raw gradients of private records, which no ε covers: use 'public-gradient', 'svd-of-weights' or "
            "'orthonormal', or with privacy.mode 'dp-sgd' 'dp-gradient'"
        )

    def factors(self, place: Place, wanted: Collection[str]) -> Factors:
        """Return orthonormal directions, which hold until the gradient is there."""
        return seeded(place, wanted)

    def layout(self, model: FederatedModel) -> Layout:
        """Return ``G``, shape (out, in), of every adapted layer."""
        return gradient_layout(model)

    def measure(self, model: FederatedModel, parts: Iterable[Batch]) -> AdapterState:
        """Return the mean of the records' gradients."""
        return mean_gradient(model, parts)

    def from_statistic(self, statistic: Factors, rank: int) -> Factors:
        """Return B, A and R of LoRA-SB's algorithm 1."""
        return gradient_basis(statistic["G"], rank, self.step, sign=True)

"""LoRA with a frozen B and a metric on A: W = W0 + s B A (I - Vᵀ V); only A is trained, B and V are public.

A record's gradient in A is s Bᵀ G (I - Vᵀ V), with G that of the weight. Where nearly all of its length lies along a
few directions of a layer's inputs that say nothing about the label, the clip spends itself on these, and the noise is
the same for all. V shrinks them: its rows are orthogonal, of length below 1. Training A in these coordinates is a step
of natural gradient in the weights, and clip and noise act in the same coordinates. The map is linear and does not
depend on a record, so that it neither costs privacy nor moves the clip's bound.

With B and V the same everywhere the mean of the products is the product of the mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedveil.common.adapters.base import Traits
from fedveil.common.adapters.mapped import Mapped, outer_sums
from fedveil.common.later import F
from fedveil.common.messages.state import Factors

if TYPE_CHECKING:
    from torch import Tensor

SHRUNK = 64
"""Directions of a layer's inputs that V can shrink, at most; of a narrow layer, a quarter of all."""


@dataclass(frozen=True)
class LoRAMetric(Mapped):
    """Factors ``A`` (rank, in), trained from 0, and ``B`` (out, rank) and ``V`` (shrunk(in), in), frozen."""

    name: ClassVar[str] = "lora-metric"
    trained: ClassVar[tuple[str, ...]] = ("A",)
    frozen: ClassVar[tuple[str, ...]] = ("B", "V")
    traits: ClassVar[Traits] = Traits(
        linear=True,
        noise="s B x_A (I - VᵀV): norm s σC/b ‖B‖ ‖I - VᵀV‖",
        free_scale="has a start that chooses the length itself (start.clip-share)",
    )
    uses_projected: ClassVar[bool] = False
    directions: ClassVar[tuple[str, ...]] = ("B", "V")

    def shapes(self, out: int, into: int) -> dict[str, tuple[int, ...]]:
        """Return those of A, (rank, into), B, (out, rank), and V, (shrunk(into), into)."""
        return {"A": (self.rank, into), "B": (out, self.rank), "V": (shrunk(into), into)}

    def begin(self, given: Factors, factors: Factors) -> Factors:
        """Return B and V; without a V nothing is shrunk."""
        del factors
        return {factor: given[factor] for factor in ("B", "V") if factor in given}

    def change(
        self, factors: Mapping[str, Tensor], inputs: Tensor, projected: Tensor, base_weight: Tensor, scale: float
    ) -> Tensor:
        """Return s B A (I - Vᵀ V) x."""
        del projected, base_weight
        A = in_weights(factors)
        return F.linear(F.linear(inputs.to(A.dtype), A), factors["B"]) * scale

    def gradients(
        self,
        factors: Mapping[str, Tensor],
        inputs: Tensor,
        projected: Tensor,
        upstream: Tensor,
        base_weight: Tensor,
        scale: float,
    ) -> dict[str, Tensor]:
        """Return s Σ Bᵀ g xᵀ (I - Vᵀ V), g being the upstream gradient at a position."""
        del projected, base_weight
        gradient, V = outer_sums(upstream @ factors["B"] * scale, inputs), factors["V"]
        return {"A": gradient - (gradient @ V.T) @ V}

    def exported(self, factors: Mapping[str, Tensor], base_weight: Tensor) -> dict[str, Tensor]:
        """Return a plain LoRA pair."""
        del base_weight
        return {"lora_A.weight": in_weights(factors), "lora_B.weight": factors["B"]}


def shrunk(into: int) -> int:
    """Return how many of a layer's ``into`` input directions V shrinks.

    >>> shrunk(384), shrunk(32), shrunk(2)
    (64, 8, 1)
    """
    return max(1, min(SHRUNK, into // 4))


def in_weights(factors: Mapping[str, Tensor]) -> Tensor:
    """Return A (I - Vᵀ V), shape (rank, in): the A of a plain LoRA pair."""
    A, V = factors["A"], factors["V"]
    return A - (A @ V.T) @ V

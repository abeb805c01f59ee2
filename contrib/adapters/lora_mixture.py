"""A mixture of frozen adapters on one basis: W = W0 + s Σ_j w_j B_j A, of which M numbers w a layer are trained.

The B_j are a library's (``contrib.library``), over the A of the seed. The weights of the model are linear in w, so that
averages are exact, and noise falls on M numbers a layer. LoraHub looks for such weights, one for a whole adapter,
without gradients; here they have per-example gradients, a clip and a price. With w = e_j the model is that of adapter
j. Exported as one plain pair of the same rank, Σ_j w_j B_j and A.

A router that chooses by token (LoRAMoE, X-LoRA) has width × M numbers and a softmax: averages are inexact there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fedveil.common.adapters.base import Traits
from fedveil.common.adapters.mapped import Mapped, outer_sums
from fedveil.common.messages.state import Factors


@dataclass(frozen=True)
class LoRAMixture(Mapped):
    """Factors ``A`` (rank, in) and ``stack`` (adapters, out, rank), frozen, and ``w`` (adapters,), trained."""

    name: ClassVar[str] = "lora-mixture"
    trained: ClassVar[tuple[str, ...]] = ("w",)
    frozen: ClassVar[tuple[str, ...]] = ("A", "stack")
    traits: ClassVar[Traits] = Traits(
        linear=True,
        noise="s Σ_j x_j B_j A: norm s σC/b (Σ_j ‖B_j A‖²)^½, whatever the layer's size",
        free_scale="has frozen adapters of a length of their own",
    )
    uses_projected: ClassVar[bool] = False
    directions: ClassVar[tuple[str, ...]] = ("A", "stack")

    def shapes(self, out: int, into: int) -> dict[str, tuple[int, ...]]:
        """Return those of A, (rank, into), stack, (adapters, out, rank), and w, (adapters,)."""
        members = int(getattr(self.origin, "members", 2))
        return {"A": (self.rank, into), "stack": (members, out, self.rank), "w": (members,)}

    def begin(self, given: Factors, factors: Factors) -> Factors:
        """Return A, and the adapters and their weights once they are there."""
        del factors
        return {factor: given[factor] for factor in ("A", "stack", "w") if factor in given}

    def change(
        self, factors: Mapping[str, Tensor], inputs: Tensor, projected: Tensor, base_weight: Tensor, scale: float
    ) -> Tensor:
        """Return s Σ_j w_j B_j A x."""
        del projected, base_weight
        A = factors["A"]
        return F.linear(F.linear(inputs.to(A.dtype), A), mixed(factors)) * scale

    def gradients(
        self,
        factors: Mapping[str, Tensor],
        inputs: Tensor,
        projected: Tensor,
        upstream: Tensor,
        base_weight: Tensor,
        scale: float,
    ) -> dict[str, Tensor]:
        """Return s ⟨Σ g (A x)ᵀ, B_j⟩ for each j, g being the upstream gradient at a position."""
        del projected, base_weight
        of_B = outer_sums(upstream * scale, F.linear(inputs, factors["A"]))
        adapters = factors["stack"].flatten(1).expand(len(of_B), -1, -1)
        # A product for each record: in one for all, a record's bits would follow from its row.
        return {"w": torch.bmm(adapters, of_B.flatten(1)[..., None])[..., 0]}

    def exported(self, factors: Mapping[str, Tensor], base_weight: Tensor) -> dict[str, Tensor]:
        """Return a plain LoRA pair of the same rank."""
        del base_weight
        return {"lora_A.weight": factors["A"], "lora_B.weight": mixed(factors)}


def mixed(factors: Mapping[str, Tensor]) -> Tensor:
    """Return Σ_j w_j B_j, shape (out, rank)."""
    return torch.einsum("j,jor->or", factors["w"], factors["stack"])

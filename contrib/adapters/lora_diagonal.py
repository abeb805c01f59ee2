"""LoRA with a diagonal alone trained: W = W0 + s B diag(z) A, with A and B frozen at a shared start.

Several systems of the field are this adapter in a start of their own:

* LoLDU (arXiv 2410.13618) in ``lu-of-weights``, which says what differs from the paper.
* The part of SALT that scales singular values, and the control arm of LoLDU, in ``svd-of-weights``.
* S2-LoRA in ``shared``: one pair of factors for all layers of one shape, its form W = W0 + Q diag(λ) P. The pair is
  random here and stays frozen. The paper most likely trains it: of Whisper-small the share of numbers that summaries
  give is that of a trained pair. What makes λ sparse is ``server.rule = "soft-threshold"``, as its row has it.

z begins at 0, so the base is never rewritten: training it is training the entries of a diagonal that begins elsewhere
over a residual base, W0 - s B diag(z₀) A. The weights are linear in z, so averages are exact. With rows of A and
columns of B of length 1 the noise has the norm s σC/b √r, whatever the layer's size, and r numbers travel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedveil.common.adapters.base import FreeScale, Traits
from fedveil.common.adapters.layers import ADAPTER_NAME, layers_of
from fedveil.common.adapters.low_rank import LowRank, lora_modules
from fedveil.common.messages.state import Factors
from fedveil.common.own_gradients import OwnGradients

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer


class Diagonal(OwnGradients):
    """z ↦ z * h, elementwise over the last dimension."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__()
        weight = like.weight
        self.weight = nn.Parameter(torch.zeros(like.in_features, device=weight.device, dtype=weight.dtype))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return ``hidden``, shape (records, ..., rank), times z."""
        return hidden * self.weight

    def gradients(self, activations: Sequence[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
        """Return the gradient of z of each record, shape (records, rank): Σ over positions of g * h, in z's dtype."""
        product = activations[0].to(self.weight.dtype) * backprops.to(self.weight.dtype)
        return {self.weight: product.flatten(1, -2).sum(1) if product.ndim > 2 else product}


class _DiagonalThenB(nn.Sequential):
    """z, then B; outside training their product at once, as the exported adapter has it."""

    def forward(self, hidden: Tensor) -> Tensor:  # shape (..., rank) to (..., out)
        if self.training:
            return cast(Tensor, super().forward(hidden))
        z, B = (cast(Tensor, module.weight) for module in self)
        with torch.autocast(hidden.device.type, enabled=False):
            folded = B * z
        return F.linear(hidden, folded)


def _gradients_at_0(factors: Factors, G: Tensor) -> Factors:
    """Return the diagonal of Bᵀ G Aᵀ, shape (rank,)."""
    return {"z": ((factors["B"].T @ G) * factors["A"]).sum(1)}


@dataclass(frozen=True)
class LoRADiagonal(LowRank):
    """Factors ``A`` (rank, in) and ``B`` (out, rank), frozen, and the vector ``z`` (rank,), trained from 0."""

    name: ClassVar[str] = "lora-diagonal"
    trained: ClassVar[tuple[str, ...]] = ("z",)
    frozen: ClassVar[tuple[str, ...]] = ("A", "B")
    traits: ClassVar[Traits] = Traits(
        linear=True,
        noise="s B diag(x_z) A: norm s σC/b √r for unit columns of B and rows of A",
        free_scale=FreeScale(("A",), _gradients_at_0, lambda rank, out, into: rank / (out * into)),
    )
    directions: ClassVar[tuple[str, ...]] = ("A", "B")

    def shapes(self, out: int, into: int) -> dict[str, tuple[int, ...]]:
        """Return those of A, (rank, into), B, (out, rank), and z, (rank,)."""
        return {"A": (self.rank, into), "B": (out, self.rank), "z": (self.rank,)}

    def prepare(self, model: PeftModel) -> None:
        """Put z between PEFT's A and B."""
        for layer in layers_of(model).values():
            B = cast(nn.Linear, lora_modules(layer)["B"])
            layer.lora_B[ADAPTER_NAME] = _DiagonalThenB(Diagonal(B), B)

    def factor_modules(self, layer: LoraLayer) -> dict[str, nn.Module]:
        """Return PEFT's A, and the z and B that ``prepare`` put in a row."""
        z, B = cast(nn.Sequential, layer.lora_B[ADAPTER_NAME])
        return {"A": layer.lora_A[ADAPTER_NAME], "z": z, "B": B}

    def begin(self, given: Factors, factors: Factors) -> Factors:
        """Return A and B; of a start that moves the weights by B R A, what a diagonal holds of it: R's."""
        del factors
        moved = {"z": given["R"].diagonal() / self.scaling} if "R" in given else {}
        return {"A": given["A"], "B": given["B"], **moved}

    def delta(self, factors: Mapping[str, Tensor], base_weight: Tensor | None = None) -> Tensor:
        """Return s B diag(z) A."""
        del base_weight
        return self.scaling * (factors["B"] * factors["z"]) @ factors["A"]

    def as_lora(self, factors: Mapping[str, Tensor]) -> Factors:
        """Return A, and z folded into B."""
        return {"A": factors["A"], "B": factors["B"] * factors["z"]}

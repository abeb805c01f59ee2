"""LoRA with a frozen A and a gate of each layer: W = W0 + s g B A, with B and the number g trained.

The layer of DiffoRA's relaxed choice (``contrib.strategies.diffora_gates``). g begins at a half. The weights are linear
in B and in g, each for itself. Exported with g folded into B.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import Tensor, nn

from fedveil.common.adapters.base import Place, Traits
from fedveil.common.adapters.layers import ADAPTER_NAME, layers_of
from fedveil.common.adapters.low_rank import LowRank, lora_modules
from fedveil.common.messages.state import Factors
from fedveil.common.own_gradients import OwnGradients

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

HALF = 0.5
"""Where a gate begins."""


class Gate(OwnGradients):
    """h ↦ g h with one number g."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), HALF, device=like.weight.device, dtype=like.weight.dtype))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return ``hidden``, shape (records, ..., out), times g."""
        return hidden * self.weight

    def gradients(self, activations: Sequence[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
        """Return the gradient of g of each record, shape (records, 1): the sum of upstream times hidden."""
        product = activations[0].to(self.weight.dtype) * backprops.to(self.weight.dtype)
        return {self.weight: product.flatten(1).sum(1, keepdim=True)}


@dataclass(frozen=True)
class LoRAGated(LowRank):
    """Factors ``A`` (rank, in), frozen, ``B`` (out, rank), trained from 0, and ``g`` (1,), trained from a half."""

    name: ClassVar[str] = "lora-gated"
    trained: ClassVar[tuple[str, ...]] = ("B", "g")
    frozen: ClassVar[tuple[str, ...]] = ("A",)
    traits: ClassVar[Traits] = Traits(
        linear=False,
        noise="in turns s g x_B A: norm s g σC/b √m ‖A‖, and s x_g B A: norm s σC/b ‖B A‖",
        free_scale="has a gate in front of B A, which is trained",
    )

    def shapes(self, out: int, into: int) -> dict[str, tuple[int, ...]]:
        """Return those of A, (rank, into), B, (out, rank), and g, (1,)."""
        return {"A": (self.rank, into), "B": (out, self.rank), "g": (1,)}

    def prepare(self, model: PeftModel) -> None:
        """Put g behind PEFT's B."""
        for layer in layers_of(model).values():
            B = cast(nn.Linear, lora_modules(layer)["B"])
            layer.lora_B[ADAPTER_NAME] = nn.Sequential(B, Gate(B))

    def factor_modules(self, layer: LoraLayer) -> dict[str, nn.Module]:
        """Return PEFT's A, and the B and g that ``prepare`` put in a row."""
        B, g = cast(nn.Sequential, layer.lora_B[ADAPTER_NAME])
        return {"A": layer.lora_A[ADAPTER_NAME], "B": B, "g": g}

    def constants(self, place: Place) -> Factors:
        """Return g at a half."""
        del place
        return {"g": torch.full((1,), HALF)}

    def begin(self, given: Factors, factors: Factors) -> Factors:
        """Return A; and B with s g B A = B R A of a start that moves the weights."""
        moved = {"B": given["B"] @ given["R"] / (self.scaling * float(factors["g"]))} if "R" in given else {}
        return {"A": given["A"], **moved}

    def delta(self, factors: Mapping[str, Tensor], base_weight: Tensor | None = None) -> Tensor:
        """Return s g B A."""
        del base_weight
        return self.scaling * factors["g"] * (factors["B"] @ factors["A"])

    def as_lora(self, factors: Mapping[str, Tensor]) -> Factors:
        """Return A, and g folded into B."""
        return {"A": factors["A"], "B": factors["B"] * factors["g"]}

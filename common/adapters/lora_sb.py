"""LoRA-SB, the parameterisation of Fed-SB: W = W0 + B R A, only the small square R is trained.

Singhal, Ponkshe et al.: Initialization using Update Approximation is a Silver Bullet (LoRA-SB) and
Fed-SB. B (out, rank) has orthonormal columns, A (rank, in) orthonormal rows, both frozen; R is
(rank, rank). The scale s is 1 whatever ``adapter.alpha`` says: with orthonormal factors the
gradient of R is then the projected gradient of the full weight, which is the point of the method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, cast

from fedveil.common.adapters.base import Traits
from fedveil.common.adapters.layers import ADAPTER_NAME, layers_of
from fedveil.common.adapters.low_rank import LowRank, lora_modules
from fedveil.common.later import nn
from fedveil.common.messages.state import Factors

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from torch import Tensor


@dataclass(frozen=True)
class LoRASB(LowRank):
    """Factors ``B`` (out, rank) and ``A`` (rank, in), frozen, and ``R`` (rank, rank), trained."""

    name: ClassVar[str] = "lora-sb"
    trained: ClassVar[tuple[str, ...]] = ("R",)
    frozen: ClassVar[tuple[str, ...]] = ("A", "B")
    traits: ClassVar[Traits] = Traits(
        linear=True,
        noise="B x_R A: norm σC/b r, whatever m and n",
        scales=("rank",),
        free_scale="has orthonormal factors, so that R's gradient is the weight's own as far as they reach",
    )
    directions: ClassVar[tuple[str, ...]] = ("A", "B")

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", float(self.rank))

    def shapes(self, out: int, into: int) -> dict[str, tuple[int, ...]]:
        """Return those of A, (rank, into), B, (out, rank), and R, (rank, rank)."""
        return {"A": (self.rank, into), "B": (out, self.rank), "R": (self.rank, self.rank)}

    def prepare(self, model: PeftModel) -> None:
        """Put R between PEFT's A and B."""
        from fedveil.common.adapters.folded import RThenB

        for layer in layers_of(model).values():
            B = cast(nn.Linear, lora_modules(layer)["B"])
            R = nn.Linear(self.rank, self.rank, bias=False, device=B.weight.device, dtype=B.weight.dtype)
            layer.lora_B[ADAPTER_NAME] = RThenB(R, B)

    def factor_modules(self, layer: LoraLayer) -> dict[str, nn.Module]:
        """Return PEFT's A, and the R and B that ``prepare`` put in a row."""
        R, B = cast(nn.Sequential, layer.lora_B[ADAPTER_NAME])
        return {"A": layer.lora_A[ADAPTER_NAME], "R": R, "B": B}

    def begin(self, given: Factors, factors: Factors) -> Factors:
        """Return A and B, and R of a start that moves the weights."""
        del factors
        return {factor: given[factor] for factor in ("A", "B", "R") if factor in given}

    def delta(self, factors: Mapping[str, Tensor], base_weight: Tensor | None = None) -> Tensor:
        """Return B R A."""
        del base_weight
        return factors["B"] @ factors["R"] @ factors["A"]

    def as_lora(self, factors: Mapping[str, Tensor]) -> Factors:
        """Return A, and R folded into B; exported with alpha = rank, so that the scale is 1."""
        return {"A": factors["A"], "B": factors["B"] @ factors["R"]}

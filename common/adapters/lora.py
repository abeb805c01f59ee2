"""LoRA: W = W0 + s B A, both factors trained (Hu et al. 2022, arXiv 2106.09685)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedveil.common.adapters.base import Traits
from fedveil.common.adapters.low_rank import LowRank, lora_modules
from fedveil.common.later import nn
from fedveil.common.messages.state import Factors

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer
    from torch import Tensor


@dataclass(frozen=True)
class LoRA(LowRank):
    """Factors ``A`` (rank, in) and ``B`` (out, rank), both trained."""

    name: ClassVar[str] = "lora"
    trained: ClassVar[tuple[str, ...]] = ("A", "B")
    frozen: ClassVar[tuple[str, ...]] = ()
    traits: ClassVar[Traits] = Traits(
        linear=False,
        noise="s (B x_A + x_B A + x_B x_A): quadratic",
        free_scale="trains A, so that a length given to it does not last",
    )

    def shapes(self, out: int, into: int) -> dict[str, tuple[int, ...]]:
        """Return those of A, (rank, into), and B, (out, rank)."""
        return {"A": (self.rank, into), "B": (out, self.rank)}

    def factor_modules(self, layer: LoraLayer) -> dict[str, nn.Module]:
        """Return PEFT's A and B."""
        return lora_modules(layer)

    def begin(self, given: Factors, factors: Factors) -> Factors:
        """Return A; and B with s B A = B R A of a start that moves the weights."""
        del factors
        moved = {"B": given["B"] @ given["R"] / self.scaling} if "R" in given else {}
        return {"A": given["A"], **moved}

    def delta(self, factors: Mapping[str, Tensor], base_weight: Tensor | None = None) -> Tensor:
        """Return s B A."""
        del base_weight
        return self.scaling * (factors["B"] @ factors["A"])

    def as_lora(self, factors: Mapping[str, Tensor]) -> Factors:
        """Return the factors themselves."""
        return {"A": factors["A"], "B": factors["B"]}

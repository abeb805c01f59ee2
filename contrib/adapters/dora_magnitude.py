"""DoRA's magnitudes alone: W = diag(mu / c) W0 with c the norms of W0's rows (Liu et al. 2024, arXiv 2402.09353).

The directions stay those of the base, so c does not move, and the weights are linear in mu: averages are exact. The
authors' code trains mu alone in the layers that are named (``Wdecompose_target_modules``). It holds of a gradient
what any subspace of m directions holds, and a layer sends m numbers.

Stock PEFT loads it as a DoRA of rank 1 whose factors are 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from fedveil.common.adapters.base import Place, Traits, lora_config
from fedveil.common.adapters.mapped import Mapped, position_sums
from fedveil.common.messages.state import Factors
from fedveil.contrib.adapters.dora import lengths_of_rows

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(frozen=True)
class DoRAMagnitude(Mapped):
    """The magnitudes ``mu`` (out,), trained, and the base's ``c`` (out,), frozen; rank and alpha change nothing."""

    name: ClassVar[str] = "dora-magnitude"
    trained: ClassVar[tuple[str, ...]] = ("mu",)
    frozen: ClassVar[tuple[str, ...]] = ("c",)
    traits: ClassVar[Traits] = Traits(
        linear=True,
        noise="diag(x_mu / c) W0: norm σC/b √m",
        scales=("rank",),
        free_scale="trains magnitudes alone, which have no scale",
        ones=("c",),
    )
    divisors: ClassVar[tuple[str, ...]] = ("c",)
    directions: ClassVar[tuple[str, ...]] = ()

    def shapes(self, out: int, into: int) -> dict[str, tuple[int, ...]]:
        """Return those of mu and c, (out,)."""
        del into
        return {"mu": (out,), "c": (out,)}

    def begin(self, given: Factors, factors: Factors) -> Factors:
        """Return nothing: mu begins at c, which follows from the base weight."""
        del given, factors
        return {}

    def constants(self, place: Place) -> Factors:
        """Return the norms of W0's rows for mu and c; ModelError if a row is zero, for it has no direction."""
        lengths = lengths_of_rows(place)
        return {"mu": lengths, "c": lengths.clone()}

    def change(
        self, factors: Mapping[str, Tensor], inputs: Tensor, projected: Tensor, base_weight: Tensor, scale: float
    ) -> Tensor:
        """Return (mu/c - 1) W0 x."""
        del inputs, base_weight, scale
        return (factors["mu"] / factors["c"] - 1) * projected

    def gradients(
        self,
        factors: Mapping[str, Tensor],
        inputs: Tensor,
        projected: Tensor,
        upstream: Tensor,
        base_weight: Tensor,
        scale: float,
    ) -> dict[str, Tensor]:
        """Return Σ g * W0 x / c, g being the upstream gradient at a position."""
        del inputs, base_weight, scale
        return {"mu": position_sums(upstream * projected) / factors["c"]}

    def exported(self, factors: Mapping[str, Tensor], base_weight: Tensor) -> dict[str, Tensor]:
        """Return PEFT's DoRA without a change of direction."""
        out, into = base_weight.shape
        return {
            "lora_A.weight": torch.zeros(1, into),
            "lora_B.weight": torch.zeros(out, 1),
            "lora_magnitude_vector": factors["mu"] / factors["c"] * base_weight.norm(dim=1),
        }

    def peft_config(self, *, fan_in_fan_out: bool = False) -> PeftConfig:
        """Return LoRA's of rank 1 with ``use_dora``."""
        return lora_config(self, fan_in_fan_out=fan_in_fan_out, use_dora=True, r=1)

"""LoRA with both factors trained from where a start puts them, over the base as it is: PiSSA, LoRA-GA.

PiSSA (Meng, Wang, Zhang 2024, arXiv 2404.02948, eq. 2 to 4) begins with the principal part of W0 in A and B and
freezes the residual W0 - s B A. Here W0 stays, the start stays in frozen halves, and what is trained is how far the
factors have moved: W = W0 + s ((B + dB) (A + dA) - B A). Gradients, clip and noise of a step are those of training the
factors themselves; only weight decay is another, as it draws towards the start. At the start nothing is added, to the
last bit, also where a residual base in half precision would be another model.

PiSSA is this adapter in the start ``svd-of-weights`` with ``start.singular-values``; LoRA-GA (Wang, Yu, Li 2024) in
``lora-ga``, without the factor m^(1/4) / √γ of its ``stable`` scale. The scale s is 1 whatever number
``adapter.alpha`` is, as in PiSSA's experiments: B A is what the start gives. With ``adapter.alpha = 0`` it is measured
(``common.starts.calibration``), and the start gives A and B as before. It is a frozen factor, the same in every layer,
because it is known after the sites have built their model.

Averages are off by Σ p_k s (dB_k - mean) (dA_k - mean); the start drops out of it. Stock PEFT loads a pair of rank 2 r,
[A + dA; dA] and s [dB, B]: without the frozen halves, on the stock base, it would count the principal part twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedveil.common.adapters.base import FreeScale, Traits, lora_config
from fedveil.common.adapters.layers import ADAPTER_NAME, layer_shape, layers_of
from fedveil.common.adapters.low_rank import LowRank, lora_modules
from fedveil.common.messages.state import Factors

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from peft.tuners.lora import LoraLayer


class _Into(nn.Module):
    """x ↦ (A x + dA x, dA x); outside training the product with both halves at once, as the exported adapter has it."""

    def __init__(self, frozen: nn.Linear, moved: nn.Linear) -> None:
        super().__init__()
        self.frozen, self.moved = frozen, moved

    @property
    def weight(self) -> Tensor:
        """The trained half; PEFT's layer asks for its dtype."""
        return self.moved.weight

    def forward(self, inputs: Tensor) -> Tensor:  # shape (..., in) to (..., 2 rank)
        if self.training:
            moved = self.moved(inputs)
            return torch.cat([self.frozen(inputs) + moved, moved], -1)
        with torch.autocast(inputs.device.type, enabled=False):
            folded = torch.cat([self.frozen.weight + self.moved.weight, self.moved.weight])
        return F.linear(inputs, folded)


class _Scale(nn.Module):
    """h ↦ s h, in the dtype of h."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, device=like.device, dtype=like.dtype), requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return (self.weight * hidden).to(hidden.dtype)


class _OutOf(nn.Module):
    """(h, g) ↦ s (dB h + B g); outside training one product, with s in it."""

    def __init__(self, frozen: nn.Linear, moved: nn.Linear) -> None:
        super().__init__()
        self.frozen, self.moved, self.scale = frozen, moved, _Scale(moved.weight)

    def forward(self, hidden: Tensor) -> Tensor:  # shape (..., 2 rank) to (..., out)
        if self.training:
            # Before the product: there it is 2 r numbers at a position, and both trained maps see it.
            turned, moved = self.scale(hidden).chunk(2, -1)
            return cast(Tensor, self.moved(turned) + self.frozen(moved))
        return F.linear(hidden, self.scale(torch.cat([self.moved.weight, self.frozen.weight], 1)))


def _gradients_at_0(factors: Factors, G: Tensor) -> Factors:
    """Return s Bᵀ G, shape (rank, in), and s G Aᵀ, shape (out, rank)."""
    s = factors["s"]
    return {"dA": s * (factors["B"].T @ G), "dB": s * (G @ factors["A"].T)}


@dataclass(frozen=True)
class LoRAIncrements(LowRank):
    """Factors ``A`` (rank, in), ``B`` (out, rank) and ``s`` (1,), frozen; ``dA`` and ``dB``, as A and B, from 0."""

    name: ClassVar[str] = "lora-increments"
    trained: ClassVar[tuple[str, ...]] = ("dA", "dB")
    frozen: ClassVar[tuple[str, ...]] = ("A", "B", "s")
    traits: ClassVar[Traits] = Traits(
        linear=False,
        noise="s (B x_A + x_B A + x_B x_A), also at the start: quadratic",
        scales=("rank",),
        free_scale=FreeScale(("s",), _gradients_at_0, lambda rank, out, into: rank / out + rank / into),
        ones=("s",),
    )
    directions: ClassVar[tuple[str, ...]] = ("A", "B")

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", float(self.rank))

    def shapes(self, out: int, into: int) -> dict[str, tuple[int, ...]]:
        """Return those of A and dA, (rank, into), of B and dB, (out, rank), and of s, (1,)."""
        A, B = (self.rank, into), (out, self.rank)
        return {"A": A, "B": B, "s": (1,), "dA": A, "dB": B}

    def prepare(self, model: PeftModel) -> None:
        """Put two maps side by side in the place of each of PEFT's."""
        for layer in layers_of(model).values():
            out, into = layer_shape(layer)
            like = cast(nn.Linear, lora_modules(layer)["A"]).weight
            linear = partial(nn.Linear, bias=False, device=like.device, dtype=like.dtype)
            layer.lora_A[ADAPTER_NAME] = _Into(linear(into, self.rank), linear(into, self.rank))
            layer.lora_B[ADAPTER_NAME] = _OutOf(linear(self.rank, out), linear(self.rank, out))

    def factor_modules(self, layer: LoraLayer) -> dict[str, nn.Module]:
        """Return the four linear maps, and the scale."""
        first, last = cast(_Into, layer.lora_A[ADAPTER_NAME]), cast(_OutOf, layer.lora_B[ADAPTER_NAME])
        return {"A": first.frozen, "dA": first.moved, "B": last.frozen, "dB": last.moved, "s": last.scale}

    def begin(self, given: Factors, factors: Factors) -> Factors:
        """Return A and B, and 1 for s; and dB with dB A = B R A of a start that moves the weights."""
        del factors
        moved = {"dB": given["B"] @ given["R"]} if "R" in given else {}
        return {"A": given["A"], "B": given["B"], "s": torch.ones(1), **moved}

    def delta(self, factors: Mapping[str, Tensor], base_weight: Tensor | None = None) -> Tensor:
        """Return s (dB (A + dA) + B dA)."""
        del base_weight
        moved = factors["dB"] @ (factors["A"] + factors["dA"]) + factors["B"] @ factors["dA"]
        return factors["s"] * moved

    def as_lora(self, factors: Mapping[str, Tensor]) -> Factors:
        """Return the halves beside each other, s in the second factor: a pair of twice the rank, of scale 1."""
        return {
            "A": torch.cat([factors["A"] + factors["dA"], factors["dA"]]),
            "B": factors["s"] * torch.cat([factors["dB"], factors["B"]], 1),
        }

    def peft_config(self, *, fan_in_fan_out: bool = False) -> PeftConfig:
        """Return LoRA's at twice the rank, of scale 1."""
        return lora_config(self, fan_in_fan_out=fan_in_fan_out, r=2 * self.rank, lora_alpha=2 * self.rank)

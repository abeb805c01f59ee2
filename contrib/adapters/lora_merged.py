"""LoRA beside what a server has merged: W = W0 + s (D + B A), A and B trained, D frozen and as large as the weight.

The base model stays what it is, to the last bit, so that its fingerprint does. What FedEx-LoRA and FLoRA write into
the base weights is in D, which begins at 0. For a site D is one constant, so that the gradients of A and B are
those of LoRA on a base with D in it. D travels in every round, because a site may have missed any: m n numbers.

Stock PEFT gets one LoRA pair a layer for D and B A together, of the rank that the largest of them has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fedveil.common.adapters.base import Traits
from fedveil.common.adapters.layers import layers_of
from fedveil.common.adapters.lora import LoRA
from fedveil.common.adapters.mapped import Mapped, outer_sums
from fedveil.common.messages.state import AdapterState, Factors

if TYPE_CHECKING:
    from peft import PeftModel

NEGLIGIBLE = 1e-7
"""Singular values below this share of the largest are float32's rounding."""


@dataclass(frozen=True)
class LoRAMerged(Mapped):
    """Factors ``A`` (rank, in) and ``B`` (out, rank), trained, and ``D`` (out, in), frozen, from 0."""

    name: ClassVar[str] = "lora-merged"
    trained: ClassVar[tuple[str, ...]] = ("A", "B")
    frozen: ClassVar[tuple[str, ...]] = ("D",)
    traits: ClassVar[Traits] = Traits(
        linear=False,
        noise="s (B x_A + x_B A + x_B x_A): quadratic",
        free_scale="trains A, so that a length given to it does not last",
    )
    uses_projected: ClassVar[bool] = False

    def shapes(self, out: int, into: int) -> dict[str, tuple[int, ...]]:
        """Return those of A, (rank, into), B, (out, rank), and D, (out, into)."""
        return {"A": (self.rank, into), "B": (out, self.rank), "D": (out, into)}

    def begin(self, given: Factors, factors: Factors) -> Factors:
        """Return A; and B with s B A = B R A of a start that moves the weights."""
        del factors
        moved = {"B": given["B"] @ given["R"] / self.scaling} if "R" in given else {}
        return {"A": given["A"], **moved}

    def change(
        self, factors: Mapping[str, Tensor], inputs: Tensor, projected: Tensor, base_weight: Tensor, scale: float
    ) -> Tensor:
        """Return s (D x + B A x)."""
        del projected, base_weight
        A, x = factors["A"], inputs.to(factors["A"].dtype)
        return (F.linear(x, factors["D"]) + F.linear(F.linear(x, A), factors["B"])) * scale

    def gradients(
        self,
        factors: Mapping[str, Tensor],
        inputs: Tensor,
        projected: Tensor,
        upstream: Tensor,
        base_weight: Tensor,
        scale: float,
    ) -> dict[str, Tensor]:
        """Return those of LoRA, s Σ Bᵀ g xᵀ and s Σ g (A x)ᵀ, g being the upstream gradient at a position."""
        del projected, base_weight
        return {
            "A": outer_sums(upstream @ factors["B"] * scale, inputs),
            "B": outer_sums(upstream, inputs @ factors["A"].T * scale),
        }

    def delta(self, factors: Mapping[str, Tensor], base_weight: Tensor | None = None) -> Tensor:
        """Return s (D + B A)."""
        del base_weight
        return self.scaling * (factors["D"] + factors["B"] @ factors["A"])

    def exported(self, factors: Mapping[str, Tensor], base_weight: Tensor) -> dict[str, Tensor]:
        """Return a pair whose product, at scale 1, is the whole change."""
        del base_weight
        pair = pair_of(self.delta(factors))
        return {"lora_A.weight": pair["A"], "lora_B.weight": pair["B"]}

    def export(self, model: PeftModel, state: AdapterState, folder: Path, base_name: str) -> None:
        """Write the whole change as a stock LoRA adapter of scale 1, padded with zeros to the largest layer's rank."""
        pairs = {layer: pair_of(self.delta(state[layer])) for layer in layers_of(model)}
        rank = max(len(pair["A"]) for pair in pairs.values())
        padded = {
            layer: {
                "A": F.pad(pair["A"], (0, 0, 0, rank - len(pair["A"]))),
                "B": F.pad(pair["B"], (0, rank - len(pair["A"]))),
            }
            for layer, pair in pairs.items()
        }
        LoRA(rank, float(rank), self.target_modules).export(model, padded, folder, base_name)


def pair_of(delta: Tensor) -> Factors:
    """Return ``A`` (q, in) and ``B`` (out, q) with ``B A = delta``, q its rank and at least 1; in delta's dtype."""
    left, values, right = torch.linalg.svd(delta.double(), full_matrices=False)
    rank = max(1, int((values > NEGLIGIBLE * values[0]).sum()))
    root = values[:rank].sqrt()
    pair = {"A": root[:, None] * right[:rank], "B": left[:, :rank] * root}
    return {name: factor.to(delta.dtype).contiguous() for name, factor in pair.items()}

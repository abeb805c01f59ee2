"""RandLoRA: a change of full rank over random frozen bases (Albert et al., ICLR 2025, arXiv 2502.00987).

W = W0 + s Σ_b B_b Λ_b A Γ_b, with N = ⌈min(m, n) / r⌉ bases B_b (max(m, n), r), one A (r, min(m, n)), and diagonals
Λ_b (r) and Γ_b (min(m, n)); transposed where m < n. The paper trains both diagonals, in which the weights are
bilinear, so that averages are off by a covariance. Here Λ alone is trained, from 0, and averages are exact. Γ is
frozen at normal numbers: at its constant start the change would have rank r, for it would be (Σ_b B_b Λ_b) A.

What differs from paper and code. Columns of the bases have length 1, so that noise on Λ has the norm s σC/b √P in the
weights, P = r N, whatever the layer's size. Products are paired as the published code and PEFT pair them, by position
in the two flattened bases, which is the paper's formula with the B_b permuted. Bases come from the run's public seed
in float64, layers share them, and server and sites compare a fingerprint; PEFT draws its own in half precision, which
differs between machines. So they are exported whole, and stock PEFT loads them (``save_projection``).

Frozen factors take as many numbers as W0 in each layer, in memory and in checkpoints, and a pass one more product.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fedveil.common.adapters.base import Place, Traits
from fedveil.common.adapters.export import write_stock
from fedveil.common.adapters.layers import base_weight, layer_shape, layers_of
from fedveil.common.adapters.mapped import Mapped, position_sums
from fedveil.common.messages.state import AdapterState, Factors
from fedveil.privacy.randomness import stream

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


@dataclass(frozen=True)
class RandLoRA(Mapped):
    """``lambda`` (rank, N), trained from 0; ``A`` (rank, min), ``B`` (max, N, rank) and ``gamma`` (N, min), frozen."""

    name: ClassVar[str] = "randlora"
    trained: ClassVar[tuple[str, ...]] = ("lambda",)
    frozen: ClassVar[tuple[str, ...]] = ("A", "B", "gamma")
    traits: ClassVar[Traits] = Traits(
        linear=True,
        noise="s Σ x_q b_q a_qᵀ, unit b_q and a_q: norm s σC/b √P, P = r ⌈min(m, n)/r⌉",
        scales=("rank",),
        free_scale="has random bases of length 1 in every start",
    )
    uses_projected: ClassVar[bool] = False
    directions: ClassVar[tuple[str, ...]] = ()

    def shapes(self, out: int, into: int) -> dict[str, tuple[int, ...]]:
        """Return those of lambda, (rank, N), A, (rank, min), B, (max, N, rank), and gamma, (N, min)."""
        least, most = sorted((out, into))
        bases = math.ceil(least / self.rank)
        return {
            "lambda": (self.rank, bases),
            "A": (self.rank, least),
            "B": (most, bases, self.rank),
            "gamma": (bases, least),
        }

    def begin(self, given: Factors, factors: Factors) -> Factors:
        """Return nothing: bases come from the run's seed, and lambda begins at 0."""
        del given, factors
        return {}

    def constants(self, place: Place) -> Factors:
        """Return bases uniform within ±√3, the same in every layer as far as it reaches, and a gamma of its own."""
        least, most = sorted((place.out, place.into))
        bases = math.ceil(least / self.rank)

        def base(rows: int, *names: str | int) -> Tensor:
            # Row by row, so that a larger layer's base begins with a smaller one's.
            drawn = torch.rand(rows, self.rank, generator=stream(place.seed, "randlora", *names), dtype=torch.float64)
            return ((2 * drawn - 1) * math.sqrt(3)).float()

        own = stream(place.seed, "adapter", place.layer, "gamma")
        return {
            "A": base(least, "A").T.contiguous(),
            "B": torch.stack([base(most, "B", b) for b in range(bases)], 1),
            "gamma": torch.randn(bases, least, generator=own, dtype=torch.float64).float(),
        }

    def change(
        self, factors: Mapping[str, Tensor], inputs: Tensor, projected: Tensor, base_weight: Tensor, scale: float
    ) -> Tensor:
        """Return s b Λ a x for unit columns b and unit rows a; s aᵀ Λ bᵀ x where the layer has more inputs."""
        del projected
        first, last = _maps(factors, base_weight)
        return F.linear(F.linear(inputs.to(first.dtype), first) * factors["lambda"].flatten(), last) * scale

    def gradients(
        self,
        factors: Mapping[str, Tensor],
        inputs: Tensor,
        projected: Tensor,
        upstream: Tensor,
        base_weight: Tensor,
        scale: float,
    ) -> dict[str, Tensor]:
        """Return s Σ bᵀ g * a x, g being the upstream gradient at a position; with a and b the other way as above."""
        del projected
        first, last = _maps(factors, base_weight)
        gradient = position_sums(upstream @ last * F.linear(inputs, first)) * scale
        return {"lambda": gradient.view(-1, *factors["lambda"].shape)}

    def exported(self, factors: Mapping[str, Tensor], base_weight: Tensor) -> dict[str, Tensor]:
        """Return PEFT's two diagonals; the lengths of the bases' columns go into the first."""
        del base_weight
        rows, columns = (part.double().norm(dim=1) for part in _flat(factors))
        unit = factors["lambda"].double() / (rows * columns).view_as(factors["lambda"])
        return {"randlora_lambda": unit, "randlora_gamma": factors["gamma"]}

    def bases(self, state: AdapterState, shapes: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        """Return the bases in the size that PEFT wants: that of a layer with the most outputs and the most inputs."""
        sizes = self.shapes(max(out for out, _ in shapes), max(into for _, into in shapes))
        A, B = torch.zeros(sizes["A"]), torch.zeros(sizes["B"])
        for factors in state.values():
            if "lambda" in factors:
                A[:, : factors["A"].shape[1]] = factors["A"]
                B[: factors["B"].shape[0], : factors["B"].shape[1]] = factors["B"]
        return {"randlora_A": A[:, None], "randlora_B": B}

    def export(self, model: PeftModel, state: AdapterState, folder: Path, base_name: str) -> None:
        """Write the diagonals of every layer, and the bases that all of them share."""
        adapted = layers_of(model)
        layers = {name: self.exported(state[name], base_weight(layer).float().cpu()) for name, layer in adapted.items()}
        shared = self.bases(state, [layer_shape(layer) for layer in adapted.values()])
        write_stock(self, model, layers, folder, base_name, shared=shared)

    def peft_config(self, *, fan_in_fan_out: bool = False) -> PeftConfig:
        """Return PEFT's own, whose bases come from the file."""
        from peft import RandLoraConfig

        return RandLoraConfig(
            r=self.rank,
            randlora_alpha=self.alpha,  # type: ignore[arg-type]
            target_modules=list(self.target_modules),
            save_projection=True,
            randlora_dropout=0.0,
            bias="none",
            fan_in_fan_out=fan_in_fan_out,
        )


def _flat(factors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return both bases by position, shapes (P, min) and (P, max), as PEFT flattens them."""
    rows = (factors["A"][:, None] * factors["gamma"]).flatten(0, 1)
    return rows, factors["B"].flatten(1).T


def _maps(factors: Mapping[str, Tensor], base_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the maps before and after the diagonal, shapes (P, in) and (out, P), of vectors of length 1."""
    rows, columns = (F.normalize(part, dim=1) for part in _flat(factors))
    return (rows, columns.T) if _tall(base_weight) else (columns, rows.T)


def _tall(weight: Tensor) -> bool:
    return weight.shape[0] >= weight.shape[1]

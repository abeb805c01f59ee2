"""SALT: the largest singular values of W0 and a low-rank part beside them (code of BioMedIA-MBZUAI/SALT).

W = U diag(Σ) Vᵀ, of which the first r singular values become a σ + b, and the rest takes a product X Y. Here
W = W0 + s (B diag(z) A + (I - B Bᵀ) D C): B and A are the leading singular vectors (the start ``svd-of-weights``; any
other that is orthonormal makes another adapter of this form), z and D are trained from 0, and C has orthonormal rows
that A does not reach.

What differs from the published code: a and b are one degree of freedom, which two noises would move (1 + σ²) times as
far, so one z stands for both. C is frozen: with D and C trained averages would not be exact. The code puts a ReLU on
the whole inner matrix, which loses every negative entry of X Y and which the text does not name; here there is none.
One rank serves both parts, where the paper keeps many singular values and adds a product of few columns.

Noise on z enters the weights with norm s σC/b √r, that on D with s σC/b √((m - r) r). Stock PEFT loads a plain pair of
rank 2 r.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fedveil.common.adapters.base import layer_shape
from fedveil.common.adapters.mapped import Mapped, outer_sums, position_sums
from fedveil.common.errors import ConfigError
from fedveil.common.messages.state import Factors
from fedveil.privacy.randomness import stream

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer


@dataclass(frozen=True)
class SALT(Mapped):
    """``z`` (rank,) and ``D`` (out, rank), trained from 0; ``A`` (rank, in), ``B`` (out, rank), ``C`` (rank, in)."""

    name: ClassVar[str] = "salt"
    trained: ClassVar[tuple[str, ...]] = ("z", "D")
    frozen: ClassVar[tuple[str, ...]] = ("A", "B", "C")
    linear: ClassVar[bool] = True
    uses_projected: ClassVar[bool] = False
    noise: ClassVar[str] = "s (B diag(x_z) A + (I - BBᵀ) x_D C): norm s σC/b √(r + (m - r) r) for unit rows of A and C"
    directions: ClassVar[tuple[str, ...]] = ("A", "B")
    free_scale: ClassVar[tuple[str, ...]] = ("A", "C")

    def shapes(self, out: int, into: int) -> dict[str, tuple[int, ...]]:
        """Return those of z, (rank,), of A and C, (rank, into), and of B and D, (out, rank)."""
        rows, columns = (self.rank, into), (out, self.rank)
        return {"A": rows, "B": columns, "C": rows, "z": (self.rank,), "D": columns}

    def begin(self, given: Factors) -> Factors:
        """Return A and B; D and z begin at 0, also in a start that moves the weights."""
        return {factor: given[factor] for factor in ("A", "B") if factor in given}

    def start(self, layer_name: str, layer: LoraLayer, seed: int) -> Factors:
        """Return A and B by the start, and for C random orthonormal rows that A does not reach.

        Raises:
            ConfigError: a layer has fewer than twice as many inputs as A has rows, so there are no such rows.
        """
        _, into = layer_shape(layer)
        if 2 * self.rank > into:
            raise ConfigError(
                f"adapter.rank is {self.rank}, and the adapter {self.name!r} needs twice as many inputs of a layer, "
                f"but {layer_name} has {into}: choose a rank of at most {into // 2}"
            )
        factors = super().start(layer_name, layer, seed)
        drawn = torch.randn(into, self.rank, generator=stream(seed, "adapter", layer_name, "C"), dtype=torch.float64)
        return self.fitted({**factors, "C": drawn.T})

    def fitted(self, factors: Factors) -> Factors:
        """Return C without what A reaches, its rows orthonormal."""
        reached, rows = torch.linalg.qr(factors["A"].double().T)[0], factors["C"].double().T
        for _ in range(2):  # once leaves what rounding brought in
            rows = rows - reached @ (reached.T @ rows)
        q, r = torch.linalg.qr(rows)
        return {**factors, "C": (q * torch.sign(torch.diagonal(r))).T.contiguous().float()}

    def seen(self, factors: Factors, gradient: Tensor) -> Factors:
        """Return the diagonal of Bᵀ G Aᵀ, shape (rank,), and (I - B Bᵀ) G Cᵀ, shape (out, rank)."""
        return {
            "z": ((factors["B"].T @ gradient) * factors["A"]).sum(1),
            "D": beside(factors["B"], gradient @ factors["C"].T),
        }

    def share_seen(self, out: int, into: int) -> float:
        """Return r (1 + m - r) / (m n)."""
        return self.rank * (1 + out - self.rank) / (out * into)

    def change(
        self, factors: Mapping[str, Tensor], inputs: Tensor, projected: Tensor, base_weight: Tensor, scale: float
    ) -> Tensor:
        """Return s (B (z * A x) + (I - B Bᵀ) D C x)."""
        del projected, base_weight
        x, B = inputs.to(factors["B"].dtype), factors["B"]
        scaled = F.linear(F.linear(x, factors["A"]) * factors["z"], B)
        return (scaled + F.linear(F.linear(x, factors["C"]), beside(B, factors["D"]))) * scale

    def gradients(
        self,
        factors: Mapping[str, Tensor],
        inputs: Tensor,
        projected: Tensor,
        upstream: Tensor,
        base_weight: Tensor,
        scale: float,
    ) -> dict[str, Tensor]:
        """Return s Σ Bᵀ g * A x and s (I - B Bᵀ) Σ g (C x)ᵀ, g being the upstream gradient at a position."""
        del projected, base_weight
        B = factors["B"]
        beyond = outer_sums(upstream, inputs @ factors["C"].T * scale)
        return {
            "z": position_sums(upstream @ B * (inputs @ factors["A"].T)) * scale,
            "D": beside(B, beyond),
        }

    def exported(self, factors: Mapping[str, Tensor], base_weight: Tensor) -> dict[str, Tensor]:
        """Return a plain LoRA pair of twice the rank."""
        del base_weight
        B = factors["B"]
        return {
            "lora_A.weight": torch.cat([factors["A"], factors["C"]]),
            "lora_B.weight": torch.cat([B * factors["z"], beside(B, factors["D"])], 1),
        }

    def peft_config(self, *, fan_in_fan_out: bool = False) -> LoraConfig:
        """Return LoRA's at twice the rank, and alpha so that the scale stays."""
        config = super().peft_config(fan_in_fan_out=fan_in_fan_out)
        config.r = 2 * self.rank
        config.lora_alpha = self.alpha * (math.sqrt(2) if self.scale == "sqrt-rank" else 2)  # type: ignore[assignment]
        return config


def beside(B: Tensor, D: Tensor) -> Tensor:
    """Return (I - B Bᵀ) D, shape (out, rank): what of D the orthonormal columns of B do not reach."""
    return D - B @ (B.T @ D)

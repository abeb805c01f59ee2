"""SALT: the largest singular values of W0 and a low-rank part beside them (code of BioMedIA-MBZUAI/SALT).

W = U diag(Σ) Vᵀ, of which the first r singular values become a σ + b, and the rest takes a product X Y. Here
W = W0 + s (B diag(z) A + (I - B Bᵀ) D C): B and A are the leading singular vectors (the start ``svd-of-weights``; any
other that is orthonormal makes another adapter of this form), z and D are trained from 0, and C has orthonormal rows
that A does not reach.

What differs from the published code: a and b are one degree of freedom, which two noises would move (1 + σ²) times as
far, so one z replaces both. C is frozen: with D and C trained averages would not be exact. The code puts a ReLU on
the whole inner matrix, which loses every negative entry of X Y and which the text does not name; it is left out here.
One rank serves both parts, where the paper keeps many singular values and adds a product of few columns.

Noise on z enters the weights with norm s σC/b √r, that on D with s σC/b √((m - r) r). Stock PEFT loads a plain pair of
rank 2 r.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fedveil.common.adapters.base import FreeScale, Place, Traits, lora_config
from fedveil.common.adapters.export import alpha_at
from fedveil.common.adapters.mapped import Mapped, outer_sums, position_sums
from fedveil.common.errors import ConfigError
from fedveil.common.messages.state import Factors
from fedveil.privacy.randomness import stream

if TYPE_CHECKING:
    from peft import PeftConfig


def _gradients_at_0(factors: Factors, G: Tensor) -> Factors:
    """Return the diagonal of Bᵀ G Aᵀ, shape (rank,), and (I - B Bᵀ) G Cᵀ, shape (out, rank)."""
    B = factors["B"]
    return {"z": ((B.T @ G) * factors["A"]).sum(1), "D": beside(B, G @ factors["C"].T)}


@dataclass(frozen=True)
class SALT(Mapped):
    """``z`` (rank,) and ``D`` (out, rank), trained from 0; ``A`` (rank, in), ``B`` (out, rank), ``C`` (rank, in)."""

    name: ClassVar[str] = "salt"
    trained: ClassVar[tuple[str, ...]] = ("z", "D")
    frozen: ClassVar[tuple[str, ...]] = ("A", "B", "C")
    traits: ClassVar[Traits] = Traits(
        linear=True,
        noise="s (B diag(x_z) A + (I - BBᵀ) x_D C): norm s σC/b √(r + (m - r) r) for unit rows of A and C",
        free_scale=FreeScale(
            ("A", "C"), _gradients_at_0, lambda rank, out, into: rank * (1 + out - rank) / (out * into)
        ),
    )
    uses_projected: ClassVar[bool] = False
    directions: ClassVar[tuple[str, ...]] = ("A", "B")

    def shapes(self, out: int, into: int) -> dict[str, tuple[int, ...]]:
        """Return those of z, (rank,), of A and C, (rank, into), and of B and D, (out, rank)."""
        rows, columns = (self.rank, into), (out, self.rank)
        return {"A": rows, "B": columns, "C": rows, "z": (self.rank,), "D": columns}

    def constants(self, place: Place) -> Factors:
        """Return random rows for C, which ``begin`` makes orthonormal.

        Raises:
            ConfigError: a layer has fewer than twice as many inputs as A has rows, so there are no such rows.
        """
        if 2 * self.rank > place.into:
            raise ConfigError(
                f"adapter.rank is {self.rank}, and the adapter {self.name!r} needs twice as many inputs of a layer, "
                f"but {place.layer} has {place.into}: choose a rank of at most {place.into // 2}"
            )
        own = stream(place.seed, "adapter", place.layer, "C")
        return {"C": torch.randn(place.into, self.rank, generator=own, dtype=torch.float64).T}

    def begin(self, given: Factors, factors: Factors) -> Factors:
        """Return A and B, and C without what A reaches; D and z begin at 0, also in a start that moves the weights."""
        sides: Factors = {factor: given[factor] for factor in ("A", "B") if factor in given}
        return {**sides, "C": orthonormal_beside(sides.get("A", factors["A"]), factors["C"])}

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

    def peft_config(self, *, fan_in_fan_out: bool = False) -> PeftConfig:
        """Return LoRA's at twice the rank, and alpha so that the scale stays."""
        alpha = alpha_at(self, 2 * self.rank)
        return lora_config(self, fan_in_fan_out=fan_in_fan_out, r=2 * self.rank, lora_alpha=alpha)


def orthonormal_beside(A: Tensor, C: Tensor) -> Tensor:
    """Return C without what the rows of A reach, its rows orthonormal, float32."""
    reached, rows = torch.linalg.qr(A.double().T)[0], C.double().T
    for _ in range(2):  # once leaves what rounding brought in
        rows = rows - reached @ (reached.T @ rows)
    q, r = torch.linalg.qr(rows)
    return (q * torch.sign(torch.diagonal(r))).T.contiguous().float()


def beside(B: Tensor, D: Tensor) -> Tensor:
    """Return (I - B Bᵀ) D, shape (out, rank): what of D the orthonormal columns of B do not reach."""
    return D - B @ (B.T @ D)

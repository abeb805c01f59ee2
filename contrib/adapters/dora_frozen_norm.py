"""DoRA with a frozen norm, in coordinates in which averages are exact: W = diag(mu / c) W0 + s B A.

DoRA is W = diag(mu / c) (W0 + s B' A), with c the norms of the sum's rows (Liu et al. 2024, arXiv 2402.09353). With c
frozen where the run begins, at the norms of W0's rows, the weights are linear in B' alone and in mu alone, and the
mean of both is off by Σ p_k diag(mu_k - mū) / c s (B'_k - B̄') A. In B = diag(mu / c) B' there is no product of two
trained factors: the weights that can be reached are the same, and averages are exact. Only the metric of a step
differs: a row of B moves as fast as any other, however long mu has made it. A is frozen.

Noise on mu enters the weights with norm σC/b √m, that on B with s σC/b √(m r) for orthonormal A; DoRA's own loses the
part of the latter along each row, which is small.

Stock PEFT loads the export (``use_dora``): with B' = diag(c / mu) B the magnitudes are mu / c times the norms of the
rows of W0 + s B' A.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch.nn.functional as F
from torch import Tensor

from fedveil.common.adapters.base import Place, Traits, lora_config
from fedveil.common.adapters.mapped import Mapped, outer_sums, position_sums
from fedveil.common.errors import ModelError
from fedveil.common.messages.state import Factors
from fedveil.contrib.adapters.dora import lengths_of_rows, row_norms

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(frozen=True)
class DoRAFrozenNorm(Mapped):
    """Factors ``B`` (out, rank) and ``mu`` (out,), trained, and ``A`` (rank, in) and ``c`` (out,), frozen."""

    name: ClassVar[str] = "dora-frozen-norm"
    trained: ClassVar[tuple[str, ...]] = ("B", "mu")
    frozen: ClassVar[tuple[str, ...]] = ("A", "c")
    traits: ClassVar[Traits] = Traits(
        linear=True,
        noise="diag(x_mu / c) W0 + s x_B A: norm σC/b √(m + s² m ‖A‖²)",
        free_scale="trains magnitudes beside B, whose gradients no scale changes",
        ones=("c",),
    )
    divisors: ClassVar[tuple[str, ...]] = ("c",)

    def shapes(self, out: int, into: int) -> dict[str, tuple[int, ...]]:
        """Return those of A, (rank, into), B, (out, rank), and mu and c, (out,)."""
        return {"A": (self.rank, into), "B": (out, self.rank), "mu": (out,), "c": (out,)}

    def begin(self, given: Factors, factors: Factors) -> Factors:
        """Return A; and B with s B A = B R A of a start that moves the weights."""
        del factors
        moved = {"B": given["B"] @ given["R"] / self.scaling} if "R" in given else {}
        return {"A": given["A"], **moved}

    def constants(self, place: Place) -> Factors:
        """Return the norms of W0's rows for mu and c; ModelError if a row is zero, for it has no direction."""
        lengths = lengths_of_rows(place)
        return {"mu": lengths, "c": lengths.clone()}

    def change(
        self, factors: Mapping[str, Tensor], inputs: Tensor, projected: Tensor, base_weight: Tensor, scale: float
    ) -> Tensor:
        """Return (mu/c - 1) W0 x + s B A x."""
        del base_weight
        A, B = factors["A"], factors["B"]
        return (factors["mu"] / factors["c"] - 1) * projected + F.linear(F.linear(inputs.to(A.dtype), A), B) * scale

    def gradients(
        self,
        factors: Mapping[str, Tensor],
        inputs: Tensor,
        projected: Tensor,
        upstream: Tensor,
        base_weight: Tensor,
        scale: float,
    ) -> dict[str, Tensor]:
        """Return s Σ g (A x)ᵀ and Σ g * W0 x / c, g being the upstream gradient at a position."""
        del base_weight
        return {
            "B": outer_sums(upstream, inputs @ factors["A"].T * scale),
            "mu": position_sums(upstream * projected) / factors["c"],
        }

    def exported(self, factors: Mapping[str, Tensor], base_weight: Tensor) -> dict[str, Tensor]:
        """Return DoRA's pair and magnitudes.

        Raises:
            ModelError: a magnitude is 0, and DoRA has no row that is only turned.
        """
        A, lengthened = factors["A"].double(), (factors["mu"] / factors["c"]).double()
        if not bool(lengthened.all()):
            raise ModelError("a magnitude of the trained adapter is exactly 0, which stock DoRA cannot hold: run again")
        B = factors["B"].double() / lengthened[:, None]
        return {
            "lora_A.weight": A,
            "lora_B.weight": B,
            "lora_magnitude_vector": lengthened * row_norms(base_weight.double(), A, B, self.scaling),
        }

    def peft_config(self, *, fan_in_fan_out: bool = False) -> PeftConfig:
        """Return LoRA's with ``use_dora``."""
        return lora_config(self, fan_in_fan_out=fan_in_fan_out, use_dora=True)

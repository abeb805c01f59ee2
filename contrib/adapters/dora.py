"""DoRA: W = diag(μ / c) (W0 + s B A) with c the norms of the rows of W0 + s B A (Liu et al. 2024, arXiv 2402.09353).

Direction and magnitude of each output's weights are trained apart: A and B turn the rows, μ is their
length. As in section 4.3 of the paper, and in PEFT, no gradient goes through c. A row of the weight
is an output's, as in the authors' code; their text speaks of columns.

Averages of factors are not averages of weights, whatever is frozen, because c moves with B. The
difference is of second order in what the sites' factors differ by.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fedveil.common.adapters.base import Place, Traits, lora_config
from fedveil.common.adapters.mapped import Mapped, outer_sums, position_sums
from fedveil.common.errors import ModelError
from fedveil.common.messages.state import Factors

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(frozen=True)
class DoRA(Mapped):
    """Factors ``A`` (rank, in), ``B`` (out, rank) and the magnitudes ``mu`` (out,), all trained."""

    name: ClassVar[str] = "dora"
    trained: ClassVar[tuple[str, ...]] = ("A", "B", "mu")
    frozen: ClassVar[tuple[str, ...]] = ()
    traits: ClassVar[Traits] = Traits(
        linear=False,
        noise="diag(x_mu) V/c, norm σC/b √m; diag(mu/c) s (B x_A + x_B A) less its part along V's rows",
        free_scale="trains A, whose length does not last, and magnitudes, which have no scale",
    )

    def shapes(self, out: int, into: int) -> dict[str, tuple[int, ...]]:
        """Return those of A, (rank, into), B, (out, rank), and mu, (out,)."""
        return {"A": (self.rank, into), "B": (out, self.rank), "mu": (out,)}

    def begin(self, given: Factors, factors: Factors) -> Factors:
        """Return A; B begins at 0, also where a start moves the weights, as mu are the lengths of the base's rows."""
        del factors
        return {"A": given["A"]}

    def constants(self, place: Place) -> Factors:
        """Return for mu the norms of the rows of W0, where B is 0: the model starts as its base.

        Raises:
            ModelError: a row of W0 is zero, so it has no direction.
        """
        lengths_of_rows(place)
        # In float64, so that server and sites round to the same magnitudes.
        A, B = (torch.zeros(shape) for shape in ((self.rank, place.into), (place.out, self.rank)))
        return {"mu": row_norms(place.weight(), A, B, self.scaling).float()}

    def change(
        self, factors: Mapping[str, Tensor], inputs: Tensor, projected: Tensor, base_weight: Tensor, scale: float
    ) -> Tensor:
        """Return (μ/c - 1) W0 x + (μ/c) s B A x."""
        A, B, mu = factors["A"], factors["B"], factors["mu"]
        lengthened = mu / row_norms(base_weight, A, B, scale).to(mu.dtype)
        return (lengthened - 1) * projected + lengthened * F.linear(F.linear(inputs.to(A.dtype), A), B) * scale

    def gradients(
        self,
        factors: Mapping[str, Tensor],
        inputs: Tensor,
        projected: Tensor,
        upstream: Tensor,
        base_weight: Tensor,
        scale: float,
    ) -> dict[str, Tensor]:
        """Return s Σ Bᵀ h xᵀ, s Σ h (A x)ᵀ and Σ g * (W0 x + s B A x) / c, g upstream and h = (μ/c) g."""
        A, B = factors["A"], factors["B"]
        norms = row_norms(base_weight, A, B, scale).to(A.dtype)
        lengthened, down = upstream * (factors["mu"] / norms), inputs @ A.T * scale
        return {
            "A": outer_sums(lengthened @ B * scale, inputs),
            "B": outer_sums(lengthened, down),
            "mu": position_sums(upstream * (projected + down @ B.T)) / norms,
        }

    def exported(self, factors: Mapping[str, Tensor], base_weight: Tensor) -> dict[str, Tensor]:
        """Return the LoRA pair and PEFT's magnitudes, which have no ``.weight`` in their name."""
        del base_weight
        return {
            "lora_A.weight": factors["A"],
            "lora_B.weight": factors["B"],
            "lora_magnitude_vector": factors["mu"],
        }

    def peft_config(self, *, fan_in_fan_out: bool = False) -> PeftConfig:
        """Return LoRA's with ``use_dora``."""
        return lora_config(self, fan_in_fan_out=fan_in_fan_out, use_dora=True)


def lengths_of_rows(place: Place) -> Tensor:
    """Return the norms of the rows of a layer's W0, shape (out,), float32, CPU.

    Raises:
        ModelError: a row of W0 is zero, so it has no direction.
    """
    norms = place.weight().norm(dim=1)
    if not bool(norms.all()):
        raise ModelError(
            f"row {int(norms.argmin())} of {place.layer} is zero in the base model, and DoRA divides by its norm: "
            "name other layers in adapter.targets, or set adapter.name to 'lora'"
        )
    return norms.float()


def row_norms(base_weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Return the norms of the rows of W0 + s B A, shape (out,), float64, without a gradient.

    By |w + s A' b|² = |w|² + 2 s (W0 A')_i · b + s² b · (A A') b for each row, so that the sum is never formed.
    """
    # The one product of a row's length runs in float32, or in what the weight is wider in.
    wide = torch.promote_types(base_weight.dtype, torch.float32)
    with torch.no_grad(), torch.autocast(A.device.type, enabled=False):
        squares = torch.linalg.vector_norm(base_weight, dim=1, dtype=torch.float64).square()
        crossed = (base_weight.to(wide) @ A.detach().to(wide).T).double()
        A, B = A.detach().double(), B.detach().double()
        return (squares + ((2 * scale * crossed + scale**2 * B @ (A @ A.T)) * B).sum(1)).sqrt()

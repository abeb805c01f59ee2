"""Factors of the base weight's LU decomposition: LoLDU (arXiv 2410.13618).

W0 = P L D U with partial pivoting; the paper trains the first r entries z of D over the residual base W0 - s P L_r D_r
U_r, that is W = residual + s P L_r diag(z) U_r. With the adapter ``lora-diagonal``, whose z is how far these entries
have moved, the trajectory is the same and the base is never rewritten.

What differs. The columns of P L_r and the rows of U_r have length 1 here; as published their lengths spread several
times, and one clip would serve the longest. Starts of z that are off the base model, and a trained scale, are not
there. Worth knowing: the kept part is no best approximation of W0. Its residual is the Schur complement, in which the
first r permuted rows and the first r columns vanish, so that it depends on the order of the inputs; and neither set of
vectors is orthogonal. So run ``svd-of-weights`` beside it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedveil.common.adapters import Place
from fedveil.common.errors import ModelError
from fedveil.common.messages.state import Factors
from fedveil.common.starts.base import Needs, Start

LEAST_PIVOT = 1e-8
"""A pivot below this share of the largest would blow up its row of U."""


@dataclass(frozen=True)
class LUOfWeights(Start):
    """B has the first columns of P L and A the first rows of U of W0 = P L D U, each of length 1 (LoLDU)."""

    name: ClassVar[str] = "lu-of-weights"
    needs: ClassVar[Needs] = "weights"

    def factors(self, place: Place, wanted: Collection[str]) -> Factors:
        """Return them from a decomposition in float64 on the CPU; it has no free signs.

        Raises:
            ModelError: one of the first pivots is next to nothing.
        """
        B, _, A = lu_triple(place.weight(), place.rank, place.layer)
        made = {"A": A / A.norm(dim=1, keepdim=True), "B": B / B.norm(dim=0)}
        return {factor: made[factor].contiguous().float() for factor in wanted}


def lu_triple(weight: Tensor, rank: int, layer: str = "the layer") -> tuple[Tensor, Tensor, Tensor]:
    """Return P L_r (out, rank), D_r (rank,) and U_r (rank, in), whose diagonal is 1.

    Raises:
        ModelError: as in ``LUOfWeights.factors``.
    """
    P, L, U = torch.linalg.lu(weight)
    pivots = U.diagonal()
    least = pivots[:rank].abs().min()
    if not bool(least >= LEAST_PIVOT * pivots.abs().max()):
        raise ModelError(
            f"an LU pivot of {layer} is next to nothing, so its row cannot be brought to length 1: set adapter.start "
            "to 'svd-of-weights', or lower adapter.rank"
        )
    return (P @ L)[:, :rank], pivots[:rank], U[:rank] / pivots[:rank, None]

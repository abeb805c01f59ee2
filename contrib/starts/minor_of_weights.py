"""Minor singular vectors of the base weight: the directions in which it has been silent.

In MiniLM gradients of value layers lie there (``experiments/log``, 2026-11-26).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedveil.common.adapters import Place
from fedveil.common.messages.state import Factors
from fedveil.common.starts.base import Needs, Start
from fedveil.common.starts.directions import with_fixed_signs


@dataclass(frozen=True)
class MinorOfWeights(Start):
    """B and A span the left and right singular vectors of W0 with the smallest singular values.

    The side that is the longer one also has vectors that W0 does not reach at all (singular value 0): they come first.
    """

    name: ClassVar[str] = "minor-of-weights"
    needs: ClassVar[Needs] = "weights"

    def factors(self, place: Place, wanted: Collection[str]) -> Factors:
        """Return them from eigenvectors of W0ᵀ W0 and W0 W0ᵀ in float64, in a basis that server and sites share."""
        W = place.weight()
        made: dict[str, Tensor] = {}
        if "A" in wanted:
            made["A"] = minor_rows(W, place.rank).float()
        if "B" in wanted:
            made["B"] = minor_rows(W.T, place.rank).T.contiguous().float()
        return made


def minor_rows(matrix: Tensor, rank: int) -> Tensor:
    """Return the right singular vectors of an (out, in) matrix with the smallest values as rows (rank, in).

    The smallest first, signs fixed. Where the matrix has more columns than rows it reaches none of a whole space of
    directions, which has no basis of its own: they are then what is left of the unit vectors, in order, which server
    and sites compute the same.
    """
    out, into = matrix.shape
    left = into - min(out, into)
    _, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    minor = with_fixed_signs(vt.flip(0)[: max(0, rank - left)])
    if not left:
        return minor
    # What the matrix does not reach, seen from the unit vectors: their projections, orthonormalised in order.
    unreached = torch.zeros(0, into, dtype=matrix.dtype)
    for unit in torch.eye(into, dtype=matrix.dtype):
        row = unit
        for _ in range(2):  # once leaves what rounding brought in
            row = row - vt.T @ (vt @ row)
            row = row - unreached.T @ (unreached @ row)
        if float(row.norm()) > 1e-3:
            unreached = torch.cat([unreached, row[None] / row.norm()])
        if len(unreached) == min(rank, left):
            break
    return torch.cat([unreached, minor])

"""Minor singular vectors of the base weight: the directions in which it has been silent.

In MiniLM gradients of value layers lie there (``experiments/log``, 2026-11-26).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedveil.common.adapters import Place
from fedveil.common.messages.state import Factors
from fedveil.common.starts.base import Needs, Start
from fedveil.common.starts.directions import minor_rows


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

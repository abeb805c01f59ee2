"""Principal singular vectors of the base weight.

With A frozen and B = 0 this is PiSSA (Meng, Wang, Zhang 2024) with its A frozen: the base is left as it is, because
training B from B₀ on W0 - s B₀ A is training B - B₀ from 0 on W0.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from common.adapters import Place
from common.messages.state import Factors
from common.starts.base import Needs, Start
from common.starts.directions import leading_singular_triple


@dataclass(frozen=True)
class SVDOfWeights(Start):
    """B and A span W0's leading left and right singular vectors, orthonormal, largest first."""

    name: ClassVar[str] = "svd-of-weights"
    needs: ClassVar[Needs] = "weights"

    def factors(self, place: Place, wanted: Collection[str]) -> Factors:
        """Return them from a singular value decomposition in float64, signs fixed."""
        B, _, A = leading_singular_triple(place.weight(), place.rank)
        made = {"A": A.float(), "B": B.float()}
        return {factor: made[factor] for factor in wanted}

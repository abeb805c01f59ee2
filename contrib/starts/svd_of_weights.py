"""Principal singular vectors of the base weight.

With A frozen and B = 0 this is PiSSA (Meng, Wang, Zhang 2024) with its A frozen: the base is left as it is, because
training B from B₀ on W0 - s B₀ A is training B - B₀ from 0 on W0. With both factors trained it is the adapter
``lora-increments`` and ``start.singular-values``.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedveil.common.adapters import Place
from fedveil.common.messages.state import Factors
from fedveil.common.starts.base import Needs, Start
from fedveil.common.starts.directions import leading_singular_triple


@dataclass(frozen=True)
class SVDOfWeights(Start):
    """B and A span W0's leading left and right singular vectors, orthonormal unless the option says otherwise."""

    name: ClassVar[str] = "svd-of-weights"
    needs: ClassVar[Needs] = "weights"

    singular_values: bool = False
    """Whether each factor takes the root of the singular values, as in PiSSA: B A is then W0's best of its rank."""

    def factors(self, place: Place, wanted: Collection[str]) -> Factors:
        """Return them from a singular value decomposition in float64, signs fixed."""
        B, values, A = leading_singular_triple(place.weight(), place.rank)
        root = values.sqrt() if self.singular_values else torch.ones_like(values)
        made = {"A": (root[:, None] * A).float(), "B": (B * root).float()}
        return {factor: made[factor] for factor in wanted}

"""One pair of random orthonormal factors for all layers of one shape.

S2-LoRA shares one so. Here it stays as it is drawn, where the paper most likely trains it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import ClassVar

from fedveil.common.adapters import Place
from fedveil.common.messages.state import Factors
from fedveil.common.starts.base import Needs, Start, seeded


@dataclass(frozen=True)
class Shared(Start):
    """As ``orthonormal``, but layers of one shape have the same A and B."""

    name: ClassVar[str] = "shared"
    needs: ClassVar[Needs] = "nothing"

    def factors(self, place: Place, wanted: Collection[str]) -> Factors:
        """Return them from public streams that are named for the layer's shape."""
        return seeded(replace(place, layer=f"shared {place.out}x{place.into}"), wanted)

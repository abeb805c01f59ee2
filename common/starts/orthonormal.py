"""Random orthonormal directions from the run's seed."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from fedveil.common.adapters import Place
from fedveil.common.messages.state import Factors
from fedveil.common.starts.base import Needs, Start, seeded


@dataclass(frozen=True)
class Orthonormal(Start):
    """A has orthonormal rows and B orthonormal columns, Haar distributed."""

    name: ClassVar[str] = "orthonormal"
    needs: ClassVar[Needs] = "nothing"

    def factors(self, place: Place, wanted: Collection[str]) -> Factors:
        """Return them from public streams, so that server and sites derive the same bits without sending them."""
        return seeded(place, wanted)

"""The first rows and columns of the base weight, orthonormalised: the directions of NLoRA and IntTune.

Guo, Chang, Wu: NLoRA: Nyström-Initiated Low-Rank Adaptation. The core is left at 0 on the base weight as it is:
training it from any other value, on a base from which that value's product is taken, is the same run. SLoRA and NLoRA,
which train all three factors, are not built: their averages would not be exact.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from fedveil.common.adapters import Place
from fedveil.common.messages.state import Factors
from fedveil.common.starts.base import Needs, Start
from fedveil.common.starts.directions import spanned_rows


@dataclass(frozen=True)
class Nystrom(Start):
    """The rows of A span W0's first r rows, the columns of B its first r columns."""

    name: ClassVar[str] = "nystrom"
    needs: ClassVar[Needs] = "weights"

    def factors(self, place: Place, wanted: Collection[str]) -> Factors:
        """Return them from thin QRs in float64, signs fixed."""
        W = place.weight()
        spans = {"A": lambda: spanned_rows(W[: place.rank]), "B": lambda: spanned_rows(W[:, : place.rank].T).T}
        return {factor: span().float().contiguous() for factor, span in spans.items() if factor in wanted}

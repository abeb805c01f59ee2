"""Sums over shards of a layer's inputs: MiSS (Kang, Yin, arXiv 2409.15371).

MiSS adds Dᵀ E to the weight, where E = [I I ... I], cut to the layer's inputs, sums inputs j, j + r, j + 2r, ...:
LoRA with A = E frozen, B = Dᵀ and scale 1. Its rows have a length of about √(n / r), so one step goes n / r times as
far as with orthonormal rows; here they have length 1 unless ``start.normalised`` says otherwise.
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


@dataclass(frozen=True)
class Shards(Start):
    """Row k of A is 1 at the inputs j with j mod r = k and 0 elsewhere; B is that of the outputs, transposed."""

    name: ClassVar[str] = "shards"
    needs: ClassVar[Needs] = "nothing"

    normalised: bool = True
    """Whether every row has length 1; if not, alpha = rank makes it MiSS as published."""

    def factors(self, place: Place, wanted: Collection[str]) -> Factors:
        """Return them; nothing is drawn."""
        made = {"A": lambda: self._rows(place.rank, place.into), "B": lambda: self._rows(place.rank, place.out).T}
        return {factor: make().contiguous() for factor, make in made.items() if factor in wanted}

    def _rows(self, rank: int, columns: int) -> Tensor:
        rows = (torch.arange(columns) % rank == torch.arange(rank)[:, None]).double()
        return (rows / rows.norm(dim=1, keepdim=True) if self.normalised else rows).float()

"""Sparse random directions: the A of FlyLoRA.

FlyLoRA's A is frozen, with normal numbers at p random inputs of each row and 0 elsewhere; a position then takes the k
of r directions that answer it most. The choice is the strategy ``flylora``; with k = r it is LoRA with a frozen sparse
A, which ``ffa-lora`` in this start is, with rows of length 1.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from fedveil.common.adapters import Place
from fedveil.common.check import Interval
from fedveil.common.config.fields import Unit
from fedveil.common.messages.state import Factors
from fedveil.common.starts.base import Needs, Start
from fedveil.privacy.randomness import stream


@dataclass(frozen=True)
class Sparse(Start):
    """Each row of A has normal numbers at some random inputs, and length 1; B is that of the outputs, transposed."""

    name: ClassVar[str] = "sparse"
    needs: ClassVar[Needs] = "nothing"

    density: Annotated[float, Interval(0, 1), Unit("share")] = 0.25
    """Share of a row's entries that are not 0; at least one is not. FlyLoRA's is k / r."""

    def factors(self, place: Place, wanted: Collection[str]) -> Factors:
        """Return them from public streams of the run's seed."""

        def rows(factor: str, columns: int) -> Tensor:
            draw = stream(place.seed, "adapter", place.layer, "sparse", factor)
            nonzero = max(1, int(columns * self.density))
            chosen = torch.rand(place.rank, columns, generator=draw, dtype=torch.float64).argsort(1)[:, :nonzero]
            values = torch.randn(place.rank, nonzero, generator=draw, dtype=torch.float64)
            made = torch.zeros(place.rank, columns, dtype=torch.float64).scatter(1, chosen, values)
            return (made / made.norm(dim=1, keepdim=True)).float()

        made = {"A": lambda: rows("A", place.into), "B": lambda: rows("B", place.out).T.contiguous()}
        return {factor: make() for factor, make in made.items() if factor in wanted}

"""PEFT's start: A uniform within one over the root of the layer's inputs (He et al. 2015, with a = √5)."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedveil.common.adapters import Place
from fedveil.common.later import torch
from fedveil.common.messages.state import Factors
from fedveil.common.starts.base import Needs, Start
from fedveil.privacy.randomness import stream

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Kaiming(Start):
    """A is Kaiming-uniform, from the run's seed; it has no B."""

    name: ClassVar[str] = "kaiming"
    needs: ClassVar[Needs] = "nothing"
    gives: ClassVar[tuple[str, ...]] = ("A",)

    def factors(self, place: Place, wanted: Collection[str]) -> Factors:
        """Return A."""
        del wanted
        return {"A": uniform_rows(place.rank, place.into, stream(place.seed, "adapter", place.layer, "A"))}


def uniform_rows(rank: int, columns: int, generator: torch.Generator) -> Tensor:
    """Return a matrix of shape (rank, columns), uniform within ±1/√columns, float32."""
    bound = 1 / math.sqrt(columns)
    return (torch.rand(rank, columns, generator=generator, dtype=torch.float64) * 2 - 1).mul(bound).float()

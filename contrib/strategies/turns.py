"""Turns: in each round one kind of factor is trained and averaged, and the others stay.

Weights that are a product of factors are linear in each of them, so the average is exact in every round, where that of
all factors at once is off by a covariance. Under privacy clip and noise are of that kind alone: no product of noises
enters. Whose turn it is follows from the round's number alone, so that a resumed run and a late site know it. What
rests stays bit for bit, and so do its moments and its clock at the server's optimiser.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedveil.common.later import torch
from fedveil.common.messages.columns import Chosen, columns_of
from fedveil.common.messages.state import AdapterState
from fedveil.strategies.average import Average


@dataclass(frozen=True)
class Turns(Average):
    """Sites train one kind of factor in each round; the server averages it."""

    order: ClassVar[tuple[str, ...]]
    """The factor of round 1 and of those after it, until it begins again."""

    def turn(self, round_number: int) -> str:
        """Return the factor that is trained in a round, from 1 on."""
        return self.order[(round_number - 1) % len(self.order)]

    def trained_columns(self, received: AdapterState, round_number: int, rank: int) -> Chosen:
        """Return all columns of the factor whose turn it is."""
        del rank
        return columns_of(received, {self.turn(round_number): torch.arange})

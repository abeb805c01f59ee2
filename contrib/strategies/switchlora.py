"""SwitchLoRA: a window that moves over a pool of columns, so that the change outgrows the rank that is trained.

Zhou, Wang et al.: SwitchLoRA: Switched Low-Rank Adaptation Can Learn Full-Rank Information, 2024 (arXiv 2406.06564).
The pool is all of B under one A with ``adapter.rank`` rows. In its code vectors of both factors change places with
candidates, and the base weight absorbs the difference: the same model as B of the whole pool, of which a window is
trained. What differs, and why:

* The base is never rewritten, so a late site needs B alone.
* A is frozen and B starts at 0. Two random factors would move the model before round 1, and trained rows of A would
  have to travel with the pool.
* Which columns are trained follows from the number of the round, and not from a draw.

Sites send 4 m bytes a column of the window, and receive all of B. Until the pool's rows run out, new directions gain in
a round what old ones would: expect more of it over many rounds than over six.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from fedveil.common.check import POSITIVE
from fedveil.common.config.fields import Unit
from fedveil.common.messages.columns import FACTOR
from fedveil.common.messages.state import OWN, AdapterState
from fedveil.contrib.strategies.columns import MASK, Columns
from fedveil.strategies.base import Facts
from fedveil.strategies.state import ServerState


@dataclass(frozen=True)
class SwitchLoRA(Columns):
    """Sites train the columns of B in the round's window."""

    name: ClassVar[str] = "switchlora"
    facts: ClassVar[Facts] = Facts(
        "Zhou et al. 2024",
        noise="s x_B A on the window's w columns: norm s σC/b √m ‖A_w‖, with rows of length 1 √(m w)",
        exact="linear",
    )

    window: Annotated[int, POSITIVE, Unit("columns")] = 4
    """How many columns of each layer are trained at a time; ``adapter.rank`` is how many there are."""
    interval: Annotated[int, POSITIVE, Unit("rounds")] = 1
    """From one window to the next."""

    def start(self, adapter: AdapterState, trained: tuple[str, ...]) -> ServerState:
        """Return the state with the first window."""
        return self.settle(ServerState(0, adapter, trained))

    def settle(self, state: ServerState) -> ServerState:
        """Return the state with the window of the next round, which follows from its number alone."""
        masks: AdapterState = {
            layer: {MASK: self.mask(factors[FACTOR].shape[1], state.round_number + 1)}
            for layer, factors in state.adapter.items()
            if layer not in OWN
        }
        return replace(state, memory=masks)

    def mask(self, rank: int, round_number: int) -> Tensor:
        """Return the window of a round (from 1), float32, shape (rank,); the last one goes on at the first column.

        >>> SwitchLoRA(window=2).mask(5, 3).tolist()
        [1.0, 0.0, 0.0, 0.0, 1.0]
        """
        first = (round_number - 1) // self.interval * self.window
        mask = torch.zeros(rank)
        mask[(first + torch.arange(min(self.window, rank))) % rank] = 1.0
        return mask

"""IncreLoRA: layers that learn get more columns, and the others none.

Zhang, Li, Chen et al.: IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient Fine-tuning, 2023
(arXiv 2308.12043). What differs from its code, and why:

* A layer's score is the cross-site energy of its change (``by_energy`` here). The paper's sums weights times
  gradients of the whole layer, smoothed over steps: a dense gradient of private records, which no party here has.
* A layer grows only where its score tells it from noise. The top ones of scores that are noise are a choice by noise.
* The next columns stand at 0 under the next rows of the one A, so that growing changes nothing. In the code the factor
  ``alpha / r_l`` shrinks with it: from 4 to 6 columns a third of the update is gone.
* No penalty makes rows orthogonal: those of A are, from the start.

``adapter.rank`` is the most that a layer can have. Noise of ``s σC/b √(m r_l)`` enters a layer of r_l columns, and a
site sends 4 m r_l bytes of it. Without privacy the score is the mean cosine of two sites' changes, and 0 is the least.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from fedveil.common.check import POSITIVE
from fedveil.common.config.fields import Unit
from fedveil.common.messages.state import AdapterState
from fedveil.common.messages.tensors import merge
from fedveil.contrib.strategies.by_energy import ByEnergy, first_columns
from fedveil.contrib.strategies.columns import MASK
from fedveil.strategies.base import Facts
from fedveil.strategies.state import ServerState


@dataclass(frozen=True)
class IncreLoRA(ByEnergy):
    """Sites train the first columns of B, in every layer as many as the server has given it by then."""

    name: ClassVar[str] = "increlora"
    facts: ClassVar[Facts] = Facts(
        "Zhang et al. 2023",
        noise="s x_B A on r_l columns: norm s σC/b √m ‖A_l‖, with rows of length 1 √(m r_l)",
        exact="linear",
    )

    start_columns: Annotated[int, POSITIVE, Unit("columns")] = 2
    """How many of every layer are trained in round 1."""
    more_columns: Annotated[int, POSITIVE, Unit("columns")] = 2
    """How many a layer gets when it grows."""
    top_layers: Annotated[int, POSITIVE, Unit("layers")] = 3
    """Most layers that grow after a round."""
    interval: Annotated[int, POSITIVE, Unit("rounds")] = 1
    """From one time that layers may grow to the next."""

    def begin_with(self, rank: int) -> int:
        """Return ``start-columns``, or all there are."""
        return min(self.start_columns, rank)

    def choose(self, state: ServerState, scores: dict[str, float]) -> ServerState:
        """Return the state in which the layers of the highest scores, above what noise gives, have more columns."""
        if state.round_number % self.interval:
            return state
        room = {x: score for x, score in scores.items() if score > 0 and not bool(state.memory[x][MASK].all())}
        grown: AdapterState = {}
        for layer in sorted(room, key=lambda x: (-room[x], x))[: self.top_layers]:
            mask = state.memory[layer][MASK]
            grown[layer] = {MASK: first_columns(len(mask), int(mask.sum()) + self.more_columns)}
        return replace(state, memory=merge(state.memory, grown))

"""EVA's ranks: of every layer those columns of B are trained that its start has a direction for.

Paischer, Hauzenberger et al., 2024. The start ``eva`` with ``start.mean-rank`` leaves rows of A at 0 beyond a layer's
rank. Here the columns of B over them are not trained, so that clip, noise and bytes are those of the others, and the
exported adapter has each layer's own rank (PEFT's ``rank_pattern``). A layer of rank 0 stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedveil.common.messages.columns import FACTOR
from fedveil.common.messages.state import OWN, AdapterState
from fedveil.contrib.strategies.columns import MASK, Columns
from fedveil.strategies.base import Facts
from fedveil.strategies.state import ServerState


@dataclass(frozen=True)
class EVARanks(Columns):
    """Sites train the columns of B whose row of A is not 0."""

    name: ClassVar[str] = "eva-ranks"
    facts: ClassVar[Facts] = Facts(
        "Paischer et al. 2024",
        noise="s x_B A on r_l columns: norm s σC/b √m ‖A_l‖, with rows of length 1 √(m r_l)",
        exact="linear",
    )

    def start(self, adapter: AdapterState, trained: tuple[str, ...]) -> ServerState:
        """Return the state whose masks follow from A."""
        masks: AdapterState = {}
        for layer, factors in adapter.items():
            if layer not in OWN:
                rows = (
                    factors["A"].ne(0).any(1) if "A" in factors else factors[FACTOR].new_ones(factors[FACTOR].shape[1])
                )
                masks[layer] = {MASK: rows.float()}
        return ServerState(0, adapter, trained, masks)

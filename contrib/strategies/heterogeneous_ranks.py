"""Heterogeneous ranks: each site declares how many columns of B it trains, and all of them run the whole.

HetLoRA (Cho et al. 2024), FlexLoRA (Bai et al. 2024) and FLoRA (Wang et al. 2024) let sites of unlike capacity join.
Here site k trains the first r_k columns under one frozen A whose rows are nested, and increments are averaged, so the
new weights are exactly the mean of the sites' (``contrib.strategies.columns``). What differs from the papers, and why:

* HetLoRA pads and truncates states: columns that few sites train shrink every round, whatever the records say.
* HetLoRA weighs sites by the length of their product. Under noise that length is the noise's. Here public sizes weigh.
* LoRA's ``alpha / r_k`` at each site would be another scale at each: the scale is the run's, ``alpha / r``.

A site says its rank once, as the node's setting ``rank``: it is public, like its size, so it may follow from a machine
and never from records. Site k puts noise of norm ``s σC/b √m ‖A_k‖`` into a layer's weights, with A_k the
first r_k rows of A: √(m r_k) where these have length 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedveil.common.messages.columns import Chosen
from fedveil.common.messages.state import AdapterState
from fedveil.contrib.strategies.columns import Columns
from fedveil.strategies.base import Facts


@dataclass(frozen=True)
class HeterogeneousRanks(Columns):
    """Sites train the first columns of B, as many as each declares."""

    name: ClassVar[str] = "heterogeneous-ranks"
    facts: ClassVar[Facts] = Facts(
        "Cho et al. 2024, by increments",
        noise="s x_B A on r_k columns: norm s σC/b √m ‖A_k‖, with rows of length 1 √(m r_k)",
        exact="linear",
    )

    def trained_columns(self, received: AdapterState, round_number: int, rank: int) -> Chosen:
        """Return the columns below a site's own rank."""
        chosen = super().trained_columns(received, round_number, rank)
        return {
            layer: {name: columns[columns < rank] if rank else columns for name, columns in factors.items()}
            for layer, factors in chosen.items()
        }

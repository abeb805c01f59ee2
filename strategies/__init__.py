"""One strategy per file; ``STRATEGIES`` is the table of them.

A strategy is a rule of aggregation with an adapter that it takes by default. A new one is one file
and one row. Its own options are the fields of its dataclass, and are set in the run configuration
under its name: ``fed-svd.period = 2``.
"""

from __future__ import annotations

from collections import ChainMap

from strategies.average import Average
from strategies.base import Strategy, mean, of_turn
from strategies.diffora import DiffoRA
from strategies.dylora import DyLoRA
from strategies.fed_sb import FedSB
from strategies.fed_svd import FedSVD
from strategies.fedavg import FedAvgLoRA
from strategies.fedex_lora import FedExLoRA
from strategies.ffa_lora import FFALoRA
from strategies.flexlora import FlexLoRA
from strategies.flora import FLoRA
from strategies.flylora import FlyLoRA
from strategies.heterogeneous_ranks import HeterogeneousRanks
from strategies.hetlora import HetLoRA
from strategies.increlora import IncreLoRA
from strategies.rolora import RoLoRA
from strategies.state import Contribution, Moments, ServerState
from strategies.switchlora import SwitchLoRA

STRATEGIES: dict[str, type[Strategy]] = {
    strategy.name: strategy
    for strategy in (
        FedAvgLoRA,
        FFALoRA,
        FedSB,
        FedSVD,
        FedExLoRA,
        FLoRA,
        RoLoRA,
        HeterogeneousRanks,
        FlexLoRA,
        DyLoRA,
        FlyLoRA,
        IncreLoRA,
        DiffoRA,
        SwitchLoRA,
    )
}

CONTROLS: dict[str, type[Strategy]] = {strategy.name: strategy for strategy in (HetLoRA,)}
"""Rules that are published and break what every strategy promises, to be run beside one, without privacy alone."""

ROWS = ChainMap(CONTROLS, STRATEGIES)
"""All that ``strategy`` may name; a row that comes to either table is in it."""

__all__ = [
    "CONTROLS",
    "ROWS",
    "STRATEGIES",
    "Average",
    "Contribution",
    "Moments",
    "ServerState",
    "Strategy",
    "mean",
    "of_turn",
]

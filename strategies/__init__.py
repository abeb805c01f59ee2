"""One strategy per file; ``STRATEGIES`` is the table of them.

A strategy is a rule of aggregation with an adapter that it takes by default. A new one is one file
and one row. Its own options are the fields of its dataclass, and are set in the run configuration
under its name: ``fed-svd.period = 2``.
"""

from __future__ import annotations

from strategies.average import Average
from strategies.base import Contribution, Moments, ServerState, Strategy, mean
from strategies.diffora import DiffoRA
from strategies.dylora import DyLoRA
from strategies.fed_sb import FedSB
from strategies.fed_svd import FedSVD
from strategies.fedavg import FedAvgLoRA
from strategies.ffa_lora import FFALoRA
from strategies.heterogeneous_ranks import HeterogeneousRanks
from strategies.increlora import IncreLoRA
from strategies.switchlora import SwitchLoRA

STRATEGIES: dict[str, type[Strategy]] = {
    strategy.name: strategy
    for strategy in (FedAvgLoRA, FFALoRA, FedSB, FedSVD, HeterogeneousRanks, DyLoRA, IncreLoRA, DiffoRA, SwitchLoRA)
}

__all__ = ["STRATEGIES", "Average", "Contribution", "Moments", "ServerState", "Strategy", "mean"]

"""Strategies, what a server does with the sites' updates: one a file, and ``STRATEGIES``, the table of them.

A strategy is a rule of aggregation with an adapter that it takes by default. A new one is one file
and one row. Its own options are the fields of its dataclass, and are set in the run configuration
under its name: ``fed-svd.period = 2``.
"""

from __future__ import annotations

from collections import ChainMap

from fedveil.common.rows import Table
from fedveil.strategies.average import Average
from fedveil.strategies.base import Strategy, mean
from fedveil.strategies.fed_sb import FedSB
from fedveil.strategies.fed_svd import FedSVD
from fedveil.strategies.fedavg import FedAvgLoRA
from fedveil.strategies.ffa_lora import FFALoRA
from fedveil.strategies.state import Contribution, Moments, ServerState

STRATEGIES: Table[type[Strategy]] = Table("strategies", (FedAvgLoRA, FFALoRA, FedSB, FedSVD))

CONTROLS: Table[type[Strategy]] = Table("controls", ())
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
]

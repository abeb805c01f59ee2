"""Server rules around the optimiser, one per file; ``RULES`` is the table of them.

A new one is one file and one row. Its options are the fields of its dataclass, and are set in the run
configuration under its name: ``allora.eta = 2.0``.
"""

from __future__ import annotations

from fedveil.common.rows import Table
from fedveil.strategies.rules.base import ServerRule
from fedveil.strategies.rules.none import NoRule

RULES: Table[type[ServerRule]] = Table("rules", (NoRule,))

__all__ = ["RULES", "NoRule", "ServerRule"]

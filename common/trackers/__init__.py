"""The interface of experiment trackers, and ``TRACKERS``, the table of them, whose rows are in ``contrib``."""

from __future__ import annotations

from fedveil.common.rows import Table
from fedveil.common.trackers.base import Tracker

NO_TRACKER = "none"
TRACKERS: Table[type[Tracker]] = Table("trackers", ())

__all__ = ["NO_TRACKER", "TRACKERS", "Tracker"]

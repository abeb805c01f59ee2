"""End with the process that started this one, however that ends. Imports the standard library alone."""

from __future__ import annotations

import ctypes
import signal
import sys

_DIE_WITH_PARENT = 1
"""prctl's PR_SET_PDEATHSIG."""


def die_with_parent() -> None:
    """Have Linux end this process (SIGTERM) when the thread that started it is gone; elsewhere nothing happens.

    Called in the child, between its fork and whatever it does.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGTERM)

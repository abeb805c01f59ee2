"""No dump of a process that holds records: it would put on a disk what is kept in memory alone."""

from __future__ import annotations

import ctypes
import resource
import sys

_SET_DUMPABLE = 4
"""prctl's PR_SET_DUMPABLE."""


def write_no_dumps() -> None:
    """Have the system write no dump when this process dies, and let no process but root's read its memory.

    On Linux no program that dumps are piped to gets one either, which a limit of 0 alone leaves to that program. A
    program that this one becomes, or begins by ``exec``, has the first again and has to ask for itself.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_DUMPABLE, 0)

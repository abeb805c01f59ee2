"""The door of a simulation: where it ends, a site that has paid for a round finishes it, and no other begins one.

What ends it takes the file away (``experiments.keeper``), and kills who is at work all the same after a while.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from fedveil.common.errors import RunFailed

VARIABLE = "FEDVEIL_DOOR"
"""Environment variable with the file's path; without it there is no end to wait for."""
LAST_SECONDS = 60.0


@contextmanager
def at_work() -> Iterator[None]:
    """Hold the door while a round is paid for and trained, until its reply is kept.

    Where the door is shut nothing is answered: a refusal would be written down as a failure of the run, which only
    ends.

    Raises:
        RunFailed: the simulation ends, and a minute later this process has not been ended.
    """
    place = os.environ.get(VARIABLE)
    if not place:
        yield
        return
    try:
        file = os.open(place, os.O_RDONLY)
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise
    except (FileNotFoundError, BlockingIOError) as error:
        time.sleep(LAST_SECONDS)
        raise RunFailed("the simulation ends: no round is begun any more") from error
    try:
        yield
    finally:
        os.close(file)

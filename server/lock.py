"""The lock of a run's folder: two servers would cut each other's lines off and replace each other's checkpoint.

The lock is the operating system's, on the folder itself: it ends with the process that holds it, however
that ends, leaves no file, and can be looked up through a mount that is read-only.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedveil.common.errors import FedVeilError, RunFailed

GLANCE_SECONDS = 1.0
"""Far longer than anyone who asks whether a folder is written holds its lock."""


@contextmanager
def only_writer(folder: Path, patience: float = GLANCE_SECONDS) -> Iterator[None]:
    """Be the only one that writes the folder of a run, which is there, until the block ends.

    Args:
        folder: the run's folder.
        patience: seconds to try for; 0 is one try.

    Raises:
        RunFailed: somebody writes it already; nothing of it was touched.
    """
    under_way = RunFailed(f"the run in {folder} is under way: wait for its end, or end it (`fedveil stop {folder}`)")
    with locked(os.open(folder, os.O_RDONLY | os.O_DIRECTORY), patience, under_way):
        yield


@contextmanager
def locked(descriptor: int, patience: float, taken: FedVeilError) -> Iterator[None]:
    """Hold the operating system's lock on an open file or folder until the block ends, and close it.

    Args:
        descriptor: its descriptor.
        patience: seconds to try for; 0 is one try.
        taken: what is raised where somebody else holds the lock for longer.
    """
    deadline = time.monotonic() + patience
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    raise taken from error
                time.sleep(0.02)
        yield
    finally:
        os.close(descriptor)


def is_written(folder: Path) -> bool:
    """Whether a server writes the folder of a run at this moment."""
    if not folder.is_dir():
        return False
    try:
        with only_writer(folder, patience=0.0):
            return False
    except RunFailed:
        return True


def is_locked(path: Path) -> bool:
    """Return whether somebody holds the lock of a file; a missing file has none."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False

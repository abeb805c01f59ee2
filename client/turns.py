"""Turns at a site's ledger: its worker answers tasks, or its steward scores models, and never both at once.

The lock is the operating system's, on the ledger's folder: it ends with the process that holds it, and leaves no file.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fedveil.client.ledger.file import one_line
from fedveil.common.errors import RunFailed

PATIENCE = 5.0
"""Far longer than a worker takes to ask for a task."""


@contextmanager
def task_turn(ledger: Path) -> Iterator[bool]:
    """Yield whether a worker may take a task; while it may, no score begins.

    Workers of several sites at one ledger may all take tasks. In a folder that cannot be made or opened no ledger can
    be, so every task is refused, and the server is to hear why.
    """
    with ExitStack() as turn:
        try:
            free = turn.enter_context(_locked(ledger, fcntl.LOCK_SH | fcntl.LOCK_NB))
        except OSError:
            free = True
        yield free


@contextmanager
def score_turn(ledger: Path) -> Iterator[None]:
    """Keep every worker of a ledger from taking tasks until the block ends.

    Raises:
        RunFailed: a task is being answered for longer than ``PATIENCE``, or somebody else scores.
        LedgerError: the ledger's folder cannot be made or opened.
    """
    ends = time.monotonic() + PATIENCE
    with ExitStack() as turn:
        with one_line(ledger, "opened"):
            while not turn.enter_context(_locked(ledger, fcntl.LOCK_EX | fcntl.LOCK_NB)):
                turn.pop_all().close()
                if time.monotonic() > ends:
                    raise RunFailed("this site is answering a task, or scores already: try again when it is done")
                time.sleep(0.01)  # a worker has its turn for milliseconds each time that it asks for a task
        yield


@contextmanager
def _locked(ledger: Path, kind: int) -> Iterator[bool]:
    folder = ledger.parent
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, kind)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)

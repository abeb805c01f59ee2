"""A lookout for changes of a site's records: of their files, or that they were withdrawn, since it first looked.

How long a look takes follows from how many files there are. So none delays a task that is there to be taken: one goes
on in slices while no task is there, and one begins each task, in the time of its answer (``client.process``).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping

from fedveil.client.ledger.file import withdrawn_in
from fedveil.client.node import ledger_of
from fedveil.client.site import named_files
from fedveil.common.config.flat import Scalar
from fedveil.common.errors import LedgerError
from fedveil.common.files import FileState, expanded, state_of

LOOK_SECONDS = 2.0
"""From the beginning of a look to that of the next one, while no task comes."""
SLICE_SECONDS = 0.1
"""Most of a look at once: half of what a worker waits between two questions for a task."""


class Lookout:
    """What a site's folder says of its records, as it was at the first look, and of files that cells name, when read.

    Of whatever data set of the ledger: which others share a record with this one does not matter.

    Args:
        settings: the node's.
    """

    def __init__(self, settings: Mapping[str, Scalar]) -> None:
        self.changed = False
        """Whether a look has found anything changed. It stays: what was read before may be in memory."""
        self._settings = settings
        self._first: tuple[int, dict[str, FileState]] | None = None
        self._going: Iterator[None] | None = None
        self._began = -math.inf

    def look(self) -> bool:
        """Look at everything, and return whether anything has changed since the first look, or since it was read."""
        self._began, self._going = time.monotonic(), None
        for _ in self._looking():
            pass
        return self.changed

    def go_on(self) -> None:
        """Go on with a look for ``SLICE_SECONDS``, or begin one if the last began ``LOOK_SECONDS`` ago."""
        now = time.monotonic()
        if self._going is None:
            if now - self._began <= LOOK_SECONDS:
                return
            self._began, self._going = now, self._looking()
        for _ in self._going:
            if time.monotonic() - now >= SLICE_SECONDS:
                return
        self._going = None

    def _looking(self) -> Iterator[None]:
        withdrawn, seen = _withdrawn(self._settings), dict[str, FileState]()
        for path in _own_files(self._settings):
            seen[path] = state_of(path)
            yield
        for named, state in list(named_files().items()):
            self.changed |= state_of(named) != state
            yield
        if self._first is None:
            self._first = withdrawn, seen
        self.changed |= self._first != (withdrawn, seen)


def _own_files(settings: Mapping[str, Scalar]) -> Iterator[str]:
    """Yield the file of the site's records, or all below their folder; lazily."""
    if "data" in settings:
        source = expanded(str(settings["data"]))
        yield from _below(str(source)) if source.is_dir() else [str(source)]


def _below(folder: str) -> Iterator[str]:
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                yield from _below(entry.path) if entry.is_dir(follow_symlinks=False) else [entry.path]
    except OSError:  # it is gone, or may not be opened: nothing is below it
        return


def _withdrawn(settings: Mapping[str, Scalar]) -> int:
    """Return how many data sets the site's ledger has withdrawn; -1: it cannot be read, which every round refuses."""
    try:
        return len(withdrawn_in(ledger_of(settings)))
    except (LedgerError, OSError):
        return -1

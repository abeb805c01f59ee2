"""The interface of an experiment tracker, and ``TRACKERS``, the table of them, whose rows are in ``contrib``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from fedveil.common.errors import ConfigError
from fedveil.common.rows import Table

NO_TRACKER = "none"


class Tracker(ABC):
    """A run as an experiment tracker records it, at the server: its settings, the figures of each round, its end.

    The figures are those of ``server.tracking.rounds_of``.

    Args:
        folder: of the run; what the tracker writes goes into ``where`` in it.
        run: the run's name, which a resumed run keeps.
        settings: every setting of the run, flat.

    Raises:
        Exception: whatever the package raises, here and in each method; the run continues without its tracker.
    """

    name: ClassVar[str]
    """Value of the setting ``tracker``, and the extra of pip that installs the package."""
    package: ClassVar[str]
    """The module that must be installed; a row imports it in its constructor."""
    where: ClassVar[str]
    """File or folder that it writes in the run's folder."""

    @abstractmethod
    def __init__(self, folder: Path, run: str, settings: Mapping[str, str | int | float | bool]) -> None: ...

    @abstractmethod
    def log(self, round_number: int, figures: Mapping[str, float]) -> None:
        """Record a round's figures by name; round 0 is before training. A resumed run repeats its rounds."""

    @abstractmethod
    def close(self) -> None:
        """Write what is buffered, and record that the run has ended."""


TRACKERS: Table[type[Tracker]] = Table("trackers", ())


def check_installed(name: str) -> None:
    """Raise ConfigError unless the package of a tracker is installed on this machine."""
    if name != NO_TRACKER and find_spec(package := TRACKERS[name].package) is None:
        raise ConfigError(
            f"tracker is {name!r}, whose package {package} is not installed: "
            f"pip install 'fedveil[{name}]', or set tracker to {NO_TRACKER!r}"
        )

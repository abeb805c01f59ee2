"""The interface of an experiment tracker: figures of a run, a step a round, on the server's own disk.

A tracker gets what the run's folder holds, and nothing that a site did not send anyway. Its package is imported when it
is opened, at the server alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from fedveil.common.errors import ConfigError


class Tracker(ABC):
    """One run in a tracker; made when the run starts, or goes on.

    Args:
        folder: of the run; what the tracker writes goes into ``where`` in it.
        run: the run's name. One that goes on has the name that it began with.
        settings: every setting of the run, flat.

    Raises:
        Exception: whatever the package raises; the caller goes on without a tracker.
    """

    name: ClassVar[str]
    """What ``tracker`` calls it, and the extra of pip that brings it."""
    package: ClassVar[str]
    """The module that must be there."""
    where: ClassVar[str]
    """File or folder in the run's folder that it writes."""
    look: ClassVar[str]
    """Command that shows it, with ``{folder}`` for the run's folder."""

    @abstractmethod
    def __init__(self, folder: Path, run: str, settings: Mapping[str, str | int | float | bool]) -> None: ...

    @abstractmethod
    def log(self, round_number: int, figures: Mapping[str, float]) -> None:
        """Keep a round's figures, by name; a round that is told again replaces, or follows, what was told before."""

    @abstractmethod
    def close(self) -> None:
        """Write what is left, and say that the run has ended."""

    @classmethod
    def check(cls) -> None:
        """Raise ConfigError unless the package is installed."""
        if find_spec(cls.package) is None:
            raise ConfigError(
                f"tracker is {cls.name!r}, whose package {cls.package} is not installed: "
                f"pip install 'fedveil[{cls.name}]', or set tracker to 'none'"
            )

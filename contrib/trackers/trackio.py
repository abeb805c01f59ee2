"""trackio: a database in the run's folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from fedveil.common.trackers import Tracker


class Trackio(Tracker):
    """A run of the project ``fedveil``.

    Raises:
        OSError: an earlier run of this process has its figures elsewhere.
    """

    name: ClassVar[str] = "trackio"
    package: ClassVar[str] = "trackio"
    where: ClassVar[str] = "trackio"
    _taken: ClassVar[str] = ""
    """The folder that this process took for its first run; empty: none, or the user named one."""

    def __init__(self, folder: Path, run: str, settings: Mapping[str, str | int | float | bool]) -> None:
        # The package reads it once, when it is imported. Unset, its page reports its own use to its makers.
        place = str((folder / self.where).absolute())
        own = os.environ.setdefault("TRACKIO_DIR", place) in (place, self._taken)
        if own and self._taken not in ("", place):
            raise OSError(f"trackio keeps to {self._taken} until this process ends, which is another run's folder")
        if own:
            type(self)._taken = place
        os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
        import trackio

        self._run = trackio.init(
            project="fedveil",
            name=run,
            config=dict(settings),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, round_number: int, figures: Mapping[str, float]) -> None:
        """Add the figures as a step."""
        self._run.log(dict(figures), step=round_number)

    def close(self) -> None:
        """Write what is left."""
        self._run.finish()

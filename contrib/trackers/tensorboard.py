"""TensorBoard: an event file in the run's folder, written by torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from fedveil.common.trackers import Tracker


class TensorBoard(Tracker):
    """Scalars by name, and the settings as text."""

    name: ClassVar[str] = "tensorboard"
    package: ClassVar[str] = "tensorboard"
    where: ClassVar[str] = "tensorboard"

    def __init__(self, folder: Path, run: str, settings: Mapping[str, str | int | float | bool]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / self.where))
        rows = "\n".join(f"| {key} | {value} |" for key, value in settings.items())
        self._writer.add_text("settings", f"Run {run}\n\n| setting | value |\n|---|---|\n{rows}")

    def log(self, round_number: int, figures: Mapping[str, float]) -> None:
        """Add each figure as a scalar, and write at once."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, round_number)
        self._writer.flush()

    def close(self) -> None:
        """End the event file."""
        self._writer.close()

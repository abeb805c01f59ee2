"""Weights and Biases, offline: files in the run's folder, which ``wandb sync`` sends if somebody decides to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from fedveil.common.trackers import Tracker


class WeightsAndBiases(Tracker):
    """A run of the project ``fedveil``."""

    name: ClassVar[str] = "wandb"
    package: ClassVar[str] = "wandb"
    where: ClassVar[str] = "wandb"

    def __init__(self, folder: Path, run: str, settings: Mapping[str, str | int | float | bool]) -> None:
        import wandb

        # What the terminal shows, the machine with its packages, and the code are nobody's business.
        quiet = wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            x_disable_stats=True,
            x_disable_meta=True,
            x_save_requirements=False,
            silent=True,
        )
        self._run = wandb.init(
            project="fedveil",
            name=run,
            dir=str(folder),
            mode="offline",
            config=dict(settings),
            settings=quiet,
        )

    def log(self, round_number: int, figures: Mapping[str, float]) -> None:
        """Add the figures as a step."""
        self._run.log(dict(figures), step=round_number)

    def close(self) -> None:
        """Write what is left."""
        self._run.finish()

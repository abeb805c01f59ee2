"""Where a run's files are."""

from __future__ import annotations

from pathlib import Path

from common.config import RunConfig


def run_folder(config: RunConfig, run: str) -> Path:
    """Return the folder of a run; server and simulated sites agree on it without talking."""
    return Path(config.output).expanduser().absolute() / f"{config.strategy}-{run}"

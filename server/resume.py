"""The settings of a run that goes on: those it was started with, unless they are given again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fedveil.common.config.flat import Scalar
from fedveil.common.errors import ConfigError
from fedveil.common.paths import named_run
from fedveil.common.run_lines import ConfigFile, read_file
from fedveil.server.checkpoint import NAME, load_checkpoint
from fedveil.server.lock import GLANCE_SECONDS, only_writer
from fedveil.strategies.job import configure


def with_resumed(overrides: Mapping[str, Scalar], patience: float = GLANCE_SECONDS) -> dict[str, Scalar]:
    """Return overrides completed by the settings of the run that ``resume`` names, once it can go on.

    Args:
        overrides: settings, flat; returned unchanged if they resume nothing.
        patience: seconds to wait for a process that still writes the run's folder.

    Raises:
        ConfigError: no run, or more than one, answers to the name, or it cannot go on with these settings.
        DataError: its checkpoint is damaged.
        RunFailed: it is under way.
    """
    settings = settings_of_resumed(overrides)
    if settings.get("resume"):
        folder = Path(str(settings["resume"]))
        with only_writer(folder, patience):
            load_checkpoint(folder, configure(settings), read_file(ConfigFile, folder).run)
    return settings


def settings_of_resumed(overrides: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Return overrides completed by the settings of the run that ``resume`` names; unchanged without it.

    ``resume`` becomes the absolute path of the run's folder, because Flower starts the server elsewhere.

    Raises:
        ConfigError: no run, or more than one, answers to the name.
    """
    wanted = str(overrides.get("resume", ""))
    if not wanted:
        return dict(overrides)
    try:
        found = named_run(wanted, str(overrides.get("output", "")), NAME)
    except ConfigError as error:
        raise ConfigError(f"resume: {error}") from error
    began = read_file(ConfigFile, found).settings
    return {**began, **overrides, "resume": str(found)}

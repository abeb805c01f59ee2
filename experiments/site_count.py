"""The number of simulated sites of a run, kept beside its ``config.json``.

The number is no setting of the run (sites that own their data have none), yet another one divides
the records anew: a run that went on with it would train on records that it holds out for another site's
budget, and figures of two numbers do not compare.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from fedveil.common.config.sections import RunConfig
from fedveil.common.errors import ConfigError
from fedveil.common.paths import run_folder
from fedveil.common.run_lines import RunFile, read_if_there
from fedveil.common.strict_json import to_json
from fedveil.server.records import write_json

USUAL = 4
"""Sites of a run that nobody gave a number for."""


@dataclass(frozen=True)
class SimulatedFile(RunFile):
    """How a run was simulated."""

    NAME: ClassVar[str] = "simulated.json"
    sites: int


def record_sites(folder: Path, sites: int) -> None:
    """Write the number of simulated sites into a run's folder, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SimulatedFile.NAME, to_json(SimulatedFile(sites)))


def recorded_sites(folder: Path) -> int | None:
    """Return the number of simulated sites of a run; None if its folder does not say."""
    held = read_if_there(SimulatedFile, folder)
    return held.sites if held else None


def sites_of(config: RunConfig, asked: int | None) -> int:
    """Return how many sites a run has: those asked for, or USUAL; a resumed run has those that it began with.

    Raises:
        ConfigError: another number is asked for than the resumed run began with, or nobody says what that was.
    """
    if not config.resume:
        return USUAL if asked is None else asked
    folder = run_folder(config, "")
    began = recorded_sites(folder)
    wanted = began if asked is None else asked
    if wanted is None:
        raise ConfigError(f"resume: {folder} does not say how many sites it began with: give --sites as at its start")
    if began not in (None, wanted):
        raise ConfigError(
            f"resume: --sites is {asked}, the run in {folder} began with {began}, and another number divides the "
            "records anew: leave --sites out, or start a new run"
        )
    return wanted

"""The number of simulated sites of a run, kept beside its ``config.json``.

The number is no setting of the run (sites that own their data have none), yet another one divides
the records otherwise: a resumed run would charge one site's records to another's budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from fedveil.common.config.run import RunConfig
from fedveil.common.errors import ConfigError
from fedveil.common.paths import run_folder
from fedveil.common.run_lines import RunFile, read_if_there
from fedveil.common.strict_json import to_json
from fedveil.server.records import write_json

USUAL = 4
"""Sites of a run without a given number."""


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
    file = read_if_there(SimulatedFile, folder)
    return file.sites if file else None


def sites_of(config: RunConfig, wanted: int | None) -> int:
    """Return the number of sites of a run: ``wanted``, or USUAL; a resumed run keeps that of its start.

    Raises:
        ConfigError: ``wanted`` is another than that of the resumed run's start, or that is unknown.
    """
    if not config.resume:
        return USUAL if wanted is None else wanted
    folder = run_folder(config, "")
    began = recorded_sites(folder)
    number = began if wanted is None else wanted
    if number is None:
        raise ConfigError(f"resume: {folder} does not say how many sites it began with: give --sites as at its start")
    if began not in (None, number):
        raise ConfigError(
            f"resume: --sites is {wanted}, the run in {folder} began with {began}, and another number divides the "
            "records otherwise: leave --sites out, or start a new run"
        )
    return number

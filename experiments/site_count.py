"""The simulated sites of a run, kept beside its ``config.json``: their number, their names and their ledgers.

None of these is a setting of the run (sites that own their data have none), yet another number divides the records
otherwise: a resumed run would charge one site's records to another's budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
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
    names: list[str] = field(default_factory=list)
    """Of the sites; empty: the usual ones."""
    ledgers: str = ""
    """The folder of the sites' ledgers; empty: the run's own."""


def record_sites(folder: Path, sites: int, names: Sequence[str] = (), ledgers: Path | None = None) -> None:
    """Write which simulated sites a run has into its folder, which is made if need be; as ``SimulatedFile``."""
    folder.mkdir(parents=True, exist_ok=True)
    file = SimulatedFile(sites, list(names), str(ledgers.absolute()) if ledgers else "")
    write_json(folder / SimulatedFile.NAME, to_json(file))


def recorded_ledgers(folder: Path, given: Path | None) -> Path | None:
    """Return where the sites of a run that goes on have their ledgers; None: in the run's own folder.

    Raises:
        ConfigError: ``given`` is another place: what was spent so far would not count.
    """
    file = read_if_there(SimulatedFile, folder)
    began = Path(file.ledgers) if file and file.ledgers else None
    if given is not None and given.absolute() != began:
        raise ConfigError(f"resume: the run in {folder} began with the ledgers in {began or folder}: leave ledger out")
    return began


def check_usual_sites(folder: Path) -> None:
    """Raise ConfigError if a run that goes on began with ledgers or names of its sites that Flower's engine has not."""
    if began_named(folder):
        raise ConfigError(
            f"resume: the run in {folder} has named sites or shared ledgers: go on with fedveil.run(resume=...)"
        )


def began_named(folder: Path) -> bool:
    """Return whether a run began with names of its sites, or with ledgers that several runs share."""
    file = read_if_there(SimulatedFile, folder)
    return bool(file and (file.ledgers or file.names))


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
        raise ConfigError(f"resume: {folder} does not say how many sites it began with: give as many as then")
    if began not in (None, number):
        raise ConfigError(
            f"resume: the run in {folder} began with {began} sites, not {wanted}, and another number divides the "
            "records otherwise: leave the number of sites out, or start a new run"
        )
    return number

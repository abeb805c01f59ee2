"""A simulated run before it begins: its settings filled in, its sites named, its shared ledgers looked at."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from fedveil.client.site import forget_divided
from fedveil.common.config.flat import Scalar
from fedveil.common.data.notes import notes_on
from fedveil.common.data.sources import unprotected_test
from fedveil.common.errors import ConfigError
from fedveil.common.files import expanded
from fedveil.experiments.api.records import Data, Records, Test, as_before, records_of
from fedveil.experiments.api.sites import (
    DIVISION,
    LEDGERS,
    left_of,
    most_spent,
    nodes_of,
    same_records,
    sites_of_records,
    usual_names,
)
from fedveil.experiments.hub_sources import fetched
from fedveil.experiments.own_table import hints, with_guesses
from fedveil.experiments.progress import Watch
from fedveil.experiments.simulate import check_simulated
from fedveil.experiments.site_count import USUAL, record_sites, recorded_ledgers, sites_of
from fedveil.privacy.privacy_filter import FRESH, History
from fedveil.server.ledger import with_ledger
from fedveil.server.resume import settings_of_resumed, with_resumed
from fedveil.strategies.job import Job, configure, with_recipe


@dataclass(frozen=True)
class Division:
    """How a run's records come to its sites, as people say it."""

    data: Data | None = None
    """None: as the settings name it."""
    test: Test = None
    site: str | None = None
    """A column that names the site of each row."""
    sites: int | None = None
    ledger: str | Path | None = None
    """The folder of ledgers that several runs share."""


@dataclass(frozen=True)
class Prepared:
    """A run that could begin."""

    job: Job
    settings: dict[str, Scalar]
    """Flat, with its recipe, as a run is started with."""
    names: list[str]
    """Of its sites."""
    ledger: Path | None
    """The folder of their ledgers; None: the run's own."""
    notes: list[str]
    """What was guessed and what there is to know, a line each."""


@contextmanager
def prepared(
    given: Mapping[str, Scalar], division: Division, option: str = "", *, named: bool = True
) -> Iterator[Prepared]:
    """Yield a run that could begin, while its records can be read; then drop what was read of them.

    Args:
        given: settings, flat.
        division: how records come to sites.
        option: what stands before an option's name where people write it; empty: they write Python.
        named: whether sites have the names that a column gives them, as those of this process can.

    Raises:
        ConfigError, DataError: as for ``fedveil.run``.
        RunFailed: too little is left in the ledgers.
    """
    began = settings_of_resumed(given) if given.get("resume") else {}
    records = records_of(division.data, division.test, division.site, str(given.get("model.task", "classification")))
    for key in {*records.settings} & {*given}:
        raise ConfigError(f"{key} is given as a setting, and data, test or site say it too: leave the setting out")
    given, records = fetched(given), replace(records, settings=fetched(records.settings))
    if began:
        records = as_before(records, began)
    data = {key: value for key, value in began.items() if key.startswith("data.")}
    try:
        flat = {**data, **given, **records.settings}
        with records.opened():
            yield _ready(flat, records, division, option, named=named)
    finally:
        if site := sys.modules.get("fedveil.client.app"):  # a plan trains nothing, and imports no site
            site.process.forget()
        forget_divided()


def _ready(flat: dict[str, Scalar], records: Records, division: Division, option: str, *, named: bool) -> Prepared:
    """Return the run of settings whose records can be read; arguments and errors as for ``prepared``."""
    flat, notes = with_guesses(flat, option)
    flat = with_resumed(flat | records.held_out(configure(flat).config))
    names, renamed = sites_of_records(configure(flat).config, _number(flat, records, division, option), named=named)
    settings, recipe = with_recipe(flat, sites=len(names))
    job, ledger = configure(settings), expanded(division.ledger) if division.ledger is not None else None
    if flat.get("resume"):
        ledger = recorded_ledgers(Path(str(flat["resume"])), ledger)
    if job.mechanism.summed:  # their signing keys follow from the usual names
        names = usual_names(len(names))
    check_simulated(job, len(names))
    if ledger is not None:
        same_records(ledger, job.config, names, write=False)
        notes += [left_of(ledger, job.config.privacy)] * bool(not flat.get("resume") and job.claim.per)
    notes += [renamed, recipe, *hints(job.config)]
    # Of a test set that is cut from the records the server says them, beside who is not protected.
    notes += notes_on(job.config.data, job.config.model.task) if job.config.data.test else []
    return Prepared(job, settings, names, ledger, [line for line in notes if line])


def lines_of_plan(run: Prepared) -> list[str]:
    """Return the notes on a run and, of what its server would say, what there is to know of its records."""
    data, task = run.job.config.data, run.job.config.model.task
    lines = [*run.notes, unprotected_test(data.name, data.test, data.test_size)]
    return [line for line in (*lines, *([] if data.test else notes_on(data, task))) if line]


def spent_before(run: Prepared) -> History:
    """Return what is spent in the run's ledgers, by the site that has spent most."""
    return most_spent(run.ledger, run.job.config.privacy.delta) if run.ledger else FRESH


def simulate_prepared(
    run: Prepared,
    watch: Watch,
    *,
    begun: Callable[[Path], None] = lambda _: None,
    alone: bool = True,
    level: int = logging.WARNING,
) -> Path:
    """Conduct a run in this process over its named sites, and return its folder; as ``simulate_in_process``.

    Raises:
        ConfigError: the sites of the ledgers had other records.
    """
    job, names, ledger, resumed = run.job, run.names, run.ledger, run.job.config.resume
    if ledger is not None:
        same_records(ledger, job.config, names)
    elif resumed and (Path(resumed) / LEDGERS / DIVISION).is_file():  # a run on Flower's engine writes none
        same_records(Path(resumed) / LEDGERS, job.config, names)
    named = [] if names == usual_names(len(names)) else names

    def begin(folder: Path) -> None:
        record_sites(folder, len(names), named, ledger)
        if ledger is None and not resumed:
            same_records(folder / LEDGERS, job.config, names)
        begun(folder)

    from fedveil.experiments.in_process import simulate_in_process

    settings = with_ledger(run.settings, ledger)
    return simulate_in_process(settings, nodes_of(names, ledger), watch, begun=begin, alone=alone, level=level)


def _number(flat: Mapping[str, Scalar], records: Records, division: Division, option: str) -> int:
    """Return how many sites divide the records; 0: as many as a column names.

    Raises:
        ConfigError: another number is given than there are tables, or than a resumed run began with.
    """
    sites, by_key, name = division.sites, division.site is not None, f"{option}sites"
    if records.sites is not None and sites not in (None, records.sites):
        raise ConfigError(
            f"{name} is {sites}, and data has {records.sites} tables, one for each site: leave {name} out"
        )
    if by_key and sites is not None:
        raise ConfigError(f"{name}: the column that {option}site names has a value for each site: leave {name} out")
    wanted = records.sites if sites is None else sites
    if sites is not None and sites < 1:
        raise ConfigError(f"{name} must be at least 1, not {sites}")
    if flat.get("resume"):
        return sites_of(configure(flat).config, wanted)
    return (0 if by_key else USUAL) if wanted is None else wanted

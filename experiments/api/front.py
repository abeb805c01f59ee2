"""``fedveil.run``, ``fedveil.plan`` and ``fedveil.load``."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Never

from fedveil.client.app import process
from fedveil.client.site import forget_divided
from fedveil.common.config.flat import Scalar
from fedveil.common.errors import ConfigError
from fedveil.common.files import expanded
from fedveil.common.paths import given_run
from fedveil.common.run_lines import ProgressFile
from fedveil.experiments.api.keywords import Settings, check_keywords, given_settings
from fedveil.experiments.api.records import Data, Records, Test, as_before, records_of
from fedveil.experiments.api.register import register_named
from fedveil.experiments.api.result import Run
from fedveil.experiments.api.sites import (
    DIVISION,
    LEDGERS,
    left_of,
    nodes_of,
    same_records,
    sites_of_records,
    usual_names,
)
from fedveil.experiments.in_process import simulate_in_process
from fedveil.experiments.own_table import hints, with_guesses
from fedveil.experiments.progress import shown
from fedveil.experiments.simulate import Progress, check_simulated
from fedveil.experiments.site_count import USUAL, record_sites, recorded_ledgers, sites_of
from fedveil.server.checkpoint import NAME as CHECKPOINT
from fedveil.server.ledger import with_ledger
from fedveil.server.resume import with_resumed
from fedveil.strategies.job import configure, with_recipe

if TYPE_CHECKING:
    from fedveil.experiments.api.planned import Plan


def run(
    data: Data,
    *,
    text: str | None = None,
    label: str | None = None,
    labels: Sequence[str] | None = None,
    site: str | None = None,
    sites: int | None = None,
    test: Test = None,
    epsilon: float | None = None,
    delta: float | None = None,
    strategy: str | None = None,
    rounds: int | None = None,
    model: str | None = None,
    settings: Settings | None = None,
    config: str | Path | None = None,
    output: str | Path | None = None,
    ledger: str | Path | None = None,
    resume: Run | str | Path | None = None,
    quiet: bool = False,
    **unknown: Never,
) -> Run:
    """Fine-tune a model across simulated sites in this process, under differential privacy, and return the run.

    ::

        run = fedveil.run("reviews.csv", text="question", label="kind", sites=3, epsilon=3)
        run = fedveil.run({"leeds": leeds_frame, "york": york_frame}, epsilon=3, rounds=10)
        run = fedveil.run(frame, site="hospital", settings={"adapter.rank": 4})

    Each call is a new run in a folder of its own. Its ε is of this run alone, unless ``ledger`` names a folder that
    runs on the same records share. Held-out records get no privacy protection.

    Args:
        data: what simulated sites train on: a named data set, a file (CSV, TSV, JSONL, Parquet) or a folder of such, a
            ``pandas.DataFrame`` or a ``datasets.Dataset``, which sites divide; or a list or dict of these, one for each
            site. Frames and data sets stay in memory: no copy of them is written to a disk.
        text, label: columns of the texts and of their labels.
        labels: all labels in order; those in the records if not given.
        site: a column that names the site of each row.
        sites: how many sites divide one table, 4 if not given; left out with ``site``.
        test: what is held out to score the model: a number of records, a share of them such as 0.2, or a table of its
            own. A tenth of the records if not given, at least 100 where there are enough.
        epsilon, delta: the privacy budget of each site; 8 and 1e-5 if not given. Without privacy trains
            ``settings={"privacy.mode": "none"}``.
        strategy, rounds, model: the settings ``strategy``, ``rounds`` and ``model.name``; chosen to suit if not given.
        settings: any other settings, such as ``{"adapter.rank": 4}``.
        config: a TOML file of settings; ``settings`` and keywords win over it.
        output: the folder that the run's folder is made in; ``runs`` if not given.
        ledger: a folder of ledgers that outlives this run. Runs on these records that name it share one budget, of
            which ``epsilon`` is the whole; where less than a tenth of it is left, the run is refused.
        resume: a run that was interrupted, to go on with after its last complete round; give the same ``data``.
        quiet: whether nothing is printed.

    Raises:
        ConfigError: a keyword or a setting is unknown or wrong.
        DataError: the records cannot be read, or do not suit the settings.
        RunFailed: the run could not go on, as where the budget is spent; what was trained until then is in its folder.
    """
    check_keywords(unknown)
    keywords = _keywords(text, label, labels, epsilon, delta, strategy, rounds, model, output)
    given = given_settings(keywords, settings, config)
    if resume is not None:
        given["resume"] = str(resume.folder if isinstance(resume, Run) else expanded(resume))
    with _prepared(data, test, site, given) as (flat, records, notes):
        number = _number(flat, records, sites, by_key=site is not None)
        names, renamed = sites_of_records(configure(flat).config, number)
        chosen, note = with_recipe(flat, sites=len(names))
        notes += [renamed, note]
        return _run(chosen, names, expanded(ledger) if ledger is not None else None, notes, quiet=quiet)


def plan(
    data: Data,
    *,
    text: str | None = None,
    label: str | None = None,
    labels: Sequence[str] | None = None,
    site: str | None = None,
    sites: int | None = None,
    test: Test = None,
    epsilon: float | None = None,
    delta: float | None = None,
    strategy: str | None = None,
    rounds: int | None = None,
    model: str | None = None,
    settings: Settings | None = None,
    config: str | Path | None = None,
    timed: bool = True,
    **unknown: Never,
) -> Plan:
    """Return what a run would cost in privacy, time, memory and traffic, before any training.

    ::

        fedveil.plan("reviews.csv", text="question", label="kind", sites=3, epsilon=3)

    Args:
        data, text, label, labels, site, sites, test: as for ``run``.
        epsilon, delta, strategy, rounds, model, settings, config: as for ``run``.
        timed: whether a few steps on held-out records measure how long the run will take.

    Raises:
        ConfigError, DataError: as for ``run``.
        PrivacyError: the budget cannot pay for a step.
    """
    from fedveil.experiments.api.planned import Plan
    from fedveil.experiments.planner.forecast import forecast
    from fedveil.experiments.planner.price import simulated_sizes

    check_keywords(unknown)
    given = given_settings(
        _keywords(text, label, labels, epsilon, delta, strategy, rounds, model, None), settings, config
    )
    with _prepared(data, test, site, given) as (flat, records, notes):
        number = _number(flat, records, sites, by_key=site is not None)
        names, renamed = sites_of_records(configure(flat).config, number)
        chosen, note = with_recipe(flat, sites=len(names))
        job = configure(chosen)
        sizes = simulated_sizes(job, len(names))
        notes += [renamed, note, *hints(job.config)]
        return Plan(forecast(job, sizes, workers=1, calibrated=timed), "\n".join(filter(None, notes)))


def load(folder: str | Path) -> Run:
    """Return the run in a folder, also one of ``fedveil run`` or of real sites.

    ::

        run = fedveil.load("runs/fedavg-lora-7043258109")
        run.history.plot(y="accuracy")

    Args:
        folder: of the run; or its id, or ``latest``, where it is in ``runs``.

    Raises:
        ConfigError: no run has this name.
        DataError: it is not the folder of a run.
    """
    return Run(given_run(expanded(folder)))


def _keywords(
    text: str | None,
    label: str | None,
    labels: Sequence[str] | None,
    epsilon: float | None,
    delta: float | None,
    strategy: str | None,
    rounds: int | None,
    model: str | None,
    output: str | Path | None,
) -> dict[str, object]:
    """Return the keywords that are settings, by name."""
    return dict(locals())


@contextmanager
def _prepared(
    data: Data, test: Test, site: str | None, given: dict[str, Scalar]
) -> Iterator[tuple[dict[str, Scalar], Records, list[str]]]:
    """Yield the settings of a run, its records, and a line on each guess; then drop what was read of the records."""
    settings = Run(str(given["resume"])).settings if given.get("resume") else {}
    register_named({**settings, **given})
    records = records_of(data, test, site, str(given.get("model.task", "classification")))
    for key in {*records.settings} & {*given}:
        raise ConfigError(f"{key} is given as a setting, and data, test or site say it too: leave the setting out")
    began: dict[str, Scalar] = {}
    if settings:
        records = as_before(records, settings)
        began = {key: value for key, value in settings.items() if key.startswith("data.")}
    try:
        flat = {**began, **given, **records.settings}
        with records.opened():
            flat, notes = with_guesses(flat, option="")
            flat |= records.held_out(configure(flat).config)
            yield with_resumed(flat), records, notes
    finally:
        process.forget()
        forget_divided()


def _number(flat: dict[str, Scalar], records: Records, sites: int | None, *, by_key: bool) -> int:
    """Return how many sites divide the records; 0: as many as a column names.

    Raises:
        ConfigError: another number is given than there are tables, or than a resumed run began with.
    """
    if records.sites is not None and sites not in (None, records.sites):
        raise ConfigError(f"sites is {sites}, and data has {records.sites} tables, one for each site: leave sites out")
    if by_key and sites is not None:
        raise ConfigError("sites: the column that site names has a value for each site: leave sites out")
    wanted = records.sites if sites is None else sites
    if sites is not None and sites < 1:
        raise ConfigError(f"sites must be at least 1, not {sites}")
    if flat.get("resume"):
        return sites_of(configure(flat).config, wanted)
    return (0 if by_key else USUAL) if wanted is None else wanted


def _run(
    chosen: dict[str, Scalar], names: Sequence[str], ledger: Path | None, notes: Sequence[str], *, quiet: bool
) -> Run:
    """Conduct a run over sites of these names, and return it."""
    job = configure(chosen)
    if resumed := job.config.resume:
        ledger = recorded_ledgers(Path(resumed), ledger)
    usual = usual_names(len(names))
    if job.mechanism.summed:  # their signing keys follow from the usual names
        names = usual
    check_simulated(job, len(names))
    if ledger is not None:
        chosen = with_ledger(chosen, ledger)
        same_records(ledger, job.config, names)
        if not resumed and job.claim.per:
            notes = [*notes, left_of(ledger, job.config.privacy)]
    elif resumed and (Path(resumed) / LEDGERS / DIVISION).is_file():  # `fedveil run` writes none
        same_records(Path(resumed) / LEDGERS, job.config, names)

    folders: list[Path] = []

    def begun(folder: Path) -> None:
        record_sites(folder, len(names), [] if [*names] == usual else names, ledger)
        if ledger is None and not resumed:
            same_records(folder / LEDGERS, job.config, names)
        folders.append(folder)

    nodes, level = nodes_of(names, ledger), logging.CRITICAL if quiet else logging.WARNING
    try:
        with shown("the model is loaded and texts are read", quiet=quiet) as watch:
            watch(Progress([line for line in (*notes, *hints(job.config)) if line], ProgressFile("starting")))
            return Run(simulate_in_process(chosen, nodes, watch, begun=begun, alone=False, level=level))
    except BaseException as error:
        for folder in folders:  # Python and notebooks show notes below the error
            error.add_note(f"folder: {folder}")
            if (folder / CHECKPOINT).is_file():
                error.add_note(f"go on: fedveil.run(..., resume={str(folder)!r})")
        raise

"""``fedveil.run``, ``fedveil.plan`` and ``fedveil.load``."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Never

from fedveil.common.files import expanded
from fedveil.common.paths import given_run
from fedveil.common.run_lines import ProgressFile
from fedveil.common.setting_names import called, renamed
from fedveil.experiments.api.keywords import Settings, check_keywords, given_settings, names_in_python
from fedveil.experiments.api.prepared import (
    Division,
    Prepared,
    lines_of_plan,
    prepared,
    simulate_prepared,
    spent_before,
)
from fedveil.experiments.api.records import Data, Test
from fedveil.experiments.api.register import register_named
from fedveil.experiments.api.result import Run
from fedveil.experiments.progress import shown
from fedveil.experiments.simulate import Progress
from fedveil.server.checkpoint import NAME as CHECKPOINT

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
    names = names_in_python(settings, config)
    with called(lambda: names):
        given = given_settings(keywords, settings, config)
        if resume is not None:
            given["resume"] = str(resume.folder if isinstance(resume, Run) else expanded(resume))
        register_named(given)
        with prepared(given, Division(data, test, site, sites, ledger)) as ready:
            return _run(ready, names, quiet=quiet)


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
    ledger: str | Path | None = None,
    timed: bool = True,
    **unknown: Never,
) -> Plan:
    """Return what a run would cost in privacy, time, memory and traffic, before any training.

    ::

        fedveil.plan("reviews.csv", text="question", label="kind", sites=3, epsilon=3)

    Args:
        data, text, label, labels, site, sites, test: as for ``run``.
        epsilon, delta, strategy, rounds, model, settings, config: as for ``run``.
        ledger: as for ``run``; what earlier runs have spent there counts, and nothing is written.
        timed: whether a few steps on held-out records measure how long the run will take.

    Raises:
        ConfigError, DataError: as for ``run``.
        PrivacyError: the budget cannot pay for a step.
        RunFailed: too little of a shared budget is left.
    """
    from fedveil.experiments.api.planned import Plan
    from fedveil.experiments.planner.forecast import forecast
    from fedveil.experiments.planner.price import simulated_sizes

    check_keywords(unknown)
    keywords = _keywords(text, label, labels, epsilon, delta, strategy, rounds, model, None)
    names = names_in_python(settings, config)
    with called(lambda: names):
        given = given_settings(keywords, settings, config)
        register_named(given)
        with prepared(given, Division(data, test, site, sites, ledger)) as ready:
            sizes, spent = simulated_sizes(ready.job, len(ready.names)), spent_before(ready)
            made = forecast(ready.job, sizes, workers=1, calibrated=timed, history=spent)
            return Plan(
                replace(made, names=ready.names), "\n".join(renamed(line, names) for line in lines_of_plan(ready))
            )


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


def _run(ready: Prepared, names: Mapping[str, str], *, quiet: bool) -> Run:
    """Conduct a run and return it; ``names`` are those of settings in its lines."""
    folders: list[Path] = []
    level = logging.CRITICAL if quiet else logging.WARNING
    try:
        with shown("the model is loaded and texts are read", quiet=quiet) as show:

            def watch(seen: Progress) -> None:
                show(replace(seen, lines=[renamed(line, names) for line in seen.lines]))

            watch(Progress(ready.notes, ProgressFile("starting")))
            return Run(simulate_prepared(ready, watch, begun=folders.append, alone=False, level=level))
    except BaseException as error:
        for folder in folders:  # Python and notebooks show notes below the error
            error.add_note(f"folder: {folder}")
            if (folder / CHECKPOINT).is_file():
                error.add_note(f"go on: fedveil.run(..., resume={str(folder)!r})")
        raise

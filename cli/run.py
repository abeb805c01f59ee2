"""``fedveil run``: one simulated federation, from its settings to its report."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fedveil.cli.errors import for_people
from fedveil.cli.summary import print_summary
from fedveil.cli.table_options import Given, with_table
from fedveil.common.ends import end_as_by_ctrl_c
from fedveil.common.setting_names import renamed
from fedveil.common.words import counted, visible

if TYPE_CHECKING:
    from fedveil.experiments.api.prepared import Prepared
    from fedveil.strategies.job import Job

console = Console(highlight=False, soft_wrap=True, emoji=False, markup=False)


@for_people
@with_table
def run(
    given: Given,
    sites: Annotated[
        int | None, typer.Option(min=1, help="Simulated sites that divide the data; 4, or as a resumed run began.")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that train at once; 0: as many as pay off.")] = 0,
    detach: Annotated[
        bool, typer.Option("--detach", help="Go on without this terminal, until the end or 'fedveil stop'.")
    ] = False,
    in_process: Annotated[
        bool,
        typer.Option(
            "--in-process", help="Simulate in this process, without Flower: site after site. --ledger does so."
        ),
    ] = False,
) -> None:
    """Fine-tune on a table that simulated sites divide, and report on it."""
    began = time.monotonic()
    if not detach:
        end_as_by_ctrl_c()
    from fedveil.experiments.api.prepared import prepared
    from fedveil.experiments.api.register import register_named

    here = in_process or given.ledger is not None or _began_named(given)
    if here:
        register_named(given.settings)
    with prepared(given.settings, given.division(sites), "--", named=here) as ready:
        for line in ready.notes:
            typer.echo(visible(renamed(line, given.names)), err=True)
        console.print(visible(_banner(ready.job, len(ready.names))))
        if detach:
            _detached(ready, {"--sites": len(ready.names), "--workers": workers}, here=here)
        else:
            _attended(ready, given.names, None if here else workers, began)


def _began_named(given: Given) -> bool:
    """Return whether a run goes on whose sites have names or ledgers that only this process can give them."""
    from fedveil.experiments.site_count import began_named
    from fedveil.server.resume import settings_of_resumed

    resume = settings_of_resumed(given.settings).get("resume")
    return bool(resume) and began_named(Path(str(resume)))


def _attended(ready: Prepared, names: Mapping[str, str], workers: int | None, began: float) -> None:
    """Run the federation to its end below this terminal, show its progress and say what it has come to.

    ``names`` are those of settings in its lines, and ``workers`` as for ``simulate``; None: in this process.
    """
    from fedveil.experiments.api.prepared import simulate_prepared
    from fedveil.experiments.progress import RunProgress
    from fedveil.experiments.simulate import Progress, simulate
    from fedveil.experiments.under_way import ways_on
    from fedveil.reports import read_report, write_reports

    settings = ready.settings
    begun = [Path(str(settings["resume"]))] if settings.get("resume") else []

    def begin(folder: Path) -> None:
        begun.append(folder)
        console.print(visible(f"folder: {folder}"))

    def end(folder: Path) -> None:
        progress.stop()
        if (data := read_report(folder)) is None:
            write_reports(folder)
        print_summary(folder, data, time.monotonic() - began)

    def show(seen: Progress) -> None:
        progress.show(replace(seen, lines=[renamed(line, names) for line in seen.lines]))

    try:
        with RunProgress(
            console, _first_round(ready.job), "starting" + " Flower and Ray" * (workers is not None)
        ) as progress:
            if workers is None:
                end(simulate_prepared(ready, show, begun=begin))
            else:
                simulate(settings, len(ready.names), show, workers=workers, begun=begin, ended=end)
    except BaseException as error:
        for place in begun[-1:]:
            error.add_note(ways_on(place))
        raise


def _detached(ready: Prepared, options: dict[str, int | str | None], *, here: bool) -> None:
    """Start the run in a session of its own, and say where it lies, how to follow and how to end it."""
    from fedveil.experiments.detached import LINES, begin_detached

    options |= {"--in-process": None} if here else {}
    options |= {"--ledger": str(ready.ledger)} if ready.ledger and not ready.job.config.resume else {}
    with console.status("starting" + " Flower and Ray" * (not here)):
        folder, process = begin_detached(ready.settings, Path(ready.job.config.output), options)
    console.print(visible(f"process {process} goes on without this terminal, and writes to {folder / LINES}"))
    console.print(f"folder: {folder}\nfollow: fedveil watch {folder}\nend: fedveil stop {folder}")


def _first_round(job: Job) -> str:
    """Return what sites do in their first round and never again."""
    from fedveil.common.data.sources import train_and_test

    config = job.config
    if not config.timeline.computes_ahead:
        return "each worker loads model and data"
    records = len(train_and_test(config.data, config.model.task)[0].examples)
    return f"loading the model and computing features of {records:,} records once"


def _banner(job: Job, sites: int) -> str:
    """Return a run in one line: what is trained on what, by how many sites and rounds, under which promise."""
    config = job.config
    return (
        f"{config.method} on {config.model.name} and {config.data.name}: {counted(sites, 'site')}, "
        f"{counted(config.rounds, 'round')} of {counted(config.training.local_steps, 'step')}, "
        f"{job.mechanism.promise(config.privacy)}"
    )

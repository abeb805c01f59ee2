"""``fedveil run``: one simulated federation, from its settings to its report."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from fedveil.cli.errors import for_people
from fedveil.cli.summary import print_summary
from fedveil.cli.table_options import Given, with_table
from fedveil.common.ends import end_as_by_ctrl_c
from fedveil.common.words import counted, visible

if TYPE_CHECKING:
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
        bool, typer.Option("--in-process", help="Simulate in this process, without Flower: site after site.")
    ] = False,
) -> None:
    """Fine-tune on a table that simulated sites divide, and report on it."""
    began = time.monotonic()
    if not detach:
        end_as_by_ctrl_c()
    if in_process:
        from fedveil.experiments.api.register import register_named

        register_named(given.settings)
    settings, job, number = _prepared(given, sites)
    console.print(visible(_banner(job, number)))
    if detach:
        flag: dict[str, int | None] = {"--in-process": None} if in_process else {}
        _detached(settings, job, {"--sites": number, "--workers": workers, **flag})
    else:
        _attended(settings, job, number, None if in_process else workers, began)


def _prepared(given: Given, sites: int | None) -> tuple[dict[str, Any], Job, int]:
    """Return the settings of a run, its job and its sites, and say what was guessed and which recipe it has."""
    from fedveil.experiments.own_table import hints, with_guesses
    from fedveil.experiments.simulate import check_simulated
    from fedveil.experiments.site_count import USUAL, sites_of
    from fedveil.server.resume import with_resumed
    from fedveil.strategies.job import configure, with_recipe

    settings, notes = with_guesses(with_resumed(given.settings))
    settings, note = with_recipe(settings, sites=sites or USUAL)
    job = configure(settings)
    number = sites_of(job.config, sites)
    check_simulated(job, number)  # what is wrong is said without a line above it on what the data leave open
    for line in [*notes, *[note] * bool(note), *hints(job.config)]:
        typer.echo(visible(line), err=True)
    return settings, job, number


def _attended(settings: dict[str, Any], job: Job, sites: int, workers: int | None, began: float) -> None:
    """Run the federation to its end below this terminal, show its progress and say what it has come to.

    ``workers`` as for ``simulate``; None: in this process, without Flower.
    """
    from fedveil.experiments.in_process import simulate_in_process
    from fedveil.experiments.progress import RunProgress
    from fedveil.experiments.simulate import simulate
    from fedveil.experiments.under_way import ways_on
    from fedveil.reports import read_report, write_reports

    begun = [Path(str(settings["resume"]))] if settings.get("resume") else []

    def begin(folder: Path) -> None:
        begun.append(folder)
        console.print(visible(f"folder: {folder}"))

    def end(folder: Path) -> None:
        progress.stop()
        if (data := read_report(folder)) is None:
            write_reports(folder)
        print_summary(folder, data, time.monotonic() - began)

    try:
        with RunProgress(
            console, _first_round(job), "starting" + " Flower and Ray" * (workers is not None)
        ) as progress:
            if workers is None:
                end(simulate_in_process(settings, sites, progress.show, begun=begin))
            else:
                simulate(settings, sites, progress.show, workers=workers, begun=begin, ended=end)
    except BaseException as error:
        for place in begun[-1:]:
            error.add_note(ways_on(place))
        raise


def _detached(settings: dict[str, Any], job: Job, options: dict[str, int | None]) -> None:
    """Start the run in a session of its own, and say where it lies, how to follow and how to end it."""
    from fedveil.experiments.detached import LINES, begin_detached

    with console.status("starting Flower and Ray"):
        folder, process = begin_detached(settings, Path(job.config.output), options)
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

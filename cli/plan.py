"""``fedveil plan``: what a run will cost, before it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fedveil.cli.errors import for_people
from fedveil.cli.table_options import Given, with_table
from fedveil.common.errors import ConfigError
from fedveil.common.words import visible

if TYPE_CHECKING:
    from fedveil.common.config.flat import Scalar
    from fedveil.strategies.job import Job

console = Console(highlight=False, emoji=False, markup=False)


@for_people
@with_table
def plan(
    given: Given,
    sites: Annotated[
        int | None, typer.Option(min=1, help="Simulated sites that divide the data; 4 if not said.")
    ] = None,
    sizes: Annotated[str, typer.Option(help="Public sizes instead, one per site: 700,2400,3400.")] = "",
    find: Annotated[str, typer.Option(help="Turn it round: noise, rounds or sample-rate within the budget.")] = "",
    after: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of an earlier run on the same records, whose spending counts; again for each."),
    ] = None,
    calibration: Annotated[bool, typer.Option(help="Take a few steps on public records to estimate time.")] = True,
    workers: Annotated[int, typer.Option(min=0, help="Processes that train at once; 0: as many as pay off.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything to this file as well.")] = None,
) -> None:
    """Print what a run will cost in privacy, bytes, time and memory, before any training."""
    from fedveil.common.files import write_output
    from fedveil.common.paths import given_run
    from fedveil.experiments.planner.earlier import earlier_runs
    from fedveil.experiments.planner.find import find as find_within_budget
    from fedveil.experiments.planner.forecast import forecast
    from fedveil.experiments.planner.price import site_plans
    from fedveil.experiments.planner.tables import print_forecast, print_found
    from fedveil.strategies.job import configure

    overrides, job, public_sizes = _prepared(given, sites, sizes)
    after = [given_run(place) for place in after or []]
    earlier = earlier_runs(after, job)
    history = earlier.history
    for note in earlier.notes:
        console.print(f"WARNING: {note}", style="bold")
    if find:
        found = find_within_budget(job, find, history)
        job = configure({**overrides, "recipe": job.config.recipe, found.setting: found.value})
        site_plans(job, public_sizes, history)
        print_found(console, job, public_sizes, found)
        content = {**vars(found), "sizes": list(public_sizes), "settings": job.settings()}
    else:
        planned = forecast(job, public_sizes, workers=workers, calibrated=calibration, history=history)
        print_forecast(console, planned)
        content = planned.as_json()
    if json_file is not None:
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        write_output({json_file: text.encode()}, [*given.files, *after])
        console.print(f"written to {json_file}", soft_wrap=True)


def _prepared(given: Given, sites: int | None, sizes: str) -> tuple[dict[str, Scalar], Job, tuple[int, ...]]:
    """Return the settings of a run, its job and its sites' sizes, and say what was guessed and which recipe it has."""
    from fedveil.common.data.notes import notes_on
    from fedveil.common.data.sources import unprotected_test
    from fedveil.experiments.own_table import hints, with_guesses
    from fedveil.experiments.site_count import USUAL
    from fedveil.strategies.job import configure, with_recipe

    settings, notes = (given.settings, []) if sizes else with_guesses(given.settings)
    overrides, note = with_recipe(settings, divided=not sizes, sites=0 if sizes else sites or USUAL)
    job = configure(overrides)
    public_sizes = _sizes(job, sites, sizes)  # before the notes: of data that cannot be read their error says all
    data = job.config.data
    notes += [note, "" if sizes else unprotected_test(data.name, data.test, data.test_size)]
    notes += [] if sizes else [*hints(job.config), *notes_on(data, job.config.model.task)]
    for line in filter(None, notes):
        typer.echo(visible(line), err=True)
    if sizes and not settings.get("data.records"):
        as_these = {**settings, "data.records": sum(public_sizes)}
        other = with_recipe(as_these, sites=len(public_sizes))[0]["recipe"]
        if other != job.config.recipe:
            console.print(
                f"what follows is of the recipe {job.config.recipe!r}; with data.records = {sum(public_sizes)}, as "
                f"these sites have, it is {other!r}"
            )
    return overrides, job, public_sizes


def _sizes(job: Job, sites: int | None, sizes: str) -> tuple[int, ...]:
    from fedveil.experiments.planner.price import simulated_sizes
    from fedveil.experiments.site_count import USUAL

    if not sizes:
        return simulated_sizes(job, USUAL if sites is None else sites)
    if sites is not None:
        raise ConfigError("give --sizes or --sites, not both: the sizes say how many sites there are")
    parts = [part.strip() for part in sizes.split(",")]
    if not all(re.fullmatch(r"0*[1-9][0-9]{0,17}", part) for part in parts):
        raise ConfigError(f"--sizes is {sizes!r}: give whole numbers above 0, separated by commas, such as 700,2400")
    return tuple(int(part) for part in parts)

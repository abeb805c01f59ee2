"""``fedveil plan``: what a run will cost, before it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fedveil.cli.errors import for_people
from fedveil.common.errors import ConfigError

if TYPE_CHECKING:
    from fedveil.strategies.job import Job

console = Console(highlight=False, emoji=False, markup=False)


@for_people
def plan(
    settings: Annotated[list[str] | None, typer.Option("-c", "--config", help="Settings, as in 'fedveil run'.")] = None,
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
    from fedveil.common.config.text import files_in, parse_settings
    from fedveil.common.files import write_output
    from fedveil.experiments.planner.earlier import earlier_runs
    from fedveil.experiments.planner.find import find as find_within_budget
    from fedveil.experiments.planner.forecast import forecast
    from fedveil.experiments.planner.price import site_plans
    from fedveil.experiments.planner.tables import print_forecast, print_found
    from fedveil.experiments.site_count import USUAL
    from fedveil.strategies.job import configure, with_recipe

    given = parse_settings(settings or [])
    overrides, note = with_recipe(given, divided=not sizes, sites=0 if sizes else sites or USUAL)
    job = configure(overrides)
    public_sizes = _sizes(job, sites, sizes)  # before the note: of data that cannot be read their error says all
    typer.echo(note, err=True, nl=bool(note))
    if sizes and not given.get("data.records"):
        as_these = {**given, "data.records": sum(public_sizes)}
        other = with_recipe(as_these, sites=len(public_sizes))[0]["recipe"]
        if other != job.config.recipe:
            console.print(
                f"what follows is of the recipe {job.config.recipe!r}; with data.records = {sum(public_sizes)}, as "
                f"these sites have, it is {other!r}"
            )
    earlier = earlier_runs(after or [], job)
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
        write_output({json_file: text.encode()}, [*files_in(settings or []), *(after or [])])
        console.print(f"written to {json_file}", soft_wrap=True)


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

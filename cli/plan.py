"""``fedveil plan``: what a run will cost, before it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from fedveil.cli.errors import for_people
from fedveil.cli.table_options import Given, with_table
from fedveil.common.errors import ConfigError
from fedveil.common.setting_names import renamed
from fedveil.common.words import visible

if TYPE_CHECKING:
    from fedveil.common.config.flat import Scalar
    from fedveil.privacy.privacy_filter import History
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

    with _asked(given, sites, sizes) as asked:
        earlier = [given_run(place) for place in after or []]
        content = _said(asked, earlier, find, workers, calibrated=calibration)
        text = json.dumps(content(), indent=2, ensure_ascii=False) + "\n" if json_file else ""
    if json_file is not None:
        write_output({json_file: text.encode()}, [*given.files, *earlier])
        console.print(f"written to {json_file}", soft_wrap=True)


@dataclass(frozen=True)
class _Asked:
    """The run that a plan is of."""

    settings: dict[str, Scalar]
    job: Job
    sizes: tuple[int, ...]
    history: History
    """What is spent in the ledgers that were named."""
    names: Sequence[str] = ()
    """Of the sites; empty: the usual ones."""


def _said(
    asked: _Asked, after: Sequence[Path], find: str, workers: int, *, calibrated: bool
) -> Callable[[], dict[str, Any]]:
    """Print the plan, or the answer of ``--find``, and return what returns it as plain values, with every round."""
    from fedveil.experiments.planner.earlier import earlier_runs
    from fedveil.experiments.planner.find import find as find_within_budget
    from fedveil.experiments.planner.forecast import forecast
    from fedveil.experiments.planner.price import site_plans
    from fedveil.experiments.planner.tables import print_forecast, print_found
    from fedveil.strategies.job import configure

    job, sizes = asked.job, asked.sizes
    if after and asked.history.releases:
        raise ConfigError("--ledger and --after say what is spent: give one of them")
    earlier = earlier_runs(after, job)
    history = earlier.history if after else asked.history
    for note in earlier.notes:
        console.print(f"WARNING: {note}", style="bold")
    if not find:
        planned = forecast(job, sizes, workers=workers, calibrated=calibrated, history=history)
        planned = replace(planned, names=asked.names)
        print_forecast(console, planned)
        return planned.as_json
    found = find_within_budget(job, find, history)
    job = configure({**asked.settings, "recipe": job.config.recipe, found.setting: found.value})
    site_plans(job, sizes, history)
    print_found(console, job, sizes, found)
    return lambda: {**vars(found), "sizes": list(sizes), "settings": job.settings()}


@contextmanager
def _asked(given: Given, sites: int | None, sizes: str) -> Iterator[_Asked]:
    """Yield the run, while its records can be read, and say what was guessed and which recipe it has."""
    from fedveil.experiments.api.prepared import lines_of_plan, prepared, spent_before
    from fedveil.experiments.planner.price import simulated_sizes

    if sizes:
        yield _of_sizes(given, sites, sizes)
        return
    with prepared(given.settings, given.division(sites), "--") as ready:
        public_sizes = simulated_sizes(ready.job, len(ready.names))
        for line in lines_of_plan(ready):
            typer.echo(visible(renamed(line, given.names)), err=True)
        yield _Asked(ready.settings, ready.job, public_sizes, spent_before(ready), ready.names)


def _of_sizes(given: Given, sites: int | None, sizes: str) -> _Asked:
    """Return the run of sites of public sizes, and say which recipe it has."""
    from fedveil.experiments.hub_sources import fetched
    from fedveil.privacy.privacy_filter import FRESH
    from fedveil.strategies.job import configure, with_recipe

    if sites is not None or given.site or given.ledger is not None:
        raise ConfigError(
            "give --sizes or --sites (--site, --ledger), not both: the sizes say how many sites there are"
        )
    settings = fetched(given.settings)
    overrides, note = with_recipe(settings, divided=False)
    job, public_sizes = configure(overrides), _numbers(sizes)
    if note:
        typer.echo(visible(note), err=True)
    if not settings.get("data.records"):
        as_these = {**settings, "data.records": sum(public_sizes)}
        other = with_recipe(as_these, sites=len(public_sizes))[0]["recipe"]
        if other != job.config.recipe:
            console.print(
                f"what follows is of the recipe {job.config.recipe!r}; with data.records = {sum(public_sizes)}, as "
                f"these sites have, it is {other!r}"
            )
    return _Asked(overrides, job, public_sizes, FRESH)


def _numbers(sizes: str) -> tuple[int, ...]:
    parts = [part.strip() for part in sizes.split(",")]
    if not all(re.fullmatch(r"0*[1-9][0-9]{0,17}", part) for part in parts):
        raise ConfigError(f"--sizes is {sizes!r}: give whole numbers above 0, separated by commas, such as 700,2400")
    return tuple(int(part) for part in parts)

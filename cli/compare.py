"""``fedveil compare``: configurations side by side, with and without privacy, over seeds."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from cli.errors import for_people
from common.errors import ConfigError
from common.privacy.figures import epsilon_text

if TYPE_CHECKING:
    from experiments.compare import Outcome

console = Console(highlight=False, soft_wrap=True, emoji=False, markup=False)


@for_people
def compare(
    configs: Annotated[
        list[Path] | None, typer.Argument(help="TOML files; the shipped comparison of four if none.")
    ] = None,
    settings: Annotated[list[str] | None, typer.Option("-c", "--config", help="Laid over every file.")] = None,
    seeds: Annotated[str, typer.Option(help="Seeds of each job, separated by commas.")] = "1,2,3",
    sites: Annotated[int, typer.Option(min=1, help="Simulated sites that divide the data.")] = 4,
    output: Annotated[Path, typer.Option(help="Folder of the runs; runs that it already holds are kept.")] = Path(
        "runs/compare"
    ),
) -> None:
    """Run each configuration with and without privacy under each seed, and print a table."""
    from common.config.text import parse_settings
    from common.files import finite, replace_file
    from experiments.compare import DEFAULT, table
    from experiments.compare import compare as run_all

    try:
        numbers = [int(seed) for seed in seeds.split(",")]
    except ValueError:
        raise ConfigError(f"--seeds is {seeds!r}: give whole numbers separated by commas, such as 1,2,3") from None

    def done(outcome: Outcome, number: int, total: int) -> None:
        privacy = f"ε {epsilon_text(outcome.epsilon)}" if outcome.epsilon is not None else "privacy OFF"
        console.print(
            f"{number}/{total} {outcome.name}, seed {outcome.seed}, {privacy}: "
            f"accuracy {100 * outcome.accuracy:.1f} %, {outcome.seconds:.0f} s"
        )

    outcomes = run_all(
        configs or list(DEFAULT), numbers, sites, parse_settings(settings or []), output, done, console.print
    )
    replace_file(output / "compare.md", table(outcomes).encode())
    told = json.dumps(finite([asdict(outcome) for outcome in outcomes]), indent=1, allow_nan=False) + "\n"
    replace_file(output / "compare.json", told.encode())
    console.print(table(outcomes))
    console.print(f"written to {output / 'compare.md'} and {output / 'compare.json'}")

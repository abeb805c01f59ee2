"""``fedveil sweep`` and ``fedveil pictures``: many runs in one table, and the table in pictures."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from cli.errors import for_people
from common.errors import ConfigError, DataError
from experiments.run import sweep as run_sweep

if TYPE_CHECKING:
    from experiments.sweep.rows import Row

console = Console(highlight=False, soft_wrap=True, emoji=False, markup=False)
sweep = for_people(run_sweep)


@for_people
def pictures(
    files: Annotated[list[Path], typer.Argument(help="Tables of sweeps (.jsonl), drawn together.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder of the page and the PNGs; the first table's if not said.")
    ] = None,
    published: Annotated[
        Path | None,
        typer.Option(
            help="TOML file of published figures of other models and data to draw beside; 'shipped': those that come "
            "with FedVeil, of RoBERTa-large on SST-2 and SNLI."
        ),
    ] = None,
    only: Annotated[
        str, typer.Option(help="Variants to draw, with commas between, such as 'metric,head-only'; all if not said.")
    ] = "",
    without: Annotated[
        str, typer.Option(help="Variants to leave out, with commas between, such as 'probe*,*-from-words'.")
    ] = "",
) -> None:
    """Draw accuracy against ε and against bytes, with intervals: one page and two PNGs."""
    from experiments.sweep.pictures import write_pictures
    from experiments.sweep.published import SHIPPED, read_published
    from experiments.sweep.rows import read_rows

    for file in files:
        if not file.is_file():
            raise DataError(f"{file} is not there: give a table that fedveil sweep has written (.jsonl)")
    rows = [row for file in files for row in read_rows(file)]
    first = rows[0].sweep if rows else ""
    if wanted := _patterns("--only", only, rows):
        rows = sorted((row for row in rows if _named(row, wanted)), key=lambda row: _named(row, wanted)[0])
    unwanted = _patterns("--without", without, rows)
    rows = [row for row in rows if not _named(row, unwanted)]
    # Variants of two sweeps may have one name.
    rows = [row if row.sweep == first else replace(row, variant=f"{row.sweep}: {row.variant}") for row in rows]
    figures = read_published(SHIPPED if published == Path("shipped") else published) if published else []
    for path in write_pictures(rows, figures, output or files[0].parent, files[0].stem):
        console.print(str(path))


def _patterns(option: str, said: str, rows: list[Row]) -> list[str]:
    """Return the patterns that an option names.

    Raises:
        ConfigError: one is no variant's.
    """
    patterns = [pattern for pattern in map(str.strip, said.split(",")) if pattern]
    for pattern in patterns:
        if not any(_named(row, [pattern]) for row in rows):
            raise ConfigError(f"{option}: no variant is {pattern!r}: name some of the tables")
    return patterns


def _named(row: Row, patterns: list[str]) -> list[int]:
    """Return which of the patterns name a row's variant, alone or with its sweep."""
    names = row.variant, f"{row.sweep}: {row.variant}"
    return [i for i, pattern in enumerate(patterns) if any(fnmatchcase(name, pattern) for name in names)]

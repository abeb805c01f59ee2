"""``fedveil sweep`` and ``fedveil pictures``: many runs in one table, and the table in pictures."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cli.errors import for_people
from common.errors import ConfigError, DataError
from experiments.run import sweep as run_sweep

console = Console(highlight=False, soft_wrap=True, emoji=False)
sweep = for_people(run_sweep)


@for_people
def pictures(
    files: Annotated[list[Path], typer.Argument(help="Tables of sweeps (.jsonl), drawn together.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder of the page and the PNGs; the first table's if not said.")
    ] = None,
    published: Annotated[
        Path | None, typer.Option(help="TOML file of published figures; the shipped one if not said.")
    ] = None,
    ours: Annotated[bool, typer.Option("--ours", help="Draw no published figures.")] = False,
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
    for left_out in filter(None, map(str.strip, without.split(","))):
        kept = [row for row in rows if not fnmatchcase(row.variant, left_out)]
        if len(kept) == len(rows):
            raise ConfigError(f"--without: no variant is {left_out!r}: name some of the tables")
        rows = kept
    if len(files) > 1:  # variants of two sweeps may have one name
        rows = [replace(row, variant=f"{row.sweep}: {row.variant}") for row in rows]
    figures = [] if ours else read_published(published or SHIPPED)
    for path in write_pictures(rows, figures, output or files[0].parent, files[0].stem):
        console.print(str(path), markup=False)

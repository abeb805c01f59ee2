"""``fedveil intruders``: new directions that a run has put among the largest of each layer's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cli.errors import for_people
from common.words import UNKNOWN, counted, visible

console = Console(highlight=False, soft_wrap=True, emoji=False, markup=False)


@for_people
def intruders(
    folder: Annotated[Path, typer.Argument(help="A run's folder.")],
    top: Annotated[int, typer.Option(min=1, help="Largest singular vectors of each layer that are looked at.")] = 10,
    cosine: Annotated[float, typer.Option(help="A direction is an intruder if no old one is as near as this.")] = 0.5,
) -> None:
    """Count the intruder dimensions of a run's adapter, beside those of the run's noise alone, layer by layer."""
    from experiments.intruders import intruders_of

    rows = intruders_of(folder, top, cosine)
    table = Table(title=f"intruders among the {top} largest singular vectors, cosine below {cosine:g}")
    for column in ("layer", "intruders", "of noise alone", f"σ {top} before", "σ 1 of the change", "above it after"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for row in rows:
        told = UNKNOWN if row.of_noise is None else str(row.of_noise)
        figures = (str(row.intruders), told, f"{row.edge:.3g}", f"{row.largest:.3g}", str(row.above))
        table.add_row(Text(visible(row.layer)), *figures)
    console.print(table)
    total = f"{counted(sum(row.intruders for row in rows), 'intruder')} in {counted(len(rows), 'layer')}"
    noise = [row.of_noise for row in rows if row.of_noise is not None]
    beside = f"noise alone makes {sum(noise)}" if noise else f"nothing stands beside it: {rows[0].unknown}"
    console.print(Text(visible(f"{total}; {beside}")))

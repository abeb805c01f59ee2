"""``fedveil transfer``: a run's model for another base model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedveil.cli.errors import for_people
from fedveil.common.words import percent_text

console = Console(highlight=False, soft_wrap=True, emoji=False, markup=False)


@for_people
def transfer(
    folder: Annotated[Path, typer.Argument(help="A run's folder, its id, or 'latest'.")],
    to: Annotated[str, typer.Option(help="The new base model: a name, a folder or hub:NAME, as model.name.")],
    texts: Annotated[str, typer.Option(help="Public texts: a file with one a line, or a named data set.")],
    out: Annotated[Path, typer.Option(help="A new folder.")] = Path("transferred"),
    keep: Annotated[int, typer.Option(min=0, help="Use so many of the texts, from the first on; 0: 10,000.")] = 0,
    votes: Annotated[
        Path | None, typer.Option(help="A run that began with 'text-votes': its records chose among the texts.")
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Of the new adapter.")] = 8,
    passes: Annotated[int, typer.Option(min=0, help="Over the texts; 0: a head alone.")] = 2,
) -> None:
    """Teach another base model what a run has learnt, by the run's own answers on public texts; no record is read."""
    from fedveil.common.paths import check_adapter, given_run

    folder, asked = given_run(folder), given_run(votes) if votes else None
    check_adapter(folder / "adapter")
    from fedveil.contrib.transfer import transfer as lesson
    from fedveil.contrib.transfer.student import How
    from fedveil.experiments.hub_sources import MODEL, fetched
    from fedveil.reports.derived import NO_RECORD, together_sentence

    with console.status("loading the models") as status:
        wanted = lesson.Wanted(str(fetched({MODEL: to})[MODEL]), texts, keep, asked, How(rank=rank, passes=passes))
        made = lesson.transfer(folder, out, wanted, status.update)
    for figure in made.figures:
        half = f" ± {100 * figure.half:.1f}" if figure.half else ""
        console.print(f"{percent_text(figure.value)}{half}  {figure.name}")
    console.print(f"{out}: {NO_RECORD} {together_sentence(made)}")
    for source in made.sources:
        console.print(source.claim)

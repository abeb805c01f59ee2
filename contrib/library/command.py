"""``fedveil library`` and ``fedveil compose``: what lies between federations. No command here opens a record."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedveil.cli.errors import Commands, for_people
from fedveil.common.errors import ConfigError
from fedveil.common.words import counted, decimal_text, visible

if TYPE_CHECKING:
    from fedveil.common.derived import Source

console = Console(highlight=False, soft_wrap=True, emoji=False, markup=False)
library = typer.Typer(
    cls=Commands, no_args_is_help=True, help="Keep adapters of finished runs on one basis, to begin others at them."
)
LibraryFolder = Annotated[Path, typer.Argument(help="The library's folder.")]
RunFolder = Annotated[Path, typer.Argument(help="A run's folder, its id, or 'latest'; or a derived model's folder.")]


@library.command()
@for_people
def init(
    folder: LibraryFolder,
    like: Annotated[Path, typer.Option(help="A run whose basis the library has: base, layers, rank and seed.")],
) -> None:
    """Make an empty library, whose adapters all have the A of one run."""
    from fedveil.common.paths import check_adapter, given_run

    like = given_run(like)
    check_adapter(like / "adapter")
    from fedveil.contrib.library.shelf import init as begin

    console.print(f"{folder}: {visible(begin(folder, like).basis.words)}")


@library.command()
@for_people
def add(
    folder: LibraryFolder,
    run: RunFolder,
    name: Annotated[str, typer.Option(help="What the library calls the adapter.")],
    about: Annotated[str, typer.Option(help="What the run's records are, in one line of public words.")],
) -> None:
    """Copy a run's adapter into a library, with what the run claims; one on another basis is refused."""
    from fedveil.common.paths import check_adapter, given_run

    run = given_run(run)
    check_adapter(run / "adapter")
    from fedveil.contrib.library.shelf import add as put

    made, sources = put(folder, run, name, about)
    console.print(f"{folder / name}: {counted(len(made.adapters), 'adapter')}")
    for source in sources:
        console.print(visible(source.claim))


@library.command("list")
@for_people
def list_(folder: LibraryFolder) -> None:
    """Show a library's adapters: their claims, how far each moves the base, and how much each is like the others."""
    from fedveil.contrib.library.pairs import norms, overlap
    from fedveil.contrib.library.shelf import open_library

    found = open_library(folder)
    console.print(visible(f"basis: {found.basis.words}"))
    pairs = {member.name: found.pairs(member.name).layers for member in found.adapters}
    table = Table()
    names = list(pairs)
    for column in ("adapter", "task", "ε", "norm", *(f"with {name}" for name in names)):
        table.add_column(Text(visible(column)), justify="left" if column in ("adapter", "task") else "right")
    for member in found.adapters:
        length = sum(norm**2 for norm in norms(pairs[member.name]).values()) ** 0.5
        alike = [f"{overlap(pairs[member.name], pairs[name]):+.2f}" for name in names]
        epsilon = _epsilon(found.sources(member.name))
        table.add_row(*(Text(visible(cell)) for cell in (member.name, member.task, epsilon, f"{length:.3g}", *alike)))
    console.print(table)
    for member in found.adapters:
        console.print(visible(f"{member.name}: {member.about}"))
    console.print(visible(f'start.library = "{folder}"'))
    console.print(visible(f'start.adapters = "{found.setting}"'))


def _epsilon(sources: list[Source]) -> str:
    """Return what the runs of an adapter claim, in few words."""
    from fedveil.privacy.figures import epsilon_text

    said = {
        "no claim" if source.epsilon is None else f"{epsilon_text(source.epsilon)} per {source.unit}"
        for source in sources
    }
    return ", ".join(sorted(said))


@library.command()
@for_people
def suggest(
    folder: LibraryFolder,
    about: Annotated[str, typer.Argument(help="What the records of a run to come are, in public words.")],
    top: Annotated[int, typer.Option(min=1, help="How many adapters are named.")] = 4,
    temperature: Annotated[float, typer.Option(help="Below 0.05 nearly the nearest one alone.")] = 0.1,
) -> None:
    """Name the adapters whose descriptions are nearest, and the settings of a run that begins at them."""
    from fedveil.contrib.library.describe import nearness, weights
    from fedveil.contrib.library.shelf import open_library

    found = open_library(folder)
    if not found.adapters:
        raise ConfigError(f"{folder} has no adapter: add one by 'fedveil library add'")
    if not temperature > 0:
        raise ConfigError(f"--temperature must be above 0, not {temperature:g}")
    with console.status("comparing descriptions"):
        cosines = nearness(about, [member.about for member in found.adapters])
    shares = weights(cosines, top, temperature)
    for member, cosine, share in sorted(zip(found.adapters, cosines, shares, strict=True), key=lambda row: -row[1]):
        if share:
            said = f"{decimal_text(share, 2)}  {member.name}, cosine {decimal_text(cosine, 2)}: {member.about}"
            console.print(visible(said))
    settings = {"adapter.start": "described", "start.library": folder, "start.about": about}
    for key, value in {**settings, "start.adapters": found.setting}.items():
        console.print(visible(f'{key} = "{value}"'))


@for_people
def compose(
    folders: Annotated[list[Path], typer.Argument(help="Finished runs, derived models, or a library's LIBRARY/NAME.")],
    out: Annotated[Path, typer.Option(help="A new folder.")] = Path("composed"),
    rule: Annotated[str, typer.Option(help="linear, ties, dare: on one basis; cat, svd: on any.")] = "linear",
    weights: Annotated[str, typer.Option(help="A number for each adapter, after commas; else equal shares.")] = "",
    equal_norms: Annotated[
        bool, typer.Option("--equal-norms", help="Make the changes of each layer equally long first.")
    ] = False,
    density: Annotated[float, typer.Option(help="Share of the numbers that ties and dare keep.")] = 0.5,
    rank: Annotated[int, typer.Option(min=0, help="Of svd; 0: the largest of the inputs'.")] = 0,
    seed: Annotated[int, typer.Option(help="Of what dare drops.")] = 0,
) -> None:
    """Put several adapters of one base model together as one, which claims what its runs do; no record is read."""
    from fedveil.common.paths import check_adapter, given_run

    found = [given_run(folder) for folder in folders]
    for folder in found:
        check_adapter(folder / "adapter")
    from fedveil.contrib.library.compose import Recipe
    from fedveil.contrib.library.compose import compose as put_together
    from fedveil.reports.derived import NO_RECORD, together_sentence

    try:
        shares = tuple(float(part) for part in weights.split(",")) if weights else ()
    except ValueError as error:
        raise ConfigError(f"--weights is {weights!r}: write numbers with commas between them") from error
    made = put_together(found, out, Recipe(rule, shares, equal_norms, density, rank, seed))
    console.print(f"{out}: {NO_RECORD} {together_sentence(made)}")
    for figure in made.figures:
        console.print(f"{100 * figure.value:.2g} %  {figure.name}")
    for line in (*made.notes, *(source.claim for source in made.sources)):
        console.print(visible(line))

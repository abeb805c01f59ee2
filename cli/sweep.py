"""``fedveil sweep``, ``fedveil tune`` and ``fedveil pictures``: many runs, a choice between them, their pictures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fedveil.cli.errors import for_people
from fedveil.common.ends import end_as_by_ctrl_c
from fedveil.common.errors import ConfigError, DataError
from fedveil.common.words import visible

if TYPE_CHECKING:
    from fedveil.experiments.sweep.rows import Row
    from fedveil.experiments.tune import Conduct

console = Console(highlight=False, soft_wrap=True, emoji=False, markup=False)


@for_people
def sweep(
    file: Annotated[
        Path,
        typer.Argument(help="A sweep: a TOML file with axes, or with one run's settings; or a shipped one by name."),
    ],
    output: Annotated[Path | None, typer.Option(help="Folder of the runs; in runs/sweeps if not said.")] = None,
    results: Annotated[Path | None, typer.Option(help="Folder of the table; the output if not said.")] = None,
    jobs: Annotated[int, typer.Option(help="Runs at a time; each has its share of the cores.")] = 1,
    flower: Annotated[bool, typer.Option("--flower", help="Run through Flower, not in one process.")] = False,
    only: Annotated[str, typer.Option(help="Names of the runs to start, such as '*-eps-8-*'.")] = "*",
    any_code: Annotated[bool, typer.Option("--any-code", help="Keep rows of other code; each says which.")] = False,
) -> None:
    """Run every variant × ε × seed of a file with its baselines, and write one table.

    A finished run of the same configuration, versions and code is kept, so the same command goes on where it was cut
    off. A run that fails is named with its log, the rest goes on, and the exit code is 1.
    """
    from fedveil.common.files import replace_file
    from fedveil.experiments.sweep.conduct import run_sweep
    from fedveil.experiments.sweep.file import read_sweep
    from fedveil.experiments.sweep.rows import results_file
    from fedveil.experiments.sweep.summary import markdown_of

    end_as_by_ctrl_c()
    read = read_sweep(file)
    output = output or Path("runs") / "sweeps" / read.name
    results = results or output
    with _folder_said(output):
        ended = run_sweep(read, output, results, _say, jobs=jobs, flower=flower, any_code=any_code, only=only)
    table = results_file(results, read.name)
    replace_file(table.with_suffix(".md"), markdown_of(ended.rows).encode())
    _say(f"\n{markdown_of(ended.rows, folded=False)}")
    _say(f"written to {table}, and .csv and .md beside it")
    if ended.failed:
        lines = (f"  {failed.cell.said}: {failed.reason}; log: {failed.log}" for failed in ended.failed)
        _say("\n".join([f"{len(ended.failed)} of {len(read.cells)} runs failed:", *lines]))
        raise typer.Exit(1)


@for_people
def tune(
    file: Annotated[
        Path, typer.Argument(help="A sweep's file or name, with one seed and one ε: that of all together.")
    ],
    output: Annotated[Path | None, typer.Option(help="Folder of the trials; in runs/tune if not said.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask once the total is printed.")] = False,
    server: Annotated[
        Path | None, typer.Option(help="A server's folder: the trials run on its sites, not on simulated ones.")
    ] = None,
    sites: Annotated[int, typer.Option(min=1, help="With --server: sites that must be online first.")] = 1,
    ledger_epsilon: Annotated[
        float | None, typer.Option(min=0, help="With --server: ε that a ledger may hold, with what it held before.")
    ] = None,
) -> None:
    """Print what all variants cost together, ask, run each with the same noise, charged in full, and name the best."""
    from fedveil.experiments import tune as trials
    from fedveil.privacy.figures import epsilon_text

    end_as_by_ctrl_c()
    tuning = trials.read_tuning(file, simulated=server is None)
    output = output or Path("runs") / "tune" / tuning.name
    for name, alone in tuning.alone.items():
        _say(f"{name}: ε {epsilon_text(alone)} alone")
    count, delta, noise = len(tuning.trials), f"at δ {tuning.delta:g}", f"{tuning.noise_multiplier:.4g}"
    _say(
        f"all {count} together: ε {epsilon_text(tuning.epsilon)} of {tuning.budget:g} {delta}, with noise multiplier "
        f"{noise} in each. Every site is charged that, whichever is chosen: the server sees every "
        "trial, so no discount for publishing one holds."
    )
    conduct = _deployed(server, sites, ledger_epsilon) if server else trials.simulated(tuning, output)
    if not yes and not typer.confirm("Run them?"):
        _say("nothing was run, and nothing is charged")
        return
    with _folder_said(output):
        best, charged = trials.tune(tuning, output, conduct, _say)
    _say(f"charged to each ledger, at most: ε {epsilon_text(charged)} {delta}")
    flattered = f"It is the best of {count} on the same public records, so its score is flattered"
    _say(f"best is {best}. {flattered}: measure it on others before it is quoted.")
    _say(f"report: {best.folder / 'report.html'}")


def _deployed(server: Path, sites: int, ledger_epsilon: float | None) -> Conduct:
    """Return what submits a trial to a server's sites, whose own ledgers and policies decide."""
    from fedveil.deploy.server_folder import open_server
    from fedveil.deploy.submit import submit
    from fedveil.experiments.tune import BUDGET

    folder = open_server(server)
    limit = {} if ledger_epsilon is None else {BUDGET: ledger_epsilon}
    # ``once``: a trial that ended before it was written down is not run, and paid, again.
    return lambda _, settings: submit(folder, {**settings, **limit}, _say, sites=sites, once=True)


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
    from fedveil.experiments.sweep.pictures import write_pictures
    from fedveil.experiments.sweep.published import SHIPPED, read_published
    from fedveil.experiments.sweep.rows import read_rows

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


@contextmanager
def _folder_said(output: Path) -> Iterator[None]:
    """Say where to go on if what runs within is cut off."""
    try:
        yield
    except BaseException:
        with suppress(OSError):  # of a terminal that is gone
            _say(f"folder: {output} (the same command goes on)")
        raise


def _say(line: str) -> None:
    print(*map(visible, line.split("\n")), sep="\n", flush=True)

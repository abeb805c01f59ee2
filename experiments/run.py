"""Run a sweep, or one configuration: ``python -m experiments.run FILE`` is ``fedveil sweep FILE``."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from common.ends import end_as_by_ctrl_c
from common.errors import FedVeilError


def sweep(
    file: Annotated[
        Path,
        typer.Argument(help="TOML file: a base configuration and its axes, or one run's settings."),
    ],
    output: Annotated[
        Path | None, typer.Option(help="Folder of the runs, a folder each; in runs/sweeps if not said.")
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help="Folder of the table, as .jsonl, .csv and .md; the output if not said.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Runs at a time; each has its share of the cores.")] = 1,
    flower: Annotated[bool, typer.Option("--flower", help="Run through Flower, not in one process.")] = False,
    only: Annotated[str, typer.Option(help="Names of the runs to start, such as '*-eps-8-*'.")] = "*",
    any_code: Annotated[
        bool, typer.Option("--any-code", help="Keep rows of other versions of the code; each says which.")
    ] = False,
) -> None:
    """Run every variant × ε × seed of a file with its baselines, and write one table.

    A finished run of the same configuration, versions and code is kept, so the same command goes on where it was cut
    off. A run that fails is named with its log, the rest goes on, and the exit code is 1.
    """
    from common.files import replace_file
    from experiments.sweep.conduct import run_sweep
    from experiments.sweep.file import read_sweep
    from experiments.sweep.rows import results_file
    from experiments.sweep.summary import markdown_of

    end_as_by_ctrl_c()
    read = read_sweep(file)
    output = output or Path("runs") / "sweeps" / read.name
    results = results or output
    try:
        ended = run_sweep(read, output, results, _say, jobs=jobs, flower=flower, any_code=any_code, only=only)
    except BaseException:
        with suppress(OSError):  # of a terminal that is gone
            _say(f"folder: {output} (the same command goes on)")
        raise
    table = results_file(results, read.name)
    text = markdown_of(ended.rows)
    replace_file(table.with_suffix(".md"), text.encode())
    _say(f"\n{text.partition('<details>')[0]}")
    _say(f"written to {table}, and .csv and .md beside it")
    if ended.failed:
        _say(f"{len(ended.failed)} of {len(read.cells)} runs failed:")
        for failed in ended.failed:
            _say(f"  {failed.cell.said}: {failed.reason}; log: {failed.log}")
        raise typer.Exit(1)


def _say(line: str) -> None:
    print(line, flush=True)


def main() -> None:
    """Run the command, with errors as one line."""
    try:
        typer.run(sweep)
    except FedVeilError as error:
        print(f"fedveil: {error}", file=sys.stderr)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()

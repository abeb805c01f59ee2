"""A sweep from its first run to its last: what is there already is kept, what fails is named, the rest goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from fedveil.common.errors import ConfigError, DataError
from fedveil.common.files import append_lines
from fedveil.common.strict_json import to_json
from fedveil.common.tasks import headline_of
from fedveil.common.words import percent_text
from fedveil.experiments.recipes import recipes_said
from fedveil.experiments.sweep.file import Cell, Sweep
from fedveil.experiments.sweep.one_run import (
    LOG,
    ROW,
    Work,
    basis_of,
    code_version,
    commit_of,
    run_one,
    through_of,
)
from fedveil.experiments.sweep.processes import LAST_SECONDS, Failure, each_in_a_process
from fedveil.experiments.sweep.rows import Key, Row, read_rows, results_file, row_of, write_rows
from fedveil.privacy.figures import epsilon_text, honest_text
from fedveil.server.lock import only_writer

ASIDE = "set-aside"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Failed:
    """A run of a sweep that came to nothing."""

    cell: Cell
    reason: str
    log: Path


@dataclass(frozen=True)
class Finished:
    """The end of a sweep."""

    rows: list[Row]
    """In the order of the sweep's file."""
    failed: list[Failed]


def run_sweep(
    sweep: Sweep,
    output: Path,
    results: Path,
    say: Say,
    *,
    jobs: int = 1,
    flower: bool = False,
    any_code: bool = False,
    only: str = "*",
) -> Finished:
    """Run what a sweep's table lacks, and write the table again after every run.

    Args:
        sweep, output: the runs, and the folder of their folders.
        results: folder of the table, ``<sweep>.jsonl`` and ``<sweep>.csv``.
        say: prints a line, such as one for each run.
        jobs: runs at a time, which share the machine's cores.
        flower: whether runs of all sites go through Flower; the others never do.
        any_code: whether to keep rows of other versions of the code.
        only: pattern of the names of runs that may be started; rows of the others stay in the table.

    Raises:
        ConfigError: more jobs than cores, or no run has such a name.
        DataError, RunFailed: the table cannot be read, or another sweep writes ``output``.
    """
    threads = _threads(jobs)
    if not any(fnmatchcase(cell.name, only) for cell in sweep.cells):
        raise ConfigError(f"--only is {only!r}, and no run is called so; the first is {sweep.cells[0].name!r}")
    say(recipes_said(sweep.recipes))
    origin = code_version(), commit_of(), threads
    output.mkdir(parents=True, exist_ok=True)
    with only_writer(output):
        file = results_file(results, sweep.name)
        place = output.absolute()
        works = [Work(sweep.name, c, place / c.name, through_of(c, flower=flower), *origin) for c in sweep.cells]
        rows = _begun(sweep, works, file, say, any_code=any_code)
        missing = [work for work in works if _key(work.cell) not in rows and fnmatchcase(work.cell.name, only)]
        failed = _run_all(sweep, missing, rows, file, jobs, say)
    return Finished(_ordered(sweep, rows), failed)


def _begun(sweep: Sweep, works: Sequence[Work], file: Path, say: Say, *, any_code: bool) -> dict[Key, Row]:
    """Return the rows that are valid for their runs, once the table has these alone."""
    before = read_rows(file)
    rows = _valid(works, before, say, any_code=any_code)
    _set_aside(file, [row for row in before if row not in rows.values()], say)
    write_rows(file, _ordered(sweep, rows))
    if rows:
        say(f"{len(rows)} of {len(works)} runs are there already")
    return rows


def _run_all(
    sweep: Sweep, works: Sequence[Work], rows: dict[Key, Row], file: Path, jobs: int, say: Say
) -> list[Failed]:
    """Add a row for each run and write the table again; return the runs that failed."""
    failed: list[Failed] = []
    for work in works:
        _move_aside(work.folder)
    threads = works[0].threads if works else 1
    with closing(each_in_a_process(run_one, works, jobs, threads, _log)) as ending:
        for number, (work, outcome) in enumerate(ending, start=len(rows) + 1):
            place = f"{number}/{len(sweep.cells)} {work.cell.said}"
            if isinstance(outcome, Failure):
                failed.append(Failed(work.cell, outcome.reason, _log(work)))
                say(f"{place}: FAILED, {outcome.reason}; log: {_log(work)}")
                continue
            rows[outcome.key] = outcome
            write_rows(file, _ordered(sweep, rows))
            say(f"{place}: {row_words(outcome)}")
    return failed


def row_words(row: Row) -> str:
    """Return a row's result in words."""
    spent = "no privacy" if row.epsilon is None else f"ε {epsilon_text(row.epsilon)}{honest_text(row.honest)} spent"
    early = "" if row.status == "completed" else f", stopped after {row.rounds} rounds"
    took = "" if row.seconds_in_all is None else f", {row.seconds_in_all:.0f} s"
    name = headline_of(row.settings)
    return f"{name} {percent_text(row.accuracy)} ({percent_text(row.accuracy_before)} before), {spent}{took}{early}"


def _threads(jobs: int) -> int:
    from fedveil.common.threads import site_cores

    cores = site_cores()
    if not 1 <= jobs <= cores:
        raise ConfigError(f"--jobs is {jobs}, and this machine has {cores} cores for it: give 1 to {cores}")
    return cores // jobs


def _log(work: Work) -> Path:
    return work.folder / LOG


def _key(cell: Cell) -> Key:
    return cell.variant, cell.arm, cell.site, cell.epsilon, cell.seed


def _ordered(sweep: Sweep, rows: dict[Key, Row]) -> list[Row]:
    return [rows[key] for key in map(_key, sweep.cells) if key in rows]


def _valid(works: Sequence[Work], before: Iterable[Row], say: Say, *, any_code: bool) -> dict[Key, Row]:
    """Return the rows, of the table or of the runs' own folders, that a run would have now as well."""
    known: dict[Key, list[Row]] = {}
    for row in before:
        known.setdefault(row.key, []).append(row)
    valid: dict[Key, Row] = {}
    for work in works:
        found = known.get(_key(work.cell), []) + _of_folder(work)
        basis = basis_of(work.cell, work.through, work.code)
        differing = [basis.differs(row, code_too=not any_code) for row in found]
        fitting = [row for row, differs in zip(found, differing, strict=True) if not differs]
        if fitting:
            # Another sweep's name, or a run's folder that was made under it, is no part of a result.
            valid[_key(work.cell)] = replace(fitting[0], sweep=work.sweep)
        elif found:
            say(f"{work.cell.said}: a result with {differing[0]} is not taken for this one's")
    return valid


def _of_folder(work: Work) -> list[Row]:
    path = work.folder / ROW
    if not path.is_file():
        return []
    row = row_of(path.read_text(encoding="utf-8"), str(path))
    if row.key != _key(work.cell):
        raise DataError(f"{path} is of another run than its folder's name says: move that folder away")
    return [row]


def _set_aside(file: Path, rows: Sequence[Row], say: Say) -> None:
    """Append rows that leave the table to a file beside it: they were paid for."""
    if not rows:
        return
    aside = results_file(file.parent, f"{file.stem}.{ASIDE}")
    append_lines(aside, [to_json(row) for row in rows])
    say(f"{len(rows)} rows of other runs than this sweep's leave the table for {aside}")


def _move_aside(folder: Path) -> None:
    """Rename the folder of a run that is to be run again.

    Raises:
        RunFailed: a process of a sweep that was killed still writes it, long after it should have ended.
    """
    if folder.exists():
        for run in filter(Path.is_dir, folder.iterdir()):
            with only_writer(run, LAST_SECONDS):
                pass
        folder.rename(folder.with_name(f"{folder.name}.{ASIDE}-{time.time_ns()}"))

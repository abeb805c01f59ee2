"""One run of a sweep, from its settings to its row."""

from __future__ import annotations

import math
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedveil.common.bundle import PROJECT, digest, files_of
from fedveil.common.errors import RunFailed
from fedveil.common.files import replace_file
from fedveil.common.run_lines import BaselineFile, ConfigFile, ResultFile, RoundLine, read_file, read_lines
from fedveil.common.tasks import TASKS
from fedveil.common.words import counted, visible
from fedveil.experiments.sweep.arms import ARMS
from fedveil.experiments.sweep.file import Cell
from fedveil.experiments.sweep.processes import forget_peak, peak_memory
from fedveil.experiments.sweep.rows import Basis, Costs, Row, line_of

if TYPE_CHECKING:
    from fedveil.strategies.job import Job

Through = Literal["one process", "flower"]
ROW = "row.json"
LOG = "log.txt"
PART = 0.95
"""Of a run's gain."""
FEWEST_POINTS = 4
"""Scores of a run, its start and its end among them, between which to look for that."""
PROCESSORS = Path("/proc/cpuinfo")
"""Where Linux names the model of each processor; on some kinds it does not."""


@dataclass(frozen=True)
class Work:
    """One run for a process."""

    sweep: str
    cell: Cell
    folder: Path
    """Of this run: its row, its log and the run's own folder."""
    through: Through
    code: str
    """That the sweep began with."""
    commit: str
    threads: int


def code_version(project: Path = PROJECT) -> str:
    """Return the hash of the code that makes a row, of servers, sites and experiments, as it is on the disk now."""
    own = {path.relative_to(project).as_posix(): path.read_bytes() for path in project.glob("experiments/**/*.py")}
    return digest({**files_of(project), **dict(sorted(own.items()))})


def commit_of(project: Path = PROJECT) -> str:
    """Return the commit of a work tree under git, with ``+`` if tracked files are changed; else an empty text."""
    answers = []
    for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no")):
        try:
            done = subprocess.run(["git", "-C", str(project), *words], capture_output=True, text=True, check=False)
        except OSError:
            return ""
        if done.returncode:
            return ""
        answers.append(done.stdout.strip())
    return answers[0] + ("+" if answers[1] else "")


def processor(source: Path = PROCESSORS) -> str:
    """Return the model of the processor, as ``AMD EPYC``; its kind, as ``aarch64``, where the system names no model."""
    try:
        text = source.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    model = re.search(r"^model name[ \t]*:[ \t]*(\S.*)$", text, flags=re.MULTILINE)
    return visible(model[1]).strip() if model else platform.machine()


def through_of(cell: Cell, *, flower: bool) -> Through:
    """Return how the server and the sites of a run meet: Flower simulates all sites of a division, never one of it."""
    return "flower" if flower and cell.site is None and not ARMS[cell.arm].fitted else "one process"


def basis_of(cell: Cell, through: Through, code: str) -> Basis:
    """Return what the row of a run would rest on now."""
    from fedveil.server.records import package_versions

    settings = {key: value for key, value in cell.job(Path()).settings().items() if key != "output"}
    versions = {"python": platform.python_version(), **package_versions(str(settings["model.quantise"]))}
    return Basis(settings, cell.sites, through, versions, code)


def run_one(work: Work) -> Row:
    """Conduct one run in its folder, write its row there, and return it.

    Raises:
        FedVeilError: the run failed, or the code changed meanwhile.
    """
    from fedveil.common.model.federated import model_of

    _same_code(work)
    model_of.cache_clear()  # no run finds the features or the rehearsal of the one before: seconds are comparable
    began, worked, reset = time.monotonic(), time.process_time(), forget_peak()
    if ARMS[work.cell.arm].fitted:
        row = _fitted_row(work)
    else:
        run = _through_flower(work) if work.through == "flower" else _in_process(work)
        seconds, worked = time.monotonic() - began, time.process_time() - worked
        row = _row(work, run, seconds, worked, peak_memory() if reset else (None, None))
    _same_code(work)
    replace_file(work.folder / ROW, line_of(row).encode())
    return row


def _same_code(work: Work) -> None:
    if code_version() != work.code:
        raise RunFailed("the code has changed since the sweep began: start the sweep again")


def _in_process(work: Work) -> Path:
    from fedveil.experiments.in_process import run_in_process
    from fedveil.experiments.site_count import record_sites

    cell, arm = work.cell, ARMS[work.cell.arm]
    nodes = arm.nodes(cell.sites, cell.site)
    run = run_in_process({**cell.settings, "output": str(work.folder)}, nodes, cell.name)
    if cell.site is None:  # of a site alone no number of sites is to be gone on with
        record_sites(run, len(nodes))
    return run


def _through_flower(work: Work) -> Path:
    from fedveil.experiments.simulate import simulate

    cell = work.cell
    sites = len(ARMS[cell.arm].nodes(cell.sites, cell.site))
    return simulate({**cell.settings, "output": str(work.folder)}, sites, lambda _: None)


def _row(work: Work, run: Path, seconds: float, processor_seconds: float, memory: tuple[int | None, int | None]) -> Row:
    from fedveil.common.data.sources import public_test
    from fedveil.server.collect.door import shown_of

    cell, job = work.cell, work.cell.job(work.folder)
    result, baseline, config = read_file(ResultFile, run), read_file(BaselineFile, run), read_file(ConfigFile, run)
    if result.reached is None or result.status == "failed":
        raise RunFailed(result.reason or "the run ended without a result")
    reached, shown, lines = result.reached, shown_of(job), read_lines(RoundLine, run)
    losses = [baseline.loss, *(line.loss for line in lines if line.complete and line.loss is not None)]
    travels = not ARMS[cell.arm].baseline
    measured = work.through != "flower" and shown.seconds(processor_seconds) is not None
    return Row(
        **_origin(work, job),
        site=cell.site,
        epsilon_asked=cell.epsilon,
        status=result.status,
        accuracy_before=reached.accuracy_before,
        accuracy=reached.accuracy,
        loss_before=baseline.loss,
        loss=losses[-1],
        test_records=len(public_test(job.config.data, job.config.model.task).examples),
        epsilon=reached.epsilon,
        delta=None if reached.epsilon is None else job.config.privacy.delta,
        rounds=reached.rounds,
        bytes_down=sum(line.bytes_down for line in lines) if travels else None,
        bytes_up=sum(line.bytes_up for line in lines) if travels else None,
        seconds=shown.seconds(sum(line.seconds or 0.0 for line in lines)),
        seconds_in_all=shown.seconds(seconds),
        started=config.started,
        versions=config.versions,
        settings={key: value for key, value in config.settings.items() if key != "output"},
        sent=shown.of_a_site(most_sent(lines)),
        processor_seconds=shown.seconds(processor_seconds) if measured else None,
        costs=_costs(run, job, memory if measured else (None, None), travels=travels),
    )


def _costs(run: Path, job: Job, memory: tuple[int | None, int | None], *, travels: bool) -> Costs:
    from fedveil.experiments.evaluate import read_peft_config

    lines, labelled = read_lines(RoundLine, run), TASKS[job.config.model.task].labelled
    rounds, sent = to_gain(read_file(BaselineFile, run), lines, labelled=labelled) or (None, None)
    seconds = [line.seconds for line in lines if line.complete and line.round_number and line.seconds is not None]
    tuned = run / "adapter" / "adapter_config.json"  # a run of the head alone has none
    ranks = (read_peft_config(tuned) if tuned.is_file() else {}).get("rank_pattern") or None
    return Costs(
        rounds_to_gain=rounds,
        bytes_to_gain=sent if travels else None,
        round_seconds=statistics.median(seconds) if seconds else None,
        memory=memory[0],
        gpu_memory=memory[1],
        ranks=ranks and {layer.replace("\\", ""): rank for layer, rank in ranks.items()},
    )


def to_gain(baseline: BaselineFile, lines: Iterable[RoundLine], *, labelled: bool) -> tuple[float, float] | None:
    """Return rounds and bytes after which a run first had ``PART`` of its gain, as ``Costs`` says; None: unknown.

    Args:
        baseline, lines: of the run.
        labelled: whether accuracy is judged; else the loss.
    """

    def score(accuracy: float | None, loss: float | None) -> float | None:
        return accuracy if labelled else None if loss is None else -loss

    found, sent = [(0.0, 0.0, score(baseline.accuracy, baseline.loss))], 0
    for line in lines:
        sent += line.bytes_down + line.bytes_up
        now = (line.accuracy, line.loss) if line.round_number else (baseline.begun_accuracy, baseline.begun_loss)
        found += [(float(line.round_number), float(sent), score(*now))] if line.complete else []
    points = [(*place, value) for *place, value in found if value is not None and math.isfinite(value)]
    if len(points) < FEWEST_POINTS or points[-1][2] <= points[0][2]:
        return None
    wanted = points[0][2] + PART * (points[-1][2] - points[0][2])
    for (start, bytes_before, had), (end, bytes_then, has) in pairwise(points):
        if has >= wanted:
            part = (wanted - had) / (has - had)
            return start + part * (end - start), bytes_before + part * (bytes_then - bytes_before)
    return None


def _origin(work: Work, job: Job) -> dict[str, Any]:
    """Return the fields of a row that say which run of a sweep it is, and on which code and machine."""
    from fedveil.common.model.device import choose_device, choose_precision

    device = choose_device(job.config.device)
    return {
        "sweep": work.sweep,
        "variant": work.cell.variant,
        "arm": work.cell.arm,
        "seed": work.cell.seed,
        "sites": work.cell.sites,
        "through": work.through,
        "device": str(device),
        "precision": str(choose_precision(job.config.precision, device)).removeprefix("torch."),
        "threads": work.threads,
        "machine": f"{processor()}, {counted(_cores(), 'core')}",
        "code": work.code,
        "commit": work.commit,
    }


def most_sent(lines: Iterable[RoundLine]) -> int | None:
    """Return the most numbers, of 4 bytes each, that a site sent in a round that counts; None if there was none."""
    sent = [line.bytes_up // (4 * len(line.participants)) for line in lines if line.complete and line.round_number]
    return max(sent, default=None)


def _fitted_row(work: Work) -> Row:
    """Return the row of a head that is fitted, which is no run: it has no round, and nothing of it travels."""
    from fedveil.experiments.sweep.fitted_head import fitted

    cell, job, began = work.cell, work.cell.job(work.folder), time.monotonic()
    started = datetime.now(UTC).isoformat(timespec="seconds")
    head, basis = fitted(job), basis_of(cell, work.through, work.code)
    seconds = round(time.monotonic() - began, 3)
    return Row(
        **_origin(work, job),
        site=None,
        epsilon_asked=None,
        status="completed",
        accuracy_before=head.before.accuracy,
        accuracy=head.after.accuracy,
        loss_before=head.before.loss,
        loss=head.after.loss,
        test_records=head.test_records,
        epsilon=None,
        delta=None,
        rounds=0,
        bytes_down=None,
        bytes_up=None,
        seconds=seconds,
        seconds_in_all=seconds,
        started=started,
        versions=basis.versions,
        settings=basis.settings,
        penalty=head.penalty,
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

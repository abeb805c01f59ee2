"""Work in processes: so many at a time, what fails or dies is named, and the rest goes on."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fedveil.common.errors import RunFailed
from fedveil.experiments.sweep.processes import Failure, each_in_a_process, with_threads

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 60.0
LOADED = os.environ.get("OMP_NUM_THREADS")
"""What libraries read that a process loads with this module, before it does anything."""


def until(there: Path, seconds: float = PATIENCE) -> bool:
    deadline = time.monotonic() + seconds
    while not there.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def meet(work: tuple[Path, Path, float]) -> bool:
    """Say that one is there, and return whether the other one comes."""
    own, other, seconds = work
    own.touch()
    return until(other, seconds)


def behave(work: str) -> str:
    """End as the work says."""
    print(f"at {work}", flush=True)
    if work == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if work == "fails":
        raise RunFailed("no site answered")
    if work == "breaks":
        raise KeyError("secret")
    return f"{work}, {LOADED} threads"


def sleep_long(work: Path) -> None:
    """Say which process one is, take longer than anyone waits, and end what was started when one is ended."""
    try:
        work.with_suffix(".new").write_text(str(os.getpid()), encoding="utf-8")
        work.with_suffix(".new").rename(work)  # who waits for the file ends this process at once
        time.sleep(1000)
    finally:
        work.with_suffix(".ended").touch()


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(process: int) -> bool:
    deadline = time.monotonic() + PATIENCE
    while is_alive(process) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_alive(process)


@pytest.mark.parametrize(("jobs", "seconds", "both"), [(2, PATIENCE, True), (1, 0.2, False)])
def test_so_many_are_at_work_at_a_time(jobs: int, seconds: float, both: bool, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    works = [(first, second, seconds), (second, first, seconds)]
    ended = dict(each_in_a_process(meet, works, jobs, 1, lambda work: work[0].with_suffix(".log")))
    assert ended[works[0]] is both
    assert ended[works[1]] is True


def test_what_fails_or_dies_is_named_with_its_log_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the pool's own thread, which collects the exit code, is slow to tell it."""
    collect = os.waitpid

    def waitpid(process: int, options: int) -> tuple[int, int]:
        found = collect(process, options)
        if found[0] and threading.current_thread() is not threading.main_thread():
            time.sleep(0.3)
        return found

    monkeypatch.setattr(os, "waitpid", waitpid)
    works = ["a", "fails", "breaks", "dies", "b"]
    ended = dict(each_in_a_process(behave, works, 1, 3, lambda work: tmp_path / work / "log.txt"))
    assert ended["a"] == "a, 3 threads"
    assert ended["b"] == "b, 3 threads"
    assert ended["fails"] == Failure("no site answered")
    assert ended["breaks"] == Failure("KeyError: 'secret'")
    died = ended["dies"]
    assert isinstance(died, Failure)
    assert "exit code -9 (killed, perhaps for want of memory" in died.reason
    logs = {work: (tmp_path / work / "log.txt").read_text(encoding="utf-8") for work in works}
    assert all(text.startswith(f"at {work}\n") for work, text in logs.items())
    assert "Traceback" in logs["fails"]


def test_what_a_process_is_told_of_threads_stays_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, before in itertools.product(("OMP_NUM_THREADS", "FEDVEIL_CORES"), ("2", None)):
        monkeypatch.delenv(variable, raising=False)
        if before:
            monkeypatch.setenv(variable, before)
        with with_threads(3):
            assert os.environ[variable] == "3"
        assert os.environ.get(variable) == before


def test_who_stops_to_listen_ends_the_processes(tmp_path: Path) -> None:
    ending = each_in_a_process(
        sleep_or_return, [tmp_path / "long", tmp_path / "short"], 2, 1, lambda w: w.with_suffix(".log")
    )
    assert next(ending)[0].name == "short"
    assert until(tmp_path / "long")
    ending.close()
    assert gone(int((tmp_path / "long").read_text(encoding="utf-8")))
    assert (tmp_path / "long.ended").exists(), "what it had started was left"


def sleep_or_return(work: Path) -> None:
    """Take long if that is the name of the work."""
    if work.name == "long":
        sleep_long(work)
    until(work.with_name("long"))


def test_no_process_outlives_a_parent_that_was_killed(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from test_sweep_processes import sleep_long\n"
        "from fedveil.experiments.sweep.processes import each_in_a_process\n"
        "list(each_in_a_process(sleep_long, [Path(sys.argv[1])], 1, 1, lambda work: work.with_suffix('.log')))"
    )
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "child")], env={**os.environ, "PYTHONPATH": path}
    ) as parent:
        assert until(tmp_path / "child")
        child = int((tmp_path / "child").read_text(encoding="utf-8"))
        parent.kill()
    assert gone(child)
    assert (tmp_path / "child.ended").exists(), "what it had started was left"

"""A worker that dies leaves no dump of its memory, in which records are."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fedveil.client import worker

DIES = """
import os, resource, signal
from fedveil.client.dumps import write_no_dumps
resource.setrlimit(resource.RLIMIT_CORE, (resource.getrlimit(resource.RLIMIT_CORE)[1],) * 2)
{call}
{after}
held = "a record that nobody " + "is to read"
os.kill(os.getpid(), signal.SIGABRT)
"""
AGAIN = "resource.setrlimit(resource.RLIMIT_CORE, (resource.getrlimit(resource.RLIMIT_CORE)[1],) * 2)"


def dumped(folder: Path, call: str, after: str = "") -> bool:
    """Return whether the system has written a dump of a process that dies, or handed one to a program."""
    code = DIES.format(call=call, after=after)
    process = subprocess.Popen([sys.executable, "-c", code], cwd=folder, env={"PYTHONPATH": os.pathsep.join(sys.path)})
    _, status = os.waitpid(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == -signal.SIGABRT
    return os.WCOREDUMP(status) or any(folder.iterdir())


@pytest.mark.parametrize("after", ["", AGAIN if sys.platform == "linux" else ""], ids=["by a limit", "piped"])
def test_a_process_that_asked_for_no_dump_leaves_none(after: str, tmp_path: Path) -> None:
    assert not dumped(tmp_path, "write_no_dumps()", after)


@pytest.mark.skipif(sys.platform != "linux", reason="another system has no such mark")
def test_a_process_that_asked_says_so_wherever_dumps_go() -> None:
    """Also where the system writes none, and the next test is skipped."""
    asked = "import ctypes, resource\nfrom fedveil.client.dumps import write_no_dumps\n{}\n"
    shown = "print(resource.getrlimit(resource.RLIMIT_CORE)[0], ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))"
    for call, told in (("write_no_dumps()", True), ("", False)):
        code = asked.format(call) + shown
        said = subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, check=True
        ).stdout.split()
        assert (said == [b"0", b"0"]) is told


@pytest.mark.skipif(resource.getrlimit(resource.RLIMIT_CORE)[1] == 0, reason="no process may leave a dump here")
def test_a_process_that_did_not_ask_is_found(tmp_path: Path) -> None:
    if not dumped(tmp_path, ""):
        pytest.skip("the system writes no dumps here")
    assert all(b"that nobody is to read" in file.read_bytes() for file in tmp_path.iterdir())


def test_a_worker_asks_before_it_reads_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(worker, "require_system_entropy", lambda: None)  # tests draw from a source of their own
    monkeypatch.setattr(worker, "write_no_dumps", lambda: asked.append("asked"))
    monkeypatch.setattr(worker, "set_up", lambda: asked.append("goes on"))
    none = str(tmp_path / "none")  # nothing to read there: the worker ends
    words = ("--port", "1", "--secret", none, "--node", "{}", "--authority", none, "--key", none)
    monkeypatch.setattr(sys, "argv", ["worker", *words])
    assert worker.main() == 1
    assert asked == ["asked", "goes on"]

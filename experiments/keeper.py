"""Run a command, and end it with all that it started once the starter is gone, however that ends.

Run as ``python -P -m fedveil.experiments.keeper FOLDER COMMAND...``, with a pipe as standard input that the starter
alone can write to: the operating system closes it whichever way the starter ends, SIGKILL included. Then sites that
have paid for a round finish and keep their answers first, no other one begins (``client.door``), and everything below
is ended. On Linux what lost its parent stays below this process, also in a session of its own, as Ray's processes are;
elsewhere what leads a process group is found as long as its parents live. It stays while a run lasts, so it imports the
standard library alone.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from fedveil.common.parent import die_with_parent

DOOR, LOG = "door", "log"
"""Files in the folder: the one that a site at work holds, and what the command prints."""
POLL_SECONDS = 0.1
WORK_SECONDS = 10.0
"""How long sites that have paid for a round may take to finish it."""
PATIENCE = 5.0
"""How long a process may take to end before it is killed."""
_ADOPT_ORPHANS = 36
"""prctl's PR_SET_CHILD_SUBREAPER."""


def start(folder: Path, command: list[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a keeper with a command, whose output goes to ``log`` in the folder; it ends with this process.

    It has a session of its own, so that no signal of the terminal reaches what is below it.
    """
    keeper = [sys.executable, "-P", "-m", "fedveil.experiments.keeper", str(folder)]
    with (folder / LOG).open("wb") as log:
        return subprocess.Popen(
            [*keeper, *command], env=environment, stdin=-1, stdout=log, stderr=log, start_new_session=True
        )


def let_end(keeper: subprocess.Popen[bytes]) -> None:
    """Let a keeper end what is below it."""
    if keeper.stdin:
        keeper.stdin.close()


def end(keeper: subprocess.Popen[bytes]) -> None:
    """Let a keeper end what is below it, and wait for that."""
    let_end(keeper)
    keeper.wait()


def keep(folder: Path, command: list[str]) -> int:
    """Run the command until it ends or standard input does; return its exit code once nothing below is left.

    Args:
        folder: of the door; removed where the starter is gone.
        command: what to run.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _leave)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_ADOPT_ORPHANS, 1)
    (folder / DOOR).touch(mode=0o600)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=die_with_parent)
    try:
        while process.poll() is None:
            if select.select([sys.stdin], [], [], POLL_SECONDS)[0] and not os.read(0, 1):
                close_door(folder / DOOR)
                break
        return process.returncode or 0
    finally:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        orphaned = process.poll() is None
        end_below(os.getpid())
        if orphaned:
            shutil.rmtree(folder, ignore_errors=True)


def close_door(door: Path, patience: float = WORK_SECONDS) -> None:
    """Let no site begin to work any more, and wait until those that hold the door are through."""
    deadline = time.monotonic() + patience
    with door.open("rb") as file:
        door.unlink()
        while time.monotonic() < deadline:
            with suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            time.sleep(POLL_SECONDS)


def end_below(pid: int, patience: float = PATIENCE) -> None:
    """End every process below ``pid``: tell it to, and kill it where that takes longer than ``patience`` seconds."""
    for what in (signal.SIGTERM, signal.SIGKILL):
        ended, deadline = set[int](), time.monotonic() + patience
        while (below := processes_below(pid)) and time.monotonic() < deadline:
            for each in below - ended if what == signal.SIGTERM else below:
                with suppress(ProcessLookupError):
                    os.kill(each, what)
            ended |= below
            time.sleep(POLL_SECONDS)


def processes_below(pid: int) -> set[int]:
    """Return what a process has started, what these have, and what shares a process group with one of them."""
    running = list(_processes())
    own = next((group for process, _, group in running if process == pid), pid)
    found, groups = {pid}, {pid}
    while more := {process for process, parent, group in running if parent in found or group in groups} - found:
        found |= more
        groups |= {group for process, _, group in running if process in more} - {own}
    return found - {pid}


def _processes() -> Iterator[tuple[int, int, int]]:
    """Yield number, parent and group of every process of this machine that has not ended.

    A slim image of Linux has no ``ps``, and a first process that leaves zombies.
    """
    if not Path("/proc/self/stat").exists():
        with subprocess.Popen(["ps", "-A", "-o", "pid=,ppid=,pgid=,stat="], stdout=-1, text=True) as asking:
            for line in asking.communicate()[0].splitlines():
                pid, parent, group, state = line.split()
                if not state.startswith("Z") and int(pid) != asking.pid:
                    yield int(pid), int(parent), int(group)
        return
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # ended meanwhile
            # The name stands in brackets and may hold spaces; after it come state, parent and group.
            state, parent, group = stat.read_text(errors="replace").rpartition(")")[2].split()[:3]
            if state != "Z":
                yield int(stat.parent.name), int(parent), int(group)


def _leave(number: int, _: object) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(keep(Path(sys.argv[1]), sys.argv[2:]))

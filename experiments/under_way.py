"""The process that conducts a simulated run: find it, end it, and name the command that goes on with the run."""

from __future__ import annotations

import json
import os
import platform
import shlex
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from fedveil.common.errors import ConfigError, RunFailed
from fedveil.common.files import PROCESS
from fedveil.common.paths import named_run
from fedveil.common.run_lines import RunFile, read_file
from fedveil.common.strict_json import to_json
from fedveil.server.checkpoint import NAME
from fedveil.server.lock import GLANCE_SECONDS, is_locked, is_written, locked

STOP_SECONDS = 60.0
"""How long the end of a run may take: more than sites at work and what runs below have together."""
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class ProcessFile(RunFile):
    """The process that conducts a simulated run, which holds the operating system's lock on this file."""

    NAME: ClassVar[str] = PROCESS
    process: int
    where: str
    """The machine, and on Linux the space of its process numbers: a container has its own."""


@contextmanager
def conducting(folder: Path) -> Iterator[None]:
    """Say in a run's folder, until the block ends, that this process conducts the run.

    Raises:
        RunFailed: another process does.
    """
    path = folder / ProcessFile.NAME
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    under_way = RunFailed(f"the run in {folder} is under way: end it with `fedveil stop {folder}`")
    with locked(file, GLANCE_SECONDS, under_way):
        os.ftruncate(file, 0)
        os.write(file, json.dumps(to_json(ProcessFile(os.getpid(), _here()))).encode())
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def stop(run: str, output: Path | None = None) -> tuple[Path, int]:
    """End the ``fedveil run`` that is under way, wait until it is over, and return its folder and its process.

    ``run`` and ``output`` as for ``named_run``.

    Raises:
        ConfigError: no or several folders have the name, or no ``fedveil run`` conducts it here.
        RunFailed: it may not be ended by this user, or is not over after ``STOP_SECONDS``.
    """
    folder = named_run(run, str(output or ""))
    if not is_locked(folder / ProcessFile.NAME):
        other = "; a server, a sweep or another program writes it: end that one" if is_written(folder) else ""
        raise ConfigError(f"no `fedveil run` is under way in {folder}{other}")
    owner = read_file(ProcessFile, folder)
    if owner.where != _here():
        raise ConfigError(f"the run in {folder} is under way on {owner.where}: stop it there")
    try:
        # Whoever holds the lock wrote the number, so it is no later process's.
        os.kill(owner.process, signal.SIGTERM)
    except PermissionError as error:
        raise RunFailed(f"process {owner.process}, which conducts {folder}, is another user's: ask them") from error
    except ProcessLookupError:
        pass  # it has ended just now
    deadline = time.monotonic() + STOP_SECONDS
    while is_locked(folder / ProcessFile.NAME) or is_written(folder):
        if time.monotonic() > deadline:
            raise RunFailed(f"process {owner.process}, which conducts {folder}, has not ended in {STOP_SECONDS:g} s")
        time.sleep(POLL_SECONDS)
    return folder, owner.process


def ways_on(folder: Path) -> str:
    """Return where a run lies, and the command that goes on with it if one of its rounds is complete."""
    if not (folder / NAME).is_file():
        return f"folder: {folder} (no round is complete, so there is nothing to resume)"
    quote = "'" if set('"\\') & set(str(folder)) else '"'
    return f"folder: {folder}\nresume with: fedveil run -c {shlex.quote(f'resume={quote}{folder}{quote}')}"


def _here() -> str:
    with suppress(OSError):
        return f"{platform.node()}, {Path('/proc/self/ns/pid').readlink()}"
    return platform.node()

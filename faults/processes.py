"""The processes of a federation: started in the background, killed with all that they started themselves."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from fedveil.common.errors import RunFailed

POLL_SECONDS = 0.2


def wait_until(holds: Callable[[], bool], what: str, patience: float) -> float:
    """Wait for a condition and return the seconds that it took.

    Raises:
        RunFailed: it did not come true within ``patience`` seconds; ``what`` says what was waited for.
    """
    began = time.monotonic()
    while not holds():
        if time.monotonic() - began > patience:
            raise RunFailed(f"waited {patience:.0f} s for {what}")
        time.sleep(POLL_SECONDS)
    return time.monotonic() - began


class Processes:
    """Named sessions of processes; each appends to ``NAME.log`` in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._running = folder, dict[str, subprocess.Popen[bytes]]()

    def start(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start a command as the leader of a session of its own."""
        with (self._folder / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(
                command, env=environment, cwd=self._folder, stdout=log, stderr=log, start_new_session=True
            )

    def log(self, name: str) -> str:
        """Return what a process and those before it under this name have said."""
        path = self._folder / f"{name}.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def ended(self, name: str) -> bool:
        """Whether the session's leader is gone."""
        return self._running[name].poll() is not None

    def kill(self, name: str) -> None:
        """Send SIGKILL to all that it started, also in groups of their own."""
        process = self._running.pop(name)
        for number in [process.pid, *(int(path.name) for path in Path("/proc").glob("[0-9]*"))]:
            with suppress(ProcessLookupError, PermissionError):
                if os.getsid(number) == process.pid:
                    os.kill(number, signal.SIGKILL)
        process.wait()

    def kill_all(self) -> None:
        """End everything."""
        for name in list(self._running):
            self.kill(name)

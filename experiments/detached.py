"""A run that outlives its terminal: ``fedveil run`` in a session of its own, with its lines in a file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from fedveil.common.config.flat import Scalar
from fedveil.common.config.text import to_toml
from fedveil.common.errors import DataError, RunFailed
from fedveil.common.files import PROCESS, expanded, whole_lines
from fedveil.common.run_lines import read_if_there
from fedveil.experiments.under_way import ProcessFile
from fedveil.server.lock import is_locked

LINES = "terminal.log"
"""In the run's folder, what the terminal would have shown."""
COMMAND = (sys.executable, "-P", "-m", "fedveil.cli.main", "run")
POLL_SECONDS = 0.2


def begin_detached(
    settings: Mapping[str, Scalar], output: Path, options: Mapping[str, int | str | None]
) -> tuple[Path, int]:
    """Start ``fedveil run`` in a session of its own; return the run's folder once it has begun, and its process.

    No signal of this process's terminal reaches it, and it ignores SIGHUP. Where this process is interrupted first, it
    ends the run.

    Args:
        settings: of the run, flat.
        output: folder of the runs.
        options: further options of the command, such as ``--sites``; None: it takes no value.

    Raises:
        RunFailed: it ended before it began to train; with the last line that it wrote.
    """
    output = expanded(output).absolute()
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fedveil-") as scratch:
        written = Path(scratch, "settings.toml")
        written.write_text(to_toml(settings), encoding="utf-8")
        words = [str(word) for pair in options.items() for word in pair if word is not None]
        lines = Path(tempfile.mkstemp(prefix=".terminal-", suffix=".log", dir=output)[1])
        process = _start([*COMMAND, "-c", str(written), *words], lines)
        try:
            folder = _folder_of(process, output, settings, lines)
        except BaseException:
            process.terminate()
            process.wait()
            lines.unlink(missing_ok=True)
            raise
        os.replace(lines, folder / LINES)
    return folder, process.pid


def _start(command: list[str], lines: Path) -> subprocess.Popen[bytes]:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # which the process below inherits
    try:
        with lines.open("wb") as log:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
    finally:
        signal.signal(signal.SIGHUP, before)


def _folder_of(process: subprocess.Popen[bytes], output: Path, settings: Mapping[str, Scalar], lines: Path) -> Path:
    """Return the folder that a process conducts, which it makes once Flower has taken the run."""
    resumed = [Path(str(settings["resume"]))] if settings.get("resume") else []
    while process.poll() is None:
        for folder in resumed or [path.parent for path in output.glob(f"*/{PROCESS}")]:
            with suppress(DataError):  # of a file that is being written
                owner = read_if_there(ProcessFile, folder) if is_locked(folder / PROCESS) else None
                if owner and owner.process == process.pid:
                    return folder
        time.sleep(POLL_SECONDS)
    said = whole_lines(lines)
    raise RunFailed(f"the run ended before it began ({said[-1] if said else f'exit code {process.poll()}'})")

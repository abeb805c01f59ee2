"""Processes that start warm: forked from this one, with every library loaded, and gone without a trace of it."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

Send = Callable[[str], object]
"""Hands one line to the parent; what was handed over survives a kill."""
IDLE_SECONDS = 60.0
"""How long a child that is done stays, so that it can be killed; it outlives no parent for longer."""


@dataclass(frozen=True)
class Child:
    """A running child and the lines that it sends."""

    pid: int
    _reader: int

    def line(self) -> str:
        """Return the next line, waiting for it; empty once the child is gone."""
        content = b""
        while not content.endswith(b"\n"):
            byte = os.read(self._reader, 1)
            if not byte:
                break
            content += byte
        return content.decode().rstrip("\n")

    def kill(self) -> list[str]:
        """Send SIGKILL, wait for the end, and return the lines that were not read yet."""
        os.kill(self.pid, 9)
        os.waitpid(self.pid, 0)
        lines = []
        while line := self.line():
            lines.append(line)
        os.close(self._reader)
        return lines


def fork(work: Callable[[Send], None]) -> Child:
    """Start a child that does ``work`` and then idles, as a node between two rounds.

    This process must have no other threads: a fork copies none of them, but all of their locks.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return Child(pid, reader)
    try:
        os.close(reader)
        work(lambda line: os.write(writer, line.encode() + b"\n"))
        time.sleep(IDLE_SECONDS)
    except BaseException:
        traceback.print_exc(file=sys.stderr)
    finally:
        os._exit(1)

"""The step that a command is at, in one line on a terminal; a pipe or a file gets nothing of it."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TextIO

CLEARED = "\r\x1b[K"
"""Back to the line's beginning, and nothing behind it."""


class Steps:
    """Names each step on standard error until the next one, or a line, takes its place.

    Args:
        stream: where steps are named; default: standard error.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._shown = self._stream.isatty()

    def __enter__(self) -> Steps:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._write(CLEARED)

    def __call__(self, step: str) -> None:
        """Name the step that begins."""
        self._write(f"{CLEARED}{step} ...")

    def say(self, line: str) -> None:
        """Print a line on standard output, in the place of the step's name."""
        self._write(CLEARED)
        print(line, flush=True)

    def _write(self, text: str) -> None:
        if self._shown:
            self._stream.write(text)
            self._stream.flush()

"""The progress of a run in its terminal: its lines as they come, and below them a bar with the time that is left."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from fedveil.common.words import visible

if TYPE_CHECKING:
    from fedveil.common.run_lines import ProgressFile
    from fedveil.experiments.simulate import Progress as State


class RunProgress:
    """A live line below the lines of a run; nothing of it is left, and without a terminal nothing is shown.

    Args:
        console: where to.
        first_round: what sites do in their first round and never again, in words.
    """

    def __init__(self, console: Console, first_round: str) -> None:
        self._console, self._first_words = console, first_round
        self._began_at = 0
        self._first_done: tuple[int, float] | None = None
        """The first round that was seen to end, and when."""
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[left]}", markup=False),
            TimeElapsedColumn(),
        )
        self._live = Progress(*columns, console=console, transient=True)
        self._task = self._live.add_task("starting Flower and Ray", total=None, left="")

    def __enter__(self) -> RunProgress:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def show(self, progress: State) -> None:
        """Print the new lines, and say what goes on."""
        for line in progress.lines:
            self._console.print(line)
        state = progress.state
        left = self._left(state, time.monotonic())
        done = state.round_number - 1 if state.round_number else None
        total = state.rounds if state.round_number else None
        self._live.update(
            self._task, description=visible(self._words(state)), total=total, completed=done or 0, left=left
        )

    def _words(self, state: ProgressFile) -> str:
        if state.round_number is None:
            waited = f": {state.online} of {state.wanted} are online" if state.wanted else ""
            return f"{state.phase}{waited}"
        number = f"round {state.round_number} of {state.rounds}"
        if len(state.answered) == state.asked:
            return f"{number}: averaging and scoring"
        if not self._began_at or state.round_number == self._began_at:
            return f"{number}: {self._first_words}; {len(state.answered)} of {state.asked} sites have answered"
        return f"{number}: {len(state.answered)} of {state.asked} sites have answered"

    def _left(self, state: ProgressFile, now: float) -> str:
        """Return how long the rounds that are left will take, by those after the first; empty: not known yet."""
        if state.round_number is None or state.rounds is None:
            return ""
        self._began_at = self._began_at or state.round_number
        if state.round_number > self._began_at and self._first_done is None:
            self._first_done = (state.round_number - 1, now)
        if self._first_done is None or (rounds := state.round_number - 1 - self._first_done[0]) < 1:
            return ""
        seconds = (now - self._first_done[1]) / rounds * (state.rounds - state.round_number + 1)
        return f"about {time_text(seconds)} left"


def time_text(seconds: float) -> str:
    """Return a time as people estimate it.

    >>> time_text(8.2), time_text(95), time_text(4000)
    ('8 s', '1 min 35 s', '1 h 6 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes = whole // 60
    return f"{minutes} min {whole % 60} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"

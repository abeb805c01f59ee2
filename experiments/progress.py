"""A run as it goes on, shown to people: its lines as they come, and below them a bar with the time that is left."""

from __future__ import annotations

import html
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from fedveil.common.errors import DataError
from fedveil.common.files import whole_lines
from fedveil.common.run_lines import ProgressFile, read_if_there
from fedveil.common.words import visible
from fedveil.experiments.simulate import Progress

POLL_SECONDS = 0.4
Watch = Callable[[Progress], None]


@contextmanager
def followed(folder: Path, watch: Watch) -> Iterator[None]:
    """Call ``watch`` with what is new in a run's folder until the block ends, and once more then.

    Lines that were there before, of a resumed run, are not shown again.
    """
    over, printed = threading.Event(), [len(whole_lines(folder / "run.log"))]

    def look() -> None:
        with suppress(OSError, DataError):  # of a terminal that is gone, or a file that is being written
            lines = whole_lines(folder / "run.log")
            watch(Progress(lines[printed[0] :], read_if_there(ProgressFile, folder) or ProgressFile("starting")))
            printed[0] = len(lines)

    def follow() -> None:
        while not over.wait(POLL_SECONDS):
            look()

    thread = threading.Thread(target=follow, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        look()


@contextmanager
def shown(first_round: str, *, quiet: bool = False) -> Iterator[Watch]:
    """Yield what shows a run: a bar in a terminal or notebook, lines alone elsewhere, or nothing.

    Args:
        first_round: what sites do in their first round and never again, in words.
        quiet: whether nothing is shown.
    """
    console = Console(highlight=False, soft_wrap=True, emoji=False, markup=False)
    if quiet:
        yield lambda _: None
    elif console.is_jupyter:
        yield from _in_notebook(RunProgress(console, first_round, "starting"))
    else:
        with RunProgress(console, first_round, "starting") as progress:
            yield progress.show


class RunProgress:
    """A live line below the lines of a run; nothing of it is left, and without a terminal nothing is shown.

    Args:
        console: where to.
        first_round: what sites do in their first round and never again, in words.
        starting: what is done before the run says what goes on.
    """

    def __init__(self, console: Console, first_round: str, starting: str = "starting Flower and Ray") -> None:
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
        self._live = Bar(*columns, console=console, transient=True)
        self._task = self._live.add_task(starting, total=None, left="")

    def __enter__(self) -> RunProgress:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the live line away; a second time it does nothing."""
        with suppress(OSError):  # of a terminal that is gone
            if self._console.is_terminal:
                self._live.stop()

    def show(self, progress: Progress) -> None:
        """Print the new lines, and say what goes on."""
        for line in progress.lines:
            self._console.print(visible(line))
        state = progress.state
        left = self.left(state, time.monotonic())
        done = state.round_number - 1 if state.round_number else None
        total = state.rounds if state.round_number else None
        self._live.update(
            self._task, description=visible(self.words(state)), total=total, completed=done or 0, left=left
        )

    def words(self, state: ProgressFile) -> str:
        """Return what goes on."""
        if state.round_number is None:
            waited = f": {state.online} of {state.wanted} are online" if state.wanted else ""
            return f"{state.phase}{waited}"
        number = f"round {state.round_number} of {state.rounds}"
        if len(state.answered) == state.asked:
            return f"{number}: averaging and scoring"
        if not self._began_at or state.round_number == self._began_at:
            return f"{number}: {self._first_words}; {len(state.answered)} of {state.asked} sites have answered"
        return f"{number}: {len(state.answered)} of {state.asked} sites have answered"

    def left(self, state: ProgressFile, now: float) -> str:
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


class _NotebookBar:
    """The bar of a notebook."""

    def __init__(self, state: ProgressFile, words: str) -> None:
        self._done, self._rounds, self._words = (state.round_number or 1) - 1, state.rounds, words

    def __repr__(self) -> str:
        return self._words

    def _repr_html_(self) -> str:
        at = f'value="{self._done}" max="{self._rounds}"' if self._rounds else ""
        return f"<progress {at}></progress> {html.escape(self._words)}"


def _in_notebook(progress: RunProgress) -> Iterator[Watch]:
    from IPython.display import display  # a notebook has it

    starting = ProgressFile("starting")
    handle: Any = display(_NotebookBar(starting, starting.phase), display_id=True)

    def watch(seen: Progress) -> None:
        for line in seen.lines:
            print(visible(line), flush=True)
        parts = (progress.words(seen.state), progress.left(seen.state, time.monotonic()))
        handle.update(_NotebookBar(seen.state, ", ".join(filter(None, parts))))

    yield watch

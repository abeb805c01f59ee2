"""Several pieces of work at a time, each in a process that does one after another.

A process that dies takes down the piece that it was at, and no other: another process goes on with the rest.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Generic, TypeVar

from common.errors import FedVeilError
from common.words import visible

W = TypeVar("W")
R = TypeVar("R")
THREADS = "OMP_NUM_THREADS"
"""Environment variable by which a process knows how many cores are its own."""
LAST_SECONDS = 20.0
"""How long a process that is to end may take to end what it has started."""


@dataclass(frozen=True)
class Failure:
    """The end of a piece of work that came to nothing."""

    reason: str
    """One line."""


def each_in_a_process(
    function: Callable[[W], R],
    works: Sequence[W],
    jobs: int,
    threads: int,
    log: Callable[[W], Path],
) -> Generator[tuple[W, R | Failure], None, None]:
    """Yield every piece of work with what ``function`` returned for it, in the order in which they end.

    Args:
        function: top-level, of a module that another process can import.
        works: to be pickled.
        jobs: processes at a time.
        threads: of each, as of ``with_threads``.
        log: file that takes the standard output and error of a piece of work, and the traceback of its failure; its
            folder is made.

    Closing the iterator ends the processes.
    """
    waiting = list(reversed(works))
    busy: list[_Slot[W]] = []
    idle: list[_Slot[W]] = []
    try:
        while waiting or busy:
            while waiting and len(busy) < jobs:
                slot = idle.pop() if idle else _Slot(function, threads)
                slot.begin(waiting.pop(), log)
                busy.append(slot)
            ready = wait([slot.connection for slot in busy])
            for slot in [slot for slot in busy if slot.connection in ready]:
                busy.remove(slot)
                outcome = slot.outcome()
                if slot.process.is_alive():
                    idle.append(slot)
                yield slot.work, outcome
    finally:
        for slot in idle:
            slot.connection.close()  # it leaves by itself
        for slot in busy:
            slot.process.terminate()
        for slot in [*idle, *busy]:
            slot.end()


@contextmanager
def with_threads(threads: int) -> Iterator[None]:
    """Let every process that starts meanwhile have so many threads.

    Their environment says it from the first: torch and what NumPy multiplies by read it once, when they are loaded, and
    a process loads them before it does anything that it is told.
    """
    before = os.environ.get(THREADS)
    os.environ[THREADS] = str(threads)
    try:
        yield
    finally:
        if before is None:
            del os.environ[THREADS]
        else:
            os.environ[THREADS] = before


class _Slot(Generic[W]):
    """A process and the piece of work that it is at."""

    work: W

    def __init__(self, function: Callable[[W], Any], threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_serve, args=(function, theirs))
        with with_threads(threads):
            self.process.start()
        theirs.close()

    def begin(self, work: W, log: Callable[[W], Path]) -> None:
        self.work = work
        with suppress(BrokenPipeError):  # it died; whoever asks for the outcome is told
            self.connection.send((work, log(work)))

    def outcome(self) -> Any:
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join(LAST_SECONDS)
            code = self.process.exitcode
            why = "killed, perhaps for want of memory: give fewer --jobs" if code == -signal.SIGKILL else "see its log"
            return Failure(f"its process ended with exit code {code} ({why})")

    def end(self) -> None:
        self.process.join(LAST_SECONDS)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.connection.close()


def _serve(function: Callable[[Any], Any], connection: Connection) -> None:
    """Do one piece of work after another until the other end is closed."""
    # Ctrl-C, and the end of the terminal, reach the whole group: the parent decides. To be ended takes the way of
    # Ctrl-C, so that what a run has started is ended with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        while True:
            work, log = connection.recv()
            _log_into(log)
            connection.send(_outcome(function, work))
    except EOFError:
        return
    except KeyboardInterrupt:
        os._exit(1)  # threads of libraries wait for nothing


def _outcome(function: Callable[[Any], Any], work: Any) -> Any:
    try:
        return function(work)
    except Exception as error:
        traceback.print_exc()
        told = str(error) if isinstance(error, FedVeilError) else f"{type(error).__name__}: {error}"
        return Failure(visible(told))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _log_into(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for standard in (1, 2):
        os.dup2(file, standard)
    os.close(file)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(LAST_SECONDS)
        os._exit(1)

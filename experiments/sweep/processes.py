"""Several pieces of work at a time, each in a process that does one after another.

Every process is a pool of its own: one that dies takes down the piece that it was at, and no other.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from fedveil.common.errors import FedVeilError
from fedveil.common.parent import die_with_parent
from fedveil.common.threads import CORES, THREADS
from fedveil.common.words import visible

W = TypeVar("W")
R = TypeVar("R")
PROCESS = Path("/proc/self")
"""Where Linux says what a process uses."""
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
        function, works: importable and picklable.
        jobs: processes at a time.
        threads: of each, as for ``with_threads``.
        log: file that takes the standard output and error of a piece of work, and the traceback of its failure; its
            folder is made.

    Closing the iterator ends the processes.
    """
    waiting = list(reversed(works))
    idle: list[_Worker] = []
    busy: dict[Future[R | Failure], tuple[W, _Worker]] = {}
    try:
        while waiting or busy:
            while waiting and len(busy) < jobs:
                worker = idle.pop() if idle else _Worker(threads)
                work = waiting.pop()
                busy[worker.pool.submit(_outcome, function, work, log(work))] = (work, worker)
            for future in wait(busy, return_when=FIRST_COMPLETED).done:
                work, worker = busy.pop(future)
                try:
                    outcome = future.result()
                    idle.append(worker)
                except BrokenProcessPool:
                    outcome = worker.died()
                yield work, outcome
    finally:
        for _, worker in busy.values():
            worker.process.terminate()
        for worker in [*idle, *(worker for _, worker in busy.values())]:
            worker.end()


@contextmanager
def with_threads(threads: int) -> Iterator[None]:
    """Give every process that starts meanwhile this number of threads, and as many cores.

    It is in their environment because torch and NumPy's libraries read it once, when a process loads them.
    """
    before = {variable: os.environ.get(variable) for variable in (THREADS, CORES)}
    os.environ.update(dict.fromkeys(before, str(threads)))
    try:
        yield
    finally:
        for variable, value in before.items():
            del os.environ[variable]
            os.environ.update({variable: value} if value is not None else {})


class _Worker:
    """A pool of one process, which has ``threads`` threads."""

    def __init__(self, threads: int) -> None:
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin)
        with with_threads(threads):
            number = self.pool.submit(os.getpid).result()
        (self.process,) = (child for child in multiprocessing.active_children() if child.pid == number)

    def died(self) -> Failure:
        """Return why a process came to its end before its work did."""
        # The pool's own thread collects the exit code, and who asks for it meanwhile is told that there is none.
        self.pool.shutdown()
        code = self.process.exitcode
        why = "killed, perhaps for want of memory: give fewer --jobs" if code == -signal.SIGKILL else "see its log"
        return Failure(f"its process ended with exit code {code} ({why})")

    def end(self) -> None:
        """Let the process leave, and kill it where that takes longer than ``LAST_SECONDS``."""
        self.pool.shutdown(wait=False)
        self.process.join(LAST_SECONDS)
        if self.process.is_alive():
            self.process.kill()
        self.pool.shutdown()
        self.process.join()


def forget_peak() -> bool:
    """Let the most memory that this process had begin again, and return whether the system does that."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        (PROCESS / "clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def peak_memory() -> tuple[int, int | None]:
    """Return the most bytes that this process had resident since ``forget_peak``, and torch on a GPU, if there is one.

    Raises:
        OSError: the system does not say.
    """
    import torch

    status = (PROCESS / "status").read_text(encoding="utf-8")
    resident = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(resident), torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def _begin() -> None:
    """Prepare a process: its parent alone decides when it ends."""
    # Ctrl-C, and the end of the terminal, reach the whole group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    die_with_parent()
    parent = multiprocessing.parent_process()
    if parent is None or not parent.is_alive():  # it was gone before it could be waited for
        os._exit(1)


def _outcome(function: Callable[[W], R], work: W, log: Path) -> R | Failure:
    _log_into(log)
    # SIGTERM takes the way of Ctrl-C, so that what a run has started is ended with it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return function(work)
    except KeyboardInterrupt:
        os._exit(1)  # a pool's process would wait for more work, and threads of libraries wait for nothing
    except Exception as error:
        traceback.print_exc()
        return Failure(visible(str(error) if isinstance(error, FedVeilError) else f"{type(error).__name__}: {error}"))
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys.stdout.flush()
        sys.stderr.flush()


def _log_into(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for standard in (1, 2):
        os.dup2(file, standard)
    os.close(file)

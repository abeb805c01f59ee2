"""The workers of a process that trains: whole passes go to programs of one thread each, one a core.

A pass is too small to be cut among threads. So each core has a program of its own (``client.core``), which gets the
model in memory without a name (``client.nameless``) and one batch after another over a socket. Records leave this
process only after their charge is on disk, and only in these sockets. A pass whose worker fails or dies is computed
here: no part of a sum is ever missing. Sums are exact (``privacy.grid``): which worker made what shows in no bit.

Workers are used once they compute made-up records of every shape as this process does, to the last bit.
"""

from __future__ import annotations

import copy
import logging
import os
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import send_handle
from typing import Any

import torch

from fedveil.client.core import Passes
from fedveil.client.made_up import AWAY, inventor
from fedveil.client.nameless import packed
from fedveil.common.log import place_of
from fedveil.common.model.federated import FederatedModel
from fedveil.common.model.shapes import FixedBatch
from fedveil.common.model.sharing import Kind, Share, unshared
from fedveil.common.tasks import Record
from fedveil.common.threads import THREADS, environment
from fedveil.privacy.plan import PrivacyPlan
from fedveil.privacy.randomness import stream
from fedveil.strategies.job import Job

log = logging.getLogger("fedveil.site")
LEAST_WORK = 1e13
"""Operations of a run's passes, all records taken for the longest, from which workers are worth their start: about as
much as a core takes to import what they need."""
MOST_LOST = 4
"""Workers that may be lost, after which this process computes alone."""
STARTING = 120.0
"""Seconds that workers have to start, after which this process computes alone."""


def pays(job: Job, public_size: int, model: FederatedModel | None) -> bool:
    """Return whether a run is long enough at a site for workers, by public figures alone."""
    if model is None or not job.mechanism.rehearsed:
        return False
    numbers = sum(parameter.numel() for parameter in model.base.module.parameters())
    passed = public_size * max(1.0, job.sample_rate * job.config.total_steps)
    return 6.0 * numbers * model.max_length * passed > LEAST_WORK


class _Lost(Exception):
    """A worker is gone, or does not answer as it should."""


class _Worker:
    """One worker, and the socket to it."""

    def __init__(self) -> None:
        own, its = socket.socketpair()
        with its:
            command = [sys.executable, "-P", "-m", "fedveil.client.core", str(its.fileno()), str(os.getpid())]
            own_environment = {**environment(), THREADS: "1"}
            # In a session of its own: an interrupt at the terminal is the parent's to answer.
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                pass_fds=[its.fileno()],
                env=own_environment,
                start_new_session=True,
            )
        self.link = Connection(own.detach())

    def say(self, what: str, content: Any = None, memory: Iterable[int] = ()) -> None:
        try:
            self.link.send_bytes(pickle.dumps((what, content), protocol=5))
            for descriptor in memory:
                send_handle(self.link, descriptor, self.process.pid)
        except OSError as error:
            raise _Lost from error

    def answer(self) -> Any:
        try:
            return pickle.loads(self.link.recv_bytes())  # noqa: S301 (this process alone has started the other end)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            raise _Lost from error

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.link.close()


@dataclass
class Cores:
    """The workers of this process, started when they are first needed."""

    count: int
    """How many there are; below 2 this process computes alone."""
    workers: list[_Worker] = field(default_factory=list)
    proven: set[object] = field(default_factory=set)
    """What the workers are known to compute as this process does."""
    given_up: bool = False
    """Whether they did not start, or do not compute alike: then this process computes alone for good."""

    lost: int = 0
    """Workers that were gone while they were needed."""
    _ended: threading.Event = field(default_factory=threading.Event)

    def close(self) -> None:
        """End the workers; later passes start others."""
        for worker in self.workers:
            worker.end()
        self.workers, self.proven = [], set()
        self._ended.set()

    @contextmanager
    def opened(self, model: FederatedModel, kind: Kind, plan: PrivacyPlan | None = None) -> Iterator[Share]:
        """Share a model's passes; see ``common.model.sharing``."""
        alone = self.count < 2 or self.given_up or torch.get_num_threads() > 1  # others round otherwise
        if alone or model.device.type != "cpu" or _grouped(plan):
            yield unshared
            return
        try:
            ready = self._open(Passes(_bare(model), kind, plan), model)
        except Exception as error:
            self._give_up(f"they could not be given the model: {place_of(error)}")
            ready = False
        try:
            yield partial(self._share, model) if ready else unshared
        finally:
            self._all("close")

    def _open(self, passes: Passes, model: FederatedModel) -> bool:
        kept = model.keeper.descriptors() if model.keeper else ()
        memory = packed(passes)
        try:
            if len(self.workers) != self.count:
                self.close()
                if self.lost > MOST_LOST:
                    self._give_up("workers are gone again and again")
                if self.given_up or not self._start():
                    return False
            self._all("open", bool(kept), (memory, *kept))
        finally:
            os.close(memory)
        if not self.workers:
            return False
        shapes = model.feature_shapes if passes.kind == "features" else model.shapes
        trained = tuple(tuple(p.shape) for p in model.module.parameters() if p.requires_grad)
        key = passes.kind, shapes, trained, model.precision, id(model.module), bool(kept)
        if key not in self.proven:
            if not self._alike(passes, model):
                return False
            self.proven.add(key)
        return True

    def _start(self) -> bool:
        """Start the workers from a thread that lasts: Linux ends them with the thread that has started them."""
        started: list[_Worker] = []
        done, self._ended = threading.Event(), threading.Event()
        ended = self._ended

        def start() -> None:
            try:
                started.extend(_Worker() for _ in range(self.count))
            finally:
                done.set()
            ended.wait()

        threading.Thread(target=start, daemon=True, name="fedveil-cores").start()
        done.wait()
        for worker in started:
            if not worker.link.poll(STARTING) or _safely(worker.answer) != "ready":
                self._give_up("a worker did not start", started)
                return False
        if len(started) < self.count:
            self._give_up("a worker could not be started", started)
            return False
        self.workers = started
        return True

    def _give_up(self, reason: str, started: Iterable[_Worker] = ()) -> None:
        for worker in started:
            worker.end()
        self.close()
        if not self.given_up:
            log.warning("one process computes all passes: its cores do not share them, as %s", reason)
        self.given_up = True

    def _alike(self, passes: Passes, model: FederatedModel) -> bool:
        """Return whether all workers compute made-up records of every shape as this process does, to the last bit."""
        invent = inventor(model, model.task if passes.kind == "features" else model.collator)
        shapes = model.feature_shapes if passes.kind == "features" else model.shapes
        with passes:
            before = [parameter.detach().clone() for parameter in passes.trained]
            draw = stream(0, "rehearsal", "cores")
            passes.set_trained([value + AWAY * torch.randn(value.shape, generator=draw) for value in before])
            try:
                self._all("trained", [parameter.detach() for parameter in passes.trained])
                for length in shapes.lengths:
                    rows = shapes.rows_of(length)
                    records = [invent(max(1, length - 1), i) for i in range(rows)]
                    if len(self._digests(passes, model, records, length)) > 1:
                        self._give_up(f"{rows} records of {length} tokens differ between processes")
                        return False
            finally:
                passes.set_trained(before)
        return True

    def _digests(self, passes: Passes, model: FederatedModel, records: Sequence[Record], length: int) -> set[object]:
        """Return the digests of made-up records' pass here and in all workers; once more of what these have kept."""
        found: set[object] = set()
        with model.keeper.aside(model) if model.keeper else nullcontext():
            batch = model.fixed_batch(records, length, len(records))
            for _ in range(2 if batch.places else 1):
                for worker in self.workers:
                    worker.say("digest", batch)
                found |= {passes.digest(batch), *(_safely(worker.answer) for worker in self.workers)}
        return found

    def _all(self, what: str, content: Any = None, memory: Iterable[int] = ()) -> None:
        """Have all workers do something; those that do not are ended."""
        for worker in list(self.workers):
            try:
                worker.say(what, content, memory)
            except _Lost:
                self._lose(worker)
        for worker in list(self.workers):
            if _safely(worker.answer) is not True:
                self._lose(worker)

    def _lose(self, worker: _Worker) -> None:
        log.error("a worker of this process is gone; what it had is computed here")
        self.lost += 1
        self.workers.remove(worker)
        worker.end()

    def _share(
        self, model: FederatedModel, batches: Iterable[FixedBatch], before_pass: Callable[[], None]
    ) -> Iterator[tuple[FixedBatch, Any]]:
        self._all("trained", [p.detach() for p in model.module.parameters() if p.requires_grad])
        left, busy = iter(batches), dict[Any, tuple[_Worker, FixedBatch]]()
        lost: list[FixedBatch] = []
        try:
            while True:
                lost += self._deal(left, busy, before_pass)
                if not busy:
                    break
                for link in wait(list(busy)):
                    worker, batch = busy.pop(link)
                    found = _safely(worker.answer)
                    if found is _LOST:
                        self._lose(worker)
                    yield batch, None if found is _LOST else found
        finally:
            # An error ends the step: what is under way is waited for, so that no answer is taken for a later one's.
            for worker, _ in busy.values():
                if _safely(worker.answer) is _LOST:
                    self._lose(worker)
        for batch in (*lost, *left):
            yield batch, None

    def _deal(
        self,
        left: Iterator[FixedBatch],
        busy: dict[Any, tuple[_Worker, FixedBatch]],
        before_pass: Callable[[], None],
    ) -> list[FixedBatch]:
        """Give each worker that has none a batch of those that are left; return what nobody could be given."""
        lost = []
        for worker in [worker for worker in self.workers if worker.link not in busy]:
            if (batch := next(left, None)) is None:
                break
            before_pass()
            try:
                worker.say("pass", batch)
                busy[worker.link] = worker, batch
            except _Lost:
                self._lose(worker)
                lost.append(batch)
        return lost


_LOST = object()


def _safely(answer: Callable[[], Any]) -> Any:
    try:
        return answer()
    except _Lost:
        return _LOST


def _grouped(plan: PrivacyPlan | None) -> bool:
    """Return whether a step's batches are whole units of several records, which are not divided."""
    return isinstance(plan, PrivacyPlan) and plan.unit.grouped


def _bare(model: FederatedModel) -> FederatedModel:
    """Return the same model without what no pass needs, and what no other program is to have."""
    bare = copy.copy(model)
    for name in ("base", "start", "collator", "vector_shapes", "sharing", "keeping", "keeper"):
        setattr(bare, name, None)
    bare.prefix = model.prefix and replace(model.prefix, memory=None)
    return bare

"""The workers of a process that trains: whole passes go to programs of one thread each, one a core.

A pass is too small to be cut among threads. So each core has a program of its own (``client.core``), which gets the
model in memory without a name (``client.nameless``) and one batch after another over a socket. Records leave this
process only after their charge is on disk, and only in these sockets. A pass whose worker fails, dies or stops is made
here: no part of a sum is ever missing. Sums are exact (``privacy.grid``): which worker made what shows in no bit.

Workers are used once they compute made-up records of every shape as this process does, to the last bit.
"""

from __future__ import annotations

import copy
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import wait
from typing import Any

import torch

from fedveil.client.core import Passes
from fedveil.client.made_up import AWAY, inventor
from fedveil.client.nameless import packed
from fedveil.client.worker_program import LOST, STARTING, WorkerProgram
from fedveil.common.log import place_of
from fedveil.common.model.federated import FederatedModel
from fedveil.common.model.shapes import FixedBatch
from fedveil.common.model.sharing import Kind, Share, unshared
from fedveil.common.tasks import Record
from fedveil.privacy.plan import PrivacyPlan
from fedveil.privacy.randomness import stream
from fedveil.strategies.job import Job

log = logging.getLogger("fedveil.site")
LEAST_WORK = 1e13
"""Operations of a run's passes, all records taken for the longest, from which workers are worth their start: about as
much as a core takes to import what they need."""
MOST_LOST = 4
"""Workers that may be lost, after which this process computes alone."""
SLOWER = 100.0
"""How much longer than the slowest made-up pass took here a worker may say nothing, after which it is ended."""


def pays(job: Job, public_size: int, model: FederatedModel | None) -> bool:
    """Return whether a run is long enough at a site for workers, by public figures alone."""
    if model is None or not job.mechanism.rehearsed:
        return False
    numbers = sum(parameter.numel() for parameter in model.base.module.parameters())
    passed = public_size * max(1.0, job.sample_rate * job.config.total_steps)
    return 6.0 * numbers * model.max_length * passed > LEAST_WORK


@dataclass
class Cores:
    """The workers of this process, started when they are first needed."""

    count: int
    """How many there are; below 2 this process computes alone."""
    workers: list[WorkerProgram] = field(default_factory=list)
    proven: dict[object, float] = field(default_factory=dict)
    """What the workers are known to compute as this process does, and the seconds of its slowest made-up pass here."""
    patience: float = STARTING
    """Seconds that a worker may take for a pass."""
    given_up: bool = False
    """Whether they did not start, or do not compute alike: then this process computes alone for good."""

    lost: int = 0
    """Workers that were gone while they were needed."""
    _ended: threading.Event = field(default_factory=threading.Event)

    def close(self) -> None:
        """End the workers; later passes start others."""
        for worker in self.workers:
            worker.end()
        self.workers, self.proven = [], {}
        self._ended.set()

    @contextmanager
    def opened(self, model: FederatedModel, kind: Kind, plan: PrivacyPlan | None = None) -> Iterator[Share]:
        """Share a model's passes; see ``common.model.sharing``."""
        alone = self.count < 2 or self.given_up or torch.get_num_threads() > 1  # others round otherwise
        if alone or model.device.type != "cpu":
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
        memory = packed(passes)
        try:
            if len(self.workers) != self.count:
                self.close()
                if self.lost > MOST_LOST:
                    self._give_up("workers are gone again and again")
                if self.given_up or not self._start():
                    return False
            self._all("open", memory=memory)
        finally:
            os.close(memory)
        if not self.workers:
            return False
        shapes = model.feature_shapes if passes.kind == "features" else model.shapes
        trained = tuple(tuple(p.shape) for p in model.module.parameters() if p.requires_grad)
        key = passes.kind, shapes, trained, model.precision, id(model.module)
        if key not in self.proven:
            if (slowest := self._alike(passes, model)) is None:
                return False
            self.proven[key] = slowest
        self._allow(self.proven[key])
        return True

    def _allow(self, slowest: float) -> None:
        self.patience = max(STARTING, SLOWER * slowest)
        for worker in self.workers:
            worker.allow(self.patience)

    def _start(self) -> bool:
        """Start the workers from a thread that lasts: Linux ends them with the thread that has started them."""
        started: list[WorkerProgram] = []
        done, self._ended = threading.Event(), threading.Event()
        ended = self._ended

        def start() -> None:
            try:
                started.extend(WorkerProgram() for _ in range(self.count))
            finally:
                done.set()
            ended.wait()

        threading.Thread(target=start, daemon=True, name="fedveil-cores").start()
        done.wait()
        for worker in started:
            if not worker.link.poll(STARTING) or worker.answer() != "ready":
                self._give_up("a worker did not start", started)
                return False
        if len(started) < self.count:
            self._give_up("a worker could not be started", started)
            return False
        self.workers = started
        return True

    def _give_up(self, reason: str, started: Iterable[WorkerProgram] = ()) -> None:
        for worker in started:
            worker.end()
        self.close()
        if not self.given_up:
            log.warning("one process computes all passes: its cores do not share them, as %s", reason)
        self.given_up = True

    def _alike(self, passes: Passes, model: FederatedModel) -> float | None:
        """Return the seconds of the slowest pass here, if all workers compute made-up ones of every shape as it does.

        To the last bit; else None.
        """
        invent = inventor(model, model.task if passes.kind == "features" else model.collator)
        shapes = model.feature_shapes if passes.kind == "features" else model.shapes
        slowest = 0.0
        with passes:
            before = [parameter.detach().clone() for parameter in passes.trained]
            draw = stream(0, "rehearsal", "cores")
            passes.set_trained([value + AWAY * torch.randn(value.shape, generator=draw) for value in before])
            try:
                self._all("trained", [parameter.detach() for parameter in passes.trained])
                for length in shapes.lengths:
                    rows = shapes.rows_of(length)
                    records = [invent(max(1, length - 1), i) for i in range(rows)]
                    began = time.monotonic()
                    digests = self._digests(passes, model, records, length)
                    slowest = max(slowest, time.monotonic() - began)
                    if len(digests) > 1:
                        self._give_up(f"{rows} records of {length} tokens differ between processes")
                        return None
            finally:
                passes.set_trained(before)
        return slowest

    def _digests(self, passes: Passes, model: FederatedModel, records: Sequence[Record], length: int) -> set[object]:
        """Return the digests of made-up records' pass here and in all workers."""
        batch = model.fixed_batch(records, length, len(records))
        for worker in self.workers:
            worker.say("digest", batch)
        return {passes.digest(batch), *(worker.answer() for worker in self.workers)}

    def _all(self, what: str, content: Any = None, memory: int | None = None) -> None:
        """Have all workers do something; those that do not are ended."""
        for worker in list(self.workers):
            if not worker.say(what, content, memory):
                self._lose(worker)
        for worker in list(self.workers):
            if worker.answer() is not True:
                self._lose(worker)

    def _lose(self, worker: WorkerProgram) -> None:
        log.error("a worker of this process is gone, or stopped; what it had is computed here")
        self.lost += 1
        self.workers.remove(worker)
        worker.end()

    def _share(
        self, model: FederatedModel, batches: Iterable[FixedBatch], before_pass: Callable[[], None]
    ) -> Iterator[tuple[FixedBatch, Any]]:
        self._all("trained", [p.detach() for p in model.module.parameters() if p.requires_grad])
        left, busy = iter(batches), dict[Any, tuple[WorkerProgram, FixedBatch]]()
        lost: list[FixedBatch] = []
        try:
            while True:
                lost += self._deal(left, busy, before_pass)
                if not busy:
                    break
                answered = wait(list(busy), self.patience)
                for link in answered or list(busy):
                    worker, batch = busy.pop(link)
                    found = worker.answer() if answered else LOST
                    if found is LOST:
                        self._lose(worker)
                    yield batch, None if found is LOST else found
        finally:
            # An error ends the step: what is under way is waited for, so that no answer is taken for a later one's.
            for worker, _ in busy.values():
                if worker.answer() is LOST:
                    self._lose(worker)
        for batch in (*lost, *left):
            yield batch, None

    def _deal(
        self,
        left: Iterator[FixedBatch],
        busy: dict[Any, tuple[WorkerProgram, FixedBatch]],
        before_pass: Callable[[], None],
    ) -> list[FixedBatch]:
        """Give each worker that has none a batch of those that are left; return what nobody could be given."""
        lost = []
        for worker in [worker for worker in self.workers if worker.link not in busy]:
            if (batch := next(left, None)) is None:
                break
            before_pass()
            if worker.say("pass", batch):
                busy[worker.link] = worker, batch
            else:
                self._lose(worker)
                lost.append(batch)
        return lost


def _bare(model: FederatedModel) -> FederatedModel:
    """Return the same model without what no pass needs, and what no other program is to have."""
    bare = copy.copy(model)
    for name in ("base", "start", "collator", "vector_shapes", "sharing"):
        setattr(bare, name, None)
    return bare

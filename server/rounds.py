"""The round loop, top to bottom; the only one."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from common.errors import RunFailed
from common.messages import Refusal, Reply, TrainResult, TrainTask
from common.model import Score
from common.tensors import fingerprint, start_fingerprint
from server.aggregation import contributions, sort_replies
from server.evaluation import Evaluator
from strategies import Contribution, Job, ServerState


@dataclass(frozen=True)
class Exchange:
    """What came of sending one round's tasks."""

    replies: Mapping[int, Reply]
    """By node; every node that was asked is in it."""
    bytes_down: int
    """Adapter payload of all tasks as encoded."""
    bytes_up: int
    """Adapter payload of all replies as encoded."""


class Transport(Protocol):
    """How tasks reach sites: Flower in earnest, plain calls in a test."""

    def nodes(self) -> list[int]:
        """Return the nodes that can be asked now; waits for the run's ``min-sites``."""

    def exchange(self, tasks: Mapping[int, TrainTask], timeout: float) -> Exchange:
        """Send one task per node and collect what comes back within ``timeout`` seconds."""


@dataclass(frozen=True)
class RoundOutcome:
    """One finished round, as the records and the report see it."""

    round_number: int
    results: list[TrainResult]
    refusals: list[Refusal]
    score: Score
    bytes_down: int
    bytes_up: int
    seconds: float


class Observer(Protocol):
    """Who is told about a run while it goes on: the run's folder, the terminal."""

    def started(self, baseline: Score) -> None:
        """The model before round 1 was scored."""

    def initialised(self, results: list[TrainResult], refusals: list[Refusal]) -> None:
        """Round 0 brought a full gradient, from these sites (none: from public data)."""

    def finished(self, outcome: RoundOutcome, state: ServerState) -> None:
        """A round is complete and counts."""

    def stopped(self, reason: str) -> None:
        """The run ends before its last round, and well."""


class _Sites:
    """Asks sites, and remembers which of them already have what is sent once."""

    def __init__(self, job: Job, run: str, transport: Transport, evaluator: Evaluator) -> None:
        self._job, self._run, self._transport = job, run, transport
        self._base = evaluator.model.base.fingerprint
        self._start = start_fingerprint(evaluator.start)
        self._informed: set[int] = set()

    def ask(self, round_number: int, state: ServerState) -> Exchange:
        """Send every online node its task; a site that lost what is sent once gets it within the round."""
        nodes = self._transport.nodes()
        first = self._exchange(nodes, round_number, state)
        lacking = [n for n, r in first.replies.items() if isinstance(r, Refusal) and r.kind == "basis"]
        if not lacking:
            return first
        self._informed -= set(lacking)
        second = self._exchange(lacking, round_number, state)
        return Exchange(
            {**first.replies, **second.replies},
            first.bytes_down + second.bytes_down,
            first.bytes_up + second.bytes_up,
        )

    def _exchange(self, nodes: Iterable[int], round_number: int, state: ServerState) -> Exchange:
        strategy = self._job.strategy
        basis = strategy.basis(state) if round_number else {}
        tasks = {
            node: TrainTask(
                run=self._run,
                round_number=round_number,
                state=strategy.downlink(state) if round_number else {},
                basis={} if node in self._informed else basis,
                basis_fingerprint=fingerprint(basis) if basis else "",
                base_fingerprint=self._base,
                start_fingerprint=self._start,
            )
            for node in nodes
        }
        exchange = self._transport.exchange(tasks, self._job.config.round_timeout)
        if round_number:
            self._informed |= {n for n, reply in exchange.replies.items() if isinstance(reply, TrainResult)}
        return exchange


def run_rounds(job: Job, run: str, transport: Transport, evaluator: Evaluator, observer: Observer) -> ServerState:
    """Run every round and return the last state.

    Sites whose budget is spent refuse and the others go on; when no site is left the run ends
    early and well, with what was trained so far.

    Raises:
        RunFailed: fewer than ``min-sites`` sites succeeded in a round; names each with its reason.
    """
    sites = _Sites(job, run, transport, evaluator)
    state = _initialise(job, sites, evaluator, observer)
    observer.started(evaluator.score(state.adapter))
    for round_number in range(1, job.config.rounds + 1):
        began = time.monotonic()
        exchange = sites.ask(round_number, state)
        results, refusals = sort_replies(list(exchange.replies.values()), private=job.config.privacy.on)
        if not results and round_number > 1 and refusals and all(r.kind == "budget" for r in refusals):
            observer.stopped(f"every site's privacy budget is spent after round {round_number - 1}")
            break
        _require(results, refusals, round_number, job.config.min_sites)
        state = job.strategy.server_update(state, contributions(results))
        outcome = RoundOutcome(
            round_number,
            results,
            refusals,
            evaluator.score(state.adapter),
            exchange.bytes_down,
            exchange.bytes_up,
            time.monotonic() - began,
        )
        observer.finished(outcome, state)
    return state


def _initialise(job: Job, sites: _Sites, evaluator: Evaluator, observer: Observer) -> ServerState:
    """Return the state before round 1; a strategy that starts from a full gradient gets its round 0."""
    state, source = job.strategy.start(evaluator.start), job.strategy.gradient
    if source is None:
        return state
    if source.public_data:
        observer.initialised([], [])
        return job.strategy.begin(state, [Contribution("public", 1.0, evaluator.public_gradient(source))])
    replies = sites.ask(0, state).replies
    results, refusals = sort_replies(list(replies.values()), private=job.config.privacy.on)
    _require(results, refusals, 0, job.config.min_sites)
    observer.initialised(results, refusals)
    return job.strategy.begin(state, contributions(results))


def _require(results: list[TrainResult], refusals: list[Refusal], round_number: int, wanted: int) -> None:
    if len(results) < wanted:
        reasons = "; ".join(f"{r.site} ({r.kind}): {r.reason}" for r in refusals) or "no site answered"
        raise RunFailed(f"round {round_number}: {len(results)} sites succeeded, {wanted} needed. {reasons}")

"""The round loop, top to bottom; the only one."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from common.errors import RunFailed
from common.messages import Refusal, Reply, TrainResult, TrainTask
from common.model import Score
from common.tensors import start_fingerprint
from server.aggregation import contributions, sort_replies
from server.evaluation import Evaluator
from strategies import Job, ServerState


@dataclass(frozen=True)
class Exchange:
    """What came of sending one round's tasks."""

    replies: list[Reply]
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

    def finished(self, outcome: RoundOutcome, state: ServerState) -> None:
        """A round is complete and counts."""

    def stopped(self, reason: str) -> None:
        """The run ends before its last round, and well."""


def run_rounds(job: Job, run: str, transport: Transport, evaluator: Evaluator, observer: Observer) -> ServerState:
    """Run every round and return the last state.

    Sites whose budget is spent refuse and the others go on; when no site is left the run ends
    early and well, with what was trained so far.

    Raises:
        RunFailed: fewer than ``min-sites`` sites succeeded in a round; names each with its reason.
    """
    state = job.strategy.start(evaluator.start)
    observer.started(evaluator.score(state.adapter))
    for round_number in range(1, job.config.rounds + 1):
        began = time.monotonic()
        task = TrainTask(
            run,
            round_number,
            job.strategy.downlink(state),
            evaluator.model.base.fingerprint,
            start_fingerprint(evaluator.start),
        )
        exchange = transport.exchange(dict.fromkeys(transport.nodes(), task), job.config.round_timeout)
        results, refusals = sort_replies(exchange.replies, private=job.config.privacy.on)
        if not results and round_number > 1 and refusals and all(r.kind == "budget" for r in refusals):
            observer.stopped(f"every site's privacy budget is spent after round {round_number - 1}")
            break
        if len(results) < job.config.min_sites:
            raise RunFailed(_shortage(round_number, len(results), job.config.min_sites, refusals))
        state = job.strategy.server_update(state, contributions(results))
        score = evaluator.score(state.adapter)
        observer.finished(
            RoundOutcome(
                round_number,
                results,
                refusals,
                score,
                exchange.bytes_down,
                exchange.bytes_up,
                time.monotonic() - began,
            ),
            state,
        )
    return state


def _shortage(round_number: int, succeeded: int, wanted: int, refusals: list[Refusal]) -> str:
    reasons = "; ".join(f"{r.site} ({r.kind}): {r.reason}" for r in refusals) or "no site answered"
    return f"round {round_number}: {succeeded} sites succeeded, {wanted} needed. {reasons}"

"""The round loop: ask, average, step, evaluate, record."""

from __future__ import annotations

import time
from typing import Protocol

from fedveil.common.errors import RunFailed
from fedveil.common.model.score import Score
from fedveil.server.collect.base import Collected, Collector
from fedveil.server.observers import Observer, RoundOutcome, Update
from fedveil.strategies.state import ServerState


class Server(Protocol):
    """What the server does in a round beside asking sites."""

    def prepare(self, state: ServerState) -> ServerState:
        """Return the state that the next round starts from, where more than the last round made it."""

    def average(self, state: ServerState, got: Collected) -> ServerState:
        """Return the state with the strategy's average of what was collected, one round on."""

    def step(self, state: ServerState, averaged: ServerState, got: Collected) -> ServerState:
        """Return the state that the server's step makes, from the one before the round towards its average."""

    def evaluate(self, state: ServerState) -> Score | None:
        """Return the model's score on public records; None where this round is not scored."""


def run_rounds(
    rounds: int, start: tuple[ServerState, Score | None], collector: Collector, server: Server, observer: Observer
) -> ServerState:
    """Run every round after the state's own, and return the last state.

    Sites whose budget is spent refuse and the others go on; when too few are left for a quorum the
    run ends early and well, with what was trained so far.

    Args:
        rounds: number of the last round.
        start: the state to start from, and its score.
        collector: asks the sites.
        server: averages, steps and evaluates.
        observer: hears of every round.

    Raises:
        RunFailed: fewer than ``min-sites`` sites succeeded in a round and its retries; names each with its reason.
    """
    state, score = start
    state = server.prepare(state)
    for round_number in range(state.round_number + 1, rounds + 1):
        began = time.monotonic()
        if reason := collector.ends_before(round_number):
            observer.stopped(reason)
            break
        observer.asks()
        got = collector.collect(round_number, state)
        if not got.counts:
            observer.missed(RoundOutcome(round_number, got, score, time.monotonic() - began, counts=False))
            if not got.ending:
                raise RunFailed(got.too_few(round_number))
            observer.stopped(got.ending)
            break
        averaged = server.average(state, got)
        update = Update(state, averaged, server.step(state, averaged, got))
        score = server.evaluate(update.after)
        observer.finished(RoundOutcome(round_number, got, score, time.monotonic() - began), update, collector.members)
        state = server.prepare(update.after)
        del got, averaged, update  # else the next round's replies come while this one's are in memory
    return state

"""The state that a run's first round starts from: a saved one, or one that is made now."""

from __future__ import annotations

import time

from fedveil.common.errors import RunFailed
from fedveil.common.model.score import Score
from fedveil.common.starts import PaidStart
from fedveil.server.checkpoint import Checkpoint
from fedveil.server.collect.base import Collected, Collector
from fedveil.server.model import ServerModel
from fedveil.server.observers import Observer, RoundOutcome
from fedveil.strategies.base import mean
from fedveil.strategies.job import Job
from fedveil.strategies.state import ServerState


def resume(saved: Checkpoint, observer: Observer) -> tuple[ServerState, Score | None]:
    """Return the state and the score of a checkpoint."""
    observer.resumed(saved.state.round_number, saved.score)
    return saved.state, saved.score


def begin(
    job: Job, collector: Collector, server_model: ServerModel, observer: Observer
) -> tuple[ServerState, Score | None]:
    """Return the state before round 1 and its score.

    Raises:
        RunFailed: too few sites brought what the start is made of.
    """
    # What round 0 brings is paid for as what the others bring: "before" is before it.
    of_sites = job.origin.asked == "sites"
    before = server_model.score(job.start(server_model.start).adapter) if of_sites else None
    state = _initialise(job, collector, server_model, observer)
    score = server_model.score(state.adapter)
    observer.started(before or score, state, collector.members, score if of_sites else None)
    return state, score


def _initialise(job: Job, collector: Collector, server_model: ServerModel, observer: Observer) -> ServerState:
    """Return the state before round 1; only a start that server and sites cannot derive has a round 0."""
    state = job.start(server_model.start)
    if job.derived:
        return state
    began = time.monotonic()
    if job.origin.asked == "sites":
        return _from_sites(job, collector, server_model, observer, state)
    state = begun_in_public(job, server_model)
    observer.initialised(RoundOutcome(0, Collected(attempts=1), None, time.monotonic() - began))
    return state


def begun_in_public(job: Job, server_model: ServerModel) -> ServerState:
    """Return the state before any record was used: what is scored as "before"."""
    state = job.start(server_model.start)
    if job.derived or job.origin.asked == "sites":
        return state
    if job.origin.asked == "server":
        state = job.begin(server_model.start, server_model.public_statistic())
    return job.start(server_model.calibrated(state.adapter)) if job.calibrated else state


def _from_sites(
    job: Job, collector: Collector, server_model: ServerModel, observer: Observer, state: ServerState
) -> ServerState:
    """Return the state that the mean of the sites' statistics makes."""
    began = time.monotonic()
    observer.asks()
    got = collector.collect(0, state)
    if not got.counts:
        score = server_model.score(state.adapter)
        observer.missed(RoundOutcome(0, got, score, time.monotonic() - began, counts=False))
        raise RunFailed(got.too_few(0))
    observer.initialised(RoundOutcome(0, got, None, time.monotonic() - began))
    measured = mean(got.averaged)
    if isinstance(job.origin, PaidStart):
        server_model.statistic_words = job.origin.found(measured, job.adapter.rank, got.noise.exact() or 0.0)
    state = job.begin(server_model.start, server_model.completed(measured))
    return job.start(server_model.calibrated(state.adapter)) if job.calibrated else state

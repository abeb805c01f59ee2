"""The server's part of a round: the strategy's average, the optimiser's step, the score, and what comes between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fedveil.common.messages.state import AdapterState
from fedveil.common.messages.tensors import merge
from fedveil.common.model.score import Score
from fedveil.server.collect.base import Collected
from fedveil.server.model import ServerModel
from fedveil.server.ruled import round_step
from fedveil.strategies.job import Job
from fedveil.strategies.state import ServerState, as_returned


class ServerUpdate:
    """Averages, steps and evaluates by a job's settings.

    Args:
        job: the run.
        server_model: the run's model at the server.
        save: saves a state that was made after a round which is saved already, before any site is sent it.
        renewed: whether the state that the run goes on from was made so.
    """

    def __init__(
        self, job: Job, server_model: ServerModel, save: Callable[[ServerState], None], *, renewed: bool = False
    ) -> None:
        self._job, self._model, self._save, self._renewed = job, server_model, save, renewed
        self._measured: AdapterState | None = None
        """What the server's rule took from public text."""

    def prepare(self, state: ServerState) -> ServerState:
        """Return the state with what the start has of the head, after the head's own rounds.

        The paid round is saved before it, so that no site pays again where a text cannot be read. The state is saved
        before it is sent: another machine would make it equal to the last bit but one, and sites would pay again.
        """
        if 0 < state.round_number == self._job.starts_after and not self._renewed:
            state = self._model.around_head(state)
            self._save(state)
            self._renewed, self._measured = True, None
        if self._measured is None:
            self._measured = self._model.rule_statistic(state)
        return state

    def average(self, state: ServerState, got: Collected) -> ServerState:
        """Return the state with the strategy's average of what was collected, one round on."""
        strategy = self._job.strategy
        return as_returned(strategy.combine(state, got.averaged), state, f"strategy {strategy.name!r}: combine")

    def step(self, state: ServerState, averaged: ServerState, got: Collected) -> ServerState:
        """Return the state that rule, optimiser and strategy make of an average, from the state before the round."""
        job, model = self._job, self._model.model
        after = round_step(job, self._measured or {}, got.noise, state.round_number + 1)(state, averaged)
        remembered = job.rule.remember(state, averaged, model, job.config, got.noise.usual)
        unsettled = replace(after, memory=merge(after.memory, remembered))
        return as_returned(job.strategy.settle(unsettled), unsettled, f"strategy {job.strategy.name!r}: settle")

    def evaluate(self, state: ServerState) -> Score | None:
        """Return the score of every ``evaluate-every``-th round and of the last one."""
        config, number = self._job.config, state.round_number
        due = number % config.evaluate_every == 0 or number == config.rounds
        return self._model.score(state.adapter) if due else None

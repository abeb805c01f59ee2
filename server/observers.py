"""The events of a run, and the interface of its observers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from fedveil.common.model.score import Score
from fedveil.server.collect.base import Collected
from fedveil.server.members import Member
from fedveil.strategies.state import ServerState


@dataclass(frozen=True)
class RoundOutcome:
    """One finished round, as observers see it."""

    round_number: int
    got: Collected
    """What came of asking the sites; its results have been paid for, whether or not the round counts."""
    score: Score | None
    """None in a round that is not scored (``evaluate-every``)."""
    seconds: float
    counts: bool = True
    """Whether the quorum was reached; if not, nothing was averaged."""


@dataclass(frozen=True)
class Update:
    """The server's part of a round that counts: all three states are of the whole adapter, in its own dtype.

    The length of the round's average, say, is
    ``l2_norm(subtract(update.averaged.adapter, update.before.adapter))`` (``common.messages.tensors``).
    """

    before: ServerState
    """What the sites started from."""
    averaged: ServerState
    """The same with the strategy's average of what they sent; what no site trained is as before."""
    after: ServerState
    """What the server's step made of it, and the next round starts from."""


class Observer:
    """Receives the events of a run: its folder, the terminal, an experiment tracker. By default it ignores each."""

    def started(
        self, baseline: Score, state: ServerState, members: Mapping[str, Member], begun: Score | None = None
    ) -> None:
        """The score before any record was used, and the one after round 0 where that used some."""

    def resumed(self, round_number: int, score: Score | None) -> None:
        """The run resumes after a round with that round's score."""

    def asks(self) -> None:
        """Sites are about to receive a task, and to pay for it.

        Raises:
            RunFailed: their replies could not be saved.
        """

    def initialised(self, outcome: RoundOutcome) -> None:
        """The initialisation was made from the outcome's sites, or without sites from public records."""

    def finished(self, outcome: RoundOutcome, update: Update, members: Mapping[str, Member]) -> None:
        """A round is complete and counts."""

    def renewed(self, state: ServerState, members: Mapping[str, Member]) -> None:
        """The server made a new state after the last round; no site has seen it."""

    def missed(self, outcome: RoundOutcome) -> None:
        """A round did not reach its quorum: the run ends with the state before it."""

    def stopped(self, reason: str) -> None:
        """The run ends before its last round, without an error."""


class Observers(Observer):
    """Passes each event to several observers, in their order."""

    def __init__(self, *observers: Observer) -> None:
        for event in (name for name in vars(Observer) if not name.startswith("_")):
            setattr(self, event, partial(_pass_on, [getattr(observer, event) for observer in observers]))


def _pass_on(listeners: Sequence[Callable[..., None]], *event: object, **named: object) -> None:
    for listener in listeners:
        listener(*event, **named)

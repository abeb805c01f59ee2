"""The events of a run, and the interface of its observers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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


class Observer:
    """Hears what goes on in a run: its folder, the terminal, a tracker. Each method does nothing by default."""

    def started(
        self, baseline: Score, state: ServerState, members: Mapping[str, Member], begun: Score | None = None
    ) -> None:
        """Hear the score before any record was used, and the one after round 0 where that used some."""

    def resumed(self, round_number: int, score: Score | None) -> None:
        """Hear that the run goes on after a round, and that round's score."""

    def asks(self) -> None:
        """Hear that sites are about to be asked, and to pay.

        Raises:
            RunFailed: what they answer could not be saved.
        """

    def initialised(self, outcome: RoundOutcome) -> None:
        """Hear what round 0 brought for the start, from the outcome's sites (none: from public records)."""

    def finished(self, outcome: RoundOutcome, state: ServerState, members: Mapping[str, Member]) -> None:
        """Hear that a round is complete and counts."""

    def renewed(self, state: ServerState, members: Mapping[str, Member]) -> None:
        """Hear of a state that was made after the last round, which is saved; no site has seen it."""

    def missed(self, outcome: RoundOutcome) -> None:
        """Hear that a round did not reach its quorum: what was trained before stays, and the run ends."""

    def stopped(self, reason: str) -> None:
        """Hear that the run ends before its last round, and well."""


class Observers(Observer):
    """Passes what it hears to several observers, in their order."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def started(
        self, baseline: Score, state: ServerState, members: Mapping[str, Member], begun: Score | None = None
    ) -> None:
        """Pass it on."""
        for one in self._observers:
            one.started(baseline, state, members, begun)

    def resumed(self, round_number: int, score: Score | None) -> None:
        """Pass it on."""
        for one in self._observers:
            one.resumed(round_number, score)

    def asks(self) -> None:
        """Pass it on."""
        for one in self._observers:
            one.asks()

    def initialised(self, outcome: RoundOutcome) -> None:
        """Pass it on."""
        for one in self._observers:
            one.initialised(outcome)

    def finished(self, outcome: RoundOutcome, state: ServerState, members: Mapping[str, Member]) -> None:
        """Pass it on."""
        for one in self._observers:
            one.finished(outcome, state, members)

    def renewed(self, state: ServerState, members: Mapping[str, Member]) -> None:
        """Pass it on."""
        for one in self._observers:
            one.renewed(state, members)

    def missed(self, outcome: RoundOutcome) -> None:
        """Pass it on."""
        for one in self._observers:
            one.missed(outcome)

    def stopped(self, reason: str) -> None:
        """Pass it on."""
        for one in self._observers:
            one.stopped(reason)

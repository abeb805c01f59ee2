"""The phases of a run: what each round trains, on which inputs, and at which rate.

Server and sites make a run's ``Schedule`` from the run's settings alone, so no task can change what a round does. It
says per round what is trained and sent, what sites compute ahead and keep, what a model has to rehearse, and what the
planner counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from fedveil.common.check import nearest
from fedveil.common.config.schedule import learning_rate
from fedveil.common.errors import ConfigError

HEAD, ADAPTER = "head", "adapter"
"""What a phase can train: the classification head, and all that the adapter trains."""
Inputs = Literal["examples", "features", "jacobians"]
"""What steps are on: the examples themselves, the features that the head sees of each, or each one's Jacobian of the
logits by the adapter (``client.linearised``)."""
KINDS: dict[str, tuple[tuple[str, ...], Inputs]] = {
    "adapter+head on examples": ((ADAPTER, HEAD), "examples"),
    "adapter on examples": ((ADAPTER,), "examples"),
    "adapter on jacobians": ((ADAPTER,), "jacobians"),
    "head on features": ((HEAD,), "features"),
}
"""What a phase may be, as the setting ``phases`` says it."""
_WRITTEN = re.compile(r"(?:(1/)?([1-9]\d{0,8}) )?(\S+ on \S+)(?: every ([1-9]\d{0,8}))?")


@dataclass(frozen=True)
class Phase:
    """Consecutive rounds that train the same tensors on the same inputs, in one course of the learning rate."""

    rounds: int
    trains: tuple[str, ...]
    """``HEAD``, ``ADAPTER`` or both."""
    inputs: Inputs = "examples"
    every: int = 0
    """Rounds after which sites compute their features or Jacobians again; 0: once in the phase."""

    def computations(self) -> int:
        """Return how often sites compute the phase's inputs ahead of its steps; 0 where these are the examples.

        >>> Phase(20, (ADAPTER,), "jacobians", every=8).computations()
        3
        """
        if self.inputs == "examples":
            return 0
        return -(-self.rounds // self.every) if self.every else 1


@dataclass(frozen=True)
class Schedule:
    """A run's phases in their order; rounds are numbered from 1 on.

    >>> run = Schedule((Phase(2, (HEAD,), "features"), Phase(3, (ADAPTER,), "jacobians")))
    >>> run.rounds, run.trains_adapter(2), run.at(3).inputs, run.span(4)
    (5, False, 'jacobians', (2, 3))
    """

    phases: tuple[Phase, ...]

    @property
    def rounds(self) -> int:
        """The length of the run."""
        return sum(phase.rounds for phase in self.phases)

    @property
    def adapter_waits(self) -> int:
        """Rounds of the head alone before the adapter is first trained; 0 where it is trained at once, or never."""
        return next((before for before, phase in self._spans() if ADAPTER in phase.trains), 0)

    @property
    def has_adapter(self) -> bool:
        """Whether some round trains an adapter."""
        return any(ADAPTER in phase.trains for phase in self.phases)

    @property
    def computes_ahead(self) -> bool:
        """Whether sites keep features or Jacobians of their records from one round to the next."""
        return any(phase.inputs != "examples" for phase in self.phases)

    def with_inputs(self, inputs: Inputs) -> tuple[Phase, ...]:
        """Return the phases whose steps are on these inputs."""
        return tuple(phase for phase in self.phases if phase.inputs == inputs)

    def at(self, round_number: int) -> Phase:
        """Return the phase of a round.

        Raises:
            ConfigError: the run has no such round.
        """
        return self.phases[self._index(round_number)]

    def span(self, round_number: int) -> tuple[int, int]:
        """Return the rounds before the phase of a round, and those in it."""
        index = self._index(round_number)
        return sum(phase.rounds for phase in self.phases[:index]), self.phases[index].rounds

    def trains_adapter(self, round_number: int) -> bool:
        """Return whether a round trains the adapter; if not, it stays as it is, to the bit."""
        return ADAPTER in self.at(round_number).trains

    def trains_head(self, round_number: int) -> bool:
        """Return whether a round trains the head; if not, it stays as it is, to the bit."""
        return HEAD in self.at(round_number).trains

    def computation(self, round_number: int) -> tuple[int, int]:
        """Return which computation of features or Jacobians serves a round: its phase, and its number in that."""
        before, _ = self.span(round_number)
        every = self.at(round_number).every
        return self._index(round_number), (round_number - 1 - before) // every if every else 0

    def ends_computation(self, round_number: int) -> bool:
        """Return whether no later round needs the features or Jacobians of this one."""
        return round_number >= self.rounds or self.computation(round_number) != self.computation(round_number + 1)

    def rate(self, course: str, peak: float, round_number: int, step: int = 0, steps: int = 1) -> float:
        """Return the learning rate of a step; each phase has the whole course.

        Args:
            course: a name of ``common.config.schedule``.
            peak: the highest rate.
            round_number: the round's.
            step: of the round, from 0 on.
            steps: of every round.
        """
        before, rounds = self.span(round_number)
        return learning_rate(course, peak, (round_number - 1 - before) * steps + step, rounds * steps)

    def _spans(self) -> Iterator[tuple[int, Phase]]:
        before = 0
        for phase in self.phases:
            yield before, phase
            before += phase.rounds

    def _index(self, round_number: int) -> int:
        for index, (before, phase) in enumerate(self._spans()):
            if before < round_number <= before + phase.rounds:
                return index
        raise ConfigError(f"there is no round {round_number} in a run of {self.rounds}")


def parse_phases(text: str, rounds: int = 0) -> tuple[Phase, ...]:
    """Return the phases that the setting ``phases`` lists.

    >>> parse_phases("2 head on features, 6 adapter on jacobians every 3")[1]
    Phase(rounds=6, trains=('adapter',), inputs='jacobians', every=3)
    >>> phases_text(parse_phases("1/3 head on features, adapter on jacobians, 1/7 head on features", 37))
    '12 head on features, 20 adapter on jacobians, 5 head on features'

    Args:
        text: phases, separated by commas; one begins with its rounds, with ``1/N`` of the run's, rounded down, or with
            neither: it has the rounds that the others leave.
        rounds: of the run; 0: the phases say how many there are.

    Raises:
        ConfigError: the text is not of that form, or leaves a phase without a round.
    """
    parts = [" ".join(part.split()) for part in text.split(",")]
    written = [_match(part) for part in parts]
    counts = [rounds // int(match[2]) if match[1] else int(match[2] or 0) for match in written]
    rest = [index for index, match in enumerate(written) if not match[2]]
    if len(rest) > 1 or (not rounds and (rest or any(match[1] for match in written))):
        raise ConfigError(f"phases has {text!r}: say of every phase but one how many rounds it has")
    if rest:
        counts[rest[0]] = rounds - sum(counts)
    if min(counts) < 1:
        raise ConfigError(f"phases has {text!r}, and rounds is {rounds}, which leaves a phase without a round")
    return tuple(_phase(part, match, count) for part, match, count in zip(parts, written, counts, strict=True))


def rounds_of(text: str) -> int:
    """Return how many rounds the phases of a text have together; 0 where one of them has a share of the run's."""
    written = [_match(" ".join(part.split())) for part in text.split(",")]
    return 0 if any(match[1] or not match[2] for match in written) else sum(int(match[2]) for match in written)


def _match(text: str) -> re.Match[str]:
    match = _WRITTEN.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"phases has {text!r}: write how many rounds, what they train and on what, as in '12 head on features' or "
            "'20 adapter on jacobians every 10', with commas between phases"
        )
    return match


def _phase(text: str, match: re.Match[str], rounds: int) -> Phase:
    kind, every = match[3], int(match[4] or 0)
    if kind not in KINDS:
        raise ConfigError(
            f"phases has {text!r}: there is no {kind!r}{nearest(kind, KINDS)}; there are {', '.join(KINDS)}"
        )
    trains, inputs = KINDS[kind]
    if every and (inputs != "jacobians" or every >= rounds):
        raise ConfigError(
            f"phases has {text!r}: 'every' is for fewer rounds than the phase has, and for jacobians alone"
        )
    return Phase(rounds, trains, inputs, every)


def phases_text(phases: tuple[Phase, ...]) -> str:
    """Return phases as the setting ``phases`` lists them.

    >>> phases_text((Phase(2, (HEAD,), "features"), Phase(6, (ADAPTER,), "jacobians", 3)))
    '2 head on features, 6 adapter on jacobians every 3'
    """
    kinds = {kind: name for name, kind in KINDS.items()}
    return ", ".join(
        f"{phase.rounds} {kinds[phase.trains, phase.inputs]}{f' every {phase.every}' if phase.every else ''}"
        for phase in phases
    )

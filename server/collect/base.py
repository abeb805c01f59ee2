"""The result of a round, and the interface of its collector."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from fedveil.common.messages.round import TrainResult
from fedveil.common.words import clean, counted
from fedveil.server.collect.noise import NO_NOISE, Noise
from fedveil.strategies.state import Contribution, ServerState

if TYPE_CHECKING:
    from fedveil.common.run_lines import Absence
    from fedveil.server.members import Member


@dataclass
class Collected:
    """What all attempts at a round brought."""

    results: dict[int, TrainResult] = field(default_factory=dict)
    """By node; these count."""
    refusals: dict[int, Absence] = field(default_factory=dict)
    """By node, the last word of each that was asked and has no result."""
    paid: list[TrainResult] = field(default_factory=list)
    """What was charged for in every attempt, without contents, in order: what counts and what does not."""
    failures: list[Absence] = field(default_factory=list)
    """Everything that went wrong, also where a later attempt mended it."""
    needed: int = 1
    """How many results a round must have."""
    attempts: int = 0
    bytes_down: int = 0
    """Adapter payload of all tasks and, up, of all replies."""
    bytes_up: int = 0
    averaged: tuple[Contribution, ...] = ()
    """What the strategy averages, each part with its noise. Empty: the round does not count."""
    noise: Noise = NO_NOISE
    """On one number of the average."""
    participants: tuple[str, ...] = ()
    """The names under which the round's line says who took part."""
    ending: str = ""
    """Why the run ends well with this round, which does not count; empty: it does not end so."""

    @property
    def counts(self) -> bool:
        """Whether the round brought enough for an average."""
        return bool(self.averaged)

    def pay(self, results: Iterable[TrainResult]) -> None:
        """Remember what results cost their sites, whatever becomes of them."""
        self.paid += [replace(one, contribution={}, words=b"", offer=None) for one in results if one.spending]

    def in_order(self) -> Collected:
        """Return the same, with results and refusals in the order of the sites' names."""
        results = dict(sorted(self.results.items(), key=lambda item: item[1].site))
        return replace(self, results=results, refusals=dict(sorted(self.refusals.items(), key=lambda i: i[1].site)))

    def only_budgets_failed(self) -> bool:
        """Return whether nothing but spent budgets went wrong, in any attempt: no site can do another round."""
        # A site that refused a sum in an earlier round is asked no more: it is among the refusals alone.
        refused = any(absence.kind == "budget" for absence in self.refusals.values())
        return refused and all(failure.kind == "budget" for failure in self.failures)

    def too_few(self, round_number: int) -> str:
        """Return why a round does not count: who did not take part, sites with one reason together."""
        last, sites = self.failures[-1] if self.failures else None, dict[tuple[str, str], list[str]]()
        for absent in self.refusals.values():
            # Of a reason that all have, such as a spent budget, one line is read and not one for each.
            sites.setdefault((absent.kind, absent.reason.replace(f" {absent.site!r}", "")), []).append(absent.site)
        lines = [f"{', '.join(names)} ({kind}): {reason}" for (kind, reason), names in sites.items()]
        # What no site answers for, such as how many make a sum, and what to do then.
        reasons = "; ".join([*([last.reason] if last and not last.site else []), *lines])
        attempts = f" in {self.attempts} attempts" if self.attempts > 1 else ""
        succeeded = f"{counted(len(self.results), 'site')} succeeded{attempts}, {self.needed} needed"
        return f"round {round_number}: {succeeded}. {clean(reasons, 2000)}"


class Collector(Protocol):
    """Asks sites for the rounds of a run. What it hands on is all that anybody is shown of them."""

    @property
    def members(self) -> Mapping[str, Member]:
        """What the server remembers of every site that counted, by the mark of its node."""

    def ends_before(self, round_number: int) -> str:
        """Return why the run ends well before a round; empty: it does not."""

    def collect(self, round_number: int, state: ServerState) -> Collected:
        """Ask sites for a round that starts from ``state``; what comes back is paid for, whether or not it counts."""

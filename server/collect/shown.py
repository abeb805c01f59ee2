"""The lines that a run shows of a round during collection and afterwards: progress, log, times, sites and cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fedveil.common.messages.round import Spending
from fedveil.common.run_lines import ProgressFile
from fedveil.common.words import counted
from fedveil.server.collect.base import Collected
from fedveil.server.members import Member


@dataclass(frozen=True)
class Shown:
    """All of a round is shown: who gets a task, who answered, how long it took, and what each site has spent."""

    rounds: int
    unit: str
    """Of the promise, in one word; empty: there is no promise."""
    count: int
    """How many honest sites the price counts on; 0: it counts on none."""

    hidden_log: str = ""
    """The name of a logger whose lines the run's log leaves out; empty: none."""
    log_note: str = ""
    """What the run's log says of itself; empty: nothing."""

    def waiting(self, online: int, wanted: int) -> ProgressFile:
        """Return the progress while sites are waited for, before any gets a task."""
        return ProgressFile("waiting for sites", online=online, wanted=wanted)

    def ready(self) -> ProgressFile | None:
        """Return the progress when enough sites are there, before any gets a task; None: no new one."""
        return None

    def answered(self, round_number: int, sites: Sequence[str], asked: int) -> ProgressFile | None:
        """Return the progress while sites answer; None: no new one."""
        return ProgressFile(
            "training", round_number=round_number, rounds=self.rounds, answered=list(sites), asked=asked
        )

    def seconds(self, seconds: float) -> float | None:
        """Return how long a round took, in s; None: that is not shown."""
        return round(seconds, 3)

    def of_a_site(self, figure: int | None) -> int | None:
        """Return a figure that follows from what one site sent; None: that is not shown."""
        return figure

    def sites(self, got: Collected) -> str:
        """Return who took part in a round, in words."""
        return counted(len(got.results), "site")

    @property
    def whose(self) -> str:
        """Whose spending the terminal shows."""
        return f"worst site, h = {self.count}" if self.count else "worst site"

    def spent(self, got: Collected, members: Mapping[str, Member]) -> list[Spending | None]:
        """Return the spendings of which the terminal shows the largest."""
        del got
        return [member.spending for member in members.values()]

    def by_lines(self, epsilon: Callable[[], float | None]) -> float | None:
        """Return the ε by all lines of the run, where it can be above what a site says; None: it cannot."""
        return epsilon()


@dataclass(frozen=True)
class ShownOfCohort(Shown):
    """Nothing is shown that follows from who was drawn or has answered. ``count`` is the size of the cohort."""

    # Of sites in this very process, an experiment's, the lines would tell who was drawn.
    hidden_log: str = "fedveil.site"
    log_note: str = (
        "this log has the times of rounds, which may show who was drawn: it is the trusted server's own, and is not to "
        "be published"
    )

    def ready(self) -> ProgressFile | None:
        """Return that training goes on, which is written before anybody is drawn."""
        return ProgressFile("training")

    def answered(self, round_number: int, sites: Sequence[str], asked: int) -> ProgressFile | None:
        """Return None: not even whether anybody was drawn is shown."""
        del round_number, sites, asked
        return None

    def seconds(self, seconds: float) -> float | None:
        """Return None: a round takes as long as those who were drawn."""
        del seconds
        return None

    def of_a_site(self, figure: int | None) -> int | None:
        """Return None: no figure is one site's."""
        del figure
        return None

    def sites(self, got: Collected) -> str:
        """Return the cohort."""
        del got
        return f"cohort of {self.count}"

    @property
    def whose(self) -> str:
        """Whose spending the terminal shows."""
        return "trusted server"

    def spent(self, got: Collected, members: Mapping[str, Member]) -> list[Spending | None]:
        """Return what the server's ledger was charged for."""
        del members
        return [paid.spending for paid in got.paid]

    def by_lines(self, epsilon: Callable[[], float | None]) -> float | None:
        """Return None: the server's ledger is the one that counts."""
        del epsilon
        return None

"""The spending of each site: by its own ledger, and computed again here from every line that it sent.

The ledger's total is the number of record. The figure computed here covers what reached the server of this run alone.
A site whose ledger has earlier runs, or charged rounds whose reply was lost, reports more. A site that reports less
than its own lines cost is wrong, and the report says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from fedveil.common.errors import ConfigError
from fedveil.common.messages.round import SpendingFigures
from fedveil.common.words import natural, pathless
from fedveil.privacy.accountant import TRAINING
from fedveil.privacy.accounting import alone
from fedveil.privacy.events import Event
from fedveil.privacy.privacy_filter import departed, promised
from fedveil.reports.folder import RunFiles
from fedveil.reports.releases import releases_of, releases_of_site

EXPOSED = (
    "no ε holds: records of its data set were released without privacy before, and its steward still allowed private "
    "rounds; the recomputed figures are of this run's releases alone"
)
MORE = "its ledger also has earlier runs, rounds that were charged and did not count, or the rest of its first plan"
"""Why a site may report more than this run's lines cost."""
TOLERANCE = 1e-3
"""In ε: the PLD's discretisation."""


@dataclass(frozen=True)
class Recomputed:
    """The ε of one site's releases in this run, by its own lines."""

    epsilon: float
    """By the number of record's accountant (PLD)."""
    accountant: str
    rdp: float
    """By RDP: the cross-check."""
    departed: float
    """By the price of what departs from a plan, which is below a PLD's where hardly anything was spent."""


@dataclass(frozen=True)
class SiteReport:
    """One site in the report. Epsilons: for the mechanism's unit, add or remove one, at ``delta``; None: no claim."""

    site: str
    public_size: int | None
    """Records, as the site declares; None where the run's files do not say."""
    rounds_joined: int
    rounds_refused: int
    steps: int | None
    """Optimiser steps in this run."""
    events: list[Event]
    """Of the training steps, distinct, in order of use."""
    delta: float | None
    epsilon_total: float | None
    """By the site's ledger, over all runs that used it."""
    epsilon_budget: float | None
    epsilon_remaining: float | None
    accountant: str
    epsilon_recomputed: float | None
    """Of this run's releases, by the number of record's accountant (PLD)."""
    accountant_recomputed: str
    epsilon_rdp: float | None
    """Of this run's releases, by RDP: the cross-check."""
    epsilon_alone: float | None
    """Of this run's releases, if no other site adds its noise to a sum; None where none was to."""
    epsilon_all_honest: float | None
    """Of this run's releases, if all sites of each sum add their noise, by the sum of fewest sites; None as above."""
    epsilon_without_colluders: float | None
    """The same if all do but ``privacy.colluders`` of them; None as above, and where these leave no site."""
    agreement: str
    """``agrees``, ``larger`` or ``smaller`` (the site's total against the recomputed one), ``exposed`` (its total is
    infinite), ``unknown`` or ``none``."""
    note: str
    """The agreement in words."""

    @property
    def epsilon_worst(self) -> float | None:
        """The larger of what the site says and what its lines cost: a report never shows less."""
        known = [value for value in (self.epsilon_total, self.epsilon_recomputed) if value is not None]
        return max(known) if known else None


def site_reports(files: RunFiles) -> list[SiteReport]:
    """Return every site that the run's files name, in the natural order of names: site-2 before site-10."""
    names = [name for name, lines in files.by_site.items() if lines.privacy or lines.joined or lines.refusals]
    return [_site(name, files) for name in sorted(names, key=natural)]


def worst_site(sites: Iterable[SiteReport]) -> SiteReport | None:
    """Return the site that has spent most, whose ε is the federation's; None if none has paid for anything."""
    paid = [site for site in sites if site.epsilon_worst is not None]
    return max(paid, key=lambda site: site.epsilon_worst or 0.0, default=None)


def federation_delta(sites: Iterable[SiteReport]) -> float | None:
    """Return the δ at which the worst site's ε holds for every site: the largest, since policies may ask for less.

    What a site has spent at a smaller δ holds at a larger one as well; at a smaller one it costs more.
    """
    return max((site.delta for site in sites if site.delta is not None), default=None)


def _counted(name: str, files: RunFiles) -> list[bool]:
    """Return which of a site's releases count: in each round that does and has it, the last that it paid for.

    The others are of attempts that were thrown away, replies that do not count, and rounds that were cut off.
    """
    lines = files.by_site[name]
    own = [line.round_number for line in lines.privacy if line.spent]
    joined = {line.round_number for line in lines.joined if line.complete}
    return [number in joined and number not in own[place + 1 :] for place, number in enumerate(own)]


def _site(name: str, files: RunFiles) -> SiteReport:
    lines = files.by_site[name]
    own = lines.privacy
    paid = [line.spent for line in own if line.spent]
    training = [spent for spent in paid if spent.purpose == TRAINING]
    last = paid[-1] if paid else None
    total, delta = (last.epsilon_total, last.delta) if last else (None, None)
    again, fault = _recompute(name, files, delta)
    agreement, note = _compare(total, again, fault)
    return SiteReport(
        site=name,
        public_size=own[-1].public_size if own else None,
        rounds_joined=len(lines.joined),
        rounds_refused=len(lines.refusals),
        steps=sum(spent.steps_round for spent in paid) if paid else None,
        events=list(dict.fromkeys(spent.event for spent in training)),
        delta=delta,
        epsilon_total=total,
        epsilon_budget=last.epsilon_budget if last else None,
        epsilon_remaining=last.epsilon_remaining if last else None,
        accountant=next((line.accountant for line in reversed(own) if line.spent), ""),
        epsilon_recomputed=again.epsilon if again else None,
        accountant_recomputed=again.accountant if again else "",
        epsilon_rdp=again.rdp if again else None,
        epsilon_alone=_alone(paid, files, delta) if again else None,
        epsilon_all_honest=_honest(name, paid, files, 0) if again else None,
        epsilon_without_colluders=_honest(name, paid, files, colluders_of(files)) if again else None,
        agreement=agreement,
        note=note,
    )


def _recompute(name: str, files: RunFiles, delta: float | None) -> tuple[Recomputed | None, str]:
    """Return a site's ε, computed again, and what kept it from being computed."""
    if delta is None:
        return None, ""
    try:
        releases = releases_of_site(name, files)
        value, accountant = promised(releases, delta)
        rdp = promised(releases, delta, method="rdp")[0]
        return Recomputed(value, str(accountant), rdp, departed(releases, delta)[0]), ""
    except ConfigError as error:
        return None, str(error)


def _alone(paid: Sequence[SpendingFigures], files: RunFiles, delta: float | None) -> float | None:
    releases = releases_of(paid, files)
    own = alone(releases)
    return None if delta is None or own == releases else promised(own, delta)[0]


def fewest_summed(files: RunFiles) -> int:
    """Return the size of the smallest sum among the rounds that counted; 0 if none did."""
    # Round 0 sums nothing: where its start is from public records, its line has no participants.
    counted = (line for line in files.rounds if line.complete and line.round_number)
    return min((len(line.participants) for line in counted), default=0)


def colluders_of(files: RunFiles) -> int:
    """Return how many sites of a sum may help the server, by the run's settings."""
    colluders = files.config.settings.get("privacy.colluders", 0)
    return colluders if isinstance(colluders, int) else 0


def _honest(name: str, paid: Sequence[SpendingFigures], files: RunFiles, but: int) -> float | None:
    """Return ε if in the smallest sum all sites except ``but`` add their noise; None where no noise is shared.

    Releases that do not count are priced as the site paid for them: no line has the size of those sums.
    """
    releases, sites = releases_of(paid, files), fewest_summed(files) - but
    own = [
        replace(release, event=release.event.of_honest(sites)) if counts and sites > 0 else release
        for release, counts in zip(releases, _counted(name, files), strict=True)
    ]
    return None if own == releases else promised(own, paid[-1].delta)[0]


def _compare(total: float | None, again: Recomputed | None, fault: str) -> tuple[str, str]:
    if total is None:
        return "none", "released nothing that was paid for"
    if total == math.inf:
        return "exposed", EXPOSED
    if again is None:
        return "unknown", f"cannot be recomputed: {pathless(fault)}"
    if abs(total - again.epsilon) <= TOLERANCE or total == again.epsilon:
        return "agrees", "agrees"
    if total > again.epsilon:
        return "larger", f"the site reports {total - again.epsilon:.3f} more: {MORE}"
    if total >= again.departed - TOLERANCE:
        return (
            "agrees",
            "agrees, by the accountant of departures from a first plan; the larger figure counts here",
        )
    return "smaller", "DISAGREES: the site reports less than its own lines cost; the larger figure counts here"


def distinct(events: Iterable[Event], figure: str) -> list[float]:
    """Return a figure of events, distinct and in order; one that lacks it has none."""
    return list(dict.fromkeys(event.figures[figure] for event in events if figure in event.figures))

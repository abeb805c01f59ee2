"""The federation's ε by the end of each round, by what sites reported and by what their lines cost."""

from __future__ import annotations

import math

from fedveil.common.errors import ConfigError
from fedveil.common.messages.round import SpendingFigures
from fedveil.privacy.accounting import Release
from fedveil.privacy.privacy_filter import promised
from fedveil.reports.folder import RunFiles
from fedveil.reports.releases import count_release, noised_counts, releases_of

MOST_PRICED = 64
"""Most prices of a course of ε; sites with equal releases share theirs."""


def epsilon_by(files: RunFiles, number: int) -> float | None:
    """Return the federation's ε by the end of a round; None if no site has paid by then.

    For each site it is the larger of what it reports and what its lines cost.
    """
    reported = [line.spent.epsilon_total for line in files.privacy if line.spent and line.round_number <= number]
    return max([*reported, _largest_price(_paid(files), number)]) if reported else None


def epsilon_course(files: RunFiles) -> dict[int, float | None]:
    """Return the federation's ε by the end of each round, as ``epsilon_by``.

    A long run's lines are priced at evenly spread rounds, and a price is used until the next: no release lowers it.
    """
    numbers = sorted({line.round_number for line in files.rounds} | {line.round_number for line in files.privacy})
    paid, reported = _paid(files), dict[int, float]()
    for line in files.privacy:
        if line.spent:
            reported[line.round_number] = max(line.spent.epsilon_total, reported.get(line.round_number, 0.0))
    alike = {(tuple(release for _, release in released), lines[-1][1]) for lines, released in paid}
    step = max(1, math.ceil(len(numbers) / max(2, MOST_PRICED // max(1, len(alike)))))
    priced, course, most = set(numbers[::-1][::step]), dict[int, float | None](), None
    for number in numbers:
        own = _largest_price(paid, number) if number in priced else 0.0
        if number in reported or most is not None:
            most = max(most or 0.0, reported.get(number, 0.0), own)
        course[number] = most
    return course


_Paid = list[tuple[list[tuple[int, float]], list[tuple[int, Release]]]]
"""Of each site the round and the δ of each line, and the round of each release."""


def _paid(files: RunFiles) -> _Paid:
    """Return what every site paid for, in one pass, except sites whose releases have no price here.

    The report names those sites, and the total that they report counts.
    """
    spent: dict[str, list[tuple[int, SpendingFigures]]] = {}
    for line in files.privacy:
        if line.spent:
            spent.setdefault(line.site, []).append((line.round_number, line.spent))
    counts: dict[str, list[tuple[int, float]]] = {}
    for number, site, noise, _ in noised_counts(files):
        counts.setdefault(site, []).append((number, noise))
    paid: _Paid = []
    for site, own in spent.items():
        try:
            releases = releases_of([one for _, one in own], files)
            released = [(number, release) for (number, _), release in zip(own, releases, strict=True)]
            released += [(number, count_release(noise)) for number, noise in counts.get(site, [])]
        except ConfigError:
            continue
        paid.append(([(number, one.delta) for number, one in own], released))
    return paid


def _largest_price(paid: _Paid, number: int) -> float:
    """Return the largest of what each site's lines cost by the end of a round; of sites that did the same, once."""
    alike = set()
    for lines, released in paid:
        if deltas := [delta for at, delta in lines if at <= number]:
            alike.add((tuple(release for at, release in released if at <= number), deltas[-1]))
    return max((promised(releases, delta)[0] for releases, delta in alike), default=0.0)

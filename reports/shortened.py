"""Updates that the server made shorter before it averaged them, by site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common.run_lines import RoundLine
from common.words import EACH, names_text, natural, number_text
from reports.alike import spread

SHORTENED_COLUMNS = ("site", "rounds with such an update", "multiplied by")
SHORTENED = (
    "An update that is longer than is likely is multiplied by a figure below 1 before it is averaged, so that no site "
    "moves the model much further than the others do. It counts, and is no fault in itself: a site whose records are "
    "unlike the others' has longer ones. Where it is the same site in most rounds, ask there."
)


@dataclass(frozen=True)
class ShortenedReport:
    """One site's updates that were made shorter, in rounds that count and in round 0."""

    site: str
    rounds: list[int]
    factors: list[float]
    """What each was multiplied by, in the order of ``rounds``."""


def shortened_reports(rounds: Sequence[RoundLine]) -> list[ShortenedReport]:
    """Return every site with such an update, in the natural order of names."""
    told: dict[str, list[tuple[int, float]]] = {}
    for line in rounds:
        for one in line.shortened:
            told.setdefault(one.site, []).append((line.round_number, one.factor))
    return [
        ShortenedReport(site, [number for number, _ in told[site]], [factor for _, factor in told[site]])
        for site in sorted(told, key=natural)
    ]


def shortened_cells(reports: Sequence[ShortenedReport]) -> list[tuple[str, str, str]]:
    """Return the rows of the table as text: a row a site, or one row for many.

    >>> shortened_cells([ShortenedReport("north", [1, 4], [0.5, 0.25])])
    [('north', '2', '0.25 to 0.5')]
    """
    groups = [[report] for report in reports] if len(reports) <= EACH else [list(reports)]
    return [
        (
            names_text([report.site for report in group]),
            spread([len(report.rounds) for report in group], str),
            spread([factor for report in group for factor in report.factors], number_text),
        )
        for group in groups
    ]

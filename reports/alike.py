"""Tables of sites in which one row groups equal sites, so that a federation of a thousand fits a page.

Up to ``EACH`` sites, each has its own row. Above that, sites with equal figures share one, whatever their names and
public sizes. If that gives more than ``EACH`` rows, fewer figures must be equal (``ODDITIES``), a row has the lowest
and the highest of each figure, and the site that has spent most keeps its own row. Every row counts its sites.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from fedveil.common.run_lines import Absence
from fedveil.common.words import EACH, UNKNOWN, counted, names_text, natural, number_text, numbers_text
from fedveil.privacy.figures import NO_CLAIM, epsilon_text, remaining_text
from fedveil.reports.releases import ReleaseReport
from fedveil.reports.sites import MORE, SiteReport, distinct, worst_site

T = TypeVar("T")


@dataclass(frozen=True)
class Alike:
    """The sites of one row, with their figures as text: one, or the lowest and the highest."""

    names: str
    """Each, or the first and the last with their number."""
    count: int
    sizes: str
    """Public sizes."""
    joined: str
    refused: str
    steps: str
    rates: str
    noises: str
    clips: str
    spent: str
    deltas: str
    budgets: str
    left: str
    again: str
    """ε by PLD, computed again."""
    rdp: str
    alone: str
    """ε of this run's sums if no other site adds its noise."""
    agreement: str
    """That of every site in the row."""
    note: str


@dataclass(frozen=True)
class AlikeRelease:
    """The releases beside training of one row, likewise."""

    round_number: int
    names: str
    purpose: str
    count: str
    noises: str
    rates: str
    clips: str
    added: str
    value: str


def alike_sites(sites: Sequence[SiteReport]) -> list[Alike]:
    """Return the rows of a table of sites, in the natural order of their first names."""
    return [_row(group) for group in groups_of_sites(sites)]


def groups_of_sites(sites: Sequence[SiteReport]) -> list[list[SiteReport]]:
    """Return the sites of each row, in the order of their first sites."""
    groups = _groups(sites, lambda site: replace(site, site="", public_size=None), len(sites))
    worst = worst_site(sites)
    for key in ODDITIES if len(sites) > EACH else ():
        if len(groups) <= EACH:
            break
        groups = _groups(sites, partial(_oddity, key, worst), len(sites))
    return groups


ODDITIES: tuple[Callable[[SiteReport], object], ...] = (
    lambda s: (s.agreement, s.rounds_refused > 0, s.delta, _figures(s), s.epsilon_budget),
    lambda s: (s.agreement, s.rounds_refused > 0, s.delta, _figures(s)),
    lambda s: (s.agreement, s.rounds_refused > 0),
)
"""What makes a site odd, the most first; the last has hardly more than ``EACH`` kinds."""


def _oddity(key: Callable[[SiteReport], object], worst: SiteReport | None, site: SiteReport) -> object:
    return site is worst, key(site)


def _figures(site: SiteReport) -> tuple[list[float], ...]:
    return distinct(site.events, "noise_multiplier"), distinct(site.events, "clip_norm")


def _row(group: Sequence[SiteReport]) -> Alike:
    def of_events(name: str) -> str:
        lists = [distinct(site.events, name) for site in group]
        values = [value for values in lists for value in values]
        return numbers_text(lists[0]) if all(own == lists[0] for own in lists) else spread(values, number_text)

    return Alike(
        names=names_text([site.site for site in group]),
        count=len(group),
        sizes=spread([site.public_size for site in group], number_text),
        joined=spread([site.rounds_joined for site in group], str),
        refused=spread([site.rounds_refused for site in group], str),
        steps=spread([site.steps for site in group], number_text),
        rates=of_events("sample_rate"),
        noises=of_events("noise_multiplier"),
        clips=of_events("clip_norm"),
        spent=spread([site.epsilon_total for site in group], epsilon_text, NO_CLAIM),
        deltas=spread([site.delta for site in group], lambda value: f"{value:g}"),
        budgets=spread([site.epsilon_budget for site in group], number_text),
        left=spread([site.epsilon_remaining for site in group], remaining_text, NO_CLAIM),
        again=spread([site.epsilon_recomputed for site in group], epsilon_text),
        rdp=spread([site.epsilon_rdp for site in group], epsilon_text),
        alone=spread([site.epsilon_alone for site in group], epsilon_text),
        agreement=group[0].agreement,
        note=_note(group),
    )


def _note(group: Sequence[SiteReport]) -> str:
    notes = list(dict.fromkeys(site.note for site in group))
    if len(notes) == 1:
        return notes[0]
    if group[0].agreement == "larger":
        more = [(site.epsilon_total or 0.0) - (site.epsilon_recomputed or 0.0) for site in group]
        return f"each reports more, by {spread(more, lambda value: f'{value:.3f}')}: {MORE}"
    return f"{notes[0]} (and {counted(len(notes) - 1, 'other reason')})"


def alike_absences(absences: Sequence[Absence], sites: int) -> list[tuple[str, Absence]]:
    """Return absences grouped by attempt, kind and reason, each with the sites' names.

    More than ``EACH`` reasons of one attempt and kind are one group, with the first reason and the number of others.
    """
    groups = _groups(absences, lambda absence: replace(absence, site=""), sites)
    kinds = _groups(absences, lambda absence: (absence.round_number, absence.attempt, absence.kind), sites)
    if len(groups) > EACH * len(kinds):
        groups = kinds
    return [(names_text([absence.site for absence in group]), _reason(group)) for group in groups]


def _reason(group: Sequence[Absence]) -> Absence:
    others = len({absence.reason for absence in group}) - 1
    more = f" (and {counted(others, 'other reason')})" if others else ""
    return replace(group[0], reason=group[0].reason + more)


def alike_releases(releases: Sequence[ReleaseReport], sites: int) -> list[AlikeRelease]:
    """Return releases beside training, grouped by round and price, or by round and kind if prices are many."""
    groups = _groups(releases, lambda release: replace(release, site=""), sites)
    kinds = _groups(releases, lambda release: (release.round_number, release.purpose, release.count), sites)
    if len(groups) > EACH * len(kinds):
        groups = kinds
    return [
        AlikeRelease(
            round_number=group[0].round_number,
            names=names_text([release.site for release in group]),
            purpose=group[0].purpose,
            count=number_text(group[0].count),
            noises=spread([n for r in group for n in distinct([r.event], "noise_multiplier")], number_text),
            rates=spread([n for r in group for n in distinct([r.event], "sample_rate")], number_text),
            clips=spread([n for r in group for n in distinct([r.event], "clip_norm")], number_text),
            added=spread([release.epsilon_added for release in group], epsilon_text, "with the round"),
            value=spread([release.value for release in group], number_text),
        )
        for group in groups
    ]


def participants_text(participants: Sequence[str], sites: Sequence[SiteReport]) -> str:
    """Return who took part in a round: every name, or all sites except the named ones."""
    if len(participants) <= EACH:
        return ", ".join(participants)
    took = set(participants)
    missing = [site.site for site in sites if site.site not in took]
    if not missing:
        return f"all {number_text(len(took))} sites"
    if len(missing) <= EACH:
        return f"all but {', '.join(missing)} ({number_text(len(took))} sites)"
    return names_text(sorted(took, key=natural))


def spread(values: Sequence[T | None], form: Callable[[T], str], unknown: str = UNKNOWN) -> str:
    """Return figures as text: their common value, or the lowest and the highest of the known ones.

    >>> spread([3, None, 1, 2], str), spread([2, 2], str), spread([None], str)
    ('1 to 3', '2', '–')
    """
    known = sorted({value for value in values if value is not None})  # type: ignore[type-var]
    if not known:
        return unknown
    low, high = form(known[0]), form(known[-1])
    return low if low == high else f"{low} to {high}"


def _groups(rows: Iterable[T], key: Callable[[T], object], sites: int) -> list[list[T]]:
    """Return rows grouped by key, in the order of their first rows; one row each in a small federation."""
    groups: dict[object, list[T]] = {}
    for place, row in enumerate(rows):
        groups.setdefault(place if sites <= EACH else repr(key(row)), []).append(row)
    return list(groups.values())

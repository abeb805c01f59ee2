"""Sites that did alike as one row, so that a federation of a thousand fits a page; odd ones stay rows of their own.

Up to ``EACH`` sites every one has its row. Of more, two are alike if all that a row says of them is equal but for the
name and the public size. Nothing is left out: a row counts its sites, and has the lowest and the highest size.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from common.run_lines import Absence
from common.words import EACH, names_text, natural, number_text
from reports.sites import ReleaseReport, SiteReport

T = TypeVar("T")


@dataclass(frozen=True)
class Alike:
    """Sites that one row stands for."""

    names: str
    """In words: each, or the first and the last with their number."""
    sizes: str
    """Their public sizes: one, or the lowest and the highest."""
    count: int
    site: SiteReport
    """The first of them, in natural order; but for name and size it is every one."""


def alike_sites(sites: Sequence[SiteReport]) -> list[Alike]:
    """Return the rows of a table of sites, in the natural order of their first names."""
    return [
        Alike(names_text([site.site for site in group]), _sizes(group), len(group), group[0])
        for group in _groups(sites, lambda site: replace(site, site="", public_size=None), len(sites))
    ]


def alike_absences(absences: Sequence[Absence], sites: int) -> list[tuple[str, Absence]]:
    """Return refusals and failures, those of one attempt by one kind and reason together, with the names in words."""
    groups = _groups(absences, lambda absence: replace(absence, site="", node=None), sites)
    return [(names_text([absence.site for absence in group]), group[0]) for group in groups]


def alike_releases(releases: Sequence[ReleaseReport], sites: int) -> list[tuple[str, ReleaseReport]]:
    """Return releases beside training, those of one round and price together, with the names in words."""
    groups = _groups(releases, lambda release: replace(release, site=""), sites)
    return [(names_text([release.site for release in group]), group[0]) for group in groups]


def participants_text(participants: Sequence[str], sites: Sequence[SiteReport]) -> str:
    """Return who took part in a round: every name, or all sites of the run but those that are named."""
    if len(participants) <= EACH:
        return ", ".join(participants)
    took = set(participants)
    missing = [site.site for site in sites if site.site not in took]
    if not missing:
        return f"all {number_text(len(took))} sites"
    if len(missing) <= EACH:
        return f"all but {', '.join(missing)} ({number_text(len(took))} sites)"
    return names_text(sorted(took, key=natural))


def _groups(rows: Iterable[T], key: Callable[[T], Hashable | object], sites: int) -> list[list[T]]:
    """Return rows by what they are alike in, in the order of the first of each; apart where a federation is small."""
    held = list(rows)
    if sites <= EACH:
        return [[row] for row in held]
    groups: dict[str, list[T]] = {}
    for row in held:
        groups.setdefault(repr(key(row)), []).append(row)
    return list(groups.values())


def _sizes(group: Sequence[SiteReport]) -> str:
    sizes = sorted({site.public_size for site in group if site.public_size is not None})
    if len(sizes) < 2:
        return number_text(sizes[0] if sizes else None)
    return f"{number_text(sizes[0])} to {number_text(sizes[-1])}"

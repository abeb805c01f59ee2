"""Units: whose addition or removal stays unnoticed, as words of a claim and as which records are drawn together.

A unit is an axis of its own, chosen by ``privacy.unit``. A mechanism says which units it protects
(``Mechanism.units``); what it clips, samples and counts is then one of these. Its public size, and so the divisor, a
site's weight and the least delta, count units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fedveil.common.errors import MechanismError
from fedveil.common.tasks.base import OWNER
from fedveil.privacy.claim import Claim

if TYPE_CHECKING:
    from fedveil.common.tasks import Record
    from fedveil.common.tasks.examples import Dataset


@dataclass(frozen=True)
class Unit:
    """One kind of neighbour. A record is one by itself: where units are ``grouped`` several belong to one."""

    name: str
    """What ``privacy.unit`` calls it: one word."""
    what: str
    """What one of them is, in a claim."""
    adjacency: str
    """How neighbouring data sets differ."""
    each: str
    """How one of them is drawn, in a sampler's words."""
    leaves_out: tuple[str, ...]
    """What somebody might take for promised, and is not."""
    across: str
    """What a federation's figure, the maximum over its sites, means for one that is at several sites."""
    grouped: bool
    """Whether several records belong to one unit, so that their gradients are summed before the clip."""
    leaves_out_of_sums: tuple[str, ...] = ()
    """As ``leaves_out``, where all sites' noise is that of one sum; empty: no such sum protects it."""
    across_sums: str = ""
    """As ``across``, there."""

    def said(self, claim: Claim, *, summed: bool) -> Claim:
        """Return a record's claim as it is made of this unit.

        Args:
            claim: the record's.
            summed: whether all sites' noise is that of one sum. Then one that is at several sites moves that sum by
                several clips: no noises of its sites compose.
        """
        if not self.grouped:
            return claim
        sampler = claim.sampler.replace(RECORD.each, self.each)
        of_records = {*RECORD.leaves_out, *RECORD.leaves_out_of_sums}
        texts = tuple(text for text in claim.leaves_out if text not in of_records)
        return replace(
            claim,
            unit=self.what,
            adjacency=self.adjacency,
            sampler=sampler,
            per=self.name,
            leaves_out=(*(self.leaves_out_of_sums if summed else self.leaves_out), *texts),
            across=self.across_sums if summed else self.across,
        )

    def members(self, records: Sequence[Record]) -> list[list[int]]:
        """Return the positions of each unit's records, units in the order in which they first occur.

        Raises:
            MechanismError: a record belongs to no one, so that no claim would cover it.
        """
        return self.owned(records) if self.grouped else [[position] for position in range(len(records))]

    def owned(self, rows: Sequence[Record]) -> list[list[int]]:
        """Return the positions of each unit's rows, where each row says whose it is (``OWNER``); as ``members``."""
        found: dict[int, list[int]] = {}
        for position, row in enumerate(rows):
            if OWNER not in row:
                raise MechanismError(f"a record belongs to no {self.name}: whose gradients are clipped is not known")
            found.setdefault(row[OWNER], []).append(position)
        return list(found.values())

    def count(self, data: Dataset) -> int:
        """Return how many there are in a site's data; the number is private."""
        return len({example.person for example in data.examples}) if self.grouped else len(data.examples)


_NAMES = (
    "a person whom the column of persons calls by several names: each name counts as one",
    "what the records of others tell of a person, such as those of a family",
    "what runs by record released of other rows of a person under another name: they remember no persons",
)
RECORD = Unit(
    name="record",
    what="one training record of one site",
    adjacency="add or remove one record",
    each="each record on its own",
    leaves_out=(
        "a person with several records: the unit is one record",
        "a record, or a person, at several sites: what these have spent adds up",
    ),
    across="their records are disjoint.",
    grouped=False,
    leaves_out_of_sums=(
        "a person with several records, and a record that several sites of a sum hold: the unit is one record at one "
        "site, and k of them in one sum have the ε of k records",
    ),
    across_sums="their records are disjoint; one that k sites of a sum hold is k records of that sum.",
)
PERSON = Unit(
    name="person",
    what="all training records of one person at one site",
    adjacency="add or remove one person with all their records",
    each="each person on their own, with all their records that the run uses",
    leaves_out=(
        "a person at several sites: what these have spent adds up",
        *_NAMES,
    ),
    across="a person with records at several sites has the sum of what these have spent, at the sum of their δ.",
    grouped=True,
    leaves_out_of_sums=(
        "a person at several sites of a sum, whose noise is one: at k sites they have the ε of k persons, which is "
        "more than what the sites have spent adds up to",
        *_NAMES,
    ),
    across_sums="a person with records at k sites of a sum is k persons of that sum, and has the ε of so many.",
)
SITE = Unit(
    name="site",
    what="one site, with all its training records",
    adjacency="replace one site's update by zero in every round; the cohort that the sum is divided by stays as it is",
    each="each site on its own",
    leaves_out=(
        "any record against the server: it sees each site's update without noise",
        "that a site is one of the cohort, and when it was connected: its updates are protected",
        "a site that runs as several nodes, and people whose records are at several sites: each counts as several",
        "who was asked in a round, against whoever watches the sites' network: where privacy.site-rate is below 1, "
        "the price counts on that being hidden",
        "when rounds begin and end, against whoever watches the run while it goes on, or gets the server's own logs: "
        "where privacy.site-rate is below 1, the price counts on who was drawn being hidden",
    ),
    across="all updates are in one sum, for which the server's ledger is charged once.",
    grouped=False,
)
UNITS: dict[str, Unit] = {row.name: row for row in (RECORD, PERSON, SITE)}

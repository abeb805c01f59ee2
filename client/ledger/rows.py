"""The rows of a ledger as data: charges and their receipts, terms, budgets, exposures, failures, holds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from fedveil.common.check import in_range, not_negative, positive
from fedveil.common.errors import ConfigError
from fedveil.privacy import privacy_filter
from fedveil.privacy.accountant import TRAINING, Accountant
from fedveil.privacy.accounting import Release, alone, check_terms
from fedveil.privacy.events import Event
from fedveil.privacy.privacy_filter import Commitment


@dataclass(frozen=True)
class Terms:
    """What holds for a data set by its ledger alone."""

    epsilon: float
    """The steward's latest budget; infinite if none was ever set."""
    delta: float
    """The smallest delta of all budgets and charges; infinite if there is none."""

    def stricter(self, epsilon: float, delta: float) -> tuple[float, float]:
        """Return the smaller epsilon and the smaller delta."""
        return min(self.epsilon, epsilon), min(self.delta, delta)


@dataclass(frozen=True)
class Budget:
    """One row of a data set's history of budgets."""

    dataset: str
    epsilon: float
    delta: float
    set_at: str
    """UTC, ISO 8601."""
    replaced: float | None
    """Epsilon of the budget that held until then; None for the first one."""


@dataclass(frozen=True)
class Charge:
    """What a round is about to release of a data set, and the terms on which it may.

    Raises:
        ConfigError: a figure is out of range, or none that an honest job has; or there is nothing to charge.
    """

    dataset: str
    """The site's name for the records; budgets of different names are separate."""
    run: str
    """The run's name, for the record."""
    round_number: int
    """1-based; 0 for releases before the first round."""
    releases: tuple[Release, ...]
    """What is about to be released, at least one."""
    delta: float
    """All releases of the data set are composed at one delta: this, or a smaller one that the ledger holds for it."""
    max_epsilon: float
    """The budget that the caller allows; a smaller one that is stored wins."""
    unit: str = "record"
    """What one neighbour is, in one word. Charges of several units do not compose."""
    max_alone: float = math.inf
    """Most that all releases of the data set may cost if no other site adds its noise to a sum. Also for a charge that
    shares none: it composes with those that do."""
    records_per_person: int = 1
    """Most units of one person, for the next figure alone."""
    max_person: float = math.inf
    """Most that all releases of the data set may cost a person with so many."""
    mask_key: bytes = b""
    """Public key of a secure sum's masks; of one key, one charge is made. Empty: it is no secure sum."""
    planned: tuple[Release, ...] = ()
    """Everything that the run is to release of the data set; empty: this charge, again and again."""
    site: str = ""
    """Of a secure sum, which site it is there; a record is at one site of a sum. Empty: it is no secure sum."""
    held_out: str = ""
    """The rule by which rows of the data set are left out, in words; empty: there is none."""

    def __post_init__(self) -> None:
        positive(max_epsilon=self.max_epsilon)
        if not self.max_alone > 0:
            raise ConfigError(f"epsilon-alone must be above 0, not {self.max_alone!r}")
        if not self.max_person > 0:
            raise ConfigError(f"epsilon-person must be above 0, not {self.max_person!r}")
        in_range(0, 0.5, delta=self.delta)
        not_negative(round_number=self.round_number)
        if not self.releases or not self.dataset or not self.run or not self.unit:
            raise ConfigError("a charge needs a data set, a run and at least one release: name all three")
        if self.mask_key and not self.site:
            raise ConfigError("a charge with a key of masks needs the site's name in the sum: name it")
        check_terms([*self.releases, *self.planned], self.delta)


@dataclass(frozen=True)
class Receipt:
    """What one charge cost. Epsilons are for add or remove one unit, at the charge's delta."""

    epsilon_before: float
    """As ``epsilon_after``, before this charge."""
    epsilon_after: float
    """Of everything charged to the data set, this charge included; where it shares records with others of its ledger,
    the largest of theirs and its own, since a shared record's history is among them. Theirs are at deltas that are not
    above this one's, so it holds at ``delta``; it may be above ``max_epsilon``, which limits the own one."""
    epsilon_remaining: float
    """Budget minus ``epsilon_after``; at least 0."""
    steps_round: int
    """Releases for training in this charge."""
    steps_total: int
    """Releases for training of the data set, this charge included."""
    accountant: Accountant
    """What computed ``epsilon_after``."""
    max_epsilon: float
    """The budget that held: the caller's or the ledger's, whichever is smaller."""
    delta: float
    """The delta at which all of the data set's releases were composed."""
    alone_after: float = 0.0
    """As ``epsilon_after``, if no other site adds its noise to a sum."""
    person_after: float = 0.0
    """As ``epsilon_after``, of a person with the charge's most units; 0 where nobody limits that."""
    kept: float = 0.0
    """Of the steward's budget, what is reserved for other runs; 0 where that limits nothing. ``max_epsilon`` is without
    it."""
    exposed: bool = False
    """Whether records of the data set were released without privacy too. Then no epsilon holds for them: the
    figures above are of what was charged alone."""

    @property
    def epsilon_increment(self) -> float:
        """What this charge added: ``epsilon_after - epsilon_before``."""
        return self.epsilon_after - self.epsilon_before


@dataclass(frozen=True)
class Entry:
    """One row of the ledger: releases that were charged, and when."""

    id: int
    dataset: str
    run: str
    round_number: int
    purpose: str
    unit: str
    """What one neighbour is, in one word."""
    event: Event
    count: int
    delta: float
    charged_at: str
    """UTC, ISO 8601."""
    caused_by: str | None
    """The data set that was trained, where another one was charged because it shares a record; None: this one was."""


@dataclass(frozen=True)
class FirstPlan:
    """One row of the ledger: what the first run of a data set planned, before anything of it was released."""

    dataset: str
    run: str
    commitment: Commitment
    committed_at: str
    """UTC, ISO 8601."""


@dataclass(frozen=True)
class Exposure:
    """One row of the ledger: a round that released records without privacy, which no budget pays for."""

    id: int
    dataset: str
    run: str
    round_number: int
    steps: int
    """Optimiser steps; 0 for a start from a statistic."""
    released_at: str
    """UTC, ISO 8601."""


@dataclass(frozen=True)
class Failure:
    """One row of the ledger: a round that failed after its charge, and was answered by noise alone.

    A whole sum replaced is more than one record's share of it, so such a round is outside the claim.
    """

    id: int
    dataset: str
    run: str
    round_number: int
    reason: str
    """As in the site's own log: it quotes no record, and never leaves the site."""
    failed_at: str
    """UTC, ISO 8601."""


@dataclass(frozen=True)
class Reservation:
    """One row of the ledger: epsilon of a data set's budget that is kept for one run, or the end of that (0)."""

    id: int
    dataset: str
    run: str
    epsilon: float
    until: str
    """UTC, ISO 8601; from then on nothing is kept."""
    set_at: str
    """UTC, ISO 8601."""


@dataclass(frozen=True)
class Withdrawal:
    """One row of the ledger: a data set of which nothing is released any more."""

    id: int
    dataset: str
    reason: str
    """The steward's; it never leaves the site."""
    withdrawn_at: str
    """UTC, ISO 8601."""


@dataclass(frozen=True)
class HeldOutRule:
    """One row of the ledger: the rule by which a data set's charges from then on left rows out."""

    id: int
    dataset: str
    rule: str
    """In words; empty: from then on no row is held out."""
    set_at: str
    """UTC, ISO 8601."""


def of_all(own: Receipt, prices: Iterable[Receipt]) -> Receipt:
    """Return the receipt of a data set whose records others hold too: ``own`` with the largest of all histories.

    Each record's whole history is that of one of ``prices``, so their maximum bounds what any record has spent.
    """
    held = list(prices)
    dearest = max(held, key=lambda other: other.epsilon_after)
    own = replace(own, alone_after=max(own.alone_after, *(other.alone_after for other in held)))
    if dearest.epsilon_after <= own.epsilon_after:
        return own
    return replace(
        own,
        epsilon_before=dearest.epsilon_before,
        epsilon_after=dearest.epsilon_after,
        epsilon_remaining=max(0.0, own.max_epsilon - dearest.epsilon_after),
        accountant=dearest.accountant,
    )


def price(
    spent: Sequence[Release], releases: Sequence[Release], delta: float, max_epsilon: float, plan: Commitment
) -> Receipt:
    """Return the receipt of ``releases`` on top of ``spent``, whether or not the budget allows them."""
    whole = [*spent, *releases]
    after, accountant = privacy_filter.price(whole, plan, delta)
    steps = sum(release.count for release in releases if release.purpose == TRAINING)
    return Receipt(
        epsilon_before=privacy_filter.price(spent, plan, delta)[0],
        epsilon_after=after,
        epsilon_remaining=max(0.0, max_epsilon - after),
        steps_round=steps,
        steps_total=steps + sum(release.count for release in spent if release.purpose == TRAINING),
        accountant=accountant,
        max_epsilon=max_epsilon,
        delta=delta,
        alone_after=privacy_filter.price(alone(whole), plan.changed(alone), delta)[0],
    )

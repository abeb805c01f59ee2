"""The rows of a ledger as data: terms, budgets, exposures, failures, and charges with their price."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from common.accountant import TRAINING, Accountant
from common.privacy import accounting
from common.privacy.accounting import Release, epsilon_with_method


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
    """The receipt of one charge. Epsilons are record level, add/remove one record, at the charge's delta."""

    epsilon_before: float
    """As ``epsilon_after``, before this charge."""
    epsilon_after: float
    """Of everything charged to the data set, this charge included; where it shares records with others of its ledger,
    the largest of theirs and its own, since a shared record's history is among them. Theirs are at deltas that are not
    above this one's, so it holds at ``delta``; it may be above ``max_epsilon``, which limits the own one."""
    epsilon_remaining: float
    """Budget minus ``epsilon_after``; at least 0."""
    steps_round: int
    """Releases of kind ``training`` in this charge."""
    steps_total: int
    """Releases of kind ``training`` of the data set, this charge included."""
    accountant: Accountant
    """What computed ``epsilon_after``."""
    max_epsilon: float
    """The budget that held: the caller's or the ledger's, whichever is smaller."""
    delta: float
    """The delta at which all of the data set's releases were composed."""
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
    kind: str
    noise_multiplier: float
    sample_rate: float
    count: int
    delta: float
    clip_norm: float
    charged_at: str
    """UTC, ISO 8601."""
    caused_by: str | None
    """The data set that was trained, where another one was charged because it shares a record; None: this one was."""


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


def of_all(charge: Charge, prices: Iterable[Charge]) -> Charge:
    """Return the receipt of a data set whose records others hold too: ``charge`` with the largest of all histories.

    Each record's whole history is that of one of ``prices``, so their maximum bounds what any record has spent.
    """
    dearest = max(prices, key=lambda other: other.epsilon_after)
    if dearest.epsilon_after <= charge.epsilon_after:
        return charge
    return replace(
        charge,
        epsilon_before=dearest.epsilon_before,
        epsilon_after=dearest.epsilon_after,
        epsilon_remaining=max(0.0, charge.max_epsilon - dearest.epsilon_after),
        accountant=dearest.accountant,
    )


def price(spent: Sequence[Release], releases: Sequence[Release], delta: float, max_epsilon: float) -> Charge:
    """Return the receipt of ``releases`` on top of ``spent``, whether or not the budget allows them."""
    after, accountant = epsilon_with_method([*spent, *releases], delta)
    steps = sum(release.count for release in releases if release.kind == TRAINING)
    return Charge(
        epsilon_before=accounting.epsilon(spent, delta),
        epsilon_after=after,
        epsilon_remaining=max(0.0, max_epsilon - after),
        steps_round=steps,
        steps_total=steps + sum(release.count for release in spent if release.kind == TRAINING),
        accountant=accountant,
        max_epsilon=max_epsilon,
        delta=delta,
    )

"""The limits of a charge: a release without privacy before it, another unit, and the budgets of all that it touches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from fedveil.client.ledger.history import LedgerHistory
from fedveil.client.ledger.rows import Charge, Receipt
from fedveil.common.errors import BudgetExhausted, PolicyRefusal
from fedveil.privacy.accountant import AT_RATE_1, DEPARTED
from fedveil.privacy.accounting import Release, honest_sites
from fedveil.privacy.figures import epsilon_text, honest_text, remaining_text

DEARER = {
    DEPARTED: ", more because the data set's first run planned something else",
    AT_RATE_1: ", more because rates count as 1: the data set's first run planned whole batches",
}
"""Why a charge costs more than if everything had been planned together."""


def hold_closed(dataset: str, *, exposed: bool) -> None:
    """Raise PolicyRefusal if records of a data set were released without privacy."""
    if exposed:
        raise PolicyRefusal(
            f"records of data set {dataset!r} were released without privacy before, so no epsilon holds for "
            "them: a private run needs after-no-privacy = true in the site's policy"
        )


def hold_to_unit(ledger: LedgerHistory, charge: Charge, names: Iterable[str]) -> None:
    """Raise PolicyRefusal if any of the data sets was charged for another unit: no epsilon holds for both."""
    shared = set(names)
    if any(name in shared and unit != charge.unit for name, unit in ledger.units()):
        # No name of another data set: this line leaves the site.
        raise PolicyRefusal(
            f"records of data set {charge.dataset!r} were charged for another unit than one {charge.unit}, and no "
            "epsilon holds for both: this run needs records that no run of another unit has used"
        )


def hold_to_budgets(ledger: LedgerHistory, charge: Charge, prices: Mapping[str, Receipt]) -> None:
    """Raise BudgetExhausted unless the charge fits the budget of every data set that has a price."""
    own = prices[charge.dataset]
    what = f"data set {charge.dataset!r} refuses round {charge.round_number} of run {charge.run!r}"
    if not own.epsilon_after <= own.max_epsilon or own.max_epsilon <= 0:
        before, after = (epsilon_text(e, decimals=4) for e in (own.epsilon_before, own.epsilon_after))
        left = remaining_text(max(0.0, own.max_epsilon - own.epsilon_before), decimals=4)
        reserved = f" without {own.kept:g} that is kept for another run" if own.kept else ""
        honest = max(ledger.honest_sites(charge.dataset), honest_sites(charge.releases))
        rests = honest_text(honest)
        dearer = DEARER.get(own.accountant.detour.reason, "") if own.accountant.detour else ""
        raise BudgetExhausted(
            f"{what} ({_spoken(charge.releases)}): epsilon {before} is spent, this would make it {after}"
            f"{rests}{dearer}, the budget is {own.max_epsilon:g}{reserved} at delta {own.delta:g}, {left} is left; see "
            f"`fedveil ledger show {ledger.path}`"
        )
    if ledger.holds.withdrawn(prices) or not all(p.epsilon_after <= p.max_epsilon for p in prices.values()):
        # No figures and no names, and the same line where the other one was withdrawn: it leaves the site.
        raise BudgetExhausted(
            f"{what}: records that it shares with another data set have no budget left for it; see "
            f"`fedveil ledger show {ledger.path}`"
        )
    if not all(price.alone_after <= charge.max_alone for price in prices.values()):
        # No figure: it would be that of another data set, where that is the dearer one.
        raise BudgetExhausted(
            f"{what}: if no other site adds its noise, all releases would cost more than the policy's "
            f"epsilon-alone {charge.max_alone:g}; see `fedveil ledger show {ledger.path}`"
        )
    if not all(price.person_after <= charge.max_person for price in prices.values()):
        raise BudgetExhausted(
            f"{what}: a person with {charge.records_per_person} records would have more than the policy's "
            f"epsilon-person {charge.max_person:g}; see `fedveil ledger show {ledger.path}`"
        )


def _spoken(releases: Sequence[Release]) -> str:
    return ", ".join(
        f"{r.count} {r.purpose} at noise {r.event.noise_multiplier:g}, rate {r.event.sample_rate:g}" for r in releases
    )

"""The receipt of a run at a site: everything that it charged to one data set, with what that came to.

For anyone who asks a steward what was done with some records. It quotes no record, and its charges follow from public
settings. That a round failed, and when, may depend on the records; why it failed stays in the ledger, as words of the
site's own log.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fedveil.client.ledger.file import now
from fedveil.client.ledger.ledger import Ledger
from fedveil.client.ledger.rows import Entry, Exposure
from fedveil.common.check import nearest
from fedveil.common.errors import LedgerError
from fedveil.privacy.accountant import TRAINING
from fedveil.privacy.accounting import Release, alone, honest_sites
from fedveil.privacy.privacy_filter import promised

CONTEXT = "FedVeil receipt, 2"
"""What the file is, and the number of its form."""


@dataclass(frozen=True)
class FailedRound:
    """A charged round that was answered by noise alone, without the reason."""

    round_number: int
    failed_at: str
    """UTC, ISO 8601."""


@dataclass(frozen=True)
class RunReceipt:
    """What one run has cost one data set. Epsilons are at ``delta``, for add or remove one unit.

    Where sums of several sites were charged, each counts on honest sites, and has a price alone, which counts on none.
    """

    context: str
    """What the file is, so that no signature of it passes for one of anything else."""
    dataset: str
    run: str
    unit: str
    """What one neighbour is, in one word; empty: nothing was priced."""
    delta: float | None
    """The δ of all of the data set's releases; None: there is none."""
    epsilon_run: float | None
    """Of this run's charges alone. None, of this and the next two: records were released without privacy, and no ε
    holds."""
    epsilon_before: float | None
    """Of everything charged to the data set, by its own name, before the run's first charge."""
    epsilon_after: float | None
    """Of everything charged to it up to the run's last charge, those of other runs in between included."""
    epsilon_run_alone: float | None
    """As ``epsilon_run``, if no other site adds its noise to a sum. None: none is counted on, or no ε holds."""
    epsilon_after_alone: float | None
    """The same of ``epsilon_after``."""
    honest_sites_run: int
    """Sites of each sum that ``epsilon_run`` takes for honest, the most of all its sums; 0: it has none."""
    honest_sites_after: int
    """The same of ``epsilon_after``; at most these does ``epsilon_before`` count on."""
    honest_sites_largest: int
    """The same of ``largest``."""
    largest: float | None
    """The largest of the data set and all of its ledger that share a record with it, by everything charged until now:
    it bounds what any of its records has spent, under whatever name. None: one of these was released without privacy.
    """
    budget: float | None
    """The steward's, as it holds now; None: there is none."""
    rounds: tuple[int, ...]
    """Rounds in which the data set was trained and charged, in order; one that was repeated stands twice."""
    charges: tuple[Entry, ...]
    """Those too that another data set caused, because it shares records."""
    exposures: tuple[Exposure, ...]
    """Rounds that released records without privacy."""
    failures: tuple[FailedRound, ...]
    """Charged rounds that were answered by noise alone. Which ones these are may depend on the records."""
    withdrawn: str
    """When the data set was withdrawn; empty: it is not."""
    made: str
    """UTC, ISO 8601."""

    def as_json(self) -> dict[str, Any]:
        """Return it as data, in the order of the fields."""
        return asdict(self)


def receipt_of(ledger: Ledger, dataset: str, run: str) -> RunReceipt:
    """Return the receipt of a run.

    Raises:
        LedgerError: the ledger holds nothing of the run for this data set; or as for ``Ledger.entries``.
    """
    whole, exposures = _rounds(ledger, dataset, run)
    charges = [entry for entry in whole if entry.run == run]
    failed = [row for row in ledger.failures() if (row.dataset, row.run) == (dataset, run)]
    terms = ledger.terms(dataset)
    gone = [row.withdrawn_at for row in ledger.holds.withdrawals() if row.dataset == dataset]
    parts: list[Sequence[Entry]] = [charges, [], []]
    if charges:
        parts[1] = [entry for entry in whole if entry.id < charges[0].id]
        parts[2] = [entry for entry in whole if entry.id <= charges[-1].id]
    bare = ledger.exposed(dataset)
    own = None if bare else promised(_releases(charges), terms.delta)[0]
    before, after = (None if bare else ledger.price_of(dataset, _releases(part), terms.delta) for part in parts[1:])
    honest = [honest_sites(_releases(part)) for part in (parts[0], parts[2])]
    own_alone = None if bare or honest[0] <= 1 else promised(alone(_releases(charges)), terms.delta)[0]
    after_alone = None if bare or honest[1] <= 1 else ledger.price_alone(dataset, _releases(parts[2]), terms.delta)
    return RunReceipt(
        context=CONTEXT,
        dataset=dataset,
        run=run,
        unit=charges[0].unit if charges else "",
        delta=terms.delta if math.isfinite(terms.delta) else None,
        epsilon_run=own,
        epsilon_before=before,
        epsilon_after=after,
        epsilon_run_alone=own_alone,
        epsilon_after_alone=after_alone,
        honest_sites_run=honest[0],
        honest_sites_after=honest[1],
        honest_sites_largest=ledger.honest_sites(dataset, under_any_name=True),
        largest=None if bare else _largest(ledger, dataset, terms.delta),
        budget=terms.epsilon if math.isfinite(terms.epsilon) else None,
        rounds=tuple(e.round_number for e in charges if e.purpose == TRAINING and e.caused_by is None),
        charges=tuple(charges),
        exposures=tuple(exposures),
        failures=tuple(FailedRound(row.round_number, row.failed_at) for row in failed),
        withdrawn=gone[0] if gone else "",
        made=now(),
    )


def _rounds(ledger: Ledger, dataset: str, run: str) -> tuple[list[Entry], list[Exposure]]:
    """Return all charges of a data set, and the exposures of a run; LedgerError if the run has had no round here."""
    charges = [entry for entry in ledger.entries() if entry.dataset == dataset]
    exposed = [row for row in ledger.exposures() if row.dataset == dataset]
    known = sorted({entry.run for entry in charges} | {row.run for row in exposed})
    if run not in known:
        raise LedgerError(
            f"{ledger.path} holds no round of run {run!r} on data set {dataset!r}{nearest(run, known)}: see "
            f"`fedveil ledger show {ledger.path}`"
        )
    return charges, [row for row in exposed if row.run == run]


def _largest(ledger: Ledger, dataset: str, delta: float) -> float | None:
    shared = ledger.largest(dataset, delta)
    found = ledger.epsilon(dataset, delta) if shared is None else shared
    return found if math.isfinite(found) else None  # of another name it may be infinite, which JSON has not


def _releases(entries: Sequence[Entry]) -> list[Release]:
    return [Release(entry.event, entry.count, entry.purpose) for entry in entries]

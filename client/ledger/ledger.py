"""The durable ledger of one site: what every data set has paid, over all runs, rounds and restarts.

A charge is priced first, and written in one SQLite transaction that holds the write lock and begins by asking whether
anybody has written since the history was read: then it is priced again. So two processes can never spend the same
remainder, and none waits while another computes. A charge is on disk before ``charge`` returns, and only then may a
record be touched. Rows are only ever added.

A round without privacy costs no budget, because no budget could pay for it: it is written down as an exposure. From
then on no epsilon holds for the data set, nor for another one with one of its records. A round that failed after its
charge, and was answered by noise alone, is written down as a failure.

Beside charges the ledger keeps, per data set, the budgets that its steward has set (the latest one holds) and keyed
hashes of every record that it was charged for. A charge for records of which another data set holds any is a charge
to that one too, within its budget: so the history of the name that a record was first used under has all that ever
became of it, and no record passes the largest of the figures, whatever it is called. The strictest of what the caller
asks for and what the ledger holds wins: the smaller epsilon, and the smallest delta that the data set was ever
charged or budgeted at, so that everything it released is composed at one delta. How the file
survives crashes is in ``file``, its tables are in ``schema``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from fedveil.client.ledger.file import now
from fedveil.client.ledger.history import LedgerHistory
from fedveil.client.ledger.holds import WITHDRAWN
from fedveil.client.ledger.limits import hold_closed, hold_to_budgets, hold_to_unit
from fedveil.client.ledger.rows import Charge, Receipt, Terms, of_all, price
from fedveil.common.check import not_negative
from fedveil.common.errors import ConfigError, PolicyRefusal
from fedveil.privacy import privacy_filter
from fedveil.privacy.privacy_filter import Commitment, commitment_to

_SHARED = (
    "data set {!r} refuses round {} of run {!r}: records that it shares with another data set are released no more; "
    "see `fedveil ledger show {}`"
)
PRICES = 4
"""How often a charge is priced anew because others wrote meanwhile, before it is priced under the lock."""


class Ledger(LedgerHistory):
    """The ledger in the file ``path``: with what writes it: charges, exposures, budgets.

    Args and errors: as for ``LedgerHistory``. Every process and every thread opens its own.
    """

    def set_budget(self, dataset: str, epsilon: float, delta: float) -> Terms:
        """Make a steward's budget hold, as ``BudgetHistory.set``."""
        return self._budgets.set(dataset, epsilon, delta)

    def lower_budget(self, dataset: str, epsilon: float, delta: float) -> Terms:
        """Take the stricter budget, as ``BudgetHistory.lower``."""
        return self._budgets.lower(dataset, epsilon, delta)

    def charge(
        self,
        charge: Charge,
        *,
        records: Collection[int] = (),
        allow: Callable[[int, int], None] | None = None,
        after_exposure: bool = False,
    ) -> Receipt:
        """Price a charge on top of all that its data set has spent, and write it down durably.

        Guarantees: when this returns, the charge is on disk; when it raises, nothing was written (after a disk failure
        during the write, nothing or all of it). The data set's epsilon never passes ``max_epsilon`` nor the budget that
        is stored here, also where others charge at the same time. A round charged again is charged again: it releases
        again. Every data set of this ledger that shares a record with ``records`` is charged the same, within its own
        stored budget if it has one; the receipt's epsilon is the largest of theirs, and so may be above
        ``max_epsilon``.

        Args:
            charge: what is about to be released, and on what terms.
            records: ``record_hashes`` under ``key`` of the records that are about to be used; they are kept.
            allow: called with what ``trained`` returns, under the same lock; what it raises, this raises.
            after_exposure: whether to charge also where records were released without privacy; the budget then holds
                for what was charged, and the receipt says ``exposed``.

        Raises:
            BudgetExhausted: the releases would exceed the budget, or that of a data set that shares records, or cost
                more than ``max_alone`` if no other site adds its noise, or a person more than ``max_person``.
            PolicyRefusal: the data set was withdrawn, or records were released without privacy, or charged for another
                unit, or for the same sum at another site, or the masks' key has a charge already.
            LedgerError: the file cannot be read or written, or was locked for too long.
        """
        dataset = charge.dataset
        with self._offer(charge, records) as (db, prices, others, unknown):
            self._hold_to_withdrawals(dataset)
            if allow:
                allow(*self.trained(dataset, charge.run))
            _remember(db, dataset, unknown)
            exposed = self.exposed(dataset)
            if not after_exposure:
                hold_closed(dataset, exposed=exposed)
            hold_to_unit(self, charge, prices)
            self.sums.hold_apart(charge, prices)
            hold_to_budgets(self, charge, prices)
            self.sums.use_key(db, charge)
            self.rules.note(db, dataset, charge.held_out)
            for name in prices:
                self.plans.commit(db, name, charge.run, self._plan(name, charge))
            _insert(db, charge, prices)
        return replace(of_all(prices[dataset], others), exposed=exposed)

    def check(self, charge: Charge, *, records: Collection[int] = (), after_exposure: bool = False) -> None:
        """Raise as ``charge`` would by all that the ledger holds now; nothing is written."""
        self._hold_to_withdrawals(charge.dataset)
        others = self._recognise(charge.dataset, records)
        prices = self._prices([charge.dataset, *others], charge)
        if not after_exposure:
            open_names = {exposure.dataset for exposure in self.exposures()}
            hold_closed(charge.dataset, exposed=self.exposed(charge.dataset) or not open_names.isdisjoint(others))
        hold_to_unit(self, charge, prices)
        self.sums.hold_apart(charge, prices)
        hold_to_budgets(self, charge, prices)

    def _hold_to_withdrawals(self, dataset: str) -> None:
        """Raise PolicyRefusal if the data set was withdrawn; by its own name, which is the steward's word."""
        if self.holds.withdrawn([dataset]):
            raise PolicyRefusal(WITHDRAWN.format(dataset))

    def remember(self, dataset: str, records: Collection[int]) -> None:
        """Keep hashes of records of ``dataset``, durably, so that they are known again though none was charged for.

        Raises:
            LedgerError: the file cannot be written.
        """
        with self._file.transaction() as db:
            _remember(db, dataset, records)

    def expose(
        self,
        dataset: str,
        *,
        run: str,
        round_number: int,
        steps: int,
        records: Collection[int] = (),
        allow: Callable[[int, int], None] | None = None,
        held_out: str = "",
    ) -> None:
        """Write down durably that a round is about to release records of ``dataset`` without privacy.

        Guarantees: as ``charge``. From then on ``exposed`` is true of all data sets that share a record with this one.

        Args:
            dataset, run, round_number, steps, records, allow, held_out: of the round, as in ``charge`` and ``Charge``.

        Raises:
            ConfigError: a figure is out of range, or a name is empty.
            PolicyRefusal: the data set was withdrawn, or another one that shares a record with it.
            LedgerError: the file cannot be read or written, or was locked for too long.
        """
        not_negative(round_number=round_number, steps=steps)
        if not dataset or not run:
            raise ConfigError("a release without privacy needs a data set and a run: name both")
        with self._file.transaction() as db:
            self._hold_to_withdrawals(dataset)
            if self.holds.withdrawn(self._recognise(dataset, records)):
                raise PolicyRefusal(_SHARED.format(dataset, round_number, run, self.path))
            if allow:
                allow(*self.trained(dataset, run))
            _remember(db, dataset, records)
            self.rules.note(db, dataset, held_out)
            db.execute(
                "INSERT INTO exposures (dataset, run, round, steps, released_at) VALUES (?, ?, ?, ?, ?)",
                (dataset, run, round_number, steps, now()),
            )

    def fail(self, dataset: str, *, run: str, round_number: int, reason: str) -> None:
        """Write down durably that a charged round of ``dataset`` failed and is answered by noise alone.

        Args:
            dataset, run, round_number: as in ``Charge``.
            reason: what the site's own log says of it; no content of a record.

        Raises:
            LedgerError: the file cannot be read or written, or was locked for too long.
        """
        with self._file.transaction() as db:
            db.execute(
                "INSERT INTO failures (dataset, run, round, reason, failed_at) VALUES (?, ?, ?, ?, ?)",
                (dataset, run, round_number, reason, now()),
            )

    @contextmanager
    def _offer(
        self, charge: Charge, records: Collection[int]
    ) -> Iterator[tuple[Any, dict[str, Receipt], list[Receipt], list[int]]]:
        """Hold the write lock with the prices of a charge on top of everything that the ledger holds by then.

        Yields the file's connection, each data set's price as it is judged, the prices from which the receipt takes
        the largest, and the records that the ledger does not know yet.

        All is found before the lock is taken, and again if anybody else has written meanwhile. Who is
        too slow ``PRICES`` times computes them under the lock: some seconds, by the accountant's ``MOST_WORK``.
        """

        def offer() -> tuple[dict[str, Receipt], list[Receipt], list[int]]:
            names = [charge.dataset, *self._recognise(charge.dataset, records)]
            unknown = self._unknown(charge.dataset, records)
            prices = self._prices(names, charge)
            return prices, self._at_most(prices, charge, prices[charge.dataset].delta), unknown

        for left in reversed(range(PRICES + 1)):
            seen, offered = self._version(), offer()
            with self._file.transaction() as db:
                if self._version() != seen:
                    if left:
                        continue
                    offered = offer()
                yield db, *offered
                return

    def _version(self) -> int:
        return self._file.version()

    def _prices(self, names: Sequence[str], charge: Charge) -> dict[str, Receipt]:
        """Return what a charge costs each data set: the first has the records, the others share some.

        The caller's budget is the first one's alone, and so is its delta: a caller that chose a limit for the others,
        or met one of theirs at a figure of its choice, would learn by a refusal that a record is shared. Each of them
        keeps its own stored budget, at its own stored delta.
        """
        own, *others = names
        terms = self.terms(own)
        prices = {own: self._kept_price(own, charge, min(charge.delta, terms.delta), charge.max_epsilon, terms.epsilon)}
        for name in others:
            terms = self.terms(name)
            # A name that holds records without a charge or a budget was released without privacy: it has no delta yet.
            at = terms.delta if math.isfinite(terms.delta) else prices[own].delta
            prices[name] = self._kept_price(name, charge, at, math.inf, terms.epsilon)
        return prices

    def _kept_price(self, dataset: str, charge: Charge, delta: float, limit: float, budget: float) -> Receipt:
        """Return a price within ``limit``, and within the steward's ``budget`` less what is kept for other runs."""
        reserved = self.kept(dataset, charge.run, delta)
        least = min(limit, budget - reserved)
        priced = self._price(dataset, charge, delta, least)
        if math.isfinite(charge.max_person):
            releases, plan = [*self.spent(dataset), *charge.releases], self._plan(dataset, charge)
            with self._file.apart():
                person = privacy_filter.price_of_several(releases, plan, charge.records_per_person, delta)
            priced = replace(priced, person_after=person)
        return replace(priced, kept=reserved) if reserved and budget - reserved < limit else priced

    def _at_most(self, prices: dict[str, Receipt], charge: Charge, delta: float) -> list[Receipt]:
        """Return the prices at deltas of at most ``delta``, at which a receipt of that delta may name the largest."""
        return [
            priced if priced.delta <= delta else self._price(name, charge, delta, priced.max_epsilon)
            for name, priced in prices.items()
        ]

    def _price(self, dataset: str, charge: Charge, delta: float, max_epsilon: float) -> Receipt:
        spent, plan = self.spent(dataset), self._plan(dataset, charge)
        with self._file.apart():
            return price(spent, charge.releases, delta, max_epsilon, plan)

    def _plan(self, dataset: str, charge: Charge) -> Commitment:
        """Return what holds for a data set with this charge: the charge's own plan, where it is the first.

        What an earlier format charged without a plan is all that is planned then: a plan that comes after it may have
        been chosen by what it showed.
        """
        spent = self.spent(dataset)
        return self.plans.of_history(dataset, spent) if spent else commitment_to(charge.planned, charge.releases)


def _insert(db: Any, charge: Charge, prices: dict[str, Receipt]) -> None:
    """Add a charge's rows, for each data set that it has a price for."""
    figures = [(r.purpose, charge.unit, r.event.kind, r.event.text(), r.count) for r in charge.releases]
    db.executemany(
        "INSERT INTO charges "
        "(dataset, run, round, purpose, unit, kind, figures, count, delta, charged_at, caused_by) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [
            (name, charge.run, charge.round_number, *release, priced.delta, now(), cause)
            for name, priced in prices.items()
            for cause in [None if name == charge.dataset else charge.dataset]
            for release in figures
        ],
    )


def _remember(db: Any, dataset: str, records: Collection[int]) -> None:
    db.executemany(
        "INSERT OR IGNORE INTO records (hash, dataset) VALUES (?, ?)", [(value, dataset) for value in records]
    )

"""The durable ledger of one site: what every data set has paid, over all runs, rounds and restarts.

A charge is priced first, and written in one SQLite transaction that holds the write lock and begins by
asking whether anybody has written since the history was read: then it is priced again. So two processes
can never spend the same remainder, and none waits while another computes. A charge is on disk before
``charge`` returns, and only then may a record be touched. Rows are only ever added.

A round without privacy costs no budget, because no budget could pay for it: it is written down as an
exposure. From then on no epsilon holds for the data set, nor for another one with one of its records.
A round that failed after its charge, and was answered by noise alone, is written down as a failure.

Beside charges the ledger keeps, per data set, the budgets that its steward has set (the latest one
holds) and keyed hashes of every record that it was charged for. A charge for records of which another
data set holds any is a charge to that one too, within its budget: so the history of the name that a
record was first used under has all that ever became of it, and no record passes the largest of the
figures, whatever it is called. The strictest of what the caller
asks for and what the ledger holds wins: the smaller epsilon, and the smallest delta that the data
set was ever charged or budgeted at, so that everything it released is composed at one delta.

How the file survives crashes, and what it cannot know, is in ``file``; its tables are in ``schema``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from client.ledger.budgets import BudgetHistory
from client.ledger.file import BUSY_SECONDS, LedgerFile, now
from client.ledger.holds import WITHDRAWN, Holds
from client.ledger.plans import Plans
from client.ledger.rows import Budget, Charge, Entry, Exposure, Failure, Receipt, Terms, of_all, price
from client.ledger.sums import Sums
from common.accountant import AT_RATE_1, DEPARTED, TRAINING
from common.check import not_negative
from common.errors import BudgetExhausted, ConfigError, LedgerError, PolicyRefusal
from common.privacy import privacy_filter
from common.privacy.accounting import Release, alone, honest_sites
from common.privacy.events import event_from
from common.privacy.figures import epsilon_text, honest_text, remaining_text
from common.privacy.privacy_filter import FRESH, Commitment, History, commitment_to

ENTRY = ("id", "dataset", "run", "round_number", "purpose", "unit", "count", "delta", "charged_at", "caused_by")
"""Fields of an entry that are columns."""
DEARER = {
    DEPARTED: ", more because the data set's first run planned something else",
    AT_RATE_1: ", more because rates count as 1: the data set's first run planned whole batches",
}
"""Why a charge costs more than if everything had been planned together."""
PRICES = 4
"""How often a charge is priced anew because others wrote meanwhile, before it is priced under the lock."""


class Ledger:
    """The ledger in the file ``path``: charges, exposures, budgets and what is known of records.

    Args and errors: as for ``LedgerFile``. Every process and every thread opens its own. A context manager: it closes
    itself.
    """

    def __init__(
        self,
        path: Path,
        *,
        patience: float = BUSY_SECONDS,
        apart: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._file = LedgerFile(path, patience=patience, apart=apart)
        self._budgets = BudgetHistory(self._file)
        self.holds = Holds(self._file)
        """What the steward keeps for a run, and has withdrawn."""
        self.plans = Plans(self._file)
        """What the first run of each data set planned."""
        self.sums = Sums(self._file)
        """What was done in secure sums, and is done once."""

    @property
    def path(self) -> Path:
        """Of the file."""
        return self._file.path

    def close(self) -> None:
        """Close the file; closing twice does nothing."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # --- budgets ---

    def set_budget(self, dataset: str, epsilon: float, delta: float) -> Terms:
        """Make a steward's budget hold, as ``BudgetHistory.set``."""
        return self._budgets.set(dataset, epsilon, delta)

    def lower_budget(self, dataset: str, epsilon: float, delta: float) -> Terms:
        """Take the stricter budget, as ``BudgetHistory.lower``."""
        return self._budgets.lower(dataset, epsilon, delta)

    def terms(self, dataset: str) -> Terms:
        """Return the budget and the delta that hold for ``dataset`` by what the ledger has seen."""
        return self._budgets.terms(dataset)

    def budgets(self) -> list[Budget]:
        """Return every budget that was ever set, of all data sets, oldest first."""
        return self._budgets.history()

    # --- what is released ---

    def charge(
        self,
        charge: Charge,
        *,
        records: Collection[int] = (),
        allow: Callable[[int, int], None] | None = None,
        after_exposure: bool = False,
    ) -> Receipt:
        """Price a charge on top of all that its data set has spent, and write it down durably.

        Guarantees: when this returns, the charge is on disk; when it raises, nothing was written
        (after a disk failure during the write, nothing or all of it). The data set's epsilon never
        passes ``max_epsilon`` nor the budget that is stored here, whoever else charges at the same
        time. The same run and round charged again is charged again: a repeated round releases anew.
        Every data set of this ledger that shares a record with ``records`` is charged the same, within its
        own stored budget if it has one; the receipt's epsilon is the largest of theirs, and so may be
        above ``max_epsilon``.

        Args:
            charge: what is about to be released, and on what terms.
            records: ``record_hashes`` under ``key`` of the records that are about to be used; they are
                kept. Records under the same name may change: they stay on the same budget.
            allow: called with what ``trained`` returns, under the same lock; what it raises, this raises.
            after_exposure: whether to charge also where records were released without privacy; the budget
                then holds for what was charged, and the receipt says ``exposed``.

        Raises:
            BudgetExhausted: the releases would exceed the budget, or that of a data set that shares records, or cost
                more than ``max_alone`` if no other site adds its noise, or a person more than ``max_person``.
            PolicyRefusal: the data set was withdrawn, or records were released without privacy, or charged for another
                unit, or for the same sum at another site, or the masks' key has a charge already.
            LedgerError: the file cannot be read or written, or was locked for too long.
        """
        dataset = charge.dataset
        with self._offer(charge, records) as (db, prices, told, unknown):
            self._hold_to_withdrawals(dataset)
            if allow:
                allow(*self.trained(dataset, charge.run))
            _remember(db, dataset, unknown)
            exposed = self.exposed(dataset)
            if not after_exposure:
                self._hold_closed(dataset, exposed)
            self._hold_to_unit(charge, prices)
            self.sums.hold_apart(charge, prices)
            self._hold_to_budgets(charge, prices)
            self.sums.use_key(db, charge)
            for name in prices:
                self.plans.commit(db, name, charge.run, self._plan(name, charge))
            db.executemany(
                "INSERT INTO charges "
                "(dataset, run, round, purpose, unit, kind, figures, count, delta, charged_at, caused_by) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    (
                        name,
                        charge.run,
                        charge.round_number,
                        release.purpose,
                        charge.unit,
                        release.event.kind,
                        release.event.text(),
                        release.count,
                        priced.delta,
                        now(),
                        None if name == dataset else dataset,
                    )
                    for name, priced in prices.items()
                    for release in charge.releases
                ],
            )
        return replace(of_all(prices[dataset], told), exposed=exposed)

    def check(self, charge: Charge, *, records: Collection[int] = (), after_exposure: bool = False) -> None:
        """Raise as ``charge`` would by all that the ledger holds now; nothing is written."""
        self._hold_to_withdrawals(charge.dataset)
        others = self._recognise(charge.dataset, records)
        prices = self._prices([charge.dataset, *others], charge)
        if not after_exposure:
            open_names = {exposure.dataset for exposure in self.exposures()}
            self._hold_closed(charge.dataset, self.exposed(charge.dataset) or not open_names.isdisjoint(others))
        self._hold_to_unit(charge, prices)
        self.sums.hold_apart(charge, prices)
        self._hold_to_budgets(charge, prices)

    def _hold_closed(self, dataset: str, exposed: bool) -> None:
        """Raise PolicyRefusal if records of a data set were released without privacy."""
        if exposed:
            raise PolicyRefusal(
                f"records of data set {dataset!r} were released without privacy before, so no epsilon holds for "
                "them: a private run needs after-no-privacy = true in the site's policy"
            )

    def _hold_to_withdrawals(self, dataset: str) -> None:
        """Raise PolicyRefusal if the data set was withdrawn; by its own name, which is the steward's word."""
        if self.holds.withdrawn([dataset]):
            raise PolicyRefusal(WITHDRAWN.format(dataset))

    def _hold_to_unit(self, charge: Charge, names: Iterable[str]) -> None:
        """Raise PolicyRefusal if any of the data sets was charged for another unit: no epsilon holds for both."""
        with self._file.reading() as db:
            held = set(db.execute("SELECT DISTINCT dataset, unit FROM charges").fetchall())
        if any((name, unit) in held for name in names for _, unit in held if unit != charge.unit):
            # No name of another data set: this line leaves the site.
            raise PolicyRefusal(
                f"records of data set {charge.dataset!r} were charged for another unit than one {charge.unit}, and no "
                "epsilon holds for both: this run needs records that no run of another unit has used"
            )

    def _hold_to_budgets(self, charge: Charge, prices: Mapping[str, Receipt]) -> None:
        """Raise BudgetExhausted unless the charge fits the budget of every data set that has a price."""
        own = prices[charge.dataset]
        what = f"data set {charge.dataset!r} refuses round {charge.round_number} of run {charge.run!r}"
        if not own.epsilon_after <= own.max_epsilon or own.max_epsilon <= 0:
            before, after = (epsilon_text(e, decimals=4) for e in (own.epsilon_before, own.epsilon_after))
            left = remaining_text(max(0.0, own.max_epsilon - own.epsilon_before), decimals=4)
            kept = f" without {own.kept:g} that is kept for another run" if own.kept else ""
            honest = max(self.honest_sites(charge.dataset), honest_sites(charge.releases))
            rests = honest_text(honest)
            dearer = DEARER.get(own.accountant.detour.reason, "") if own.accountant.detour else ""
            raise BudgetExhausted(
                f"{what} ({_spoken(charge.releases)}): epsilon {before} is spent, this would make it {after}"
                f"{rests}{dearer}, the budget is {own.max_epsilon:g}{kept} at delta {own.delta:g}, {left} is left; see "
                f"`fedveil ledger show {self.path}`"
            )
        if self.holds.withdrawn(prices) or not all(p.epsilon_after <= p.max_epsilon for p in prices.values()):
            # No figures and no names, and the same line where the other one was withdrawn: it leaves the site.
            raise BudgetExhausted(
                f"{what}: records that it shares with another data set have no budget left for it; see "
                f"`fedveil ledger show {self.path}`"
            )
        if not all(price.alone_after <= charge.max_alone for price in prices.values()):
            # No figure: it would be that of another data set, where that is the dearer one.
            raise BudgetExhausted(
                f"{what}: if no other site adds its noise, all releases would cost more than the policy's "
                f"epsilon-alone {charge.max_alone:g}; see `fedveil ledger show {self.path}`"
            )
        if not all(price.person_after <= charge.max_person for price in prices.values()):
            raise BudgetExhausted(
                f"{what}: a person with {charge.records_per_person} records would have more than the policy's "
                f"epsilon-person {charge.max_person:g}; see `fedveil ledger show {self.path}`"
            )

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
    ) -> None:
        """Write down durably that a round is about to release records of ``dataset`` without privacy.

        Guarantees: when this returns, the event is on disk; when it raises, nothing was written. From then on
        ``exposed`` is true of this data set, and of any other that shares a record with it.

        Args:
            steps: optimiser steps of the round.
            dataset, run, round_number: as in ``Charge``.
            records, allow: as in ``charge``.

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
                raise PolicyRefusal(
                    f"data set {dataset!r} refuses round {round_number} of run {run!r}: records that it shares with "
                    f"another data set are released no more; see `fedveil ledger show {self.path}`"
                )
            if allow:
                allow(*self.trained(dataset, run))
            _remember(db, dataset, records)
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

    def trained(self, dataset: str, run: str) -> tuple[int, int]:
        """Return how many rounds of a run, and how many steps, ``dataset`` has trained; a round again counts again.

        Charged ones, and ones without privacy. A start from a full gradient is no round, and what was charged here
        because another data set with one of its records was trained is that one's.
        """
        with self._file.reading() as db:
            rounds, steps = db.execute(
                "SELECT COUNT(*), COALESCE(SUM(steps), 0) FROM ("
                "SELECT count AS steps FROM charges "
                "WHERE dataset = :name AND run = :run AND purpose = :purpose AND caused_by IS NULL "
                "UNION ALL SELECT steps FROM exposures WHERE dataset = :name AND run = :run AND round > 0)",
                {"name": dataset, "run": run, "purpose": TRAINING},
            ).fetchone()
        return rounds, steps

    def exposed(self, dataset: str) -> bool:
        """Return whether records of ``dataset`` were released without privacy, under this name or another one."""
        with self._file.reading() as db:
            names = [name for (name,) in db.execute("SELECT DISTINCT dataset FROM exposures")]
            if not names or dataset in names:
                return bool(names)
            (shared,) = db.execute(
                "SELECT EXISTS (SELECT 1 FROM records AS own JOIN records AS open USING (hash) WHERE own.dataset = ? "
                "AND open.dataset IN (SELECT dataset FROM exposures))",
                (dataset,),
            ).fetchone()
        return bool(shared)

    def exposures(self) -> list[Exposure]:
        """Return every round that released records without privacy, of all data sets, oldest first."""
        with self._file.reading() as db:
            rows = db.execute("SELECT id, dataset, run, round, steps, released_at FROM exposures ORDER BY id")
            return [Exposure(*row) for row in rows]

    def failures(self) -> list[Failure]:
        """Return every charged round that was answered by noise alone, of all data sets, oldest first."""
        with self._file.reading() as db:
            rows = db.execute("SELECT id, dataset, run, round, reason, failed_at FROM failures ORDER BY id")
            return [Failure(*row) for row in rows]

    @property
    def key(self) -> bytes:
        """The ledger's own random key for ``record_hashes``."""
        with self._file.reading() as db:
            row = db.execute("SELECT key FROM secrets").fetchone()
        if row is None or len(row[0]) != 32:
            raise LedgerError(f"the ledger {self.path} is damaged (it has no key): do not train, ask for help")
        return bytes(row[0])

    def _recognise(self, dataset: str, records: Collection[int]) -> list[str]:
        """Return the other data sets of this ledger that were charged for any of these records, sorted.

        One is enough: what was released of it under either name composes. That short records such as "ok" are
        equal by chance only makes the charge too high.
        """
        if not records:
            return []
        with self._file.reading() as db:
            db.execute("CREATE TEMP TABLE IF NOT EXISTS opened (hash INTEGER PRIMARY KEY) WITHOUT ROWID")
            db.execute("DELETE FROM opened")
            db.executemany("INSERT OR IGNORE INTO opened VALUES (?)", [(value,) for value in records])
            rows = db.execute(
                "SELECT DISTINCT dataset FROM opened JOIN records USING (hash) WHERE dataset != ? ORDER BY dataset",
                (dataset,),
            )
            return [name for (name,) in rows.fetchall()]

    def _unknown(self, dataset: str, records: Collection[int]) -> list[int]:
        """Return those ``records`` that ``dataset`` is not known by yet.

        Other nodes wait for the lock under which they are written, each time for as long as that takes: what is known
        takes none of it.
        """
        with self._file.reading() as db:
            known = {value for (value,) in db.execute("SELECT hash FROM records WHERE dataset = ?", (dataset,))}
        return [value for value in records if value not in known]

    def _prices(self, names: Sequence[str], charge: Charge) -> dict[str, Receipt]:
        """Return what a charge costs each data set: the first has the records, the others share some.

        The caller's budget is the first one's alone, and so is its delta: a caller that chose a limit for the others,
        or met one of theirs at a figure of its choice, would learn by a refusal that a record is shared. Each of them
        keeps its own stored budget, at its own stored delta.
        """
        own, *others = names
        held = self.terms(own)
        prices = {own: self._kept_price(own, charge, min(charge.delta, held.delta), charge.max_epsilon, held.epsilon)}
        for name in others:
            held = self.terms(name)
            # A name that holds records without a charge or a budget was released without privacy: it has no delta yet.
            at = held.delta if math.isfinite(held.delta) else prices[own].delta
            prices[name] = self._kept_price(name, charge, at, math.inf, held.epsilon)
        return prices

    def _kept_price(self, dataset: str, charge: Charge, delta: float, limit: float, budget: float) -> Receipt:
        """Return a price within ``limit``, and within the steward's ``budget`` less what is kept for other runs."""
        kept = self.kept(dataset, charge.run, delta)
        least = min(limit, budget - kept)
        priced = self._price(dataset, charge, delta, least)
        if math.isfinite(charge.max_person):
            releases, plan = [*self.spent(dataset), *charge.releases], self._plan(dataset, charge)
            with self._file.apart():
                person = privacy_filter.price_of_several(releases, plan, charge.records_per_person, delta)
            priced = replace(priced, person_after=person)
        return replace(priced, kept=kept) if kept and budget - kept < limit else priced

    def kept(self, dataset: str, run: str, delta: float) -> float:
        """Return the epsilon of ``dataset`` at ``delta`` that is kept for other runs than ``run``; empty: for all."""

        def total(without: str, after: int) -> float:
            with self._file.apart():
                return self.price_of(dataset, self.spent(dataset, without, after), delta)

        return self.holds.kept(dataset, run, total)

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

    def spent(self, dataset: str, without: str = "", after: int = 0) -> list[Release]:
        """Return everything charged to ``dataset``, equal releases merged; empty for an unknown name.

        Args:
            dataset: the data set.
            without: a run whose charges are left out.
            after: number of a charge; those of that run up to it are not left out.

        Raises:
            LedgerError: the file cannot be read, or holds what has no price: figures that no mechanism has, or a kind
                of release that this version does not know. It is never left out.
        """
        return self._released("dataset = ? AND (run != ? OR id <= ?)", (dataset, without, after))

    def history(self, dataset: str, run: str) -> History:
        """Return what ``dataset`` had spent before the first charge of a run, all of it where there is none.

        Raises:
            LedgerError: as for ``spent``.
        """
        first = "(SELECT MIN(id) FROM charges WHERE dataset = ? AND run = ?)"
        before = self._released(f"dataset = ? AND id < COALESCE({first}, id + 1)", (dataset, dataset, run))
        return History(tuple(before), self.plans.of_history(dataset, before)) if before else FRESH

    def _released(self, where: str, figures: tuple[str | int, ...]) -> list[Release]:
        with self._file.reading() as db:
            rows = db.execute(
                f"SELECT kind, figures, SUM(count), purpose FROM charges WHERE {where} "
                "GROUP BY kind, figures, purpose ORDER BY MIN(id)",
                figures,
            ).fetchall()
        try:
            return [Release(event_from(kind, text), count, purpose) for kind, text, count, purpose in rows]
        except (ConfigError, TypeError) as error:
            raise LedgerError(
                f"the ledger {self.path} is damaged, or of another version ({error}): do not train, ask for help"
            ) from error

    def epsilon(self, dataset: str, delta: float) -> float:
        """Return what ``dataset`` has spent at ``delta``; 0.0 for an unknown name, infinite for an exposed one."""
        return math.inf if self.exposed(dataset) else self.price_of(dataset, self.spent(dataset), delta)

    def price_of(self, dataset: str, releases: Sequence[Release], delta: float) -> float:
        """Return the epsilon at ``delta`` of releases that were charged to ``dataset``, by its first run's plan."""
        return privacy_filter.price(releases, self._planned(dataset), delta)[0]

    def price_alone(self, dataset: str, releases: Sequence[Release], delta: float) -> float:
        """Return the same if no other site had added its noise to a sum; equal where none was to."""
        return privacy_filter.price(alone(releases), self._planned(dataset).changed(alone), delta)[0]

    def _planned(self, dataset: str) -> Commitment:
        return self.plans.of_history(dataset, self.spent(dataset))

    def epsilon_alone(self, dataset: str, delta: float) -> float:
        """Return the same if no other site had added its noise to a sum; equal where none was to."""
        return math.inf if self.exposed(dataset) else self.price_alone(dataset, self.spent(dataset), delta)

    def epsilon_of_person(self, dataset: str, records: int, delta: float) -> float:
        """Return the same as ``epsilon`` of a person with so many records; errors as ``epsilon_of_several``."""
        if self.exposed(dataset):
            return math.inf
        return privacy_filter.price_of_several(self.spent(dataset), self._planned(dataset), records, delta)

    def largest(self, dataset: str, delta: float) -> float | None:
        """Return the largest epsilon of ``dataset`` and all that share a record with it; None if none does.

        It bounds what any of its records has spent, at ``delta``; infinite if one of them was exposed.
        """
        others = [self.epsilon(name, min(delta, self.terms(name).delta)) for name in self._sharing(dataset)]
        return max(self.epsilon(dataset, delta), *others) if others else None

    def honest_sites(self, dataset: str, *, under_any_name: bool = False) -> int:
        """Return on how many honest sites of each sum ``epsilon`` counts, the most of all its sums; 0 without one.

        Args:
            dataset: the data set.
            under_any_name: of ``largest`` instead, with the sums of all that share a record with it.
        """
        names = [dataset, *(self._sharing(dataset) if under_any_name else [])]
        return honest_sites(release for name in names for release in self.spent(name))

    def _sharing(self, dataset: str) -> list[str]:
        """Return the other data sets that share a record with one, as far as their records were charged."""
        with self._file.reading() as db:
            rows = db.execute(
                "SELECT DISTINCT other.dataset FROM records AS own JOIN records AS other USING (hash) "
                "WHERE own.dataset = :name AND other.dataset != :name",
                {"name": dataset},
            ).fetchall()
        return [name for (name,) in rows]

    def entries(self) -> list[Entry]:
        """Return every charge, of all data sets, oldest first."""
        with self._file.reading() as db:
            rows = db.execute(
                "SELECT kind, figures, id, dataset, run, round, purpose, unit, count, delta, charged_at, caused_by "
                "FROM charges ORDER BY id"
            ).fetchall()
        try:
            return [Entry(event=event_from(*row[:2]), **dict(zip(ENTRY, row[2:], strict=True))) for row in rows]
        except ConfigError as error:
            raise LedgerError(f"the ledger {self.path} is damaged ({error}): do not train, ask for help") from error


def _spoken(releases: Sequence[Release]) -> str:
    return ", ".join(
        f"{r.count} {r.purpose} at noise {r.event.noise_multiplier:g}, rate {r.event.sample_rate:g}" for r in releases
    )


def _remember(db: Any, dataset: str, records: Collection[int]) -> None:
    db.executemany(
        "INSERT OR IGNORE INTO records (hash, dataset) VALUES (?, ?)", [(value, dataset) for value in records]
    )

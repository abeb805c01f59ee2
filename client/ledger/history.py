"""The contents of a site's ledger: what each data set has spent, when, for which unit, and which records it knows."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Self

from fedveil.client.ledger.budgets import BudgetHistory
from fedveil.client.ledger.file import BUSY_SECONDS, LedgerFile, key_of
from fedveil.client.ledger.holds import Holds
from fedveil.client.ledger.plans import Plans
from fedveil.client.ledger.rows import Budget, Entry, Exposure, Failure, Terms
from fedveil.client.ledger.rules import HeldOutRules
from fedveil.client.ledger.sums import Sums
from fedveil.common.errors import ConfigError, LedgerError
from fedveil.privacy import privacy_filter
from fedveil.privacy.accountant import TRAINING
from fedveil.privacy.accounting import Release, alone, honest_sites
from fedveil.privacy.events import event_from
from fedveil.privacy.privacy_filter import FRESH, Commitment, History

ENTRY = ("id", "dataset", "run", "round_number", "purpose", "unit", "count", "delta", "charged_at", "caused_by")
"""Fields of an entry that are columns."""


class LedgerHistory:
    """The ledger in the file ``path``, read: charges, exposures, failures, budgets and what is known of records.

    Args and errors: as for ``LedgerFile``. A context manager: it closes itself.
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
        self.rules = HeldOutRules(self._file)
        """By which rule rows of each data set were held out."""
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

    def terms(self, dataset: str) -> Terms:
        """Return the budget and the delta that hold for ``dataset`` by what the ledger has seen."""
        return self._budgets.terms(dataset)

    def budgets(self) -> list[Budget]:
        """Return every budget that was ever set, of all data sets, oldest first."""
        return self._budgets.history()

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
        """Return what ``dataset`` had spent before the first charge of a run, all of it where it has no charge.

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
        """Return the same as ``epsilon`` of a person with that many records; errors as ``epsilon_of_several``."""
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

    @property
    def key(self) -> bytes:
        """The ledger's own random key for ``record_hashes``."""
        with self._file.reading() as db:
            return key_of(self.path, db)

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

    def known(self, records: Collection[int]) -> frozenset[int]:
        """Return those ``records`` that the ledger was charged for, or remembers, under any name."""
        with self._file.reading() as db:
            return frozenset(value for (value,) in db.execute("SELECT hash FROM records")) & frozenset(records)

    def _unknown(self, dataset: str, records: Collection[int]) -> list[int]:
        """Return those ``records`` that ``dataset`` is not known by yet.

        Other nodes wait for the lock under which they are written, each time for as long as that takes: what is known
        takes none of it.
        """
        with self._file.reading() as db:
            known = {value for (value,) in db.execute("SELECT hash FROM records WHERE dataset = ?", (dataset,))}
        return [value for value in records if value not in known]

    def _sharing(self, dataset: str) -> list[str]:
        """Return the other data sets that share a record with one, as far as their records were charged."""
        with self._file.reading() as db:
            rows = db.execute(
                "SELECT DISTINCT other.dataset FROM records AS own JOIN records AS other USING (hash) "
                "WHERE own.dataset = :name AND other.dataset != :name",
                {"name": dataset},
            ).fetchall()
        return [name for (name,) in rows]

    def kept(self, dataset: str, run: str, delta: float) -> float:
        """Return the epsilon of ``dataset`` at ``delta`` that is kept for other runs than ``run``; empty: for all."""

        def total(without: str, after: int) -> float:
            with self._file.apart():
                return self.price_of(dataset, self.spent(dataset, without, after), delta)

        return self.holds.kept(dataset, run, total)

    def units(self) -> set[tuple[str, str]]:
        """Return the data sets that were charged, each with the units that it was charged for, in one word each."""
        with self._file.reading() as db:
            return set(db.execute("SELECT DISTINCT dataset, unit FROM charges").fetchall())

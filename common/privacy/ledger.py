"""The durable ledger of one site: what every data set has paid, over all runs, rounds and restarts.

A charge is priced and written in one SQLite transaction that holds the write lock from before the
history is read, so two processes can never spend the same remainder. It is on disk before
``charge`` returns, and only then may a record be touched. Rows are only ever added.

Beside charges the ledger keeps, per data set, the budgets that its steward has set (the latest one
holds) and keyed hashes of every record that it was charged for. A charge for records of which another
data set holds any is a charge to that one too, within its budget: so the history of the name that a
record was first used under has all that ever became of it, and no record passes the largest of the
figures, whatever it is called. The strictest of what the caller
asks for and what the ledger holds wins: the smaller epsilon, and the smallest delta that the data
set was ever charged or budgeted at, so that everything it released is composed at one delta.

How the file survives crashes, and what it cannot know, stands in ``ledger_file``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime

from common.check import below, in_range, not_negative, positive
from common.errors import BudgetExhausted, ConfigError, LedgerError
from common.privacy import accounting
from common.privacy.accounting import TRAINING, Release
from common.privacy.charges import EVALUATION, Budget, Charge, Entry, Terms, of_all, price
from common.privacy.figures import epsilon_text, remaining_text
from common.privacy.ledger_file import LedgerFile, one_line


class Ledger(LedgerFile):
    """The ledger in the file ``path``: charges, budgets and what is known of records. See ``LedgerFile``."""

    def charge(
        self,
        dataset: str,
        releases: Sequence[Release],
        *,
        run: str,
        round_number: int,
        delta: float,
        max_epsilon: float,
        clip_norm: float,
        records: Collection[int] = (),
        allow: Callable[[int, int], None] | None = None,
    ) -> Charge:
        """Price ``releases`` on top of all that ``dataset`` has spent, and write them down durably.

        Guarantees: when this returns, the charge is on disk; when it raises, nothing was written
        (after a disk failure during the write, nothing or all of it). The data set's epsilon never
        passes ``max_epsilon`` nor the budget that is stored here, whoever else charges at the same
        time. The same run and round charged again is charged again: a repeated round releases anew.
        Every data set of this ledger that shares a record with ``records`` is charged the same, and
        keeps its own budget and the caller's; the receipt's epsilon is the largest of theirs.

        Args:
            dataset: the site's name for the records; budgets of different names are separate.
            releases: what is about to be released, at least one.
            run: the run's name, for the record.
            round_number: 1-based; 0 for releases before the first round.
            delta: all releases of the data set are composed at one delta: this, or a smaller one that
                the ledger holds for it.
            max_epsilon: the budget that the caller allows; a smaller one that is stored wins.
            clip_norm: L2, for the record; the price does not depend on it.
            records: ``record_hashes`` under ``key`` of the records that are about to be used; they are
                kept. Records under the same name may change: they stay on the same budget.
            allow: called with what ``trained`` returns, under the same lock; what it raises, this raises.

        Raises:
            BudgetExhausted: the releases would exceed the budget, or that of a data set that shares records.
            ConfigError: a figure is out of range, or there is nothing to charge.
            LedgerError: the file cannot be read or written, or was locked for 60 seconds.
        """
        positive(max_epsilon=max_epsilon, clip_norm=clip_norm)
        in_range(0, 0.5, delta=delta)
        not_negative(round_number=round_number)
        if not releases or not dataset or not run:
            raise ConfigError("a charge needs a data set, a run and at least one release: name all three")
        with self._transaction():
            names = [dataset, *self._recognise(dataset, records)]
            if allow:
                allow(*self.trained(dataset, run))
            prices = self._prices(names, releases, delta, max_epsilon)
            charge = prices[dataset]
            what = f"data set {dataset!r} refuses round {round_number} of run {run!r}"
            if not charge.epsilon_after <= charge.max_epsilon:
                before, after = (epsilon_text(e, decimals=4) for e in (charge.epsilon_before, charge.epsilon_after))
                left = remaining_text(max(0.0, charge.max_epsilon - charge.epsilon_before), decimals=4)
                raise BudgetExhausted(
                    f"{what} ({_spoken(releases)}): epsilon {before} is spent, this would make it {after}, the budget "
                    f"is {charge.max_epsilon:g} at delta {charge.delta:g}, {left} is left; see "
                    f"`fedveil ledger show {self.path}`"
                )
            if not all(other.epsilon_after <= other.max_epsilon for other in prices.values()):
                # No figures and no names: this line leaves the site.
                raise BudgetExhausted(
                    f"{what}: records that it shares with another data set have no budget left for it; see "
                    f"`fedveil ledger show {self.path}`"
                )
            self._connection.executemany(
                "INSERT INTO charges (dataset, run, round, kind, noise_multiplier, sample_rate, count, delta, "
                "clip_norm, charged_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    (
                        *(name, run, round_number, r.kind, r.noise_multiplier, r.sample_rate, r.count, charge.delta),
                        *(1.0 if r.kind == EVALUATION else clip_norm, _now()),
                    )
                    for name in names
                    for r in releases
                ],
            )
            self._connection.executemany(
                "INSERT OR IGNORE INTO records (hash, dataset) VALUES (?, ?)", [(value, dataset) for value in records]
            )
        return of_all(charge, prices.values())

    def set_budget(self, dataset: str, epsilon: float, delta: float) -> Terms:
        """Make (epsilon, delta) the steward's budget of ``dataset`` and return what held until then.

        This is how a budget is raised, too; earlier ones stay in the history. A delta that the data set
        was already charged or budgeted at never grows.

        Raises:
            ConfigError: a figure is out of range, or the name is empty.
            LedgerError: the file cannot be written.
        """
        positive(epsilon=epsilon)
        in_range(0, 0.5, delta=delta)
        below(0.5, delta=delta)
        if not dataset:
            raise ConfigError("a budget needs a data set: name it")
        with self._transaction():
            before = self.terms(dataset)
            self._insert_budget(dataset, epsilon, delta)
        return before

    def lower_budget(self, dataset: str, epsilon: float, delta: float) -> Terms:
        """Take the stricter of the stored budget and this one, store it if it is new, and return what now holds.

        Infinite figures stand for "as stored"; without any budget nothing is stored.
        """
        with self._transaction():
            stored = self.terms(dataset)
            wanted = stored.stricter(epsilon, delta)
            if wanted != (stored.epsilon, stored.delta) and all(map(math.isfinite, wanted)):
                self._insert_budget(dataset, *wanted)
        return Terms(*wanted)

    def _insert_budget(self, dataset: str, epsilon: float, delta: float) -> None:
        self._connection.execute(
            "INSERT INTO budgets (dataset, epsilon, delta, set_at) VALUES (?, ?, ?, ?)",
            (dataset, epsilon, delta, _now()),
        )

    def terms(self, dataset: str) -> Terms:
        """Return the budget and the delta that hold for ``dataset`` by what the ledger has seen."""
        with one_line(self.path, "read"):
            latest = self._connection.execute(
                "SELECT epsilon FROM budgets WHERE dataset = ? ORDER BY id DESC LIMIT 1", (dataset,)
            ).fetchone()
            (delta,) = self._connection.execute(
                "SELECT MIN(delta) FROM (SELECT delta FROM budgets WHERE dataset = :name "
                "UNION ALL SELECT delta FROM charges WHERE dataset = :name)",
                {"name": dataset},
            ).fetchone()
        return Terms(latest[0] if latest else math.inf, math.inf if delta is None else delta)

    def budgets(self) -> list[Budget]:
        """Return every budget that was ever set, of all data sets, oldest first."""
        with one_line(self.path, "read"):
            rows = self._connection.execute(
                "SELECT dataset, epsilon, delta, set_at, LAG(epsilon) OVER (PARTITION BY dataset ORDER BY id) "
                "FROM budgets ORDER BY id"
            )
            return [Budget(*row) for row in rows]

    def trained(self, dataset: str, run: str) -> tuple[int, int]:
        """Return how often a round of a run, and how many steps, were charged to ``dataset``; a round again counts."""
        with one_line(self.path, "read"):
            rounds, steps = self._connection.execute(
                "SELECT COUNT(*), COALESCE(SUM(count), 0) FROM charges WHERE dataset = ? AND run = ? AND kind = ?",
                (dataset, run, TRAINING),
            ).fetchone()
        return rounds, steps

    @property
    def key(self) -> bytes:
        """The ledger's own random key for ``record_hashes``."""
        with one_line(self.path, "read"):
            row = self._connection.execute("SELECT key FROM secrets").fetchone()
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
        self._connection.execute("CREATE TEMP TABLE IF NOT EXISTS opened (hash INTEGER PRIMARY KEY) WITHOUT ROWID")
        self._connection.execute("DELETE FROM opened")
        self._connection.executemany("INSERT OR IGNORE INTO opened VALUES (?)", [(value,) for value in records])
        rows = self._connection.execute(
            "SELECT DISTINCT dataset FROM opened JOIN records USING (hash) WHERE dataset != ? ORDER BY dataset",
            (dataset,),
        )
        return [name for (name,) in rows.fetchall()]

    def _prices(
        self, names: Sequence[str], releases: Sequence[Release], delta: float, max_epsilon: float
    ) -> dict[str, Charge]:
        """Return what ``releases`` cost each data set, at one delta: the first has the records, the others share some.

        No name may pass the budget of the first one: it is a budget of records that the others hold as well.
        """
        terms = {name: self.terms(name) for name in names}
        delta = min(delta, *(held.delta for held in terms.values()))
        max_epsilon = min(max_epsilon, terms[names[0]].epsilon)
        return {
            name: price(self.spent(name), releases, delta, min(max_epsilon, held.epsilon))
            for name, held in terms.items()
        }

    def spent(self, dataset: str) -> list[Release]:
        """Return everything charged to ``dataset``, equal releases merged; empty for an unknown name.

        Raises:
            LedgerError: the file cannot be read, or holds figures that no mechanism has.
        """
        with one_line(self.path, "read"):
            rows = self._connection.execute(
                "SELECT noise_multiplier, sample_rate, SUM(count), kind FROM charges WHERE dataset = ? "
                "GROUP BY noise_multiplier, sample_rate, kind ORDER BY MIN(id)",
                (dataset,),
            ).fetchall()
        try:
            return [Release(*row) for row in rows]
        except (ConfigError, TypeError) as error:
            raise LedgerError(f"the ledger {self.path} is damaged ({error}): do not train, ask for help") from error

    def epsilon(self, dataset: str, delta: float) -> float:
        """Return what ``dataset`` has spent at ``delta``; 0.0 for an unknown name."""
        return accounting.epsilon(self.spent(dataset), delta)

    def entries(self) -> list[Entry]:
        """Return every row, of all data sets, oldest first."""
        with one_line(self.path, "read"):
            return [
                Entry(*row)
                for row in self._connection.execute(
                    "SELECT id, dataset, run, round, kind, noise_multiplier, sample_rate, count, delta, clip_norm, "
                    "charged_at FROM charges ORDER BY id"
                )
            ]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _spoken(releases: Sequence[Release]) -> str:
    return ", ".join(f"{r.count} {r.kind} at noise {r.noise_multiplier:g}, rate {r.sample_rate:g}" for r in releases)

"""The budgets of a ledger's data sets: the latest one holds, and those before it stay in the history."""

from __future__ import annotations

import math
from typing import Any

from fedveil.client.ledger.file import LedgerFile, now
from fedveil.client.ledger.rows import Budget, Terms
from fedveil.common.check import at_least, below, in_range, positive
from fedveil.common.errors import ConfigError
from fedveil.privacy.accounting import LEAST_DELTA


class BudgetHistory:
    """What a steward allows, in the tables of a ledger's file."""

    def __init__(self, file: LedgerFile) -> None:
        self._file = file

    def set(self, dataset: str, epsilon: float, delta: float) -> Terms:
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
        at_least(LEAST_DELTA, delta=delta)
        if not dataset:
            raise ConfigError("a budget needs a data set: name it")
        with self._file.transaction() as db:
            before = self.terms(dataset)
            _insert(db, dataset, epsilon, delta)
        return before

    def lower(self, dataset: str, epsilon: float, delta: float) -> Terms:
        """Take the stricter of the stored budget and this one, store it if it is new, and return what now holds.

        Infinite figures stand for "as stored"; without any budget nothing is stored.
        """
        with self._file.transaction() as db:
            stored = self.terms(dataset)
            wanted = stored.stricter(epsilon, delta)
            if wanted != (stored.epsilon, stored.delta) and all(map(math.isfinite, wanted)):
                _insert(db, dataset, *wanted)
        return Terms(*wanted)

    def terms(self, dataset: str) -> Terms:
        """Return the budget and the delta that hold for ``dataset`` by what the ledger has seen."""
        with self._file.reading() as db:
            latest = db.execute(
                "SELECT epsilon FROM budgets WHERE dataset = ? ORDER BY id DESC LIMIT 1", (dataset,)
            ).fetchone()
            (delta,) = db.execute(
                "SELECT MIN(delta) FROM (SELECT delta FROM budgets WHERE dataset = :name "
                "UNION ALL SELECT delta FROM charges WHERE dataset = :name)",
                {"name": dataset},
            ).fetchone()
        return Terms(latest[0] if latest else math.inf, math.inf if delta is None else delta)

    def history(self) -> list[Budget]:
        """Return every budget that was ever set, of all data sets, oldest first."""
        with self._file.reading() as db:
            rows = db.execute(
                "SELECT dataset, epsilon, delta, set_at, LAG(epsilon) OVER (PARTITION BY dataset ORDER BY id) "
                "FROM budgets ORDER BY id"
            )
            return [Budget(*row) for row in rows]


def _insert(db: Any, dataset: str, epsilon: float, delta: float) -> None:
    db.execute(
        "INSERT INTO budgets (dataset, epsilon, delta, set_at) VALUES (?, ?, ?, ?)", (dataset, epsilon, delta, now())
    )

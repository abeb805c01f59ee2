"""The holds of a steward on a data set: budget that is kept for one run until a day, and its end for good.

A reservation of ε for a run is a limit for every other run: they may bring what the data set has spent no further than
the budget less what is kept. It is counted in the data set's total, at its δ. What the run itself has added to that
total since the reservation was made is no longer kept; what it had added before is not taken from it. It is no limit
for the run, and gives it no budget beyond the steward's.

A withdrawal has no opposite. From then on nothing of the data set is released, priced or not, under its own name or
under another one with one of its records. It undoes nothing: what was sent has been sent.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, time

from fedveil.client.ledger.file import LedgerFile, now
from fedveil.client.ledger.rows import Reservation, Withdrawal
from fedveil.common.errors import ConfigError
from fedveil.common.paths import RUN_NAME

Total = Callable[[str, int], float]
"""The epsilon of a data set without the charges of a run after the one of this number; of all, with an empty name."""
WITHDRAWN = "data set '{}' was withdrawn by its steward: no round gets anything of it"
DAY = re.compile(r"\d{4}-\d{2}-\d{2}")


class Holds:
    """Reservations and withdrawals, in the tables of a ledger's file."""

    def __init__(self, file: LedgerFile) -> None:
        self._file = file

    def reserve(self, dataset: str, run: str, epsilon: float, until: str) -> None:
        """Keep ``epsilon`` of the budget of ``dataset`` for a run; it replaces an earlier one for it, and 0 ends that.

        Args:
            dataset: the data set.
            run: as charges name it; it may have begun.
            epsilon: of the data set's total, for what the run adds from now on.
            until: as ``moment`` returns it.

        Raises:
            ConfigError: a figure is out of range, a name is empty, or the time has passed.
            LedgerError: the file cannot be written.
        """
        if not 0 <= epsilon < math.inf:
            raise ConfigError(f"epsilon is {epsilon!r}: reserve a number above 0, or 0 to end a reservation")
        if not dataset or not RUN_NAME.fullmatch(run):
            raise ConfigError(f"a reservation needs a data set and the name of a run, not {dataset!r} and {run!r}")
        if until <= now():
            raise ConfigError(f"until is {until}, which has passed: name a later day")
        with self._file.transaction() as db:
            db.execute(
                "INSERT INTO reservations (dataset, run, epsilon, until, set_at, last_charge) "
                "VALUES (?, ?, ?, ?, ?, (SELECT COALESCE(MAX(id), 0) FROM charges))",
                (dataset, run, epsilon, until, now()),
            )

    def kept(self, dataset: str, run: str, total: Total) -> float:
        """Return the epsilon of ``dataset`` that is kept for other runs than ``run`` now; at least 0.

        Args:
            dataset: the data set.
            run: whose own reservation does not count; empty: all count.
            total: gives what the data set has spent.
        """
        with self._file.reading() as db:
            rows = db.execute(
                "SELECT run, epsilon, last_charge FROM reservations WHERE dataset = :name AND run != :run "
                "AND until > :now AND epsilon > 0 "
                "AND id IN (SELECT MAX(id) FROM reservations WHERE dataset = :name GROUP BY run)",
                {"name": dataset, "run": run, "now": now()},
            ).fetchall()
            latest = dict(db.execute("SELECT run, MAX(id) FROM charges WHERE dataset = ? GROUP BY run", (dataset,)))
        if not rows:
            return 0.0
        added = {name: total("", 0) - total(name, last) for name, _, last in rows if latest.get(name, 0) > last}
        return sum(max(0.0, epsilon - max(0.0, added.get(name, 0.0))) for name, epsilon, _ in rows)

    def withdraw(self, dataset: str, reason: str) -> None:
        """Stop a data set for good, durably.

        Raises:
            ConfigError: it has no name, or no reason is given.
            LedgerError: the file cannot be written.
        """
        if not dataset or not reason.strip():
            raise ConfigError("a withdrawal needs a data set and a reason, which stays in the ledger: give both")
        with self._file.transaction() as db:
            db.execute(
                "INSERT INTO withdrawals (dataset, reason, withdrawn_at) VALUES (?, ?, ?)", (dataset, reason, now())
            )

    def withdrawn(self, names: Iterable[str]) -> bool:
        """Whether any of these data sets was withdrawn."""
        with self._file.reading() as db:
            gone = {name for (name,) in db.execute("SELECT DISTINCT dataset FROM withdrawals")}
        return not gone.isdisjoint(names)

    def reservations(self) -> list[Reservation]:
        """Return every reservation that was ever made, of all data sets, oldest first."""
        with self._file.reading() as db:
            rows = db.execute("SELECT id, dataset, run, epsilon, until, set_at FROM reservations ORDER BY id")
            return [Reservation(*row) for row in rows]

    def withdrawals(self) -> list[Withdrawal]:
        """Return every withdrawal, of all data sets, oldest first."""
        with self._file.reading() as db:
            rows = db.execute("SELECT id, dataset, reason, withdrawn_at FROM withdrawals ORDER BY id")
            return [Withdrawal(*row) for row in rows]


def moment(text: str) -> str:
    """Return the time that a day ends at, or a time with its zone, as a ledger writes it: UTC, ISO 8601, to the second.

    >>> moment("2026-12-31"), moment("2026-12-31T12:00:00+01:00")
    ('2026-12-31T23:59:59+00:00', '2026-12-31T11:00:00+00:00')

    Raises:
        ConfigError: it is neither.
    """
    try:
        read = datetime.fromisoformat(text)
        if DAY.fullmatch(text):
            read = datetime.combine(read, time(23, 59, 59), UTC)
        if read.tzinfo is None:
            raise ValueError(text)
        read = read.astimezone(UTC)
    except (ValueError, OverflowError) as error:  # the latter of a time that is outside the years 1 to 9999 in UTC
        raise ConfigError(f"{text!r} is no time: write a day as 2026-12-31, or 2026-12-31T12:00:00+00:00") from error
    return read.isoformat(timespec="seconds")

"""The rules by which a site held rows out of training: each is written down before what is charged under it."""

from __future__ import annotations

from typing import Any

from fedveil.client.ledger.file import LedgerFile, now
from fedveil.client.ledger.rows import HeldOutRule


class HeldOutRules:
    """The rules of each data set, in the table of a ledger's file."""

    def __init__(self, file: LedgerFile) -> None:
        self._file = file

    def note(self, db: Any, dataset: str, rule: str) -> None:
        """Write a rule down in a charge's transaction, unless it is the data set's latest; empty: nothing is held out.

        A data set that never had a rule gets no row for having none.
        """
        latest = db.execute(
            "SELECT rule FROM held_out WHERE dataset = ? ORDER BY id DESC LIMIT 1", (dataset,)
        ).fetchone()
        if rule != (latest[0] if latest else ""):
            db.execute("INSERT INTO held_out (dataset, rule, set_at) VALUES (?, ?, ?)", (dataset, rule, now()))

    def all(self) -> list[HeldOutRule]:
        """Return every rule that charges were made under, of all data sets, oldest first."""
        with self._file.reading() as db:
            rows = db.execute("SELECT id, dataset, rule, set_at FROM held_out ORDER BY id")
            return [HeldOutRule(*row) for row in rows]

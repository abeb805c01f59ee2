"""First plans: by what a data set's first run planned its charges are priced, see ``privacy.privacy_filter``.

It is written with the first charge and never again: a price that holds for adaptive choices needs it fixed
before anything was released.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fedveil.client.ledger.file import LedgerFile, now
from fedveil.client.ledger.rows import FirstPlan
from fedveil.common.errors import ConfigError, LedgerError
from fedveil.privacy.accounting import Release
from fedveil.privacy.events import event_from
from fedveil.privacy.privacy_filter import Commitment, commitment_to


class Plans:
    """First plans, in the tables of a ledger's file."""

    def __init__(self, file: LedgerFile) -> None:
        self._file = file

    def all(self) -> list[FirstPlan]:
        """Return every plan that was written down, oldest first.

        Raises:
            LedgerError: the file cannot be read, or holds what has no price.
        """
        with self._file.reading() as db:
            rows = db.execute("SELECT dataset, run, releases, committed_at FROM plans ORDER BY rowid").fetchall()
        try:
            return [FirstPlan(name, run, _read(text), when) for name, run, text, when in rows]
        except (ConfigError, TypeError, ValueError) as error:
            raise LedgerError(
                f"the ledger {self._file.path} is damaged, or of another version ({error}): do not train, ask for help"
            ) from error

    def of(self, dataset: str) -> Commitment | None:
        """Return what was written down for a data set, None if nothing was; errors as for ``all``."""
        return next((row.commitment for row in self.all() if row.dataset == dataset), None)

    def of_history(self, dataset: str, spent: Sequence[Release]) -> Commitment:
        """Return what was written down, or what a history without a plan counts as: that it was planned as it is."""
        return self.of(dataset) or commitment_to([], spent)

    def commit(self, db: Any, dataset: str, run: str, commitment: Commitment) -> None:
        """Write a plan down with a charge, unless the data set has one."""
        releases = [(r.event.kind, r.event.text(), r.count, r.purpose) for r in commitment.releases]
        db.execute(
            "INSERT OR IGNORE INTO plans (dataset, run, releases, committed_at) VALUES (?, ?, ?, ?)",
            (dataset, run, json.dumps(releases), now()),
        )


def _read(rows: str) -> Commitment:
    releases = (Release(event_from(kind, text), count, purpose) for kind, text, count, purpose in json.loads(rows))
    return Commitment(tuple(releases))

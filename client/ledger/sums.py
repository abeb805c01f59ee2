"""A site's part in secure sums as its ledger remembers it: the keys of its masks, its lists of survivors.

Nothing of this has a price. It is in the ledger because a node's memory may be lost, put back or raced, and the ledger
is on disk before anything leaves: under one key one vector, of one attempt one list, in one sum each record once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from fedveil.client.ledger.file import LedgerFile, now
from fedveil.client.ledger.rows import Charge
from fedveil.common.errors import PolicyRefusal, ProtocolError


class Sums:
    """Keys of masks and signed lists, in the tables of a ledger's file."""

    def __init__(self, file: LedgerFile) -> None:
        self._file = file

    def hold_apart(self, charge: Charge, names: Iterable[str]) -> None:
        """Raise PolicyRefusal if another site was charged for the same sum by one of these data sets.

        The noise of a sum is one. A record that two of its sites hold moves it by two clips, and no two charges compose
        to that price: so one site of a ledger has it. A round may be repeated by the same site.

        Args:
            charge: for a sum; any other passes.
            names: of its own data set, and of those that share records with it.
        """
        if not charge.site:
            return
        with self._file.reading() as db:
            rows = db.execute(
                "SELECT DISTINCT dataset FROM mask_keys WHERE run = ? AND round = ? AND site != ?",
                (charge.run, charge.round_number, charge.site),
            ).fetchall()
        if {dataset for (dataset,) in rows} & set(names):
            # No name of another data set: this line leaves the site.
            raise PolicyRefusal(
                f"another site of this ledger was charged for round {charge.round_number} of run {charge.run!r}, and "
                f"has records of data set {charge.dataset!r} too, or that name: in one sum a record is at one site; "
                "take one of the two out of the roster, or part their records and data sets"
            )

    def use_key(self, db: Any, charge: Charge) -> None:
        """Write down, with its charge, that a key of masks is charged for; PolicyRefusal if it was before."""
        if not charge.mask_key:
            return
        (used,) = db.execute("SELECT EXISTS (SELECT 1 FROM mask_keys WHERE key = ?)", (charge.mask_key,)).fetchone()
        if used:
            raise PolicyRefusal(
                f"round {charge.round_number} of run {charge.run!r} was charged under this key of its masks before, "
                "and under one key one vector leaves: the server must begin another attempt"
            )
        db.execute(
            "INSERT INTO mask_keys (key, dataset, run, round, charged_at, site) VALUES (?, ?, ?, ?, ?, ?)",
            (charge.mask_key, charge.dataset, charge.run, charge.round_number, now(), charge.site),
        )

    def sign(self, context: bytes, survivors: Sequence[str]) -> None:
        """Write down durably which survivors are about to be signed for, before the signature leaves; again is free.

        Args:
            context: hash of the sum's context, 32 bytes: of one attempt.
            survivors: names of sites.

        Raises:
            ProtocolError: others were signed for in this attempt.
            LedgerError: the file cannot be read or written, or was locked for too long.
        """
        listed = json.dumps(list(survivors))
        with self._file.transaction() as db:
            row = db.execute("SELECT survivors FROM signed_lists WHERE context = ?", (context,)).fetchone()
            if row is None:
                db.execute(
                    "INSERT INTO signed_lists (context, survivors, signed_at) VALUES (?, ?, ?)",
                    (context, listed, now()),
                )
            elif row[0] != listed:
                raise ProtocolError("other survivors were signed for in this attempt before: each attempt has one list")

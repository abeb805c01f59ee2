"""How a ledger knows records again without keeping them: one keyed hash a record.

The key is random and of one ledger, so hashes of two ledgers cannot be compared. Who holds the
ledger's file, and so its key, can test whether a record that they guess is in it: the file must be
kept as safe as the records. Nothing of this ever leaves the site.
"""

from __future__ import annotations

import hashlib

from common.examples import Dataset

SHARED = 0.5
"""Two data sets are the same people's if they share this part of the smaller one's distinct records."""


def record_hashes(data: Dataset, key: bytes) -> frozenset[int]:
    """Return a signed 64-bit hash of every distinct record under ``key`` (32 bytes), whatever their order.

    Equal records have equal hashes in every data set: label names count, their numbers do not.
    """
    return frozenset(
        int.from_bytes(hashlib.blake2b(record.encode(), digest_size=8, key=key).digest(), "big", signed=True)
        for record in data.canonical_records()
    )

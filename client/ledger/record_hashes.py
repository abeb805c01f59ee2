"""Keyed hashes of records and of whole rows, by which a ledger knows records again without keeping them.

The run chooses which columns of a row are read. So the row as it stands in its source is hashed as well,
with all its columns: read through others it is still the same one. Where persons are read a person is
hashed as well, so that other records of the same one are known again; rows are hashed all the same, also those
that a run leaves out, so that records are known again by any unit.

The key is random and of one ledger, so hashes of two ledgers cannot be compared. Who holds the
ledger's file, and so its key, can test whether a record that they guess is in it: the file must be
kept as safe as the records. Nothing of this ever leaves the site.
"""

from __future__ import annotations

import hashlib

from common.tasks.examples import Dataset


def record_hashes(data: Dataset, key: bytes) -> frozenset[int]:
    """Return signed 64-bit hashes under ``key`` (32 bytes) of every distinct record, its row and its person.

    Their order does not count. Equal records have equal hashes in every data set: label names count, their
    numbers do not. A made-up record has no row.
    """
    rows = {b"row:" + example.row for example in data.examples if example.row}
    persons = {b"person:" + example.person.encode() for example in data.examples if example.person}
    texts = {record.encode() for record in data.canonical_records()}
    return frozenset(_hash(content, key) for content in rows | persons | texts)


def _hash(content: bytes, key: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8, key=key).digest(), "big", signed=True)

"""Keyed hashes of records and of whole rows, by which a ledger knows records again without keeping them.

The run chooses which columns of a row are read. So the row as its source has it is hashed as well,
with all its columns: read through others it is still the same one. Where persons are read a person is
hashed as well, so that other records of the same one are known again; rows are hashed all the same, also those
that a run leaves out, so that records are known again by any unit.

A record is known again by what it says, too: its words but for case, blanks, invisible characters and the ways
in which Unicode writes one letter, or its pixels; without its label. So a table that another program has exported, or
whose labels have other names, is no other one. Equal words of two records make them one, which costs too much and never
too little.

The key is random and of one ledger, so hashes of two ledgers cannot be compared. Who holds the
ledger's file, and so its key, can test whether a record that they guess is in it: the file must be
kept as safe as the records. Nothing of this ever leaves the site.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata

from fedveil.common.tasks.examples import Dataset, Example

_UNSEEN = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f"
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f"
    "\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
"""Control characters that are no blanks, and what Unicode calls ignorable by default: soft hyphens, joiners, fillers
and blanks of no width, marks of direction, variation selectors, tags, and a byte order mark as a character."""


def record_hashes(data: Dataset, key: bytes) -> frozenset[int]:
    """Return signed 64-bit hashes under ``key`` (32 bytes) of every distinct record, its words, its row and its person.

    Their order does not count. Equal records have equal hashes in every data set: label names count in all but the
    words, their numbers do not. A made-up record has no row.
    """
    rows = {b"row:" + example.row for example in data.examples if example.row}
    persons = {b"person:" + example.person.encode() for example in data.examples if example.person}
    texts = {record.encode() for record in data.canonical_records()}
    words = {b"words:" + said(example).encode() for example in data.examples}
    return frozenset(_hash(content, key) for content in rows | persons | texts | words)


def said(example: Example) -> str:
    """Return a text that is equal for records that say, or show, the same, however it is written.

    >>> from fedveil.common.tasks.text import TextExample
    >>> said(TextExample(text=" Au  Lait", label=1)) == said(TextExample(text="au\u00a0lait", label=0))
    True
    """
    # All words, and not a task's likeness: that may be of the question alone, which many records share. No line break
    # is left in any of them.
    return "\n".join(map(_plain, example.texts())) or example.likeness()


def _plain(text: str) -> str:
    text = _UNSEEN.sub("", text)
    if not text.isascii():
        folded = unicodedata.normalize("NFKC", text).casefold()
        # In Turkish i has the capital with a dot, of which a small letter and a mark are left, and the small letter
        # without one has the capital I. Which letter was meant is not known, so all are one.
        text = unicodedata.normalize("NFKC", folded.replace("i\u0307", "i").replace("\u0131", "i"))
    return " ".join(text.casefold().split())


def _hash(content: bytes, key: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8, key=key).digest(), "big", signed=True)

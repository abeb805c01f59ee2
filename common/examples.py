"""Records and data sets as the program handles them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Example:
    """One record; ``text`` is the prompt where there is a completion."""

    text: str
    text_pair: str | None = None
    label: int | None = None
    """Index into the data set's ``label_names``."""
    completion: str | None = None
    key: str = ""
    """Value of the natural partition's column, such as an author."""
    row: bytes = field(default=b"", compare=False, repr=False)
    """SHA-256 of the whole row that it was read from, whichever columns were chosen; empty: made up."""


@dataclass(frozen=True)
class Dataset:
    """Records in a fixed order, and the names of their labels (none for causal-lm)."""

    name: str
    examples: tuple[Example, ...]
    label_names: tuple[str, ...]
    label_phrases: tuple[tuple[str, ...], ...] = ()
    """Public phrases about each label, written by hand and not taken from records; may be empty."""

    def canonical_records(self) -> list[str]:
        """Return one text per record, equal for equal records, sorted.

        The order of records, the data set's name, the order of labels and the natural keys do not
        change it: none of them makes the same people's records another data set.
        """
        return sorted(
            json.dumps([e.text, e.text_pair, None if e.label is None else self.label_names[e.label], e.completion])
            for e in self.examples
        )

    def fingerprint(self) -> str:
        """Return the SHA-256 of the canonical records as a multiset, in hexadecimal."""
        digest = hashlib.sha256()
        for record in self.canonical_records():
            digest.update(record.encode() + b"\n")
        return digest.hexdigest()

"""Records and data sets as the program handles them."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import ClassVar

BESIDE = ("key", "person", "slice", "part", "template")
"""Fields that are about a record, and none of what it holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example(ABC):
    """One record as it was read. A kind of record adds what it holds as fields, which the roles of its task name."""

    left_out: ClassVar[Mapping[str, str]] = {}
    """Columns of other programs' layouts that change what a record says, each with what to do about it. A row that
    fills in one which no setting names is no record: without it, it would say something else."""

    label: int | None = None
    """Index into the data set's ``label_names``."""
    key: str = ""
    """Value of the natural partition's column, such as an author."""
    person: str = field(default="", repr=False)
    """Whose it is, as the column ``data.person`` says; empty: no one is named. It never leaves a site."""
    slice: str = field(default="", compare=False)
    """Of a test record: the part of the test data that it is of; empty: no slices are read."""
    part: str = field(default="", compare=False, repr=False)
    """Of a site's own record: what it has in the column by which rows are held out; empty: none is read."""
    template: str = field(default="", compare=False, repr=False)
    """The run's ``data.template``, which is the same for all records; empty: there is none."""
    row: bytes = field(default=b"", compare=False, repr=False)
    """SHA-256 of the whole row that it was read from, whichever columns were chosen; empty: made up."""

    @abstractmethod
    def canonical(self, label: str | None) -> str:
        """Return a text that is equal for equal records alone; the ledger knows records again by it.

        Args:
            label: name of the record's label; None: it has none.
        """

    @property
    def all_labels(self) -> frozenset[int]:
        """The numbers of all labels that are in the record."""
        return frozenset(() if self.label is None else (self.label,))

    @abstractmethod
    def likeness(self) -> str:
        """Return a text that is equal for near-duplicates, of which the public test part takes all or none."""

    def lacks(self) -> tuple[str, str]:
        """Return why it is no record though each of its cells is well, and what to do about it; else nothing, twice."""
        return "", ""

    @property
    def stratum(self) -> int | None:
        """The number by which data are divided evenly, or unevenly: that of the label."""
        return self.label

    def answer(self, names: Sequence[str] = ()) -> str | None:
        """Return the name of the label, or without ``names`` its number; None: it has none."""
        return None if self.label is None else names[self.label] if names else str(self.label)

    def texts(self) -> list[str]:
        """Return the words that the record holds, a text for each of its fields; none, if it holds no words."""
        values = [getattr(self, item.name) for item in fields(self) if item.name not in BESIDE]
        return [value for value in values if isinstance(value, str)]


@dataclass(frozen=True)
class Dataset:
    """Records in a fixed order, and the names of their labels (none for a task without labels)."""

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
        return sorted(example.canonical(example.answer(self.label_names)) for example in self.examples)

    def fingerprint(self) -> str:
        """Return the SHA-256 of the canonical records as a multiset, in hexadecimal."""
        digest = hashlib.sha256()
        for record in self.canonical_records():
            digest.update(record.encode() + b"\n")
        return digest.hexdigest()

"""Tables as they were read from a file or from the hub, before any check of their cells."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path


@dataclass(frozen=True)
class Unfit:
    """A row that is no record."""

    origin: str
    """The file or the hub's name."""
    row: object
    """The line of the file that it begins in, or its index in a frame; of other sources its number, from 1."""
    reason: str
    """For a steward: it names columns and settings, and quotes nothing of the row."""
    words: str
    """The whole line for those who may see the row; it may quote it."""
    of_file: bool = False
    """Whether the file, more likely than this row alone, is written otherwise than it was read."""
    unit: str = "line"
    """What ``row`` counts: line, index or row."""


@dataclass(frozen=True)
class Table:
    """Columns of equal length as read, before any check of their values."""

    origin: str
    columns: Mapping[str, Sequence[object]]
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Labels of a column in the order that the source itself gives, where it does."""
    unread: Mapping[int, Unfit] = field(default_factory=dict)
    """Rows, counted from 0, that could not be read; in the columns their cells are None."""
    has_header: bool = True
    """Whether the source names its columns; else they are those that some row has."""
    folder: Path | None = None
    """Where the file lies that was read, for cells that name other files; None: it is no file of this machine's."""

    unit: str = "row"
    """What people find a row by: the line of a file, the index of a frame; else rows are counted from 1."""
    places: Sequence[object] = ()
    """Of each row its line or its index."""

    @property
    def size(self) -> int:
        """Number of rows, the unread ones among them."""
        return len(next(iter(self.columns.values()), self.unread))

    def place(self, index: int) -> object:
        """Return what people find a row by, which is counted from 0 here."""
        return self.places[index] if self.places else index + 1

    def row(self, index: int) -> Iterable[tuple[str, object]]:
        """Return the cells of a row, counted from 0, each with its column's name; of an object its own, by name.

        So what is made of a row follows from it alone, however another one orders its names.
        """
        if isinstance(self.columns, Objects):
            return sorted(self.columns.rows[index].items(), key=itemgetter(0))
        return ((name, column[index]) for name, column in self.columns.items())


class Objects(Mapping[str, Sequence[object]]):
    """The columns of rows that name their cells themselves; each is made on its first use.

    All of them at once would be as large as the number of rows times that of all names, so that one row of many names
    would have every other take its time and its memory.
    """

    def __init__(self, rows: Sequence[Mapping[str, object]]) -> None:
        self.rows = rows
        self._names = dict.fromkeys(name for row in rows for name in row)
        self._made: dict[str, list[object]] = {}

    def __getitem__(self, name: str) -> Sequence[object]:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._made:
            self._made[name] = [row.get(name) for row in self.rows]
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

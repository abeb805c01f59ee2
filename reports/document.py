"""The blocks of a report, which page and Markdown show each in its own way."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar


class Good(str):
    """A cell that says that all is well."""

    __slots__ = ()


class Bad(str):
    """A cell that says that something is wrong."""

    __slots__ = ()


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str
    style: str = ""
    """``alarm``, ``care`` or ``claim``; empty: as all text."""
    label: str = ""
    """A bold word before it."""


@dataclass(frozen=True)
class Items:
    """A list below a title."""

    kind: ClassVar[str] = "items"
    title: str
    rows: Sequence[str]


@dataclass(frozen=True)
class Terms:
    """Names with their explanations."""

    kind: ClassVar[str] = "terms"
    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """A table; each row begins with its name."""

    kind: ClassVar[str] = "table"
    caption: str
    """Title on the page, and for screen readers."""
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    figures: Collection[int] = ()
    """Columns that hold figures."""
    folded: str = ""
    """What a reader opens it by; empty: it is open."""
    matrix: bool = False
    """Whether columns are of one kind, and a row is read across them: on a phone it scrolls."""

    @property
    def layout(self) -> str:
        """Return how it fits a phone: a ``matrix`` scrolls, ``cards`` has a block for each row, else cells wrap."""
        if self.matrix:
            return "matrix"
        wide = any(self.style_of(column) == "wide" for column in range(len(self.columns)))
        return "cards" if wide or len(self.columns) > MOST_WRAPPED else "wraps"

    def style_of(self, column: int) -> str:
        """Return the class of a column's cells: ``n`` figures, ``wide`` sentences."""
        if column in self.figures:
            return "n"
        return "wide" if any(len(row[column]) > LONG for row in self.rows) else "name"


LONG = 40
"""Characters from which on a cell is a sentence."""
MOST_WRAPPED = 4
"""Columns that fit a phone side by side."""


Block = Text | Items | Terms | Table


@dataclass(frozen=True)
class Section:
    """Blocks below one heading."""

    anchor: str
    title: str
    group: str
    """Where the page's contents name it."""
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Box:
    """A figure of the result with its notes."""

    label: str
    figure: str
    notes: Sequence[str]

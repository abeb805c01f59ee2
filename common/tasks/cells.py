"""Cells of a table: their limits, and their readers.

A reader takes a cell and returns its value, or raises ``Misfit`` if the cell holds none. A role names its reader
(``common.tasks.roles``), so a kind of task may read numbers, or the file that a cell names, where others read text.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

CELL_CHARACTERS = 131_072
"""Longest text of one cell."""
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
"""Beginnings of a text that a spreadsheet would compute."""
UNREADABLE = object()
"""In place of a cell that no Python value can hold, such as a time before the year 1."""
OF_LISTS = (
    "lists of words are read with model.task = 'token-classification', lists of labels with 'multi-label', and turns "
    "with 'chat'"
)
"""What to do about a cell that holds a list where text is read."""

Reader = Callable[[object, Path | None], object]
"""Takes a cell and the folder of its file (None: no file of this machine's); returns its value."""
Namer = Callable[[object, Path | None], Path | None]
"""Takes the same and returns the file that a reader of the cell opens, there or not; None: none."""


class Misfit(Exception):
    """A cell that holds no value of its role.

    Args:
        what: what is wrong, in words that quote nothing of the cell; the column is named after them.
        advice: what to do about it.
    """

    def __init__(self, what: str, advice: str = "") -> None:
        super().__init__(what)
        self.what, self.advice = what, advice


def read_text(value: object, folder: Path | None = None) -> str:
    """Return a cell as text, with its blanks.

    Raises:
        Misfit: it is blank, neither text nor a number, not finite, too long, or no text that can be written.
    """
    if is_missing(value):
        raise Misfit("has no value", "fill it in or remove the row")
    if not isinstance(value, str | int | float):
        kind = "cell" if value is UNREADABLE else type(value).__name__
        raise Misfit(f"has a {kind}", OF_LISTS if isinstance(value, list | tuple) else "make it text or a number")
    if isinstance(value, float) and math.isinf(value):
        raise Misfit("has a number that is not finite")
    text = plain(value)
    if len(text) > CELL_CHARACTERS:
        raise Misfit(f"has more than {CELL_CHARACTERS} characters")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Misfit("has half a character") from None
    return text


def read_optional(value: object, folder: Path | None = None) -> str:
    """Return a cell as text, empty where it is blank; Misfit: see read_text."""
    return "" if is_missing(value) else read_text(value)


def read_word(value: object, folder: Path | None = None) -> str:
    """Return a cell as text without blanks around it; errors: see read_text."""
    return read_text(value).strip()


def read_if_any(value: object, folder: Path | None = None) -> str:
    """Return a cell as text without blanks around it, empty where it is blank; errors: see read_text."""
    return read_optional(value).strip()


def read_labels(value: object, folder: Path | None = None) -> str | list[str]:
    """Return a cell of labels: a list of them, or one text, in which a separator may be; an empty cell has none.

    Raises:
        Misfit: the cell is missing, which says nothing of its labels, or one of them is as ``read_text`` refuses.
    """
    if hasattr(value, "tolist"):  # of a frame in memory
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [read_word(label) for label in value]
    return "" if isinstance(value, str) and not value.strip() else read_word(value)


def names_no_file(value: object, folder: Path | None = None) -> None:
    """Return that a reader of the cell opens no file."""


def is_missing(value: object) -> bool:
    """Return whether a cell is empty: nothing, no number, or blanks alone."""
    return value is None or (isinstance(value, float) and math.isnan(value)) or not str(value).strip()


def plain(value: object) -> str:
    """Return a cell as text, whatever it holds; a table with gaps stores whole numbers as floats.

    >>> plain(3.0), plain("3.0")
    ('3', '3.0')
    """
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def shown_as_text(value: object) -> object:
    """Return a cell that a spreadsheet shows as text, for words of others and of models.

    >>> shown_as_text("=1+1"), shown_as_text(-1)
    ("'=1+1", -1)
    """
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value

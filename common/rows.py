"""The one place that decides which rows of a table are records, for public data and for protected ones.

Whoever reads public data gets an error that names the first row that does not fit. At a site that
protects its records such a row contributes nothing, as if it were not there, and its steward alone hears of it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from common.check import nearest
from common.errors import ConfigError, DataError
from common.examples import Dataset, Example
from common.tables import UNREADABLE, Table, Unfit

CELL_CHARACTERS = 131_072
"""Longest text of one cell."""
Roles = Mapping[str, tuple[str, str]]
"""Field of Example to the setting that names a column, and that column."""
_STRIPPED = ("label", "key")


class _Misfit(Exception):
    """What is wrong with a cell: words for the steward, and words that may quote it."""

    def __init__(self, reason: str, words: str = "") -> None:
        super().__init__(reason)
        self.reason, self.words = reason, words or reason


def read_rows(
    name: str, tables: Sequence[Table], roles: Roles, labels: tuple[str, ...] = (), *, protected: bool = False
) -> tuple[Dataset, list[Unfit]]:
    """Return the rows that are records, in their order, and those that are not.

    Args:
        name: what the data set is called.
        tables: what was read; a folder has several.
        roles: which columns are read, and for what.
        labels: names of the labels in order; empty: the source's own, else the sorted distinct values.
        protected: whether a row that does not fit is left out; else it is an error. Then ``labels`` must be given.

    Raises:
        DataError: a header lacks a column. Of public data also: a row does not fit, no JSON line has a column, or
            there is but one label.
        ConfigError: ``protected`` rows with labels that nobody named.
    """
    for table in tables:
        if table.unread and not protected:
            raise DataError(next(iter(table.unread.values())).words)
        for setting, column in roles.values():
            # Without a header the rows make the columns: whether one is there would tell of a record.
            if column not in table.columns and (table.has_header or not protected):
                raise DataError(
                    f"{table.origin} has no column {column!r} ({setting}); "
                    f"it has {', '.join(table.columns)}{nearest(column, table.columns)}"
                )
    if "label" not in roles:
        labels = ()
    elif not labels:
        if protected:
            raise ConfigError("the labels of protected records are not read off them: name all in data.labels")
        labels = tables[0].class_names.get(roles["label"][1], ()) or _distinct(tables, roles["label"])
    examples: list[Example] = []
    unfit: list[Unfit] = []
    index = {label: i for i, label in enumerate(labels)}
    for table in tables:
        for row in range(table.size):
            found = _record(table, row, roles, index)
            if isinstance(found, Example):
                examples.append(found)
            elif protected:
                unfit.append(found)
            else:
                raise DataError(found.words)
    if "label" in roles and len(labels) < 2:
        raise DataError(
            f"{name} has only the label {labels[0]!r}, and a classifier needs 2: name all labels in data.labels"
        )
    return Dataset(name, tuple(examples), labels), unfit


def _record(table: Table, row: int, roles: Roles, index: Mapping[str, int]) -> Example | Unfit:
    if row in table.unread:
        return table.unread[row]
    values: dict[str, Any] = {}
    try:
        for role, (setting, column) in roles.items():
            value = table.columns[column][row] if column in table.columns else None
            text = _text(value, f"in column {column!r} ({setting})")
            values[role] = text.strip() if role in _STRIPPED else text
        if "label" in values:
            values["label"] = _label(values["label"], index)
    except _Misfit as misfit:
        return Unfit(table.origin, row + 1, misfit.reason, f"{table.origin} row {row + 1} {misfit.words}")
    return Example(**values, row=_row_digest(table, row))


def _label(label: str, index: Mapping[str, int]) -> int:
    if label not in index:
        quoted = f"has the label {label!r}, which is not among data.labels ({', '.join(index)}){nearest(label, index)}"
        raise _Misfit("has a label that is not among data.labels", quoted)
    return index[label]


def _text(value: object, where: str) -> str:
    """Return a cell as text.

    Raises:
        _Misfit: it is blank, neither text nor a number, not finite, too long, or no text that can be written.
    """
    if _missing(value):
        raise _Misfit(f"has no value {where}", f"has no value {where}: fill it in or remove the row")
    if not isinstance(value, str | int | float):
        kind = "cell" if value is UNREADABLE else type(value).__name__
        raise _Misfit(f"has a {kind} {where}", f"has a {kind} {where}: make it text or a number")
    if isinstance(value, float) and math.isinf(value):
        raise _Misfit(f"has a number that is not finite {where}")
    text = _plain(value)
    if len(text) > CELL_CHARACTERS:
        raise _Misfit(f"has more than {CELL_CHARACTERS} characters {where}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _Misfit(f"has half a character {where}") from None
    return text


def _missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value)) or not str(value).strip()


def _plain(value: object) -> str:
    # A table with gaps stores whole numbers as floats.
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _row_digest(table: Table, row: int) -> bytes:
    """Return the SHA-256 of a whole row: the same for the same row of any kind of file, whatever is chosen of it."""
    cells = {}
    for column, values in table.columns.items():
        value = values[row]
        if value is not UNREADABLE and not _missing(value):
            cells[column.strip()] = _plain(value).strip()
    return hashlib.sha256(json.dumps(cells, sort_keys=True).encode()).digest()


def _distinct(tables: Iterable[Table], role: tuple[str, str]) -> tuple[str, ...]:
    """Return the labels sorted: as numbers if all are whole numbers, else as text."""
    setting, column = role
    found = set()
    for table in tables:
        for value in table.columns.get(column, ()):
            try:
                found.add(_text(value, setting).strip())
            except _Misfit:  # found again, and told, where rows become examples
                continue
    try:
        return tuple(sorted(found, key=lambda label: (int(label), label)))
    except ValueError:
        return tuple(sorted(found))

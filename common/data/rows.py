"""The one place that decides which rows of a table are records, for public data and for protected ones.

Of public data the first row that does not fit is an error. At a site that protects its records such a row contributes
nothing, as if it were not there, and only its steward learns of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedveil.common.check import nearest
from fedveil.common.errors import ConfigError, DataError
from fedveil.common.files import FileState, state_of
from fedveil.common.tasks.cells import UNREADABLE, Misfit, is_missing, plain
from fedveil.common.tasks.examples import Dataset, Example
from fedveil.common.tasks.layouts import known_layout
from fedveil.common.tasks.roles import LABELS, Column
from fedveil.common.tasks.table_files import separated_otherwise
from fedveil.common.tasks.tables import Table, Unfit
from fedveil.common.words import counted

SHOWN_ROWS = 5
"""Rows that an error names by their numbers."""
TWO_LABELS = "and a classifier needs 2: name all labels in data.labels"


def read_rows(
    name: str,
    tables: Sequence[Table],
    columns: Sequence[Column],
    example: type[Example],
    labels: tuple[str, ...] = (),
    *,
    protected: bool = False,
    skip: bool = False,
) -> tuple[Dataset, list[Unfit], dict[Path, FileState]]:
    """Return the records, the rows that are none, and the files that ``protected`` cells name, as before their opening.

    Args:
        name: of the data set.
        tables: what was read; a folder has several.
        columns, example: what is read, and what a row becomes; it has a field for each role.
        labels: in order; empty: the source's own, else the distinct values, sorted.
        protected, skip: whether a site protects the rows, and whether one that does not fit is left out or an error.

    Raises:
        DataError: a header lacks a column, or there is but one label; of public data also: a row does not fit.
        ConfigError: ``protected`` rows, and ``labels`` is empty.
    """
    _check_columns(tables, columns, protected=protected)
    labels = _labels_of(columns, tables, labels, protected=protected)
    examples, unfit, files = list[Example](), list[Unfit](), dict[Path, FileState]()
    index = {label: i for i, label in enumerate(labels)}
    for table, row in ((each, row) for each in tables for row in range(each.size)):
        for path in _files_named(table, row, columns) if protected else ():
            files.setdefault(path, state_of(path))
        record = _filled_in(table, row, columns, example.left_out) or _record(table, row, columns, example, index)
        if isinstance(record, Example):
            examples.append(record)
        else:
            unfit.append(record)
    if unfit and not (skip and (examples or protected)):
        raise _unusable(unfit, some=bool(examples))
    if len(labels) == 1:
        raise DataError(f"{name} has only the label {labels[0]!r}, {TWO_LABELS}")
    return Dataset(name, tuple(examples), labels), unfit, files


def _unusable(unfit: Sequence[Unfit], *, some: bool) -> DataError:
    """Return an error with the first row that is no record, the number of all, and the remedy if ``some`` are one."""
    rows = [str(row.row) for row in unfit if row.origin == unfit[0].origin]
    few = (
        f"{unfit[0].unit} "
        + ", ".join(rows[:SHOWN_ROWS])
        + ", ..." * (len(unfit) > SHOWN_ROWS or len(rows) < len(unfit))
    )
    more = f" ({counted(len(unfit), 'row')} in all cannot be used: {few})" if len(unfit) > 1 else ""
    return DataError(f"{unfit[0].words}{more}" + "; data.invalid-rows = 'skip' leaves such rows out" * some)


def _labels_of(
    columns: Sequence[Column], tables: Sequence[Table], labels: tuple[str, ...], *, protected: bool
) -> tuple[str, ...]:
    labelled = next((column for column in columns if column.role.labels), None)
    if labelled is None or labelled.role.labels is None:
        return ()
    if protected and not labels:
        raise ConfigError("the labels of protected records are not read off them: name all in data.labels")
    labels = labels or tables[0].class_names.get(labelled.name, ())
    labelled.role.labels.check(labels)
    return labels or labelled.role.labels.in_order(_values(tables, labelled))


def _check_columns(tables: Iterable[Table], columns: Sequence[Column], *, protected: bool) -> None:
    """Raise DataError if a header lacks a column."""
    for table in tables:
        # Without a header the rows make the columns, so that one which could not be read may be why.
        unread = None if protected or table.has_header else next(iter(table.unread.values()), None)
        for column in columns:
            # At a site, whether one is there would tell of a record.
            if column.name not in table.columns and (table.has_header or not protected):
                if unread:
                    raise DataError(unread.words)
                raise DataError(
                    f"{table.origin} has no column {column.name!r} ({column.setting}); "
                    f"it has {', '.join(table.columns)}"
                    f"{_separated_otherwise(table) or nearest(column.name, table.columns)}"
                    f"{known_layout(table.columns)}"
                )


def _files_named(table: Table, row: int, columns: Sequence[Column]) -> Iterator[Path]:
    for column in columns:
        if column.name in table.columns:
            path = column.role.file(table.columns[column.name][row], table.folder)
            if path is not None:
                yield path


def _record(
    table: Table, row: int, columns: Sequence[Column], example: type[Example], index: Mapping[str, int]
) -> Example | Unfit:
    if row in table.unread:
        return table.unread[row]
    values: dict[str, Any] = {}
    for column in columns:
        where = f"in column {column.name!r} ({column.setting})"
        cell = table.columns[column.name][row] if column.name in table.columns else None
        try:
            value = column.role.read(cell, table.folder)
        except Misfit as misfit:
            reason = f"{misfit.what} {where}"
            return _unfit(table, row, reason, f"{reason}: {misfit.advice}" if misfit.advice else reason)
        except Exception:  # of any reader that a task brings; its words might quote the cell
            reason = f"has a cell that cannot be read {where}"
            return _unfit(table, row, reason, reason)
        if column.role.labels:
            try:
                value = column.role.labels.numbered(_parted(column, value), index)
            except KeyError as error:
                known = f"{', '.join(index)}){nearest(str(error.args[0]), index)}"
                quoted = f"has the label {error.args[0]!r}, which is not among data.labels ({known}"
                return _unfit(table, row, "has a label that is not among data.labels", quoted)
        values[column.role.field] = value
    record = example(**values, row=_row_digest(table, row))
    reason, advice = record.lacks()
    return _unfit(table, row, reason, f"{reason}: {advice}") if reason else record


def _parted(column: Column, value: Any) -> Any:
    """Return a cell's labels one by one where it may hold several, else what its role's reader gives."""
    if column.role is not LABELS:
        return value
    if not column.separator:
        return list(value) if isinstance(value, list) else [str(value)] if value else []
    parts = value if isinstance(value, list) else str(value).split(column.separator)
    return [part.strip() for part in parts if part.strip()]


def _filled_in(table: Table, row: int, columns: Sequence[Column], names: Mapping[str, str]) -> Unfit | None:
    """Return that a row is no record if it fills in a column that changes what it says and is not read."""
    read = {column.name for column in columns}
    for name, advice in names.items():
        if name in table.columns and name not in read and not _is_blank(table.columns[name][row]):
            reason = f"fills in the column {name!r}, which is not read"
            return _unfit(table, row, reason, f"{reason}: {advice}")
    return None


def _is_blank(cell: object) -> bool:
    return is_missing(cell) or str(cell).strip() == "[]"


def _unfit(table: Table, row: int, reason: str, words: str) -> Unfit:
    place = table.place(row)
    return Unfit(table.origin, place, reason, f"{table.origin} {table.unit} {place} {words}", unit=table.unit)


def _row_digest(table: Table, row: int) -> bytes:
    """Return the SHA-256 of a whole row: the same for the same row of any kind of file, whatever is chosen of it."""
    cells = {}
    for column, value in table.row(row):
        if value is not UNREADABLE and not is_missing(value):
            cells[column.strip()] = plain(value).strip()
    return hashlib.sha256(json.dumps(cells, sort_keys=True).encode()).digest()


def _separated_otherwise(table: Table) -> str:
    (only, *others) = table.columns or ("",)
    advice = "" if others else separated_otherwise(only)
    return advice and f": {advice}"


def _values(tables: Iterable[Table], column: Column) -> Iterator[Any]:
    """Yield what the cells of a column hold."""
    for table in tables:
        for value in table.columns.get(column.name, ()):
            try:
                yield _parted(column, column.role.read(value, table.folder))
            except Misfit:  # labels again, and told, where rows become examples
                continue

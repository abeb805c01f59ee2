"""Reading files and hub data sets into columns, before any check of their cells.

A row that cannot be read (not JSON, another number of fields than the header) keeps its place as a row
of empty cells, with the reason beside it. A file whose rows cannot be separated is an error.

Of protected records a row is a line, whatever the others contain: in a CSV file whose cells may hold line breaks one
quote that is not doubled makes one cell of all rows up to the next.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedveil.common.errors import DataError, UnreadableFile
from fedveil.common.foreign_words import CSV_UNCLOSED
from fedveil.common.hub import HUB, opened
from fedveil.common.tasks.cells import UNREADABLE
from fedveil.common.tasks.conll import read_conll
from fedveil.common.tasks.tables import Objects, Table, Unfit

HEADER = "the header"


def read_hub(source: str) -> Table:
    """Return the columns of ``hub:NAME[:SPLIT]``, from the hub where this process's command named it.

    Raises:
        DataError: the hub does not give it, or it is empty.
    """
    name, _, split = source.removeprefix(HUB).partition(":")
    import datasets  # slow to import, and only this source needs it

    try:
        with opened(source):
            loaded = datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise DataError(
            f"{source} cannot be loaded from the hub ({reason}): check the name, the split and the connection, "
            f"or name a file"
        ) from error
    return dataset_table(loaded, source)


def dataset_table(loaded: Any, origin: str) -> Table:
    """Return the columns of a ``datasets.Dataset``.

    Args:
        loaded: the data set.
        origin: what messages call it.

    Raises:
        DataError: it is empty.
    """
    import datasets

    if not len(loaded):
        raise DataError(f"{origin} is empty: it has no records")
    for column, kind in loaded.features.items():
        if isinstance(kind, datasets.Image):  # as bytes: the cell's reader decodes them, within limits
            loaded = loaded.cast_column(column, datasets.Image(decode=False))
    columns: dict[str, list[Any]] = dict(loaded[:])
    classes = {
        column: tuple(kind.names) for column, kind in loaded.features.items() if isinstance(kind, datasets.ClassLabel)
    }
    for column, names in classes.items():
        # -1 is the hub's way to say that a record has no label.
        columns[column] = [None if i is None or i < 0 else names[i] for i in columns[column]]
    return Table(origin, columns, classes)


def read_file(path: Path, *, by_line: bool = False) -> Table:
    """Return the columns of a CSV, TSV, JSONL or Parquet file.

    Args:
        path: the file.
        by_line: whether each line of a CSV or TSV is a row by itself, which no other line changes.

    Raises:
        UnreadableFile: its rows cannot be separated, or it has none, or two columns have one name.
        DataError: the file cannot be opened.
    """
    try:
        readers = {**READERS, **BY_LINE} if by_line else READERS
        table = readers[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        raise UnreadableFile(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from error
    except OSError as error:
        if not path.is_file() or error.errno is not None:
            raise DataError(
                f"{path} cannot be opened ({error.strerror or error}): check path and permissions"
            ) from error
        raise _unreadable(path, error) from error  # Arrow says so of files that were cut short
    except (csv.Error, ValueError, LookupError, TypeError, NotImplementedError) as error:
        # csv's errors are of quotes that do not match and of line ends inside a cell: the rows after them are
        # anyone's guess. Arrow's are kinds of the others.
        raise _unreadable(path, error) from error
    if not table.size:
        raise UnreadableFile(f"{path} is empty: it has no records")
    return table


def _unreadable(path: Path, error: Exception) -> UnreadableFile:
    what = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".") + ": fix it, or save it again"
    if isinstance(error, csv.Error):
        with path.open(encoding="utf-8-sig", errors="replace") as lines:
            what = separated_otherwise(lines.readline()) or what
    return UnreadableFile(f"{path} cannot be read as {path.suffix[1:].upper()}: {what}")


def separated_otherwise(header: str) -> str:
    """Return what to do about a header without commas that has another sign between its names; empty: it has none."""
    sign = next((sign for sign in ";\t" if sign in header), "")
    if not sign or "," in header:
        return ""
    name = "semicolons" if sign == ";" else "tabs"
    return f"its fields are separated by {name}; save it with commas, or with tabs as .tsv"


def _check_names(names: Sequence[str]) -> None:
    """Raise ValueError if two columns have one name."""
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise ValueError(f"two columns are called {twice!r}")


@contextmanager
def _cells_of_any_size() -> Iterator[None]:
    """Lift csv's limit on a cell, which would refuse the file; what is too large is decided row by row."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def read_delimited(path: Path, delimiter: str, quoting: int) -> Table:
    """Return the columns of a text whose first line names them; errors as csv's and a file's own."""
    options: dict[str, Any] = {"delimiter": delimiter, "quoting": quoting, "strict": True}
    with path.open(encoding="utf-8-sig", newline="") as lines, _cells_of_any_size():
        reader, rows, begins = csv.reader(lines, **options), dict[int, list[str]](), 1
        try:
            for row in reader:
                if row:
                    rows[begins] = row
                begins = reader.line_num + 1
        except csv.Error as error:
            # A quote that is never closed takes the rest of the file, so where the error was met says nothing.
            where = f"the row that begins in line {begins}" if rows else HEADER
            raise _located(where, error) from error
    return _of_rows(path, rows.pop(next(iter(rows), 0), []), rows)


def _located(where: str, error: csv.Error) -> csv.Error:
    """Return csv's error with the row that has it."""
    open_quote = CSV_UNCLOSED in str(error)
    return csv.Error(f"{where} has {'a quote that is never closed' if open_quote else error}")


def _read_by_line(path: Path, delimiter: str, quoting: int) -> Table:
    """Return the columns of a text of which each line is read by itself; one that is no row is unread."""
    options: dict[str, Any] = {"delimiter": delimiter, "quoting": quoting, "strict": True}
    header: list[str] = []
    rows: dict[int, list[str] | Unfit] = {}
    with _cells_of_any_size():
        for number, line in _lines(path):
            try:
                if isinstance(line, UnicodeDecodeError):
                    raise line
                row = next(csv.reader([line], **options), [])
            except (UnicodeDecodeError, csv.Error) as error:
                if not header and isinstance(error, csv.Error):
                    raise _located(HEADER, error) from error
                if not header:
                    raise
                rows[number] = _no_row(path, number, error)
                continue
            if row and header:
                rows[number] = row
            header = header or row
    return _of_rows(path, header, rows)


def _lines(path: Path) -> Iterator[tuple[int, str | UnicodeDecodeError]]:
    """Yield number and text of each line, or why it is not UTF-8; a line break is a line feed alone."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                yield number, error


def _no_row(path: Path, number: int, error: Exception) -> Unfit:
    if isinstance(error, UnicodeDecodeError):
        return _unread(path, number, "is not UTF-8", "is not UTF-8: save the file as UTF-8", of_file=True)
    advice = (
        "double the quotes inside a quoted cell; if cells hold line breaks and a program that doubles quotes wrote the "
        "file, write line-breaks = true into the policy, or save it as JSONL or Parquet"
    )
    words = f"is no row by itself ({error}): {advice}"
    return _unread(path, number, "is a line that is no row by itself", words, of_file=True)


def _of_rows(path: Path, header: Sequence[str], rows: Mapping[int, Sequence[str] | Unfit]) -> Table:
    """Return the columns of rows, each by the line that it begins in."""
    _check_names(header)
    unread: dict[int, Unfit] = {}
    cells: list[Sequence[object]] = []
    empty: list[object] = [None] * len(header)
    for i, (line, row) in enumerate(rows.items()):
        if isinstance(row, Unfit):
            unread[i] = row
        elif len(row) != len(header):
            what = f"has {len(row)} fields, but the header names {len(header)}"
            advice = "(a text that contains the separator must be quoted in CSV and changed in TSV)"
            unread[i] = _unread(path, line, "has another number of fields than the header", f"{what} {advice}")
        cells.append(empty if i in unread or isinstance(row, Unfit) else row)
    columns = {name: [row[i] for row in cells] for i, name in enumerate(header)}
    return Table(str(path), columns, unread=unread, folder=path.parent, unit="line", places=[*rows])


def _unread(path: Path, line: int, reason: str, words: str, *, of_file: bool = False) -> Unfit:
    kind = path.suffix[1:].upper()
    return Unfit(str(path), line, reason, f"{path} cannot be read as {kind}: line {line} {words}", of_file)


def _read_jsonl(path: Path) -> Table:
    records: dict[int, dict[str, object]] = {}
    unread: dict[int, Unfit] = {}
    for number, line in _lines(path):
        record: Any = {}
        if isinstance(line, UnicodeDecodeError):
            unread[len(records)] = _no_row(path, number, line)
        elif not line.strip():
            continue
        else:
            try:
                record = json.loads(line, object_pairs_hook=_object)
            except (ValueError, RecursionError) as error:
                what = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                unread[len(records)] = _unread(path, number, "is not JSON", f"is not JSON ({what})")
        if not isinstance(record, dict):
            unread[len(records)] = _unread(path, number, *["is not a JSON object"] * 2)
            record = {}
        records[number] = record
    columns, of = Objects([*records.values()]), path.parent
    return Table(str(path), columns, unread=unread, has_header=False, folder=of, unit="line", places=[*records])


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("a name occurs twice in one object")
    return dict(pairs)


def _read_parquet(path: Path) -> Table:
    import pyarrow.parquet  # slow to import, and only this kind of file needs it

    table = pyarrow.parquet.read_table(path)
    _check_names(table.column_names)
    columns = {name: _values(table.column(name)) for name in table.column_names}
    return Table(str(path), columns, folder=path.parent)


def _values(column: Any) -> list[object]:
    """Return a column's cells; one that Python cannot hold must not hide the others."""
    try:
        values: list[object] = column.to_pylist()
    except (ValueError, OverflowError):
        return [_value(cell) for cell in column]
    return values


def _value(cell: Any) -> object:
    try:
        value: object = cell.as_py()
    except (ValueError, OverflowError):
        return UNREADABLE
    return value


READERS: Mapping[str, Callable[[Path], Table]] = {
    ".csv": lambda path: read_delimited(path, ",", csv.QUOTE_MINIMAL),
    ".tsv": lambda path: read_delimited(path, "\t", csv.QUOTE_NONE),
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".conll": read_conll,
}
BY_LINE: Mapping[str, Callable[[Path], Table]] = {
    ".csv": lambda path: _read_by_line(path, ",", csv.QUOTE_MINIMAL),
    ".tsv": lambda path: _read_by_line(path, "\t", csv.QUOTE_NONE),
}
"""In place of those of ``READERS`` where one line must not change what another is; JSONL is read so anyway."""

"""Reading files and hub data sets into columns, before any check of their values."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import DataError


@dataclass(frozen=True)
class Table:
    """Columns of equal length as read, before any check of their values."""

    origin: str
    columns: Mapping[str, Sequence[object]]
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Labels of a column in the order that the source itself gives, where it does."""


def read_hub(source: str) -> Table:
    """Return the columns of ``hub:NAME[:SPLIT]``.

    Raises:
        DataError: the hub does not give it, or it is empty.
    """
    name, _, split = source.removeprefix("hub:").partition(":")
    import datasets  # slow to import, and only this source needs it

    try:
        loaded = datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise DataError(
            f"{source} cannot be loaded from the hub ({reason}): check the name, the split and the connection, "
            f"or name a file"
        ) from error
    if not len(loaded):
        raise DataError(f"{source} is empty: it has no records")
    columns: dict[str, list[Any]] = dict(loaded[:])
    classes = {
        column: tuple(kind.names) for column, kind in loaded.features.items() if isinstance(kind, datasets.ClassLabel)
    }
    for column, names in classes.items():
        # -1 is the hub's way to say that a record has no label.
        columns[column] = [None if i is None or i < 0 else names[i] for i in columns[column]]
    return Table(source, columns, classes)


def read_file(path: Path) -> Table:
    """Return the columns of a CSV, TSV, JSONL or Parquet file.

    Raises:
        DataError: the file cannot be read as what its ending says, or is empty.
    """
    try:
        columns = READERS[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from error
    except (csv.Error, ValueError, OSError) as error:  # Arrow's and json's errors are ValueErrors
        raise DataError(f"{path} cannot be read as {path.suffix[1:].upper()}: {str(error).splitlines()[0]}") from error
    if not any(columns.values()):
        raise DataError(f"{path} is empty: it has no records")
    return Table(str(path), columns)


def _read_delimited(path: Path, delimiter: str, quoting: int) -> dict[str, list[object]]:
    options: dict[str, Any] = {"delimiter": delimiter, "quoting": quoting, "strict": True}
    with path.open(encoding="utf-8-sig", newline="") as lines:
        rows = [row for row in csv.reader(lines, **options) if row]
    header = rows[0] if rows else []
    for number, row in enumerate(rows[1:], start=1):
        if len(row) != len(header):
            raise ValueError(
                f"row {number} has {len(row)} fields, but the header names {len(header)} "
                f"(a text that contains the separator must be quoted in CSV and changed in TSV)"
            )
    return {name: [row[i] for row in rows[1:]] for i, name in enumerate(header)}


def _read_jsonl(path: Path) -> dict[str, list[object]]:
    records: list[dict[str, object]] = []
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is not JSON ({error.msg})") from error
            if not isinstance(record, dict):
                raise ValueError(f"line {number} is not a JSON object")
            records.append(record)
    names = dict.fromkeys(name for record in records for name in record)
    return {name: [record.get(name) for record in records] for name in names}


def _read_parquet(path: Path) -> dict[str, list[object]]:
    import pyarrow.parquet  # slow to import, and only this kind of file needs it

    columns: dict[str, list[object]] = pyarrow.parquet.read_table(path).to_pydict()
    return columns


READERS: Mapping[str, Callable[[Path], dict[str, list[object]]]] = {
    ".csv": lambda path: _read_delimited(path, ",", csv.QUOTE_MINIMAL),
    ".tsv": lambda path: _read_delimited(path, "\t", csv.QUOTE_NONE),
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}

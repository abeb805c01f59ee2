"""Reading of named data sets (``common.data.named``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from string import Formatter

from fedveil.common.data.named import DATASETS, KnownPlace, NamedDataset, UserFile
from fedveil.common.data.rows import read_rows
from fedveil.common.errors import DataError
from fedveil.common.tasks import TASKS
from fedveil.common.tasks.cells import is_missing
from fedveil.common.tasks.examples import Dataset
from fedveil.common.tasks.roles import KEY, LABEL, LABELS, PERSON, Column
from fedveil.common.tasks.tables import Table


@lru_cache(maxsize=4)
def load_named(name: str, key: str, person: str) -> Dataset:
    """Load a named data set; kept, because a simulation asks for it again every round."""
    named = DATASETS[name]
    kind = TASKS[named.task]
    if named.is_folder:
        with _located(name, named.file) as folder:
            table = kind.read_source(folder)
        if table is None:
            raise DataError(f"the data set {name!r} is no folder that model.task {named.task!r} reads")
        table = dataclasses.replace(table, origin=name, folder=None)
        read = [Column(role, role.column) for role in kind.roles]
    else:
        table = _table_of(name, named)
        given = (*named.fields, *([LABEL.field] if named.label else []))
        read = [Column(role, role.field, "," * (role is LABELS)) for role in kind.roles if role.field in given]
    if key:
        read.append(Column(KEY, key))
    if person:
        read.append(Column(PERSON, person))
    return read_rows(name, [table], read, kind.example, named.label_names)[0]


def _table_of(origin: str, named: NamedDataset) -> Table:
    """Return a named data set's table: the columns of its file, and one for each field."""
    if named.is_folder:
        raise DataError(f"the data set {named.name!r} is a folder, and no table of texts")
    with _located(named.name, named.file) as place:
        file = named.read(place)
    _check_columns(named, file)
    rows = [dict(zip(file.columns, row, strict=True)) for row in zip(*file.columns.values(), strict=True)]
    if named.only:
        rows = [row for row in rows if row[named.only[0]] == named.only[1]]
    clean = [{column: str(value).strip() for column, value in row.items()} for row in rows]
    columns: dict[str, list[object]] = {column: [row[column] for row in clean] for column in file.columns}
    for name, words in named.fields.items():
        filled = (words.format_map(row) for row in clean)
        columns[name] = [named.cut(text) if named.cut else text for text in filled]
    if named.label:
        columns[LABEL.field] = [named.labels[row[named.label]] for row in clean]
    return Table(origin, columns, folder=file.folder)


@contextmanager
def _located(name: str, file: KnownPlace | UserFile) -> Iterator[Path]:
    """Yield where a named data set lies; DataError if it is not there, saying how to get it."""
    if not isinstance(file, UserFile):
        with file.located() as place:
            yield place
        return
    path = Path(file.path)
    if not path.exists():
        raise DataError(
            f"the data set {name!r} is read from {path.absolute()}, which is not there and which {file.how}"
        )
    yield path


def _check_columns(named: NamedDataset, file: Table) -> None:
    """Raise DataError, naming the first row that does not fit, unless a file of the user's is of the row's form."""
    if named.public:
        return
    columns = [name for words in named.fields.values() for _, name, _, _ in Formatter().parse(words) if name]
    for column in [*columns, *([named.label] if named.label else [])]:
        if column not in file.columns:
            raise DataError(f"{file.origin} has no column {column!r}, which the data set {named.name!r} is read from")
        for row, value in enumerate(file.columns[column]):
            if row in file.unread:
                raise DataError(file.unread[row].words)
            where = f"{file.origin} {file.unit} {file.place(row)}"
            if is_missing(value):
                raise DataError(f"{where} has no value in column {column!r}: remove the row")
            if column == named.label and str(value).strip() not in named.labels:
                raise DataError(
                    f"{where} has the {column} {value!r}; those of the data set {named.name!r} are "
                    f"{', '.join(named.labels)}"
                )


def load_texts(name: str) -> list[str]:
    """Return every text of a named data set, in its order: of a pair both. Its labels are not read.

    Raises:
        DataError: its file is missing, altered or no table.
    """
    named = DATASETS[name]
    table = _table_of(name, dataclasses.replace(named, label="", labels={}))
    fields = [field for field in named.fields if field != LABELS.field]
    return [str(text) for row in zip(*(table.columns[field] for field in fields), strict=True) for text in row]

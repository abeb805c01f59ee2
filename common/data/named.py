"""Named data sets: where the file or folder of each lies, how its rows become records, and the table of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from fedveil.common.rows import Table as Rows
from fedveil.common.tasks.table_files import read_file
from fedveil.common.tasks.tables import Table


class KnownPlace(Protocol):
    """A file or a folder of which every byte is known by a hash, and which anyone can get."""

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder."""

    def located(self) -> AbstractContextManager[Path]:
        """Yield where it lies, once its hash has been compared.

        Raises:
            DataError: it is not installed, or altered.
        """


@dataclass(frozen=True, slots=True)
class UserFile:
    """A file that no package carries, and that the user puts where it is looked for; its bytes are not known."""

    path: str
    """Relative to where the program was started, with forward slashes."""
    how: str
    """How the user gets it, in words that fit behind "which"."""


@dataclass(frozen=True)
class NamedDataset:
    """A data set with a name: a table, or a folder that its task reads by itself (``Task.read_source``)."""

    name: str
    """What ``data.name`` calls it."""
    file: KnownPlace | UserFile
    task: str
    """The kind of task that it is for, as ``model.task``."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """What the fields of an example hold: format strings over the table's columns. Of a folder, none."""
    label: str = ""
    """Column of the label; empty: of a folder, or no such column."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """The name of each label by what the column holds, in the labels' order; empty: records have none. Of a set with
    several labels a record, ``fields`` has ``labels``: their names, with commas between."""
    label_phrases: tuple[tuple[str, ...], ...] = ()
    """Phrases for ``head.start = "label-words"``, by label; made up, none was taken from a record."""
    only: tuple[str, str] | None = None
    """Column and the value that a row must have there to belong."""
    read: Callable[[Path], Table] = read_file
    """How the file is read, if its ending does not say; or how a folder becomes a table."""
    cut: Callable[[str], str] | None = None
    """What is kept of each field; None: all of it."""
    shares_sentences_with: tuple[str, ...] = ()
    """Named data sets of the same sentences, in part at least: neither is public text for the other."""
    sentences_sha256: str = ""
    """SHA-256 of its sentences as public text, one a line (``start.text``); empty: its user says it."""

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the labels in order."""
        return tuple(self.labels.values())

    @property
    def public(self) -> bool:
        """Whether everybody who has it has the same bytes, which anyone can get."""
        return not isinstance(self.file, UserFile)

    @property
    def is_folder(self) -> bool:
        """Whether it is no table, but a folder that its task reads by itself."""
        return not isinstance(self.file, UserFile) and self.file.is_folder and self.read is read_file


DATASETS: Rows[NamedDataset] = Rows(
    "data sets",
    (),
    {
        "rotten-tomatoes": "sets.movie_reviews:ROTTEN_TOMATOES",
        "imdb": "sets.movie_reviews:IMDB",
        "imdb-endings": "sets.movie_reviews:IMDB_ENDINGS",
        "sst2": "sets.sst2:SST2",
        "sst2-dev": "sets.sst2:SST2_DEV",
        "sst2-test": "sets.sst2:SST2_TEST",
        "reuters": "sets.orange:REUTERS",
        "reuters-test": "sets.orange:REUTERS_TEST",
        "20-newsgroups": "sets.orange:NEWSGROUPS",
        "20-newsgroups-test": "sets.orange:NEWSGROUPS_TEST",
        "snli": "sets.sentence_pairs:SNLI",
        "snli-dev": "sets.sentence_pairs:SNLI_DEV",
        "qnli": "sets.sentence_pairs:QNLI",
        "qnli-dev": "sets.sentence_pairs:QNLI_DEV",
        "asdiv": "sets.asdiv:ASDIV",
        "asdiv-prompts": "sets.asdiv:ASDIV_PROMPTS",
        "asdiv-pairs": "sets.asdiv:ASDIV_PAIRS",
        "medmcqa": "sets.medical:MEDMCQA",
        "medmcqa-specialties": "sets.medical:MEDMCQA_SPECIALTIES",
        "medmcqa-specialties-test": "sets.medical:MEDMCQA_SPECIALTIES_TEST",
        "medmcqa-pairs": "sets.medical:MEDMCQA_PAIRS",
        "medqa": "sets.medical:MEDQA",
        "pubmedqa": "sets.medical:PUBMEDQA",
        "goemotions": "sets.goemotions:GOEMOTIONS",
        "goemotions-dev": "sets.goemotions:GOEMOTIONS_DEV",
        "textile-images": "sets.textile_images:TEXTILE_IMAGES",
        "spoken-digits": "sets.spoken:SPOKEN_DIGITS",
        "spoken-digits-test": "sets.spoken:SPOKEN_DIGITS_TEST",
        "spoken-sentences": "sets.spoken:SPOKEN_SENTENCES",
        "spoken-sentences-test": "sets.spoken:SPOKEN_SENTENCES_TEST",
        "fsdd": "sets.spoken:FSDD",
    },
    "fedveil.demo",
)
"""The data sets that ``data.name`` may name. No data set counts as public that is not in this table."""


def share_sentences(one: str, other: str) -> bool:
    """Return whether two sources are known to hold the same sentences: one data set, or two whose rows say so.

    A source is a name, or the file that a row of the table looks for.
    """
    one, other = _row_of(one), _row_of(other)
    if one == other:
        return True
    pairs = ((one, other), (other, one))
    return any(b in DATASETS[a].shares_sentences_with for a, b in pairs if a in DATASETS)


def _row_of(source: str) -> str:
    if source in DATASETS:
        return source
    files = {Path(row.file.path): name for name, row in DATASETS.items() if isinstance(row.file, UserFile)}
    return files.get(Path(source), source)

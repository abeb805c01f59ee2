"""A named data set: where its file or folder lies, and how its rows become records."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from common.data.packaged import PackagedFile, PackagedTree
from common.tasks.tables import Table, read_file


@dataclass(frozen=True, slots=True)
class UserFile:
    """A file that no package carries, and that the user puts where it is looked for; its bytes are not known."""

    path: str
    """Relative to where the program was started, with forward slashes."""
    how: str
    """How the user gets it, in words that fit behind "which"."""


@dataclass(frozen=True)
class NamedDataset:
    """A data set with a name: a table, or a folder that its task reads by itself (``Task.reads``)."""

    name: str
    """What ``data.name`` calls it."""
    file: PackagedFile | PackagedTree | UserFile
    task: str
    """The kind of task that it is for, as ``model.task``."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """What the fields of an example hold: format strings over the table's columns. Of a folder, none."""
    label: str = ""
    """Column of the label; empty: of a folder, or there is none."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """The name of each label by what the column holds, in the labels' order; empty: records have none."""
    label_phrases: tuple[tuple[str, ...], ...] = ()
    """Phrases for ``head.start = "label-words"``, by label; made up, none was taken from a record."""
    only: tuple[str, str] | None = None
    """Column and the value that a row must have there to belong."""
    read: Callable[[Path], Table] = read_file
    """How the file is read, if its ending does not say."""
    cut: Callable[[str], str] | None = None
    """What is kept of each field; None: all of it."""
    shares_sentences_with: tuple[str, ...] = ()
    """Named data sets of the same sentences, in part at least: neither is public text for the other."""
    sentences_sha256: str = ""
    """SHA-256 of its sentences as public text, one a line (``start.text``); empty: whoever uses them says it."""

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the labels in order."""
        return tuple(self.labels.values())

    @property
    def public(self) -> bool:
        """Whether everybody who has it has the same bytes, which anyone can get."""
        return not isinstance(self.file, UserFile)

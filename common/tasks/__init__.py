"""Kinds of task, such as classification or chat: one a file, and ``TASKS``, the table of them."""

from __future__ import annotations

from collections.abc import Mapping

from fedveil.common.rows import Table
from fedveil.common.tasks.base import Batch, Record, Scored, Sums, Task, wording_of
from fedveil.common.tasks.causal_lm import CausalLM
from fedveil.common.tasks.chat import Chat
from fedveil.common.tasks.classification import Classification
from fedveil.common.tasks.finished import Answer, Finished
from fedveil.common.tasks.image_classification import ImageClassification
from fedveil.common.tasks.instruction import Instruction
from fedveil.common.tasks.multi_label import MultiLabel
from fedveil.common.tasks.roles import Role
from fedveil.common.tasks.stock_classification import StockClassification
from fedveil.common.tasks.token_classification import TokenClassification

TASKS: Table[Task] = Table(
    "tasks",
    (
        *(Classification(), MultiLabel(), TokenClassification()),
        *(CausalLM(), Chat(), Instruction(), ImageClassification()),
    ),
)


def scored_of(settings: Mapping[str, object]) -> Scored:
    """Return what scores and reports say of the task that settings name; of one that is not known, what is usual."""
    task = TASKS.get(str(settings.get("model.task", "")))
    return task.scored if task else Scored()


def headline_of(settings: Mapping[str, object]) -> str:
    """Return the name of the figure that a run with these settings is judged by."""
    return scored_of(settings).headline


def roles_of_all() -> tuple[Role, ...]:
    """Return the roles of all tasks, of each setting the first, in the table's order."""
    first: dict[str, Role] = {}
    for role in (role for task in TASKS.values() for role in task.roles):
        first.setdefault(role.setting, role)
    return tuple(first.values())


__all__ = [
    "TASKS",
    "Answer",
    "Batch",
    "CausalLM",
    "Chat",
    "Classification",
    "Finished",
    "ImageClassification",
    "Instruction",
    "MultiLabel",
    "Record",
    "Scored",
    "StockClassification",
    "Sums",
    "Task",
    "TokenClassification",
    "headline_of",
    "roles_of_all",
    "scored_of",
    "wording_of",
]

"""One kind of task per file; ``TASKS`` is the table of them."""

from __future__ import annotations

from common.tasks.base import Answer, Batch, Finished, Record, Sums, Task
from common.tasks.causal_lm import CausalLM
from common.tasks.chat import Chat
from common.tasks.classification import Classification
from common.tasks.image_classification import ImageClassification
from common.tasks.instruction import Instruction
from common.tasks.roles import Role
from common.tasks.stock_classification import StockClassification

TASKS: dict[str, Task] = {
    task.name: task for task in (Classification(), CausalLM(), Chat(), Instruction(), ImageClassification())
}


def roles_of_all() -> tuple[Role, ...]:
    """Return the roles of all tasks, one for each setting, in the table's order."""
    return tuple({role.setting: role for task in TASKS.values() for role in task.roles}.values())


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
    "Record",
    "StockClassification",
    "Sums",
    "Task",
    "roles_of_all",
]

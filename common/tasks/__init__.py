"""One kind of task per file; ``TASKS`` is the table of them."""

from __future__ import annotations

from common.tasks.base import Batch, Record, Sums, Task
from common.tasks.causal_lm import CausalLM, CompletionModel
from common.tasks.classification import Classification, TextClassifier

TASKS: dict[str, Task] = {task.name: task for task in (Classification(), CausalLM())}

__all__ = [
    "TASKS",
    "Batch",
    "CausalLM",
    "Classification",
    "CompletionModel",
    "Record",
    "Sums",
    "Task",
    "TextClassifier",
]

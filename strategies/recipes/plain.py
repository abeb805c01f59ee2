"""Next to nothing filled in: each setting is what its own description says.

A head of images starts at zero. A language model has its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from fedveil.common.config.sections import Scalar
from fedveil.common.tasks import TASKS
from fedveil.strategies.recipes.base import Asked, Recipe


@dataclass(frozen=True)
class Plain(Recipe):
    """The strategy's own adapter, trained for six rounds beside the head."""

    name: ClassVar[str] = "plain"

    def unfit(self, asked: Asked) -> str:
        """Return that it suits every run."""
        del asked
        return ""

    def settings(self, asked: Asked) -> Mapping[str, Scalar]:
        """Return none, but for a head that no words can start, and for records without labels."""
        task = TASKS.get(asked.settings.model.task)
        unworded = task and task.labelled and not task.wording
        return {**asked.unlabelled, **({"head.start": "zeros"} if unworded else {})}

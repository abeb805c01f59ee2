"""LoRA on every linear layer, in twelve rounds of smaller steps: what suits a run without privacy.

Where no noise is added, more trained numbers cost none, and more steps none either. Under noise both do.

The figures were chosen on IMDB (``experiments/LOG.md``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from common.config.sections import Scalar
from common.tasks import TASKS
from strategies.recipes.base import Asked, Recipe
from strategies.recipes.whole import own_method


@dataclass(frozen=True)
class Open(Recipe):
    """LoRA on every linear layer beside the head, without privacy."""

    name: ClassVar[str] = "open"
    claims: ClassVar[bool] = False

    def unfit(self, asked: Asked) -> str:
        """Return what is not for it: privacy, another method, labels without words."""
        task = TASKS.get(asked.settings.model.task)
        return own_method(asked, claims=self.claims) or (
            "" if task and task.worded else f"model.task is {asked.settings.model.task!r}"
        )

    def settings(self, asked: Asked) -> Mapping[str, Scalar]:
        """Return the layers and the rounds, and the sites' rate where their steps are Adam's."""
        rate = {"training.learning-rate": 0.004} if asked.optimizer == "adam" else {}
        return {"rounds": 12, "evaluate-every": 3, "adapter.targets": "all-linear", **rate}

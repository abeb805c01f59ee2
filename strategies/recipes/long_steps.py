"""The server's plain steps with a heavy ball, long ones, for adapters in language models.

A private run of a language model takes few steps, for each is a pass over its records. Adam's are as short as its rate
says, however sure the average is. A plain step is as long as the average, and ``server.most-noise`` bounds what of it
may be noise.

The figures were chosen on GSM8K (``experiments/log``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from fedveil.common.config.sections import Scalar
from fedveil.common.tasks import TASKS
from fedveil.strategies.recipes.base import Asked, Recipe

STRATEGIES = ("ffa-lora", "fed-svd")
"""Those whose own adapter it has, with a frozen A. Where A is trained beside B, as FedAvg-LoRA has it, the noise of one
is multiplied by the other's, and steps as long as these lead astray."""
ADAPTER = "lora-frozen-a"
DECIDED = ("server.", "training.optimizer", "training.learning-rate", "training.momentum", "training.weight-decay")
"""What it decides as a whole, or what has no say beside it."""
WITHOUT_CLIP = 6.0
"""Rate of whoever wants it without privacy, where steps are as long as gradients are. It is no recipe for that."""


@dataclass(frozen=True)
class LongSteps(Recipe):
    """LoRA with a frozen A in a language model, by the server's plain steps."""

    name: ClassVar[str] = "long-steps"
    labelled: ClassVar[bool] = False

    def unfit(self, asked: Asked) -> str:
        """Return what is not for it: labels, another adapter, steps of one's own, noise that no site adds."""
        run = asked.settings
        mechanism, task = run.privacy.mechanism, TASKS.get(run.model.task)
        if task is None or task.labelled:
            return f"model.task is {run.model.task!r}"
        if "strategy" in asked.given and run.strategy not in STRATEGIES:
            return f"strategy is {run.strategy!r}"
        if "adapter.name" in asked.given and run.adapter.name != ADAPTER:
            return "adapter.name is set"
        if not mechanism.claims or mechanism.central:
            return f"privacy.mode is {run.privacy.mode!r}"
        own = sorted(key for key in asked.given if key.startswith(DECIDED))
        return f"{own[0]} is set" if own else ""

    def settings(self, asked: Asked) -> Mapping[str, Scalar]:
        """Return the adapter and the steps."""
        return {
            **asked.unlabelled,
            "adapter.name": ADAPTER,
            "server.optimizer": "momentum",
            "server.momentum": 0.8,
            "server.learning-rate": 24.0 if asked.clips else WITHOUT_CLIP,
            **({"server.most-noise": 0.3} if asked.told_noise else {}),
            "training.optimizer": "sgd",
            "training.learning-rate": 1.0,
        }

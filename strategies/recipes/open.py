"""LoRA on every linear layer, by one plain step of all sites a round and the server's Adam, for runs without privacy.

Where no noise is added, more trained numbers cost none, and more steps none either. Under noise both do.

A round's mean change is the gradient of one batch of the whole federation. So the run is Adam on all records in one
place, however unevenly labels are divided, but where a site's update is shortened (``server.aggregation``). Adam at the
sites is not that. It begins anew in every round and brings any gradient to full steps, so a site with one label alone
goes on towards that label with nothing left to learn (Wang et al. 2021, Local Adaptivity in Federated Learning, arXiv
2106.02305).

The figures were chosen on IMDB and on QNLI (``experiments/log``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from fedveil.common.config.sections import Scalar
from fedveil.common.tasks import TASKS
from fedveil.strategies.recipes.base import Asked, Recipe
from fedveil.strategies.recipes.whole import own_method

ROUNDS = 48
FEWEST = 24
"""Rounds, and so steps of the server's Adam, below which its rate would not carry it far."""


@dataclass(frozen=True)
class Open(Recipe):
    """LoRA on every linear layer beside the head, without privacy, by Adam at the server."""

    name: ClassVar[str] = "open"
    claims: ClassVar[bool] = False

    def unfit(self, asked: Asked) -> str:
        """Return what is not for it: privacy, another method, labels without words, few rounds."""
        if told := own_method(asked, claims=self.claims):
            return told
        task, rounds = TASKS.get(asked.settings.model.task), asked.settings.rounds
        if not (task and task.wording):
            return f"model.task is {asked.settings.model.task!r}"
        few = "rounds" in asked.given and rounds < FEWEST
        return f"rounds is {rounds}, and {self.name!r} needs {FEWEST} or more" if few else ""

    def settings(self, asked: Asked) -> Mapping[str, Scalar]:
        """Return the whole method; whoever wants it where noise is added has Adam's rate and τ for noise."""
        whole: dict[str, Scalar] = {
            "rounds": ROUNDS,
            "evaluate-every": 8,
            "adapter.targets": "all-linear",
            "training.optimizer": "sgd",
            "training.local-steps": 1,
            "training.sample-rate": 0.072,
            "server.optimizer": "adam",
        }
        if asked.settings.privacy.mechanism.claims:
            return whole
        return {**whole, "schedule": "slanted", "server.learning-rate": 0.006, "server.adam-tau": 1e-6}

"""The head alone, on features of the frozen base model that each record has once, whitened by made-up records.

A step costs a product of the size of the head, and a round is one step on all records, which the server takes. It is
the line that an adapter must beat, and what suits many labels.

The figures for words were chosen on IMDB and on 20 Newsgroups with 4, 6 and 20 labels, those for images on
Fashion-MNIST and on digits (``experiments/log``). Where records are many and labels are near each other, a head is
short of steps and not of budget, which is that of all steps together: so there are thirty. The rate is for little
noise; where there is more, ``server.most-noise`` lowers it.

Images of one kind are far from any made-up one, and most of their features is what they have in common. So sites spend
a tenth of the budget on their mean first, where the mechanism has such a release (``class-means``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from fedveil.common.config.sections import Scalar
from fedveil.common.tasks import TASKS
from fedveil.strategies.recipes.base import Asked, Recipe
from fedveil.strategies.recipes.whole import own_method

WITHOUT_CLIP = 0.5
"""Rate without privacy, where steps are as long as gradients are, and a longer rate diverges."""


@dataclass(frozen=True)
class HeadOnly(Recipe):
    """The head alone, whitened by made-up records, on features that each record has once."""

    name: ClassVar[str] = "head-only"
    trains: ClassVar[str] = "the classification head only, no LoRA adapter"

    def unfit(self, asked: Asked) -> str:
        """Return what is not for it: another method, or settings of an adapter."""
        adapted = sorted(asked.given & {"adapter.rank", "adapter.targets"})
        return own_method(asked) or (f"{adapted[0]} is set" if adapted else "")

    def settings(self, asked: Asked) -> Mapping[str, Scalar]:
        """Return the whole method."""
        run = asked.settings
        worded = TASKS[run.model.task].wording
        common: dict[str, Scalar] = {
            "adapter.name": "none",
            "adapter.start": "public-metric",
            "evaluate-every": 5 if worded else 4,
            "head-rate": 1.0,
            "head.metric": "public",
            "server.optimizer": "momentum",
            "server.momentum": 0.5,
            "training.local-steps": 1,
            "training.sample-rate": 1.0,
            "training.optimizer": "sgd",
            "training.learning-rate": 1.0,
        }
        rate: dict[str, Scalar] = {"server.learning-rate": (16.0 if worded else 32.0) if asked.clips else WITHOUT_CLIP}
        if asked.told_noise:
            rate["server.most-noise"] = 0.1 if worded else 0.15
        if worded:
            return {**common, **rate, "rounds": 30, "start.records": 512, "start.ridge": 1.0}
        own = {**rate, "rounds": 16, "head.start": "zeros"}
        if "paid release" not in run.privacy.mechanism.starts:
            return {**common, **own, "start.records": 512}
        centred: dict[str, Scalar] = {"start.sums": "all", "start.share": 0.1, "start.sample-rate": 1.0}
        return {**common, **own, "adapter.start": "class-means", **centred}

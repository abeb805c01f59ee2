"""The head alone, on features of the frozen base model that each record has once, whitened by made-up words.

A step costs a product of the size of the head, so sites take forty of them, each on all records. It is the line that an
adapter must beat, and what suits many labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from common.config.sections import Scalar
from strategies.recipes.base import Asked, Recipe
from strategies.recipes.whole import own_method


@dataclass(frozen=True)
class HeadOnly(Recipe):
    """The head alone, whitened by made-up words, on features that each record has once."""

    name: ClassVar[str] = "head-only"

    def unfit(self, asked: Asked) -> str:
        """Return what is not for it: another method."""
        return own_method(asked)

    def settings(self, asked: Asked) -> Mapping[str, Scalar]:
        """Return the whole method; in a secure sum a round is one step."""
        summed = asked.settings.privacy.mechanism.summed
        return {
            "rounds": 40 if summed else 4,
            "evaluate-every": 10 if summed else 1,
            "head-rate": 1.0,
            "adapter.name": "none",
            "adapter.start": "public-metric",
            "start.records": 512,
            "head.metric": "public",
            "server.optimizer": "none",
            "training.local-steps": 1 if summed else 10,
            "training.sample-rate": 1.0,
            "training.optimizer": "sgd",
            "training.learning-rate": 8.0,
        }

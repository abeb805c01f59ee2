"""The head alone, on features of the frozen base model that each record has once, whitened by made-up words.

A step costs a product of the size of the head, and a round is one step on all records, which the server takes. It is
the line that an adapter must beat, and what suits many labels.

The figures were chosen on IMDB and on 20 Newsgroups with 4, 6 and 20 labels (``experiments/LOG.md``). The rate is for
little noise; where there is more, ``server.most-noise`` lowers it.
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
        """Return what is not for it: another method, or settings of an adapter."""
        adapted = sorted(asked.given & {"adapter.rank", "adapter.targets"})
        return own_method(asked) or (f"{adapted[0]} is set" if adapted else "")

    def settings(self, asked: Asked) -> Mapping[str, Scalar]:
        """Return the whole method."""
        del asked
        return {
            "rounds": 12,
            "evaluate-every": 4,
            "head-rate": 1.0,
            "adapter.name": "none",
            "adapter.start": "public-metric",
            "start.records": 512,
            "head.metric": "public",
            "server.optimizer": "momentum",
            "server.momentum": 0.5,
            "server.learning-rate": 16.0,
            "server.most-noise": 0.07,
            "training.local-steps": 1,
            "training.sample-rate": 1.0,
            "training.optimizer": "sgd",
            "training.learning-rate": 1.0,
        }

"""Nothing filled in: each setting is what its own description says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from common.config.sections import Scalar
from strategies.recipes.base import Asked, Recipe


@dataclass(frozen=True)
class Plain(Recipe):
    """The strategy's own adapter, trained for six rounds beside the head."""

    name: ClassVar[str] = "plain"

    def unfit(self, asked: Asked) -> str:
        """Return that it suits every run."""
        del asked
        return ""

    def settings(self, asked: Asked) -> Mapping[str, Scalar]:
        """Return none."""
        del asked
        return {}

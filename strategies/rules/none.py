"""No rule: the optimiser takes the averaged change as it is, and its step is the result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedveil.strategies.rules.base import ServerRule


@dataclass(frozen=True)
class NoRule(ServerRule):
    """The change and the step as they are."""

    name: ClassVar[str] = "none"
    paper: ClassVar[str] = ""

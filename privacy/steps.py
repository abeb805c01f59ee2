"""The interface of a round's steps, which every plan gives to the training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from fedveil.privacy.secure_sum.masks import Words


def nothing() -> None:
    """Do nothing."""


class Steps(Protocol):
    """What takes the optimiser steps of one round."""

    words: Words | None
    """After a step, what is sent in place of the trained tensors: shape (numbers,), in the canonical order of these;
    None where they are sent themselves."""

    def step(self, batches: Iterable[Any], losses: Callable[[Any], Tensor]) -> None:
        """Take one optimiser step on one logical batch, given as any number of parts."""

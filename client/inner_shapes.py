"""Shapes inside a pass: whether they follow from what records hold, and not from how long these are.

A mixture of experts gives each expert the tokens of all records of a batch that chose it, in one product. How many
these are decides how the product rounds. So a record's bits follow from who is beside it, in a batch of any shape; and
where two experts are nearly equal, another rounding is another expert. Only a record that passes by itself is alone in
every product.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fedveil.common.foreign_words import TORCH_GROUPED
from fedveil.common.model.federated import FederatedModel
from fedveil.common.model.shapes import FixedBatch

Traced = tuple[Any, tuple[torch.Size, ...]]
"""An operation, and the shapes of what it takes and gives."""


class _Trace(TorchDispatchMode):
    """Takes down every operation inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Traced] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute the operation, and take it down."""
        del types
        given = kwargs or {}
        found = func(*args, **given)
        self.seen.append((func, tuple(_shapes((args, given, found)))))
        return found


def _shapes(part: Any) -> Iterator[torch.Size]:
    """Yield the shape of every tensor in what an operation takes or gives, in order."""
    if isinstance(part, Tensor):
        yield part.shape
    elif isinstance(part, tuple | list | dict):
        for inner in part.values() if isinstance(part, dict) else part:
            yield from _shapes(inner)


def follow_from_records(model: FederatedModel, batches: Iterable[FixedBatch]) -> bool:
    """Return whether batches of one shape differ in the shape of anything that is computed of them.

    Args:
        model: whose losses are computed, without a gradient.
        batches: of one shape each, of different records.
    """
    first: list[Traced] | None = None
    for batch in batches:
        with torch.no_grad(), _Trace() as trace:
            model.losses(batch)
        operations = {operation for operation, _ in trace.seen}
        if any(TORCH_GROUPED in str(operation) for operation in operations) or (first or trace.seen) != trace.seen:
            return True
        first = trace.seen
    return False

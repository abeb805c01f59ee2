"""The two shapes in which adapters move through the program.

``Factors`` are the tensors of one adapted layer, by the paper's letter:
LoRA ``{"A": (rank, in), "B": (out, rank)}``, Fed-SB ``{"B", "R": (rank, rank), "A"}``;
the classification head is one more entry ``{"weight": (classes, in), "bias": (classes,)}``.
``AdapterState`` maps layer names (as in the base model's ``named_modules()``) to factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias, TypeVar

if TYPE_CHECKING:
    from torch import Tensor


T = TypeVar("T")
Place = tuple[str, str, str]
"""Where a tensor of a task is: the task's part, layer and factor."""
STATE, BASIS = "state", "basis"
"""The parts of a task that have tensors."""
Factors: TypeAlias = "dict[str, Tensor]"
AdapterState: TypeAlias = dict[str, Factors]

HEAD = "head"
"""Name of the classification head inside an AdapterState."""
METRIC = "metric"
"""Name of the public map of the head's features inside an AdapterState: ``{"centre": (in,), "map": (in, in)}``."""
OWN = (HEAD, METRIC)
"""What of an AdapterState is no adapted layer."""


def of_head(state: Mapping[str, T]) -> dict[str, T]:
    """Return what of ``state`` is the head's own, or its features'."""
    return {layer: factors for layer, factors in state.items() if layer in OWN}


def below_head(state: Mapping[str, T]) -> dict[str, T]:
    """Return what of ``state`` is of adapted layers."""
    return {layer: factors for layer, factors in state.items() if layer not in OWN}

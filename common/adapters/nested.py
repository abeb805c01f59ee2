"""A rank for each record: it passes through the first columns of B alone, and trains no other.

DyLoRA (Valipour et al. 2023, arXiv 2210.07558) draws one rank a step, and its released scripts then train the last
column alone. A private run has few steps, so that it would see few ranks, and would pay a whole step for one column.
Here each record has a rank of its own in every pass, the same in all layers. Its gradient is then zero beyond its rank,
and is clipped as any.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from common.adapters.base import ADAPTER_NAME, Adapter

DEPTH = "depth"
"""Name of the records' ranks among the tensors of a batch: int64, shape (rows,), each at least 1."""


class Depths:
    """The ranks of the records that pass now; None: all have the whole."""

    def __init__(self) -> None:
        self.now: Tensor | None = None

    def masked(self, module: nn.Module, given: tuple[Any, ...]) -> tuple[Tensor] | None:
        """Return ``A x``, shape (rows, ..., rank), with zeros beyond each row's rank: a hook before B."""
        del module
        if self.now is None:
            return None
        (projected,) = given
        kept = torch.arange(projected.shape[-1], device=projected.device) < self.now[:, None]
        return (projected * kept.view(len(kept), *[1] * (projected.dim() - 2), -1).to(projected.dtype),)

    @contextmanager
    def of(self, ranks: Tensor | None) -> Iterator[None]:
        """Let records of these ranks pass."""
        before, self.now = self.now, ranks
        try:
            yield
        finally:
            self.now = before


@contextmanager
def nested_ranks(adapter: Adapter, model: nn.Module) -> Iterator[Depths]:
    """Put the ranks of records in front of every layer's B, and take them away again."""
    depths = Depths()
    hooks = [
        layer.lora_B[ADAPTER_NAME].register_forward_pre_hook(depths.masked) for layer in adapter.layers(model).values()
    ]
    try:
        yield depths
    finally:
        for hook in hooks:
            hook.remove()

"""The k of r directions that answer an input most: what FlyLoRA lets through between A and B.

The choice is made at every position of every record, from ``A x`` of that position and nothing else, inside the
record's own pass. So a record's gradient depends on that record alone and is clipped as any: nothing is released by
the choice, and the sensitivity is the clip. For a given input the output is linear in B, whatever is chosen.

A direction's score is its absolute answer. FlyLoRA's released code adds a bias that counts, over all records and
without noise, how often each direction was taken: a statistic of private records that no ε covers. It is left out;
rows of A of length 1 do what it is for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from common.adapters.base import ADAPTER_NAME, Adapter


class Routes:
    """A hook before B that keeps the ``active`` largest answers of each position, and puts 0 in place of the others.

    >>> Routes(1).largest(torch.tensor([[0.5, -2.0, 1.0]]))
    tensor([[ 0., -2.,  0.]])
    """

    def __init__(self, active: int) -> None:
        self.active = active

    def largest(self, projected: Tensor) -> Tensor:
        """Return ``A x``, shape (rows, ..., rank), with zeros but for the largest in absolute value."""
        kept = projected.detach().abs().topk(self.active, dim=-1).indices
        return projected * torch.zeros_like(projected).scatter(-1, kept, 1.0)

    def before(self, module: nn.Module, given: tuple[Any, ...]) -> tuple[Tensor]:
        """Return what B takes."""
        del module
        (projected,) = given
        return (self.largest(projected),)


@contextmanager
def routed_directions(adapter: Adapter, model: nn.Module, active: int) -> Iterator[None]:
    """Let each position through its ``active`` directions in every layer, and all of them again afterwards."""
    routes = Routes(active)
    hooks = [
        layer.lora_B[ADAPTER_NAME].register_forward_pre_hook(routes.before) for layer in adapter.layers(model).values()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

"""A or B as two linear maps while columns of it are trained: those that are, and those that rest.

Each gets its slice of the factor's inputs, and the first alone requires a gradient. So per-record gradients, the clip
and the noise cover the trained columns and nothing else, by Opacus' own hooks, and the forward pass is that of the
whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from fedveil.common.adapters.base import Adapter, parameters_of
from fedveil.common.adapters.layers import ADAPTER_NAME, layers_of
from fedveil.common.errors import ModelError
from fedveil.common.messages.columns import Chosen


class SplitColumns(nn.Module):
    """A linear map whose chosen columns, at least one, are a parameter of their own."""

    def __init__(self, whole: nn.Linear, columns: Tensor) -> None:
        super().__init__()
        device, mask = whole.weight.device, torch.zeros(whole.in_features, dtype=torch.bool)
        mask[columns] = True
        self.columns, self.others = mask.nonzero()[:, 0].to(device), (~mask).nonzero()[:, 0].to(device)
        self.moving = _linear(whole.weight.detach()[:, self.columns], trained=True)
        resting = whole.weight.detach()[:, self.others]
        self.resting = _linear(resting, trained=False) if len(self.others) else None

    @property
    def weight(self) -> nn.Parameter:
        """The trained columns, shape (outputs, columns)."""
        return cast(nn.Parameter, self.moving.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return what the whole map makes of inputs of shape (..., columns of the whole)."""
        moved: Tensor = self.moving(inputs.index_select(-1, self.columns))
        if self.resting is None:
            return moved
        return moved + cast(Tensor, self.resting(inputs.index_select(-1, self.others)))


def _linear(weight: Tensor, *, trained: bool) -> nn.Linear:
    out, into = weight.shape
    linear = nn.Linear(into, out, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone(), requires_grad=trained)
    return linear


def _linear_map(adapter: Adapter, maps: nn.ModuleDict, name: str, parameter: nn.Parameter) -> nn.Linear:
    """Return the linear map that has a factor as its weight."""
    whole = dict(maps.items()).get(ADAPTER_NAME)
    if not isinstance(whole, nn.Linear) or whole.weight is not parameter:
        raise ModelError(f"the adapter {adapter.name!r} trains {name} whole or not at all: choose 'lora'")
    return whole


@contextmanager
def split_columns(adapter: Adapter, model: nn.Module, chosen: Chosen) -> Iterator[None]:
    """Let the chosen columns of every layer, and no other number of the adapter, take a gradient.

    Afterwards every factor is whole again, with what was trained in its place.

    Raises:
        ModelError: a factor of which a part is chosen is no linear map of the adapter.
    """
    wholes: list[tuple[nn.ModuleDict, nn.Linear]] = []
    resting: list[nn.Parameter] = []
    layers = layers_of(model)
    trained = [
        (layer, name, parameter)
        for layer, factors in parameters_of(adapter, model).items()
        for name, parameter in factors.items()
        if parameter.requires_grad
    ]
    try:
        for layer, name, parameter in trained:
            columns = chosen[layer].get(name, torch.zeros(0, dtype=torch.int64))
            if not len(columns):
                parameter.requires_grad_(False)
                resting.append(parameter)
            elif len(columns) < parameter.shape[-1]:
                maps = {"A": layers[layer].lora_A, "B": layers[layer].lora_B}[name]
                wholes.append((maps, _linear_map(adapter, maps, name, parameter)))
                maps[ADAPTER_NAME] = SplitColumns(wholes[-1][1], columns)
        yield
    finally:
        for maps, whole in wholes:
            split = cast(SplitColumns, maps[ADAPTER_NAME])
            with torch.no_grad():
                whole.weight[:, split.columns] = split.weight
            maps[ADAPTER_NAME] = whole
        for parameter in resting:
            parameter.requires_grad_(True)

"""Averaging: the new model is the weighted mean of what the sites trained.

The server needs the mean alone, never one site's contribution. The weights are averaged exactly
where they are linear in what is trained: ``L(sum p_k x_k) = sum p_k L(x_k)``. So they are where a round trains one of
two factors, or columns of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, final

from fedveil.common.config.run import RunConfig
from fedveil.common.later import torch
from fedveil.common.messages.columns import widened
from fedveil.common.messages.state import AdapterState, Factors
from fedveil.common.messages.tensors import merge
from fedveil.strategies.base import Strategy, mean
from fedveil.strategies.state import Contribution, ServerState

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Average(Strategy):
    """The server averages what sites train, whatever the adapter."""

    def check(self, config: RunConfig) -> None:
        """Accept every mechanism: ``combine`` passes on the mean alone."""

    @final
    def combine(self, state: ServerState, contributions: Sequence[Contribution]) -> ServerState:
        """Return ``update`` of the mean, from which nothing else of a contribution can be read."""
        return self.update(state, mean(contributions))

    def update(self, state: ServerState, mean: AdapterState) -> ServerState:
        """Server: return the state with the mean in place of what was trained, one round on.

        Where ``trained_columns`` chooses, the mean has the chosen columns alone, and all others stay as they are, to
        the bit, as inactive ones: the server's step leaves them too.
        """
        number, active = state.round_number + 1, AdapterState()
        if (chosen := self.trained_columns(self.downlink(state), number, 0)) is not None:
            active = {layer: _shares(state, layer, factors) for layer, factors in chosen.items()}
            mean = widened(mean, state.adapter, {layer: chosen[layer] for layer in chosen if layer in mean})
        return replace(state, round_number=number, adapter=merge(state.adapter, mean), active=active)


def _shares(state: ServerState, layer: str, chosen: Mapping[str, Tensor]) -> Factors:
    """Return 1 of each column that all sites train, and 0 of the others, of every factor of a layer that is trained."""
    widths = {name: t.shape[-1] for name, t in state.adapter[layer].items() if state.trains(layer, name)}
    nothing = torch.zeros(0, dtype=torch.int64)
    return {
        name: torch.zeros(width, dtype=torch.float64).index_fill(0, chosen.get(name, nothing), 1.0)
        for name, width in widths.items()
    }

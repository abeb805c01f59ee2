"""Averaging: the new model is the weighted mean of what the sites trained.

The server needs the mean alone, never one site's contribution. The weights are averaged exactly
where they are linear in what is trained: ``L(sum p_k x_k) = sum p_k L(x_k)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

from fedveil.common.config.run import RunConfig
from fedveil.common.messages.state import AdapterState
from fedveil.common.messages.tensors import merge
from fedveil.strategies.base import Strategy, mean
from fedveil.strategies.state import Contribution, ServerState


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
        """Server: return the state with the mean in place of what was trained, one round on."""
        return replace(state, round_number=state.round_number + 1, adapter=merge(state.adapter, mean))

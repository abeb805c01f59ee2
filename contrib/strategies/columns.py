"""Training by columns: one frozen A, one scale, and a public rule of which columns of B a site trains in a round.

The forward pass has all of B always, so a site's gradient is that of the global model, restricted to its columns; the
clip, the noise and what travels cover these and nothing else. The server adds increments, ``B_i ← B_i + Σ p_k ΔB_k,i``
over the sites k that train column i. That is exactly the mean of the sites' weights, whatever each of them trains,
since a column that a site does not train is as all received it.

Neither padded states (a column would shrink by ``Σ p_k`` of its sites every round) nor columns averaged among their
own sites alone (high columns would move as fast as low ones, on the noise of few) are that mean.

A choice of the server follows from what was sent, which is noised: it costs no privacy. It travels as ``S``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedveil.common.messages.columns import FACTOR, Chosen, positions_of, widened
from fedveil.common.messages.state import OWN, AdapterState
from fedveil.common.messages.tensors import merge, select
from fedveil.strategies.base import Strategy, Takes, mean
from fedveil.strategies.state import Contribution, ServerState

MASK = "S"
"""Which columns are trained in a layer, as the server sends it: shape (rank,), 1 where one is and else 0."""


@dataclass(frozen=True)
class Columns(Strategy):
    """Sites train columns of B; the server adds the mean of their increments to it."""

    adapters: ClassVar[Takes] = Takes("lora-frozen-a", trains=(FACTOR,), freezes=("A",), others=False)

    def downlink(self, state: ServerState) -> AdapterState:
        """Return all of B, the masks if the server makes them, and the head."""
        return merge(super().downlink(state), select(state.memory, (MASK,)))

    def install(self, start: AdapterState, received: AdapterState) -> AdapterState:
        """Return the start with B and the head as received."""
        rest = {layer: {n: t for n, t in factors.items() if n != MASK} for layer, factors in received.items()}
        return merge(start, rest)

    def trained_columns(self, received: AdapterState, round_number: int, rank: int) -> Chosen:
        """Return the columns that the masks have, all where there is no mask.

        Raises:
            ProtocolError: a mask has another number than 0 and 1.
        """
        del round_number, rank
        return {
            layer: {FACTOR: positions_of(factors.get(MASK, torch.ones(factors[FACTOR].shape[1])), layer)}
            for layer, factors in received.items()
            if layer not in OWN
        }

    def combine(self, state: ServerState, contributions: Sequence[Contribution]) -> ServerState:
        """Return B with the mean of the increments added; what no site trains stays as it is, bit for bit."""
        received = self.downlink(state)
        number = state.round_number + 1
        chosen = [self.trained_columns(received, number, one.rank) for one in contributions]
        whole = [
            replace(one, state=widened(one.state, state.adapter, columns))
            for one, columns in zip(contributions, chosen, strict=True)
        ]
        averaged = mean(whole)
        active = shares_of_columns(chosen, [one.weight for one in contributions], state.adapter)
        for layer, shares in active.items():
            old = state.adapter[layer][FACTOR]
            averaged[layer][FACTOR] = torch.where(shares[FACTOR] > 0, averaged[layer][FACTOR], old)
        adapter = merge(state.adapter, averaged)
        return replace(state, round_number=state.round_number + 1, adapter=adapter, active=active)


def shares_of_columns(chosen: Sequence[Chosen], weights: Sequence[float], whole: AdapterState) -> AdapterState:
    """Return, by layer and factor, the part of all weight that the sites have which train a column, float64.

    0 where no site does, and exactly 1 where all do.
    """
    total, by_layer = math.fsum(weights), dict[str, dict[str, torch.Tensor]]()
    places = dict.fromkeys((place, name) for choice in chosen for place, factors in choice.items() for name in factors)
    for layer, name in places:
        columns = [set(choice[layer][name].tolist()) for choice in chosen]
        shares = [
            math.fsum(weight for weight, trained in zip(weights, columns, strict=True) if i in trained) / total
            for i in range(whole[layer][name].shape[-1])
        ]
        by_layer.setdefault(layer, {})[name] = torch.tensor(shares, dtype=torch.float64)
    return by_layer

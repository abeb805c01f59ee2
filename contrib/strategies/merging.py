"""Averages of both factors that are exact, because what the averaged factors miss goes beside the base weights.

With shares p_k, ``Σ p_k B_k A_k = B̄ Ā + E`` and E the covariance of the sites' factors, of rank at most r (K - 1). E
is added to D of the adapter ``lora-merged``, so that the new weights are the mean of the sites' weights. The server
needs what each site sent: nothing of this can be had from a sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from fedveil.common.messages.state import OWN, AdapterState
from fedveil.common.messages.tensors import merge, select
from fedveil.strategies.base import Strategy, Takes, mean
from fedveil.strategies.state import Contribution, ServerState


@dataclass(frozen=True)
class Merging(Strategy):
    """Sites train A and B; the server averages both, and puts what their product misses into D."""

    adapters: ClassVar[Takes] = Takes("lora-merged", trains=("A", "B"), freezes=("D",))

    def basis(self, state: ServerState) -> AdapterState:
        """Return nothing: D begins at 0 everywhere, and travels in every round."""
        del state
        return {}

    def downlink(self, state: ServerState) -> AdapterState:
        """Return A, B and D of every layer, and the head."""
        return merge(super().downlink(state), select(state.adapter, ("D",)))

    def combine(self, state: ServerState, contributions: Sequence[Contribution]) -> ServerState:
        """Return the averaged factors, and D with the sites' covariance added."""
        averaged = mean(contributions)
        total = sum(contribution.weight for contribution in contributions)
        missed = {
            layer: {"D": _covariance(layer, averaged, contributions, total).add_(state.adapter[layer]["D"].double())}
            for layer in averaged
            if layer not in OWN
        }
        merged = {layer: {"D": f["D"].to(state.adapter[layer]["D"].dtype)} for layer, f in missed.items()}
        adapter = merge(merge(state.adapter, averaged), merged)
        return replace(state, round_number=state.round_number + 1, adapter=adapter)


def _covariance(layer: str, averaged: AdapterState, contributions: Sequence[Contribution], total: float) -> Tensor:
    """Return Σ p_k (B_k - B̄)(A_k - Ā) of one layer, shape (out, in), float64."""
    A, B = averaged[layer]["A"].double(), averaged[layer]["B"].double()
    found = B.new_zeros(len(B), A.shape[1])
    for one in contributions:
        apart = one.state[layer]["B"].double() - B, one.state[layer]["A"].double() - A
        found.addmm_(apart[0], apart[1], alpha=one.weight / total)
    return found

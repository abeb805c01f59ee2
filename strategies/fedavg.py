"""FedAvg-LoRA (also FedIT, "FL + LoRA"): average both factors, A and B, and the head.

McMahan et al., AISTATS 2017, applied to LoRA's factors as by Zhang et al., ICASSP 2024 (FedIT).

Inexact: with p_k summing to 1,
``sum p_k B_k A_k - Bbar Abar = sum p_k (B_k - Bbar)(A_k - Abar)``,
which vanishes when all sites agree on one factor. Under DP noise both factors are noised, so the
weights also carry the product of two noises.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from common.tensors import merge
from strategies.base import Contribution, ServerState, Strategy, mean


@dataclass(frozen=True)
class FedAvgLoRA(Strategy):
    """Sites train A and B; the server averages each."""

    name: ClassVar[str] = "fedavg-lora"
    paper: ClassVar[str] = "McMahan et al. 2017; Zhang et al. 2024 (FedIT)"
    adapters: ClassVar[tuple[str, ...]] = ("lora",)
    sent: ClassVar[tuple[str, ...]] = ("A", "B")
    received: ClassVar[tuple[str, ...]] = ("A", "B")
    exact: ClassVar[bool] = False
    noise: ClassVar[str] = "s (B x_A + x_B A + x_B x_A): quadratic"

    def aggregate(self, state: ServerState, contributions: Sequence[Contribution]) -> ServerState:
        """Return A ← Σ p_k A_k, B ← Σ p_k B_k, head ← Σ p_k head_k."""
        adapter = merge(state.adapter, mean(contributions))
        return replace(state, round_number=state.round_number + 1, adapter=adapter)

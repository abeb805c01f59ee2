"""FFA-LoRA: A frozen at a shared start, sites train B, the server averages B.

Sun, Li, Li, Ding: Improving LoRA in Privacy-preserving Federated Learning, ICLR 2024.

Exact: ``s (sum p_k B_k) A = sum p_k s B_k A``. A never travels; every party derives it from the
run's seed and checks a fingerprint. Noise on B enters the weights linearly. For SGD only
``eta s² A Aᵀ`` matters, so alpha and the scale of A are learning rates in disguise
(ALGORITHMS: 1.2); ``adapter.init = "orthonormal"`` is the control arm for FedSVD.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from common.tensors import merge
from strategies.base import Contribution, ServerState, Strategy, mean


@dataclass(frozen=True)
class FFALoRA(Strategy):
    """Sites train B under one frozen A; the server averages B."""

    name: ClassVar[str] = "ffa-lora"
    paper: ClassVar[str] = "Sun et al. 2024"
    adapters: ClassVar[tuple[str, ...]] = ("ffa-lora",)
    sent: ClassVar[tuple[str, ...]] = ("B",)
    received: ClassVar[tuple[str, ...]] = ("B",)
    exact: ClassVar[bool] = True
    noise: ClassVar[str] = "s x_B A: norm s σC/b √m ‖A‖"

    def aggregate(self, state: ServerState, contributions: Sequence[Contribution]) -> ServerState:
        """Return B ← Σ p_k B_k, head ← Σ p_k head_k; A stays bit for bit."""
        adapter = merge(state.adapter, mean(contributions))
        return replace(state, round_number=state.round_number + 1, adapter=adapter)

"""FlexLoRA by increments: sites of unlike ranks, each on the most important directions of what was learnt so far.

Bai et al.: FlexLoRA, NeurIPS 2024. There the server forms ``D = Σ p_k s_k B_k A_k`` and sends site k the best product
of rank r_k by a singular value decomposition. What is cut on the way down is lost in the next average: singular values
beyond r_k decay by the share of the sites that have them, round by round, whatever the records say.

Here the server holds ``B A`` whole and re-factorises it after each round as FedSVD does: ``U S Vᵀ = svd(B A)``,
``B ← U S``, ``A ← Vᵀ``. So the first r_k columns of B are those of the r_k largest singular values, and a site that has
declared r_k trains these, under all of B: ``A_k = Q_k A`` with Q_k the top r_k right singular rows of B. Increments are
averaged (``columns`` here), ``B + Σ p_k ΔB_k Q_k``: exact, and nothing is forgotten. Where all ranks are the
run's it is FedSVD.

B and the r × r matrix M with ``A = M A₀`` travel down. The re-factorisation sees noised factors alone, and is free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedveil.common.messages.state import AdapterState
from fedveil.contrib.strategies.heterogeneous_ranks import HeterogeneousRanks
from fedveil.strategies.base import Facts
from fedveil.strategies.fed_svd import FedSVD
from fedveil.strategies.state import ServerState

TURNED = FedSVD()
"""What re-factorises, after every round."""


@dataclass(frozen=True)
class FlexLoRA(HeterogeneousRanks):
    """Sites train the columns of B with the largest singular values, as many as each declares."""

    name: ClassVar[str] = "flexlora"
    facts: ClassVar[Facts] = Facts(
        "Bai et al. 2024 (FlexLoRA), by increments",
        noise="s x_B A on r_k columns, A orthonormal after round 1: norm s σC/b √(m r_k)",
        exact="linear",
        moves_frozen=True,
    )

    def start(self, adapter: AdapterState, trained: tuple[str, ...]) -> ServerState:
        """Return A₀ and B₀ with M = I in every layer."""
        return TURNED.start(adapter, trained)

    def basis(self, state: ServerState) -> AdapterState:
        """Return A₀, which every site rebuilds A from."""
        return TURNED.basis(state)

    def downlink(self, state: ServerState) -> AdapterState:
        """Return B and M of every layer, and the head."""
        return TURNED.downlink(state)

    def install(self, start: AdapterState, received: AdapterState) -> AdapterState:
        """Return A = M A₀ and the received B and head."""
        return TURNED.install(start, received)

    def settle(self, state: ServerState) -> ServerState:
        """Return the state re-factorised, its columns in descending order; moments of the layers are reset."""
        return TURNED.settle(state)

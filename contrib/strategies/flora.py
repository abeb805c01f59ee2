"""FLoRA: the sites' products are stacked, merged into the base, and every round begins from new factors.

Wang et al.: FLoRA, NeurIPS 2024. With B = [B_1 .. B_K] and A = [p_1 A_1; ..; p_K A_K], the shares on one factor only,
``B A = Σ p_k B_k A_k``: exact. It is merged, B begins at 0 again and A in a fresh draw. What differs here, and why:

* The product goes into D of the adapter ``lora-merged``, and not into the base weights, as in ``fedex-lora``.
* A is drawn by the round and the layer from a public stream, as long as it was at the start. In a round of one step,
  the default under privacy, only B moves, because its 0 hides A: sites then train B under one A a round.
* All sites have one rank. Sites of unlike ranks need a frozen A whose rows are nested, under which stacking is a plain
  average.

Moments of the server's optimiser are reset with the factors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedveil.common.messages.state import OWN, AdapterState
from fedveil.common.messages.tensors import merge
from fedveil.contrib.strategies.merging import Merging
from fedveil.privacy.randomness import stream
from fedveil.strategies.base import Facts
from fedveil.strategies.state import ServerState


@dataclass(frozen=True)
class FLoRA(Merging):
    """Sites train A and B; the server merges the sum of their products and draws new factors."""

    name: ClassVar[str] = "flora"
    facts: ClassVar[Facts] = Facts(
        "Wang et al. 2024 (FLoRA)",
        noise="s (x_B A + Σ p_k x_Bk x_Ak), B = 0 in every round: quadratic",
        exact="always",
        moves_frozen=True,
    )

    def settle(self, state: ServerState) -> ServerState:
        """Return the same model with B = 0, a new A, and their product in D."""
        begun: AdapterState = {}
        for layer, factors in state.adapter.items():
            if layer in OWN:
                continue
            A, B, D = (factors[name].double() for name in ("A", "B", "D"))
            drawn = torch.randn(A.shape, generator=stream(0, "flora", layer, str(state.round_number)), dtype=A.dtype)
            merged = {"A": drawn * (A.norm() / drawn.norm()), "B": 0 * B, "D": torch.addmm(D, B, A)}
            begun[layer] = {name: merged[name].to(factors[name].dtype) for name in merged}
        return replace(state, adapter=merge(state.adapter, begun), optimizer=state.optimizer.without(begun))

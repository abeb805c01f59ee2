"""HetLoRA's aggregation, as a control arm: padded states, weighed by the length of each site's product.

Cho et al.: Heterogeneous LoRA for federated fine-tuning of on-device foundation models, EMNLP 2024. Sites of unlike
ranks pad their factors with zeros, the server averages those with weights p_k ∝ ‖B_k A_k‖, and truncates on the way
down.

* Padding forgets: with P_i the weight of the sites that train column i, it leaves ``P_i B_i + Σ p_k ΔB_k,i``, so that a
  column shrinks by P_i every round without any update. The average is not the mean of the sites' weights.
* Weights by length follow the noise: of two sites with equal signal, the one with four times the noise gets 0.79 of the
  average, where its variance would give it 0.06. A run that protects its records refuses it.

Here A is frozen and shared, and sites run the whole model, as in ``heterogeneous-ranks``: what is compared is the rule
of aggregation and nothing else. The self-pruning of ranks at sites is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedveil.common.config.run import RunConfig
from fedveil.common.errors import ConfigError
from fedveil.common.messages.columns import FACTOR, widened
from fedveil.common.messages.state import OWN, AdapterState
from fedveil.common.messages.tensors import apply, merge
from fedveil.contrib.strategies.heterogeneous_ranks import HeterogeneousRanks
from fedveil.strategies.base import Facts, mean
from fedveil.strategies.state import Contribution, ServerState


@dataclass(frozen=True)
class HetLoRA(HeterogeneousRanks):
    """Sites train the first columns of B; the server averages padded states by the length of their products."""

    name: ClassVar[str] = "hetlora"
    facts: ClassVar[Facts] = Facts("Cho et al. 2024 (HetLoRA)")

    def check(self, config: RunConfig) -> None:
        """Raise ConfigError under a mechanism that protects records."""
        super().check(config)
        mechanism = config.privacy.mechanism
        if mechanism.claims:
            raise ConfigError(
                "strategy 'hetlora' weighs sites by the length of what they send, which under noise is the noise's: "
                f"with privacy.mode {mechanism.name!r} the noisiest would count most; choose 'heterogeneous-ranks' or "
                "'flexlora'"
            )

    def combine(self, state: ServerState, contributions: Sequence[Contribution]) -> ServerState:
        """Return the average of padded states, weighed by their products' lengths; by sizes while all are 0."""
        nothing = apply(torch.zeros_like, state.adapter)
        received = self.downlink(state)
        number = state.round_number + 1
        chosen = [self.trained_columns(received, number, one.rank) for one in contributions]
        padded = [
            replace(one, state=widened(one.state, nothing, columns))
            for one, columns in zip(contributions, chosen, strict=True)
        ]
        lengths = [_length(one.state, state.adapter) for one in padded]
        if all(lengths):
            padded = [replace(one, weight=length) for one, length in zip(padded, lengths, strict=True)]
        return replace(state, round_number=state.round_number + 1, adapter=merge(state.adapter, mean(padded)))


def _length(sent: AdapterState, whole: AdapterState) -> float:
    """Return ‖B_k A‖ over all layers, by B's product with A Aᵀ: nothing as large as a weight is formed."""
    total = 0.0
    for layer, factors in sent.items():
        if layer not in OWN:
            B, A = factors[FACTOR].double(), whole[layer]["A"].double()
            total += float(((B @ (A @ A.T)) * B).sum())
    return max(total, 0.0) ** 0.5

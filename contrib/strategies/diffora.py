"""DiffoRA: all layers are trained for a round or two, and those that learn are trained on.

Jiang et al.: DiffoRA: Enabling Parameter-Efficient LLM Fine-Tuning via Differential Low-Rank Matrix Adaptation, 2025
(arXiv 2502.08905), from its abstract. The paper relaxes a gate for every layer, trains gates on validation records and
factors on training records, and keeps the layers of the largest gates. What differs, and why:

* A private validation set is private, so both halves would be paid for. Here the choice is by the cross-site energy of
  the last round before it (``contrib.strategies.by_energy``), which costs nothing and has a threshold.
* A gate and a B that are both trained have no exact average. Here B alone is trained.

The B of a layer that is dropped goes back to 0: what it has learned by then may be noise alone. That step changes
the model; every other round is exactly the mean of the sites' weights. Afterwards the clip is spent on layers that
learn, and noise and bytes are those of the layers that are kept. Where noise explains all, every layer goes on, and
the next round chooses again. The exported adapter has the kept layers alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch

from fedveil.common.check import POSITIVE
from fedveil.common.config.fields import Unit
from fedveil.common.messages.columns import FACTOR
from fedveil.common.messages.state import AdapterState
from fedveil.common.messages.tensors import merge
from fedveil.contrib.strategies.by_energy import ByEnergy
from fedveil.contrib.strategies.columns import MASK
from fedveil.strategies.base import Facts
from fedveil.strategies.state import ServerState


@dataclass(frozen=True)
class DiffoRA(ByEnergy):
    """Sites train B in every layer at first, and then in the layers that the server keeps."""

    name: ClassVar[str] = "diffora"
    facts: ClassVar[Facts] = Facts(
        "Jiang et al. 2025",
        noise="s x_B A in kept layers: norm s σC/b √m ‖A‖",
        exact="linear",
    )

    warmup: Annotated[int, POSITIVE, Unit("rounds")] = 1
    """Rounds in which every layer is trained, before some are dropped."""

    def begin_with(self, rank: int) -> int:
        """Return all."""
        return rank

    def choose(self, state: ServerState, scores: dict[str, float]) -> ServerState:
        """Return the state in which layers that do not learn rest at 0, once, when it is due and some do learn."""
        chosen = not all(bool(own[MASK].all()) for own in state.memory.values())
        dropped = [layer for layer, score in scores.items() if not score > 0]
        if chosen or state.round_number < self.warmup or len(dropped) == len(scores):
            return state
        masks: AdapterState = {layer: {MASK: torch.zeros_like(state.memory[layer][MASK])} for layer in dropped}
        zeros: AdapterState = {layer: {FACTOR: torch.zeros_like(state.adapter[layer][FACTOR])} for layer in dropped}
        return replace(
            state,
            adapter=merge(state.adapter, zeros),
            memory=merge(state.memory, masks),
            optimizer=state.optimizer.without(dropped),
        )

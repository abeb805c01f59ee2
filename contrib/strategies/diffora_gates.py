"""DiffoRA with its gates: factors and gates are trained in turn, and after some rounds the layers of small gates go.

Jiang et al.: DiffoRA, 2025 (arXiv 2502.08905), from its abstract: a gate for every layer relaxes the choice of layers,
gates and factors are trained by turns, and the layers of the largest gates are kept. B is trained in odd rounds and the
gates g in even ones, up to the round ``cut``; each average is exact, for the weights are linear in what a round trains.
The server keeps g within 0 and 1. After ``cut`` the share ``layers`` of the layers, those of the largest gates, is
trained on, B alone, from where it is; the B of the others goes back to 0, which changes the model once.

The paper trains gates on records held out for them: here sites have no such part, and both see all records, which
``contrib.strategies.diffora`` avoids by a choice from the sites' agreement. Gates are numbers that passed clip and
noise, so a choice by them costs nothing. Sites send B in one round, and one number a layer in the next.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from fedveil.common.check import POSITIVE, Interval
from fedveil.common.config.fields import RATIO, Unit
from fedveil.common.later import torch
from fedveil.common.messages.columns import Chosen, positions_of
from fedveil.common.messages.state import OWN, AdapterState
from fedveil.common.messages.tensors import merge, select
from fedveil.contrib.strategies.columns import MASK
from fedveil.contrib.strategies.turns import Turns
from fedveil.strategies.base import Facts, Takes
from fedveil.strategies.state import ServerState


@dataclass(frozen=True)
class DiffoRAGates(Turns):
    """Sites train B and the gates in turn; the server keeps the layers of the largest gates."""

    name: ClassVar[str] = "diffora-gates"
    facts: ClassVar[Facts] = Facts(
        "Jiang et al. 2025",
        noise="in turns s g x_B A: norm s g σC/b √m ‖A‖, and s x_g B A; of kept layers after the cut",
        exact="always",
    )
    adapters: ClassVar[Takes] = Takes("lora-gated", trains=("B", "g"), freezes=("A",), others=False)
    order: ClassVar[tuple[str, ...]] = ("B", "g")

    cut: Annotated[int, POSITIVE, Unit("rounds")] = 4
    """Rounds in which every layer and its gate are trained, before some are dropped."""
    layers: Annotated[float, Interval(0, 1), RATIO] = 0.5
    """Share of the layers that is trained on."""

    def turn(self, round_number: int) -> str:
        """Return B in odd rounds and behind the cut, g in even ones up to it."""
        return "B" if round_number > self.cut else super().turn(round_number)

    def start(self, adapter: AdapterState, trained: tuple[str, ...]) -> ServerState:
        """Return the state in which every layer is trained."""
        masks: AdapterState = {x: {MASK: torch.ones(1)} for x in adapter if x not in OWN}
        return ServerState(0, merge(adapter, _gates(adapter)), trained, masks)

    def downlink(self, state: ServerState) -> AdapterState:
        """Return B, g and whether it is trained on of every layer, and the head."""
        return merge(super().downlink(state), select(state.memory, (MASK,)))

    def install(self, start: AdapterState, received: AdapterState) -> AdapterState:
        """Return the start with what was received."""
        return merge(start, {x: {n: t for n, t in held.items() if n != MASK} for x, held in received.items()})

    def trained_columns(self, received: AdapterState, round_number: int, rank: int) -> Chosen:
        """Return all of the factor whose turn it is in layers that are trained on; ProtocolError: a mask is none."""
        name, below = self.turn(round_number), {x: held for x, held in received.items() if x not in OWN}
        kept = {x: len(positions_of(held.get(MASK, torch.ones(1)), x)) > 0 for x, held in below.items()}
        del rank
        return {x: {name: torch.arange(held[name].shape[-1] if kept[x] else 0)} for x, held in below.items()}

    def settle(self, state: ServerState) -> ServerState:
        """Return the state with every gate within 0 and 1; at the cut, without the layers of the smallest."""
        kept = _gates(state.adapter)
        gates = {x: factors["g"] for x, factors in kept.items()}
        state = replace(state, adapter=merge(state.adapter, kept))
        if state.round_number != self.cut:
            return state
        many = max(1, round(self.layers * len(gates)))
        dropped = sorted(gates, key=lambda x: (-float(gates[x]), x))[many:]
        zeros: AdapterState = {x: {"B": torch.zeros_like(state.adapter[x]["B"])} for x in dropped}
        masks: AdapterState = {x: {MASK: torch.zeros(1)} for x in dropped}
        return replace(
            state,
            adapter=merge(state.adapter, zeros),
            memory=merge(state.memory, masks),
            optimizer=state.optimizer.without(dropped),
        )


def _gates(adapter: AdapterState) -> AdapterState:
    """Return every layer's gate within 0 and 1."""
    return {x: {"g": factors["g"].clamp(0, 1)} for x, factors in adapter.items() if x not in OWN}

"""S2-LoRA in turns: the coefficients of every layer, then the shared P, then the shared Q.

The pair and its form are ``contrib.adapters.lora_shared``. z begins at 0, so its turn is the first: while it is 0 the
pair has no gradient. What makes z sparse is a soft threshold behind each of its turns, the proximal step of
``threshold · ‖z‖₁`` (the paper's penalty, whose weight was not to be read), at the server and on numbers that passed
clip and noise, so that it costs nothing. Behind Adam, which moves each entry by as much, it is no proximal step but
still zeroes what stays small.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from fedveil.common.check import NOT_NEGATIVE
from fedveil.common.config.fields import Unit
from fedveil.common.messages.state import OWN, AdapterState
from fedveil.common.messages.tensors import merge
from fedveil.contrib.rules.soft_threshold import entries_shrunk
from fedveil.contrib.strategies.turns import Turns
from fedveil.strategies.base import Facts, Takes
from fedveil.strategies.state import ServerState


@dataclass(frozen=True)
class S2LoRA(Turns):
    """Sites train z, A and B of ``lora-shared`` in turn; the server averages, and shrinks z behind its turn."""

    name: ClassVar[str] = "s2-lora"
    facts: ClassVar[Facts] = Facts(
        "S2-LoRA",
        noise="in turns s B diag(x_z) A: norm s σC/b √r; s B diag(z) x_A and s x_B diag(z) A",
        exact="always",
    )
    adapters: ClassVar[Takes] = Takes("lora-shared", trains=("z", "A", "B"), others=False)
    order: ClassVar[tuple[str, ...]] = ("z", "A", "B")

    threshold: Annotated[float, NOT_NEGATIVE, Unit("of z")] = 0.0
    """By how much every entry of z shrinks behind each of its turns; what is smaller becomes 0."""

    def settle(self, state: ServerState) -> ServerState:
        """Return the state with z behind the threshold, if it was trained."""
        if not self.threshold or self.turn(state.round_number) != "z":
            return state
        shrunk: AdapterState = {
            layer: {"z": entries_shrunk(factors["z"].double(), self.threshold).to(factors["z"].dtype)}
            for layer, factors in state.adapter.items()
            if layer not in OWN
        }
        return replace(state, adapter=merge(state.adapter, shrunk))

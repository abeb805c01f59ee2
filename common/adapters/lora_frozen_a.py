"""LoRA with a frozen A: W = W0 + s B A with A at a shared start; only B is trained.

The parameterisation of FFA-LoRA (Sun, Li, Li, Ding: Improving LoRA in Privacy-preserving Federated
Learning, ICLR 2024) and of FedSVD, whose server moves A. With A the same everywhere the mean of the
products is the product of the mean, and noise on B enters the weights linearly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from common.adapters.lora import LoRA
from common.messages.state import OWN, AdapterState


@dataclass(frozen=True)
class LoRAFrozenA(LoRA):
    """Factors ``A`` (rank, in), frozen, and ``B`` (out, rank), trained."""

    name: ClassVar[str] = "lora-frozen-a"
    trained: ClassVar[tuple[str, ...]] = ("B",)
    frozen: ClassVar[tuple[str, ...]] = ("A",)
    linear: ClassVar[bool] = True
    free_scale: ClassVar[bool] = True
    noise: ClassVar[str] = "s x_B A: norm s σC/b √m ‖A‖"

    def first(self, state: AdapterState, rank: int) -> AdapterState:
        """Return the first rows of A and columns of B: what ``at_rank`` exports."""
        return {
            layer: {"A": factors["A"][:rank].contiguous(), "B": factors["B"][:, :rank].contiguous()}
            for layer, factors in state.items()
            if layer not in OWN
        }

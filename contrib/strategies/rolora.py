"""RoLoRA: A and B take turns; in each round one of them is trained and averaged, and the other stays.

Chen et al.: RoLoRA (2024, arXiv 2409.02346). With the other factor the same everywhere the weights are linear in what
is trained, so that the average is exact in every round, and over two rounds both factors learn. A round sends one
factor, half of what FedAvg-LoRA sends. Under privacy clip and noise are of that factor alone: no product of two noises
enters.

Odd rounds train B, since B = 0 at the start hides A; even rounds train A. Whose turn it is follows from the round's
number alone, so that a resumed run and a late site know it. The resting factor stays bit for bit, and so do its
moments and its clock at the server's optimiser.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedveil.contrib.strategies.turns import Turns
from fedveil.strategies.base import Facts, Takes


@dataclass(frozen=True)
class RoLoRA(Turns):
    """Sites train B in odd rounds and A in even ones; the server averages what was trained."""

    name: ClassVar[str] = "rolora"
    facts: ClassVar[Facts] = Facts(
        "Chen et al. 2024 (RoLoRA)",
        noise="in turns s x_B A and s B x_A: norm s σC/b √m ‖A‖ and s σC/b √n ‖B‖",
        exact="always",
    )
    adapters: ClassVar[Takes] = Takes("lora", trains=("A", "B"))
    order: ClassVar[tuple[str, ...]] = ("B", "A")

"""LoRA with a frozen A: W = W0 + s B A with A at a shared start; only B is trained.

The parameterisation of FFA-LoRA (Sun, Li, Li, Ding: Improving LoRA in Privacy-preserving Federated
Learning, ICLR 2024) and of FedSVD, whose server moves A. With A the same everywhere the mean of the
products is the product of the mean, and noise on B enters the weights linearly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fedveil.common.adapters.lora import LoRA
from fedveil.common.messages.state import OWN, AdapterState, Factors

NEGLIGIBLE = 1e-6
"""Singular values of B below this share of the largest are float32's rounding."""


@dataclass(frozen=True)
class LoRAFrozenA(LoRA):
    """Factors ``A`` (rank, in), frozen, and ``B`` (out, rank), trained."""

    name: ClassVar[str] = "lora-frozen-a"
    trained: ClassVar[tuple[str, ...]] = ("B",)
    frozen: ClassVar[tuple[str, ...]] = ("A",)
    linear: ClassVar[bool] = True
    free_scale: ClassVar[tuple[str, ...]] = ("A",)
    noise: ClassVar[str] = "s x_B A: norm s σC/b √m ‖A‖"

    def seen(self, factors: Factors, gradient: Tensor) -> Factors:
        """Return G Aᵀ, shape (out, rank)."""
        return {"B": gradient @ factors["A"].T}

    def share_seen(self, out: int, into: int) -> float:
        """Return r / n."""
        del out
        return self.rank / into

    def reduced(self, state: AdapterState) -> AdapterState:
        """Return every B with as many columns that are not 0 as its rank: a server rule may have lowered that."""
        return {layer: factors if layer in OWN else in_own_basis(factors) for layer, factors in state.items()}

    def used(self, state: AdapterState) -> dict[str, Tensor]:
        """Return the columns of B that are not 0, of every layer, where some layer has others: such were never trained.

        Of a B that is 0 everywhere, as before round 1, all columns count.
        """
        used = {
            layer: factors["B"].ne(0).any(0).nonzero()[:, 0] for layer, factors in state.items() if layer not in OWN
        }
        some = any(len(columns) for columns in used.values())
        return used if some and any(len(c) < self.rank for c in used.values()) else {}

    def of_columns(self, factors: Factors, columns: Tensor) -> Factors:
        """Return the rows of A and columns of B."""
        return {"A": factors["A"][columns], "B": factors["B"][:, columns]}


def in_own_basis(factors: Factors) -> Factors:
    """Return the pair of the same product whose first columns of B are its singular vectors, and the others 0.

    A pair whose B has no more columns than its rank, but for columns of 0, comes back as it is.
    """
    A, B = factors["A"].double(), factors["B"].double()
    U, values, Vt = torch.linalg.svd(B, full_matrices=False)
    rank = int((values > NEGLIGIBLE * values[0]).sum())
    if rank >= int(B.ne(0).any(0).sum()):
        return factors
    rest = len(A) - rank
    made = {"A": F.pad(Vt[:rank] @ A, (0, 0, 0, rest)), "B": F.pad(U[:, :rank] * values[:rank], (0, rest))}
    return {name: made[name].to(factors[name].dtype) for name in factors}

"""LoRA with a frozen A: W = W0 + s B A with A at a shared start; only B is trained.

The parameterisation of FFA-LoRA (Sun, Li, Li, Ding: Improving LoRA in Privacy-preserving Federated
Learning, ICLR 2024) and of FedSVD, whose server moves A. With A the same everywhere the mean of the
products is the product of the mean, and noise on B enters the weights linearly.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from fedveil.common.adapters.base import FreeScale, Traits
from fedveil.common.adapters.export import write_stock
from fedveil.common.adapters.layers import base_weight, layers_of
from fedveil.common.adapters.lora import LoRA
from fedveil.common.later import F, torch
from fedveil.common.messages.state import OWN, AdapterState, Factors

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

NEGLIGIBLE = 1e-6
"""Singular values of B below this share of the largest are float32's rounding."""


@dataclass(frozen=True)
class LoRAFrozenA(LoRA):
    """Factors ``A`` (rank, in), frozen, and ``B`` (out, rank), trained."""

    name: ClassVar[str] = "lora-frozen-a"
    trained: ClassVar[tuple[str, ...]] = ("B",)
    frozen: ClassVar[tuple[str, ...]] = ("A",)
    traits: ClassVar[Traits] = Traits(
        linear=True,
        noise="s x_B A: norm s σC/b √m ‖A‖",
        free_scale=FreeScale(("A",), lambda factors, G: {"B": G @ factors["A"].T}, lambda rank, out, into: rank / into),
    )
    free_scale: ClassVar[tuple[str, ...]] = ("A",)

    def export(self, model: PeftModel, state: AdapterState, folder: Path, base_name: str) -> None:
        """Write the columns of B that were trained: as many as B's rank, which a server rule may have lowered.

        A layer whose B is 0 is left out, unless all are, as before round 1.
        """
        pairs = {layer: in_own_basis(factors) for layer, factors in state.items() if layer not in OWN}
        used = {layer: factors["B"].ne(0).any(0).nonzero()[:, 0] for layer, factors in pairs.items()}
        kept = {layer: columns for layer, columns in used.items() if len(columns)}
        ranks: dict[str, int] = {}
        if kept and any(len(columns) < self.rank for columns in used.values()):
            pairs = {layer: of_columns(pairs[layer], columns) for layer, columns in kept.items()}
            ranks = {layer: len(columns) for layer, columns in kept.items()}
        layers = {
            name: self.exported(pairs[name], base_weight(layer).float().cpu())
            for name, layer in layers_of(model).items()
            if name in pairs
        }
        write_stock(self, model, layers, folder, base_name, ranks=ranks)


def of_columns(factors: Factors, columns: Tensor) -> Factors:
    """Return these rows of A and columns of B."""
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

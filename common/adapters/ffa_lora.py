"""FFA-LoRA: W = W0 + s B A with A frozen at a shared start; only B is trained.

Sun, Li, Li, Ding: Improving LoRA in Privacy-preserving Federated Learning, ICLR 2024. With A the
same everywhere the mean of the products is the product of the mean, and noise on B enters the
weights linearly. FedSVD's sites train the same parameterisation under an A that the server moves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from common.adapters.lora import LoRA


@dataclass(frozen=True)
class FFALoRA(LoRA):
    """Factors ``A`` (rank, in), frozen, and ``B`` (out, rank), trained."""

    name: ClassVar[str] = "ffa-lora"
    trained: ClassVar[tuple[str, ...]] = ("B",)
    frozen: ClassVar[tuple[str, ...]] = ("A",)

"""LoRA with a frozen B: W = W0 + s B A with B at a shared start; only A is trained.

The other side of ``lora-frozen-a``: the outputs that a layer may change are fixed, the inputs that it listens to are
learnt. A label lives in one or two directions of a layer's outputs and in many of its inputs, so B can be narrow where
its columns are the right ones (the start ``public-metric`` takes them from public text). With B the same everywhere the
mean of the products is the product of the mean, and noise on A enters the weights linearly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedveil.common.adapters.base import FreeScale, Traits
from fedveil.common.adapters.lora import LoRA
from fedveil.common.messages.state import Factors


@dataclass(frozen=True)
class LoRAFrozenB(LoRA):
    """Factors ``A`` (rank, in), trained from 0, and ``B`` (out, rank), frozen."""

    name: ClassVar[str] = "lora-frozen-b"
    trained: ClassVar[tuple[str, ...]] = ("A",)
    frozen: ClassVar[tuple[str, ...]] = ("B",)
    traits: ClassVar[Traits] = Traits(
        linear=True,
        noise="s B x_A: norm s σC/b √n ‖B‖",
        free_scale=FreeScale(("B",), lambda factors, G: {"A": factors["B"].T @ G}, lambda rank, out, into: rank / out),
    )
    directions: ClassVar[tuple[str, ...]] = ("B",)

    def begin(self, given: Factors, factors: Factors) -> Factors:
        """Return B, and A with s B A = B R A of a start that moves the weights."""
        del factors
        moved = {"A": given["R"] @ given["A"] / self.scaling} if "R" in given else {}
        return {"B": given["B"], **moved}

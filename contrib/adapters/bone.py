"""Bone, block affine (later called bat): W_ij = W0_ij + (W0_ij + I) D_i, one trained square for each block of outputs.

Kang, Yin: Bone, 2024 (arXiv 2409.15371), whose first version this is; the same authors' MiSS, once Bone as well, is the
initialisation ``shards``. W0 is cut into b × b blocks. D begins at 0. The change is linear in D, so averages of D are
averages of weights, and it has full rank. The gradient of D_i is the sum over positions and blocks of inputs of
(W0_ijᵀ g_i + g_i) x_jᵀ, g being the upstream gradient. Noise on D enters the weights through every (W0_ij + I).

b is the largest number up to ``adapter.rank`` that divides inputs and outputs of a layer, so the paper's rank where
that does. ``adapter.alpha`` says nothing: the scale is 1, as in the paper. Stock PEFT loads it (``MissConfig``,
``init_weights = "bat"``) where all layers have one b and are linear; else it is exported as the LoRA pair of the whole
change.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedveil.common.adapters.base import Traits
from fedveil.common.adapters.export import write_stock
from fedveil.common.adapters.layers import base_weight, layer_shape, layers_of
from fedveil.common.adapters.lora import LoRA
from fedveil.common.adapters.mapped import Mapped
from fedveil.common.messages.state import AdapterState, Factors
from fedveil.contrib.adapters.lora_merged import pair_of

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


@dataclass(frozen=True)
class Bone(Mapped):
    """``D`` (blocks of outputs, b, b), trained from 0."""

    name: ClassVar[str] = "bone"
    trained: ClassVar[tuple[str, ...]] = ("D",)
    frozen: ClassVar[tuple[str, ...]] = ()
    traits: ClassVar[Traits] = Traits(
        linear=True,
        noise="(W0_ij + I) x_i in every block: norm σC/b √b ‖W0 + I in each block‖",
        scales=("rank",),
        free_scale="has no factor beside D",
    )
    uses_projected: ClassVar[bool] = False
    directions: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", float(self.rank))

    def block(self, out: int, into: int) -> int:
        """Return b of a layer: the largest divisor of inputs and outputs up to the rank."""
        both = math.gcd(out, into)
        return max(size for size in range(1, min(self.rank, both) + 1) if both % size == 0)

    def shapes(self, out: int, into: int) -> dict[str, tuple[int, ...]]:
        """Return that of D, (out / b, b, b)."""
        size = self.block(out, into)
        return {"D": (out // size, size, size)}

    def begin(self, given: Factors, factors: Factors) -> Factors:
        """Return nothing: D begins at 0."""
        del given, factors
        return {}

    def change(
        self, factors: Mapping[str, Tensor], inputs: Tensor, projected: Tensor, base_weight: Tensor, scale: float
    ) -> Tensor:
        """Return the change of the weight times x."""
        del projected
        D = factors["D"]
        size = D.shape[1]
        W = base_weight.to(D.dtype).unflatten(1, (-1, size)).unflatten(0, (-1, size))  # i, row, j, column
        moved = torch.einsum("iajb,ibc->iajc", W, D) + D[:, :, None]
        return F.linear(inputs.to(D.dtype), moved.flatten(2).flatten(0, 1)) * scale

    def gradients(
        self,
        factors: Mapping[str, Tensor],
        inputs: Tensor,
        projected: Tensor,
        upstream: Tensor,
        base_weight: Tensor,
        scale: float,
    ) -> dict[str, Tensor]:
        """Return s Σ (W0_ijᵀ g_i + g_i) x_jᵀ."""
        del projected
        size = factors["D"].shape[1]
        W = base_weight.to(upstream.dtype).unflatten(1, (-1, size)).unflatten(0, (-1, size))
        x, g = (t.reshape(len(t), -1, t.shape[-1] // size, size) for t in (inputs, upstream))
        through = torch.einsum("iajb,npia->npijb", W, g)
        whole = torch.einsum("npijb,npjc->nibc", through, x) + torch.einsum("npib,npc->nibc", g, x.sum(2))
        return {"D": whole * scale}

    def exported(self, factors: Mapping[str, Tensor], base_weight: Tensor) -> dict[str, Tensor]:
        """Return PEFT's blocks."""
        del base_weight
        return {"miss_block": factors["D"]}

    def export(self, model: PeftModel, state: AdapterState, folder: Path, base_name: str) -> None:
        """Write PEFT's own form where it has one, else a LoRA pair of the whole change, padded to the largest rank."""
        adapted = layers_of(model)
        sizes = {self.block(*layer_shape(layer)) for layer in adapted.values()}
        linear = all(isinstance(layer.get_base_layer(), nn.Linear) for layer in adapted.values())
        if sizes == {self.rank} and linear:
            write_stock(
                self, model, {name: self.exported(state[name], Tensor()) for name in adapted}, folder, base_name
            )
            return
        weights = {name: base_weight(layer).float().cpu() for name, layer in adapted.items()}
        pairs = {name: pair_of(self.delta(state[name], weight)) for name, weight in weights.items()}
        rank = max(len(pair["A"]) for pair in pairs.values())
        padded = {
            name: {
                "A": F.pad(pair["A"], (0, 0, 0, rank - len(pair["A"]))),
                "B": F.pad(pair["B"], (0, rank - len(pair["A"]))),
            }
            for name, pair in pairs.items()
        }
        LoRA(rank, float(rank), self.target_modules).export(model, padded, folder, base_name)

    def peft_config(self, *, fan_in_fan_out: bool = False) -> PeftConfig:
        """Return PEFT's MiSS of the kind bat."""
        del fan_in_fan_out
        from peft import MissConfig

        return MissConfig(r=self.rank, target_modules=list(self.target_modules), init_weights="bat", bias="none")

"""LoRA with a frozen A in which each record trains the first columns of B alone, as many as its rank: DyLoRA's layer.

DyLoRA (Valipour et al. 2023, arXiv 2210.07558) draws one rank a step, and its released scripts then train the last
column alone. A private run has few steps, so that it would see few ranks, and would pay a whole step for one column.
Here each record has a rank of its own, the same in all layers and in every pass: it follows from the record's own
inputs, as numbers, by a public hash. So its gradient depends on that record alone, whatever its place in a batch, is
zero beyond its rank, and is clipped as any. What is scored and exported has every column.

Every rank is exported from one run: the first b rows of A and columns of B, with alpha = s b, in ``ranks/b`` beside
the adapter's folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from fedveil.common.adapters.export import alpha_at
from fedveil.common.adapters.layers import ADAPTER_NAME, layers_of
from fedveil.common.adapters.lora_frozen_a import LoRAFrozenA, of_columns
from fedveil.common.adapters.low_rank import lora_modules
from fedveil.common.messages.state import OWN, AdapterState

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

MASK = "attention_mask"
STEP, MIX = 6364136223846793005, -7046029254386353131
"""Odd multipliers of a 64-bit hash: of one place more in a row, and of the sum over it."""


class Ranks:
    """The ranks of the records that pass now, int64, shape (rows,); None: every record has the whole."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.now: Tensor | None = None

    def read(self, model: nn.Module, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        """Note the ranks of what a model is given; a hook before its pass."""
        self.now = ranks_of(given, named, self.most) if model.training else None


class Nested(nn.Module):
    """In training, zeros beyond each record's rank."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self.ranks = ranks

    def forward(self, projected: Tensor) -> Tensor:
        """Return ``A x``, shape (rows, ..., rank), as far as each row's rank goes."""
        if not self.training or self.ranks.now is None:
            return projected
        inside = torch.arange(projected.shape[-1], device=projected.device) < self.ranks.now[:, None]
        return projected * inside.view(len(inside), *[1] * (projected.dim() - 2), -1).to(projected.dtype)


def ranks_of(given: tuple[Any, ...], named: Mapping[str, Any], most: int) -> Tensor:
    """Return a rank from 1 to ``most`` for each row of a model's inputs, by a hash of the row without its padding.

    Args:
        given, named: the inputs, of which the first tensor counts: tokens, shape (rows, length), or pixels. Padding is
            where ``attention_mask``, of its shape, is 0.
        most: the largest rank.

    Returns:
        int64, shape (rows,).
    """
    others = (value for name, value in named.items() if name != MASK)
    inputs = next(value for value in (*given, *others) if isinstance(value, Tensor))
    flat = inputs.flatten(1)
    numbers = flat.float().contiguous().view(torch.int32).long() if flat.is_floating_point() else flat.long() + 1
    mask = named.get(MASK)
    masked = isinstance(mask, Tensor) and mask.shape == inputs.shape
    real = cast(Tensor, mask).long() if masked else torch.ones_like(numbers)
    weights = torch.full((numbers.shape[1],), STEP, dtype=torch.int64, device=numbers.device).cumprod(0)
    places = (real.cumsum(1) - 1).clamp(min=0)  # among the row's own tokens, on whichever side it is padded
    sums = (numbers * real * weights[places]).sum(1)
    mixed = (sums ^ (sums >> 31)) * MIX
    return 1 + (mixed ^ (mixed >> 32)).remainder(most)


@dataclass(frozen=True)
class LoRANested(LoRAFrozenA):
    """Factors as in ``lora-frozen-a``; in training each record passes through the first columns, up to its rank."""

    name: ClassVar[str] = "lora-nested"

    def prepare(self, model: PeftModel) -> None:
        """Put the records' ranks in front of every B."""
        ranks = Ranks(self.rank)
        for layer in layers_of(model).values():
            B = lora_modules(layer)["B"]
            layer.lora_B[ADAPTER_NAME] = nn.Sequential(Nested(ranks), B).train(B.training)
        model.register_forward_pre_hook(ranks.read, with_kwargs=True)

    def factor_modules(self, layer: LoraLayer) -> dict[str, nn.Module]:
        """Return PEFT's A, and the B that ``prepare`` put behind the records' ranks."""
        return {"A": layer.lora_A[ADAPTER_NAME], "B": cast(nn.Sequential, layer.lora_B[ADAPTER_NAME])[1]}

    def export(self, model: PeftModel, state: AdapterState, folder: Path, base_name: str) -> None:
        """Write the adapter, and each smaller rank of it into ``ranks`` beside the folder."""
        super().export(model, state, folder, base_name)
        for rank in range(1, self.rank):
            first = {
                layer: of_columns(factors, torch.arange(rank)) for layer, factors in state.items() if layer not in OWN
            }
            cut = LoRAFrozenA(rank, alpha_at(self, rank), self.target_modules, scale=self.scale)
            cut.export(model, first, folder.parent / "ranks" / str(rank), base_name)

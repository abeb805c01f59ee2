"""LoRA with a frozen A in which a position trains the k of r directions that answer it most: FlyLoRA's layer.

The choice is made at every position of every record, from ``A x`` of that position and nothing else, inside the
record's own pass. So a record's gradient depends on that record alone and is clipped as any: nothing is released by
the choice, and the sensitivity is the clip. For a given input the output is linear in B, whatever is chosen.

A direction's score is its absolute answer, and k is a quarter of the rank, as the paper has it. What differs:

* FlyLoRA's released code adds a bias that counts, over all records and without noise, how often each direction was
  taken: a statistic of private records that no ε covers. It is left out; rows of A of length 1 do what it is for.
* A choice at every position is no change of a weight, so stock PEFT cannot load it. What is scored and exported passes
  through all directions, and a run's own scores say what that costs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import Tensor, nn

from fedveil.common.adapters.layers import ADAPTER_NAME, layers_of
from fedveil.common.adapters.lora_frozen_a import LoRAFrozenA
from fedveil.common.adapters.low_rank import lora_modules
from fedveil.common.errors import ConfigError

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

SHARE = 4
"""The rank over the directions that a position trains."""


class Routes(nn.Module):
    """In training, the ``active`` largest answers of each position, and 0 in place of the others; else all of them.

    >>> Routes(1)(torch.tensor([[0.5, -2.0, 1.0]]))
    tensor([[ 0., -2.,  0.]])
    """

    def __init__(self, active: int) -> None:
        super().__init__()
        self.active = active

    def largest(self, projected: Tensor) -> Tensor:
        """Return ``A x``, shape (rows, ..., rank), with zeros but for the largest in absolute value."""
        chosen = projected.detach().abs().topk(self.active, dim=-1).indices
        return projected * torch.zeros_like(projected).scatter(-1, chosen, 1.0)

    def forward(self, projected: Tensor) -> Tensor:
        """Return what B takes, of the shape of ``projected``."""
        return self.largest(projected) if self.training else projected


@dataclass(frozen=True)
class LoRARouted(LoRAFrozenA):
    """Factors as in ``lora-frozen-a``; in training each position passes through a quarter of the directions."""

    name: ClassVar[str] = "lora-routed"

    def __post_init__(self) -> None:
        if self.rank < 2:
            raise ConfigError(
                f"adapter.rank is {self.rank}, of which {self.name!r} chooses nothing: raise it, or set adapter.name "
                "to 'lora-frozen-a'"
            )

    def prepare(self, model: PeftModel) -> None:
        """Put the choice between PEFT's A and B."""
        for layer in layers_of(model).values():
            B = lora_modules(layer)["B"]
            layer.lora_B[ADAPTER_NAME] = nn.Sequential(Routes(max(1, self.rank // SHARE)), B).train(B.training)

    def factor_modules(self, layer: LoraLayer) -> dict[str, nn.Module]:
        """Return PEFT's A, and the B that ``prepare`` put behind the choice."""
        return {"A": layer.lora_A[ADAPTER_NAME], "B": cast(nn.Sequential, layer.lora_B[ADAPTER_NAME])[1]}

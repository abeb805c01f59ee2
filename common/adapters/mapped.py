"""The interface of an adapter with a map of its own, for what PEFT's layers do not compute with exact gradients.

A row states what it adds to the output of a layer, once. The change of the weight, the gradients of each
record, and what a layer holds follow from that.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from common.adapters.base import Adapter

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

    from common.adapters.layer import AdaptedLinear


@dataclass(frozen=True)
class Mapped(Adapter):
    """A parameterisation of any factors (matrices, vectors, diagonals), whose map may need the base weight."""

    @abstractmethod
    def change(
        self, factors: Mapping[str, Tensor], inputs: Tensor, projected: Tensor, base_weight: Tensor, scale: float
    ) -> Tensor:
        """Return what is added to the output of a layer, shape (..., out): the map, linear in ``inputs``.

        What is detached in it is a constant for the gradient. It is called under ``vmap``, so it may not branch on
        values.

        Args:
            factors: every factor of the layer.
            inputs: ``x``, shape (..., in).
            projected: ``W0 x``, without bias, shape (..., out).
            base_weight: W0, shape (out, in), detached, perhaps in the precision of the pass.
            scale: stands for ``scaling``; a rehearsal puts 1 in its place, so the map must take it from here.
        """

    def delta(self, factors: Mapping[str, Tensor], base_weight: Tensor | None = None) -> Tensor:
        """Return the map of the identity, shape (out, in), in the factors' dtype; it needs the base weight."""
        if base_weight is None:
            raise TypeError(f"the change that the {self.name} adapter makes depends on the base weight: give it")
        weight = base_weight.to(next(iter(factors.values())).dtype)
        identity = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        return self.change(factors, identity, weight.T, weight, self.scaling).T

    def route(self, config: LoraConfig) -> None:
        """Let PEFT put our layer where it would put its own."""
        from common.adapters.layer import AdaptedLinear

        # Every kind of layer, so that one that cannot be adapted is refused and not left to PEFT's own.
        config._register_custom_module({nn.Module: AdaptedLinear})

    def prepare(self, layer: LoraLayer) -> None:
        """Put the branch beside the base."""
        cast("AdaptedLinear", layer).grow(self)

    def factors_of(self, layer: LoraLayer) -> dict[str, nn.Parameter]:
        """Return the branch's parameters."""
        return cast("AdaptedLinear", layer).lora_branch.factors()

    def hold(self, layer: LoraLayer, factor: str, tensor: nn.Parameter) -> None:
        """Make ``tensor`` a parameter of the branch."""
        cast("AdaptedLinear", layer).lora_branch.register_parameter(factor, tensor)

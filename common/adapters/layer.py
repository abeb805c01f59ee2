"""The linear layer under an adapter with a map of its own, in the place of PEFT's layer.

PEFT finds, names and replaces the layer; what it computes is ``base(x) + branch(W0 x, x)``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedveil.common.adapters.branch import Branch
from fedveil.common.adapters.layers import ADAPTER_NAME
from fedveil.common.adapters.low_bits import LOW_BITS
from fedveil.common.errors import ModelError

if TYPE_CHECKING:
    from fedveil.common.adapters.mapped import Mapped

LINEAR = (nn.Linear, Conv1D, *LOW_BITS.values())
"""What can be adapted: exactly these, for others (another quantised one) hold their weight otherwise."""


class AdaptedLinear(nn.Module, LoraLayer):
    """A base layer and one adapter's branch, whose parameters' names begin as PEFT's do.

    Args:
        base_layer: an ``nn.Linear`` or GPT-2's transposed ``Conv1D``.
        adapter_name: the adapter's name in PEFT.
        others: settings of PEFT's own layer, in place of which the adapter has its own.

    Raises:
        ModelError: the base layer is of another type.
    """

    lora_branch: Branch

    def __init__(self, base_layer: nn.Module, adapter_name: str, **others: Any) -> None:
        super().__init__()
        del others
        if type(base_layer) not in LINEAR:
            raise ModelError(
                "an adapter with a map of its own changes linear layers, and one that adapter.targets names is of type "
                f"{type(base_layer).__name__}: name other layers, or choose another base model or adapter"
            )
        LoraLayer.__init__(self, base_layer)
        self.fan_in_fan_out = type(base_layer) is Conv1D
        self._active_adapter = adapter_name

    def grow(self, adapter: Mapped) -> None:
        """Put the adapter's branch beside the base, still without factors."""
        self.scaling[ADAPTER_NAME] = adapter.scaling
        self.lora_branch = Branch(adapter, self)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base layer's output and what the branch adds to it, in the output's dtype."""
        result = cast(Tensor, self.base_layer(x, *args, **kwargs))
        if self.disable_adapters:
            return result
        bias = cast(Tensor | None, self.base_layer.bias)
        if not self.lora_branch.adapter.uses_projected:
            projected = result.detach()
        else:
            projected = result if bias is None else result - bias
        return (result + self.lora_branch(projected, x)).to(result.dtype)

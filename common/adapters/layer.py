"""The linear layer under an adapter with a map of its own, in the place of PEFT's layer.

PEFT finds, names and replaces the layer; what it computes is ``base(x) + branch(W0 x, x)``. The branch has exact
gradients of each record, whatever its map. A trained tensor has a gradient of its own for each record only where it is
a parameter of a module that is called once in a pass. So all factors of a layer are parameters of the branch, and the
adapter's map is the only thing that it computes. The gradients are those of the map itself, record by record
(``Mapped.gradients``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedveil.common.adapters.layers import ADAPTER_NAME, base_weight
from fedveil.common.adapters.low_bits import LOW_BITS
from fedveil.common.errors import ModelError
from fedveil.common.own_gradients import OwnGradients

if TYPE_CHECKING:
    from fedveil.common.adapters.mapped import Mapped

LINEAR = (nn.Linear, Conv1D, *LOW_BITS.values())
"""What can be adapted: exactly these, for others (another quantised one) hold their weight otherwise."""


class Branch(OwnGradients):
    """All factors of one layer, and the adapter's map over them.

    Args:
        adapter: the one whose map it is.
        layer: the adapted layer, which has the base weight, and in ``scaling`` the factor in front of the product. It
            is read in every pass, because a rehearsal puts its own in place of a server's.
    """

    def __init__(self, adapter: Mapped, layer: LoraLayer) -> None:
        super().__init__()
        self.adapter = adapter
        # In a tuple, so that it is no child: the base's weights would be this module's as well.
        self._layer = (layer,)

    def factors(self) -> dict[str, nn.Parameter]:
        """Return every factor by name."""
        return dict(self.named_parameters(recurse=False))

    def forward(self, projected: Tensor, inputs: Tensor) -> Tensor:
        """Return what is added to the layer's output.

        Args:
            projected: ``W0 x``, without bias, shape (records, ..., out); anything, if the adapter does not use it.
            inputs: ``x``, shape (records, ..., in).
        """
        (layer,) = self._layer
        return self.adapter.change(self.factors(), inputs, projected, base_weight(layer), layer.scaling[ADAPTER_NAME])

    def gradients(self, activations: Sequence[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
        """Return the gradients of each record, shape (records, *factor's), by trained factor.

        They are computed in the factors' dtype, whatever the pass was in.

        Args:
            activations: what ``forward`` was called with.
            backprops: gradient of the loss with respect to what it returned, shape (records, ..., out).
        """
        (layer,) = self._layer
        live = self.factors()
        factors = {name: factor.detach() for name, factor in live.items()}
        dtype = factors[self.adapter.trained[0]].dtype
        projected = activations[0].to(dtype) if self.adapter.uses_projected else activations[0]
        inputs, upstream = activations[1].to(dtype), backprops.to(dtype)
        with torch.autocast(projected.device.type, enabled=False):
            gradients = self.adapter.gradients(
                factors, inputs, projected, upstream, base_weight(layer), layer.scaling[ADAPTER_NAME]
            )
        # A factor that rests in a round has none.
        return {live[name]: gradient for name, gradient in gradients.items() if live[name].requires_grad}


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

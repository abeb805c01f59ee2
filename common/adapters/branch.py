"""The branch that an adapter adds to a layer, with exact gradients of each record, whatever its map.

A trained tensor has a gradient of its own for each record only where it is a parameter of a module that
is called once in a pass. So all factors of a layer are parameters of one module, and the adapter's map is
the only thing that it computes. The gradients are those of the map itself, record by record (``Mapped.gradients``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fedveil.common.adapters.layers import ADAPTER_NAME, base_weight
from fedveil.common.own_gradients import OwnGradients

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

    from fedveil.common.adapters.mapped import Mapped


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

"""The branch that an adapter adds to a layer, with exact gradients of each record, whatever its map.

A trained tensor has a gradient of its own for each record only where it is a parameter of a module that
is called once in a pass. So all factors of a layer are parameters of one module, and the adapter's map is
the only thing that it computes. The gradients are those of the map itself, record by record (``vmap``):
an adapter states its map once, and derives nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from common.adapters.base import ADAPTER_NAME, base_weight

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

    from common.adapters.mapped import Mapped


class Branch(nn.Module):
    """All factors of one layer, and the adapter's map over them.

    Args:
        adapter: the one whose map it is.
        layer: the adapted layer, which has the base weight, and in ``scaling`` the factor in front of the product. It
            is read in every pass, because a rehearsal puts its own in place of a server's.
    """

    def __init__(self, adapter: Mapped, layer: LoraLayer) -> None:
        super().__init__()
        self._adapter = adapter
        # In a tuple, so that it is no child: the base's weights would be this module's as well.
        self._layer = (layer,)

    def factors(self) -> dict[str, nn.Parameter]:
        """Return every factor by name."""
        return dict(self.named_parameters(recurse=False))

    def forward(self, projected: Tensor, inputs: Tensor) -> Tensor:
        """Return what is added to the layer's output.

        Args:
            projected: ``W0 x``, without bias, shape (records, ..., out).
            inputs: ``x``, shape (records, ..., in).
        """
        return self._change(self.factors(), projected, inputs)

    def gradients(self, activations: Sequence[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
        """Return the gradients of each record, shape (records, *factor's), by trained factor.

        They are computed in the factors' dtype, whatever the pass was in.

        Args:
            activations: what ``forward`` was called with.
            backprops: gradient of the loss with respect to what it returned, shape (records, ..., out).
        """
        factors = self.factors()
        trained = {name: factor.detach() for name, factor in factors.items() if factor.requires_grad}
        frozen = {name: factor.detach() for name, factor in factors.items() if not factor.requires_grad}
        dtype = next(iter(trained.values())).dtype
        projected, inputs, upstream = (part.detach().to(dtype) for part in (*activations, backprops))

        def inner(trained: dict[str, Tensor], projected: Tensor, inputs: Tensor, upstream: Tensor) -> Tensor:
            change = self._change({**frozen, **trained}, projected[None], inputs[None])[0]
            return (change * upstream).sum()

        with torch.autocast(projected.device.type, enabled=False):
            found = vmap(grad(inner), in_dims=(None, 0, 0, 0))(trained, projected, inputs, upstream)
        return {factors[name]: gradient for name, gradient in found.items()}

    def _change(self, factors: Mapping[str, Tensor], projected: Tensor, inputs: Tensor) -> Tensor:
        (layer,) = self._layer
        return self._adapter.change(factors, inputs, projected, base_weight(layer), layer.scaling[ADAPTER_NAME])

"""The interface of an adapter with a map of its own, for what PEFT's layers do not compute with exact gradients.

A row states what it adds to the output of a layer, once. The change of the weight, the gradients of each
record, and what a layer holds follow from that.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

from fedveil.common.adapters.base import Adapter
from fedveil.common.adapters.layers import layer_shape, layers_of
from fedveil.common.later import nn, torch

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from torch import Tensor

    from fedveil.common.adapters.layer import AdaptedLinear


@dataclass(frozen=True)
class Mapped(Adapter):
    """A parameterisation of any factors (matrices, vectors, diagonals), whose map may need the base weight."""

    uses_projected: ClassVar[bool] = True
    """Whether the map takes ``W0 x``; of one that does not, no gradient is led through that, which would be 0."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Derive the gradients of a map that replaces the one whose gradients were stated."""
        super().__init_subclass__(**kwargs)
        if "change" in vars(cls) and "gradients" not in vars(cls):
            cls.gradients = Mapped.gradients  # type: ignore[method-assign]

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
            scale: ``scaling``, or 1 in a rehearsal, so the map must take it from here.
        """

    def gradients(
        self,
        factors: Mapping[str, Tensor],
        inputs: Tensor,
        projected: Tensor,
        upstream: Tensor,
        base_weight: Tensor,
        scale: float,
    ) -> dict[str, Tensor]:
        """Return the gradient of each record, shape (records, *factor's), of every trained factor.

        They are derived from the map, by ``vmap``, which computes it once more. A row may state them where they are a
        few products: that takes an eighth to a half of the time. Tests hold what is stated to what is derived.

        Args:
            factors: every factor of the layer.
            inputs: ``x``, shape (records, ..., in), in the factors' dtype, as the next two.
            projected: ``W0 x``, without bias, shape (records, ..., out).
            upstream: gradient of the loss with respect to the change, shape (records, ..., out).
            base_weight: as in ``change``.
            scale: as in ``change``.
        """

        def of_record(inputs: Tensor, projected: Tensor, upstream: Tensor) -> dict[str, Tensor]:
            def change(trained: Mapping[str, Tensor]) -> Tensor:
                return self.change({**factors, **trained}, inputs, projected, base_weight, scale)

            pull = torch.func.vjp(change, {name: factors[name] for name in self.trained})[1]
            return cast("dict[str, Tensor]", pull(upstream)[0])

        return torch.func.vmap(of_record)(inputs, projected, upstream)

    def delta(self, factors: Mapping[str, Tensor], base_weight: Tensor | None = None) -> Tensor:
        """Return the map of the identity, shape (out, in), in the factors' dtype; it needs the base weight."""
        if base_weight is None:
            raise TypeError(f"the change that the {self.name} adapter makes depends on the base weight: give it")
        weight = base_weight.to(next(iter(factors.values())).dtype)
        identity = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        return self.change(factors, identity, weight.T, weight, self.scaling).T

    def prepare(self, model: PeftModel) -> None:
        """Put the branch beside the base."""
        for layer in layers_of(model).values():
            cast("AdaptedLinear", layer).grow(self)

    def places(self, layer: LoraLayer) -> dict[str, tuple[nn.Module, str]]:
        """Return the branch, which has a parameter of each factor's name."""
        branch = cast("AdaptedLinear", layer).lora_branch
        return {factor: (branch, factor) for factor in self.shapes(*layer_shape(layer))}


def outer_sums(left: Tensor, right: Tensor) -> Tensor:
    """Return Σ left rightᵀ over each record's positions, (records, m, n), from (records, ..., m) and (records, ..., n).

    >>> outer_sums(torch.ones(2, 3, 1), torch.ones(2, 3, 2)).tolist()
    [[[3.0, 3.0]], [[3.0, 3.0]]]
    """
    left, right = (part.reshape(len(part), -1, part.shape[-1]) for part in (left, right))
    return left.transpose(1, 2) @ right


def position_sums(values: Tensor) -> Tensor:
    """Return the sums over each record's positions, shape (records, n), from (records, ..., n)."""
    return values.reshape(len(values), -1, values.shape[-1]).sum(1)

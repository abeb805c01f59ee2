"""Layers that are computed again in the backward pass, so that only one of them has its activations in memory.

Gradient checkpointing (Chen et al. 2016, arXiv 1604.06174), in torch's reentrant form. A layer's first pass keeps no
activation and has no gradient, so Opacus' hooks see nothing of it: they take activations while it is computed again,
right before its backward pass, once. The other form computes again without calling the hooks again at the right time,
and a trained tensor then has no gradient of its own for each record (``docs/concepts/site.md``).

The reentrant form forgets a layer of which no input has a gradient. In place of making the embeddings' output have one,
which would carry gradients below the first adapted layer, each layer takes an input of no numbers that has one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fedveil.common.errors import ModelError


class Recomputed:
    """What transformers calls in place of one layer's forward pass.

    Args:
        layer: the layer.
        name: its name in the model, for errors.
    """

    def __init__(self, layer: nn.Module, name: str) -> None:
        self._layer, self._name = layer, name

    def __call__(self, function: Any, *given: Any) -> Any:
        """Return the layer's output; ``function`` is a partial of its forward pass with the arguments given by name.

        Raises:
            ModelError: the layer takes by name what has a gradient, which the second pass would lose.
        """
        if any(isinstance(value, Tensor) and value.requires_grad for value in function.keywords.values()):
            raise ModelError(
                f"model.checkpointing is true, but the layer {self._name!r} takes its input by name, so that its "
                "gradient would be lost: set model.checkpointing to false"
            )
        carried = any(isinstance(value, Tensor) and value.requires_grad for value in given)
        if not carried and not any(p.requires_grad for p in self._layer.parameters()):
            return function(*given)  # below all that is trained nothing is kept anyway

        def passing(carrier: Tensor, *given: Any) -> Any:
            del carrier
            return function(*given)

        carrier = torch.zeros(0, requires_grad=True)
        # Dropout is off, so that no state of a generator has to be put back.
        return checkpoint(passing, carrier, *given, use_reentrant=True, preserve_rng_state=False)


def recompute_layers(model: nn.Module, name: str) -> None:
    """Compute every layer of a transformers model again in the backward pass of training.

    Args:
        model: a stock model, with an adapter in it or not.
        name: the model's, for errors.

    Raises:
        ModelError: the model has no layers that transformers knows how to compute again.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers: dict[str, Any] = {
        path: layer for path, layer in model.named_modules() if isinstance(layer, GradientCheckpointingLayer)
    }
    if not layers:
        raise ModelError(
            f"model.checkpointing is true, but {name!r} has no layers that can be computed again: "
            "set model.checkpointing to false"
        )
    for path, layer in layers.items():
        layer._gradient_checkpointing_func = Recomputed(layer, path)
        layer.gradient_checkpointing = True


@contextmanager
def computed_once(model: nn.Module) -> Iterator[None]:
    """Compute every layer of a model once inside it, activations kept; put it back afterwards."""
    layers: list[Any] = [layer for layer in model.modules() if getattr(layer, "gradient_checkpointing", False) is True]
    for layer in layers:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True

"""Plain optimiser steps on the mean loss of a batch; no privacy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fedveil.privacy.together import Together

if TYPE_CHECKING:
    from fedveil.common.model.federated import FederatedModel
    from fedveil.common.tasks import Batch
    from fedveil.privacy.secure_sum.masks import Words


class PlainSteps:
    """Takes steps of a model that it puts into train mode.

    Args:
        model: whose trained parameters are those that require a gradient.
        optimizer: over exactly those.
    """

    words: Words | None = None
    """See ``privacy.steps.Steps``."""

    def __init__(self, model: FederatedModel, optimizer: Optimizer) -> None:
        self._model, self._optimizer = model, optimizer
        self._parameters = [p for p in model.module.parameters() if p.requires_grad]
        model.module.train()

    def step(self, batches: Iterable[Any], losses: Callable[[Any], Tensor]) -> None:
        """Take one step on the mean loss of a batch given in parts."""
        del losses  # the model's own
        plain_step(batches, self._model, self._optimizer, self._parameters)


def plain_step(
    parts: Iterable[Batch | Together],
    model: FederatedModel,
    optimizer: Optimizer,
    parameters: Sequence[nn.Parameter],
) -> None:
    """Take one step on the mean loss of a batch given in parts; no privacy."""
    optimizer.zero_grad(set_to_none=True)
    seen = 0
    for part in parts:
        if isinstance(part, Together):
            seen += part.units
            for batch, _ in part.parts:
                model.losses(batch).sum().backward()
        else:
            losses = model.losses(part)
            losses.sum().backward()
            seen += len(losses)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad / seen for p in parameters]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        # What the loss does not reach keeps no gradient, so that no weight decay moves it.
        parameter.grad = gradient if parameter.grad is not None or gradient.any() else None
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

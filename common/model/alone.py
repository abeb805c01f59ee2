"""Contexts in which a part of what a run trains takes a gradient alone: the head, a linearised step, or columns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import nn

from fedveil.common.adapters.split import split_columns
from fedveil.common.errors import ModelError
from fedveil.common.messages.columns import Chosen
from fedveil.common.messages.state import AdapterState
from fedveil.common.tasks.featured import FeatureCollator
from fedveil.common.tasks.tangent import Tangent

if TYPE_CHECKING:
    from fedveil.common.model.federated import FederatedModel


@contextmanager
def head_alone(model: FederatedModel) -> Iterator[None]:
    """Let the head alone take a gradient, on features of the model as it is; put all back afterwards.

    Inside it ``model.featurise`` computes features, and records that have them pass in one shape.

    Raises:
        ModelError: the model has no head.
    """
    with _on_vectors(model, ()):
        _head_of(model).requires_grad_(True)
        yield


@contextmanager
def step_alone(model: FederatedModel, around: AdapterState) -> Iterator[dict[str, dict[str, nn.Parameter]]]:
    """Let the step from ``around`` take a gradient in place of the adapter; the head stays.

    Inside it records have features and tangents, both of the model at ``around`` (``client.linearised``), and pass
    in one shape, and the logits are linear in what is trained. Afterwards the adapter has moved by the change of the
    step, unless an error ended the context.

    Args:
        model: the model.
        around: the trained tensors of every adapted layer at the point of linearisation.

    Yields:
        What is trained, by layer and factor.

    Raises:
        ModelError: the model has no head, or trains nothing below it.
    """
    below = model.below_head()
    if not below:
        raise ModelError("nothing below the head is trained, so there is nothing to linearise")
    begun = torch.cat([around[layer][name].flatten() for layer, name in below]).to(model.device)
    tangent = Tangent(len(begun)).to(model.device)
    with torch.no_grad():
        step = torch.cat([p.flatten() for p in below.values()]) - begun
        tangent.step.copy_(step)
    with _on_vectors(model, (model.classes - 1, len(tangent.step))):
        model.module.tangent = tangent
        try:
            yield model.trained()
        finally:
            model.module.tangent = None
    with torch.no_grad():
        moved = (tangent.step - step).split([p.numel() for p in below.values()])
        for parameter, part in zip(below.values(), moved, strict=True):
            parameter.add_(part.view_as(parameter))


def columns_alone(model: FederatedModel, chosen: Chosen | None) -> AbstractContextManager[None]:
    """Let the chosen columns alone take a gradient in place of the adapter; the head stays as it is.

    Inside it ``model.trained`` has these columns alone, and afterwards every factor is whole again, with what was
    trained in it.

    Args:
        model: the model.
        chosen: by layer and factor; None: every trained tensor whole, so that nothing happens.
    """
    return nullcontext() if chosen is None else split_columns(model.adapter, model.peft_model, chosen)


def _head_of(model: FederatedModel) -> nn.Linear:
    if model.module.head is None:
        raise ModelError(f"the task {model.task.name!r} has no head that could be trained alone")
    return model.module.head


@contextmanager
def _on_vectors(model: FederatedModel, tangents: tuple[int, ...]) -> Iterator[None]:
    """Take records as vectors, and no gradient anywhere; put all back afterwards."""
    _head_of(model)
    before = [(p, p.requires_grad) for p in model.module.parameters()]
    collator, shapes, only = model.collator, model.shapes, model.head_only
    model.module.requires_grad_(False)
    model.collator, model.head_only = FeatureCollator(model.task, model.module.width, tangents), True
    model.shapes = model.vector_shapes.get(tangents) or model.collator.shapes(model.base, model.max_length, 0)
    try:
        yield
    finally:
        model.vector_shapes[tangents] = model.shapes
        model.collator, model.shapes, model.head_only = collator, shapes, only
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)
            parameter.grad = None

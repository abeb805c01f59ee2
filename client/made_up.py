"""Made-up records, and factors, a head and scales of no one's choice, for a rehearsal.

A server that chose them could make gradients so small that nothing shows, and send others afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fedveil.client.unfolding import rows_of
from fedveil.common.adapters.base import parameters_of
from fedveil.common.errors import MechanismError
from fedveil.common.messages.state import METRIC
from fedveil.common.model.federated import FederatedModel
from fedveil.common.tasks import Record
from fedveil.common.tasks.base import WEIGHT, unfolds
from fedveil.common.tasks.featured import Collator
from fedveil.privacy.randomness import stream

AWAY = 0.05
"""Standard deviation of the factors while a model rehearses."""


def whole_inventor(model: FederatedModel, collator: Collator) -> Callable[[int, int], Record]:
    """Return what makes up a record of a number of tokens; a second number picks what it holds and its label."""
    made_up, classes = collator.inventor(model.base, model.max_length), max(1, model.classes)
    return lambda length, number: made_up(length, number, number % classes)


def inventor(model: FederatedModel, collator: Collator) -> Callable[[int, int], Record]:
    """Return what makes up what passes: a record, or of a task that unfolds them the largest row of one, unweighted.

    Arguments as in ``whole_inventor``. Few are unfolded: of the greatest sizes of the shapes, or below.
    """
    invent = whole_inventor(model, collator)
    if not unfolds(model.task):
        return invent

    @lru_cache(maxsize=256)
    def row(length: int, number: int) -> Record:
        rows = made_up_rows(model, invent(length, number))
        if not rows:
            raise MechanismError("a made-up record has no row: nothing of it can be rehearsed")
        return {key: value for key, value in max(rows, key=model.task.size).items() if key != WEIGHT}

    def of_grid(length: int, number: int) -> Record:
        fitting = [size - 1 for size in model.shapes.lengths if size - 1 <= length]
        return row(max(fitting, default=length), number % 2)

    return of_grid


def made_up_rows(model: FederatedModel, record: Record) -> list[Record]:
    """Return the rows of a made-up record, unfolded by coins of no one's."""
    draw = stream(0, "rehearsal", "coins")
    return rows_of(model, record, lambda count: torch.rand(count, generator=draw, dtype=torch.float64))


@contextmanager
def away_from_zero(model: FederatedModel) -> Iterator[None]:
    """Give factors, head, metric and scales made-up values, and put back what was there."""
    factors = [item for layer in parameters_of(model.adapter, model.peft_model).values() for item in layer.items()]
    head = list(model.head.values())
    metric = list(model.places().get(METRIC, {}).values())
    layers: list[Any] = [m for m in model.peft_model.modules() if isinstance(getattr(m, "scaling", None), dict)]
    changed = [*(parameter for _, parameter in factors), *head, *metric]
    before = [parameter.detach().clone() for parameter in changed]
    scales, feature_scale = [dict(layer.scaling) for layer in layers], model.module.feature_scale
    draw = stream(0, "rehearsal")
    try:
        with torch.no_grad():
            for name, parameter in factors:
                if name in model.adapter.traits.ones:
                    parameter.fill_(1.0)
                else:
                    parameter.copy_(AWAY * torch.randn(parameter.shape, generator=draw))
            for parameter in head:
                parameter.copy_(torch.randn(parameter.shape, generator=draw))
            for parameter in metric:
                # Not the identity: times that, a row stays what it is to the bit, in whatever order a device adds.
                parameter.copy_(torch.randn(parameter.shape, generator=draw) / parameter.shape[-1] ** 0.5)
        for layer in layers:
            layer.scaling.update(dict.fromkeys(layer.scaling, 1.0))
        model.module.feature_scale = 1.0 if feature_scale else feature_scale
        yield
    finally:
        _put_back(changed, before)
        for layer, scale in zip(layers, scales, strict=True):
            layer.scaling.update(scale)
        model.module.feature_scale = feature_scale


def _put_back(parameters: list[Any], values: list[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


@contextmanager
def in_float32(model: FederatedModel) -> Iterator[None]:
    """Let the model compute in float32, where rounding is far below ``MIXED``."""
    precision = model.precision
    model.precision = torch.float32
    try:
        yield
    finally:
        model.precision = precision

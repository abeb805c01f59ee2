"""Gradients of single records in one step, on tiny models whose factors are away from zero."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedveil.common.messages.tensors import entries
from fedveil.common.model.federated import FederatedModel
from fedveil.common.model.shapes import FixedBatch
from fedveil.common.tasks import Record
from fedveil.privacy.dpsgd import PrivateSteps
from fedveil.privacy.plan import gaussian_plan

SIZES = (7, 3, 6)
STEP = gaussian_plan(1.0, 1.0, 1.0, 1.0, 1e-5, 1.0)


def away_from_zero(model: FederatedModel) -> FederatedModel:
    """Return the model with every trained number moved by a little, the same every time."""
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, _, p in entries(model.trained()):  # type: ignore[arg-type]
            p.add_(0.05 * torch.randn(p.shape, generator=draw).to(p.device))
    return model


def records_of(model: FederatedModel, sizes: Sequence[int] = SIZES) -> list[Record]:
    """Return made-up records of these lengths, of both labels."""
    invent = model.collator.inventor(model.base, model.max_length)
    return [invent(size, i, i % 2) for i, size in enumerate(sizes)]


def samples(model: FederatedModel, batch: FixedBatch) -> list[Tensor]:
    """Return each record's gradient, by parameter, as a private step takes it; shape (records, ...)."""
    trained = [p for p in model.module.parameters() if p.requires_grad]
    with model.many_passes(), PrivateSteps(model.module, torch.optim.SGD(trained, lr=0.0), STEP) as steps:
        return [sample.clone() for sample in steps.samples(batch, model.losses)]

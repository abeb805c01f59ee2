"""A site's score of the model it received, as a noised count: the only score that may leave it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from common.device import autocast
from common.model import FederatedModel
from common.randomness import add_private_noise
from common.tasks import Record


@torch.no_grad()
def noised_correct(model: FederatedModel, records: Sequence[Record], noise_std: float) -> float:
    """Return how many ``records`` the model classifies correctly, plus N(0, noise_std²), rounded to a whole number.

    Adding or removing a record changes the count by at most 1. Records pass one at a time, because a
    batch's shape moves results by rounding, and a neighbour could so turn another record's answer.
    The noised count is a multiple of a public grid before it is rounded. The price must be paid before.
    """
    was_training = model.module.training
    model.module.eval()
    count = 0.0
    for record in records:
        batch = model.batch([record])
        with autocast(model.device, model.precision):
            count += float(model.task.sums(model.module, batch).correct.sum().clamp(0, 1))
    model.module.train(was_training)
    return float(round(add_private_noise(torch.tensor(count, dtype=torch.float64), noise_std).item()))

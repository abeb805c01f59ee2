"""A site's score of the model it received, as a noised count: the only score that may leave it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from fedveil.common.log import place_of
from fedveil.common.model.device import autocast
from fedveil.common.model.federated import FederatedModel
from fedveil.common.tasks import Record
from fedveil.privacy.randomness import add_private_noise

log = logging.getLogger("fedveil.site")


@torch.no_grad()
def noised_correct(model: FederatedModel, records: Sequence[Record], noise_std: float) -> float:
    """Return how many ``records`` the model answers wholly right, plus N(0, noise_std²), rounded to a whole number.

    Adding or removing a record changes the count by at most 1, however many labels or tokens its answer has.
    Records pass one at a time, because a batch's shape moves results by rounding, and a neighbour could so turn
    another record's answer. The noised count is a multiple of a public grid before it is rounded. The price must be
    paid before.
    """
    was_training = model.module.training
    model.module.eval()
    count = 0.0
    for record in records:
        count += _is_correct(model, record)
    model.module.train(was_training)
    return float(round(add_private_noise(torch.tensor(count, dtype=torch.float64), noise_std).item()))


def _is_correct(model: FederatedModel, record: Record) -> float:
    try:
        with autocast(model.device, model.precision):
            return float(model.task.sums(model.module, model.batch([record])).whole.all())
    except Exception as error:
        log.warning("a record could not be scored and counts as wrong: %s", place_of(error))
        return 0.0

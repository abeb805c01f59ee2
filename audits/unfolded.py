"""Unfolded records: how far one moves the sum with all of its rows, and whether others change these.

The world's task compares each record with itself in another order by a loss that is no sum over rows. So rows have
weights, which follow from a pass through the model as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from torch import Tensor

from audits.faults import SOUND, Fault, each_row_clipped
from audits.finding import judged
from audits.sensitivity import MOST
from audits.worlds import Gradient, Recorder, World, minus, norm, plan
from fedveil.client import unfolding
from fedveil.common.findings import Finding
from fedveil.common.model.federated import FederatedModel
from fedveil.common.tasks import CausalLM, Record
from fedveil.common.tasks.base import UNBATCHED, WEIGHT, Coins
from fedveil.common.tasks.text import TOKENS
from fedveil.privacy.dpsgd import PrivateSteps
from fedveil.privacy.plan import PrivacyPlan
from fedveil.privacy.randomness import private_uniform
from fedveil.privacy.steps import nothing


class Compared(CausalLM):
    """A record and the same with its prompt backwards; the loss is softplus of how much longer the first takes."""

    name: ClassVar[str] = "compared"

    def unfold(self, model: FederatedModel, record: Record, coins: Coins) -> list[Record]:
        """Return both, the first weighted by the loss's derivative and the second by minus that."""
        rows = both(record)
        first, second = model.losses(model.fixed_batch(rows, model.shapes.length_of(self.size(record)), 2)).tolist()
        weight = float(torch.sigmoid(torch.tensor(first - second, dtype=torch.float64)))
        return [{**rows[0], WEIGHT: weight}, {**rows[1], WEIGHT: -weight}]


def both(record: Record) -> list[Record]:
    """Return a record as it is, and with its first half backwards."""
    bare = {key: value for key, value in record.items() if key not in UNBATCHED}
    half = len(bare[TOKENS]) // 2
    return [bare, {**bare, TOKENS: bare[TOKENS][:half][::-1] + bare[TOKENS][half:]}]


def joint_loss(world: World, record: Record) -> Tensor:
    """Return the loss that a record's rows are of, the slow and obvious way."""
    first, second = (world.model.losses(world.batch([row]))[0] for row in both(record))
    return torch.nn.functional.softplus(first - second)


def joint_gradient(world: World, record: Record) -> Gradient:
    """Return its gradient by one backward pass through both rows."""
    return [gradient.double() for gradient in torch.autograd.grad(joint_loss(world, record), world.trained)]


def compared(world: World) -> World:
    """Return the world of a decoder with the task in place of its own."""
    world.model.task = world.model.collator = Compared()
    return world


def summed(world: World, records: Sequence[Record], figures: PrivacyPlan) -> Gradient:
    """Return what one step on all ``records`` hands to the optimiser."""
    optimizer, model = Recorder(world.trained), world.model
    with PrivateSteps(model.module, optimizer, figures) as steps:
        rows = unfolding.unfolded(model, records, private_uniform, nothing, hides=True)
        steps.step(figures.rows(model, rows, len(records)), model.losses)
    return optimizer.given[0]


def weights_of_batch() -> AbstractContextManager[Any]:
    """Weights over the mean of all rows of the step, as a batch's advantages may be normalised."""
    own = unfolding.unfolded

    def by_mean(*given: Any, **more: Any) -> list[Record]:
        rows = own(*given, **more)
        mean = sum(abs(row[WEIGHT]) for row in rows) / max(1, len(rows))
        return [{**row, WEIGHT: row[WEIGHT] / mean} for row in rows]

    return patch.object(unfolding, "unfolded", by_mean)


FAULTS = (
    Fault("weights over the batch's mean", weights_of_batch),
    Fault("each row of a record clipped by itself", each_row_clipped),
)


def audit_unfolding(world: World, fault: Fault = SOUND) -> Finding:
    """Take each record away in turn, at a clip that each row exceeds by itself, and at one that no record does.

    None of the rows of the others may change a bit.
    """
    worst, shows = 0.0, False
    lengths = [norm(joint_gradient(world, record)) for record in world.records]
    for clip in (min(lengths) / 4, 2 * max(lengths)):
        figures = plan(clip)
        with fault.plant():
            everyone, rows = summed(world, world.records, figures), weights(world, world.records)
            for number in range(len(world.records)):
                others = [record for i, record in enumerate(world.records) if i != number]
                worst = max(worst, norm(minus(everyone, summed(world, others, figures))) / clip)
                shows = shows or weights(world, others) != rows[: 2 * number] + rows[2 * number + 2 :]
    return judged(
        "sensitivity by unfolded record",
        fault.name,
        shows or not worst <= MOST,
        {
            "model": type(world.model.base.module).__name__,
            "clips moved by one record, at most": worst,
            "a record beside": "shows in weights" if shows else "shows in no bit",
        },
    )


def weights(world: World, records: Sequence[Record]) -> list[float]:
    """Return the weights of all rows of a step, in order."""
    return [row[WEIGHT] for row in unfolding.unfolded(world.model, records, private_uniform, nothing, hides=True)]

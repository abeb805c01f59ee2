"""Rows of a record: what a step takes in its place where the run's task unfolds records (``Task.unfold``).

Each record is unfolded by itself, between the draw and the pass. Its rows carry whose they are, so that a step adds
their gradients and clips the sum once, for the record or for the person that it belongs to (``privacy.together``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

import torch

from fedveil.common.errors import MechanismError
from fedveil.common.log import place_of
from fedveil.common.model.federated import FederatedModel
from fedveil.common.tasks import Batch, Record
from fedveil.common.tasks.base import OWNER, WEIGHT, Coins, unfolds
from fedveil.privacy.plan import Plan
from fedveil.privacy.together import Together

log = logging.getLogger("fedveil.site")


def step_parts(
    plan: Plan,
    model: FederatedModel,
    records: Sequence[Record],
    coins: Coins,
    before_pass: Callable[[], None],
    *,
    hides: bool,
) -> Iterable[Batch | Together]:
    """Return the batches of one step, of rows where the task unfolds records; arguments as for ``unfolded``."""
    if not unfolds(model.task):
        return plan.parts(model, records)
    return plan.rows(model, unfolded(model, records, coins, before_pass, hides=hides), len(records))


def unfolded(
    model: FederatedModel,
    records: Sequence[Record],
    coins: Coins,
    before_pass: Callable[[], None],
    *,
    hides: bool,
) -> list[Record]:
    """Return the rows of all records of a step, each with its owner: the person, or the record's number in the step.

    Args:
        model: as the step begins.
        records: that the step has drawn.
        coins: what unfolding draws from.
        before_pass: called before each record is unfolded, and may raise.
        hides: whether a record that fails contributes zero; else its error is raised.
    """
    rows: list[Record] = []
    for number, record in enumerate(records):
        before_pass()
        whose = record.get(OWNER, number)
        try:
            rows += [{**row, OWNER: whose} for row in rows_of(model, record, coins)]
        except MechanismError:
            raise
        except Exception as error:
            if not hides:
                raise
            log.warning("a record could not be unfolded and contributes zero: %s", place_of(error))
    return rows


@torch.no_grad()
def rows_of(model: FederatedModel, record: Record, coins: Coins) -> list[Record]:
    """Return the rows of one record, without whose they are.

    Raises:
        ValueError: the model cannot take a row, or a row has no weight.
    """
    rows = [
        {key: value for key, value in row.items() if key != OWNER} for row in model.task.unfold(model, record, coins)
    ]
    most = max(model.max_length, model.task.size(record))  # a made-up record fills its shape
    if not all(WEIGHT in row and model.task.fits(model.base, row, most) for row in rows):
        raise ValueError("the task made a row of a record that has no weight, or that the model cannot take")
    return rows

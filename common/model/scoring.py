"""Scoring of a model on public records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from fedveil.common.model.base import BaseModel
from fedveil.common.model.batching import length_batches
from fedveil.common.model.device import autocast, choose_batch_tokens
from fedveil.common.model.score import MOST_CONFUSED, Score
from fedveil.common.tasks import Record, Task
from fedveil.common.tasks.featured import Collator, FeatureCollator


@torch.no_grad()
def score_records(
    module: nn.Module,
    task: Task,
    base: BaseModel,
    records: Sequence[Record],
    device: torch.device,
    precision: torch.dtype,
    batch_tokens: int = 0,
    slices: Sequence[int] = (),
    collator: Collator | None = None,
    vectors: Sequence[Record] = (),
) -> Score:
    """Return accuracy and mean loss of any module of the task's kind on ``records`` (at least one).

    ``slices`` are each record's slice of the test data, by its number; empty: no slices. ``collator`` makes the
    batches; None: the task does. ``vectors`` are the module's features of the records, which pass in their place, in
    the same batches; empty: the module computes them.
    """
    collator = collator or task
    maker = FeatureCollator(task, 0) if vectors else collator
    was_training = module.training
    module.eval()
    totals, correct_records = torch.zeros(3, dtype=torch.float64), dict[int, bool]()
    labels, given = dict[int, int](), dict[int, int]()
    tokens = choose_batch_tokens(batch_tokens, device)
    for group in length_batches([collator.size(record) for record in records], tokens):
        batch = {k: v.to(device) for k, v in maker.collate(base, [(vectors or records)[i] for i in group]).items()}
        with autocast(device, precision):
            sums = task.sums(module, batch)
        totals += torch.stack([sums.loss.sum(), sums.correct.sum(), sums.weight.sum()]).double().cpu()
        if task.counted:
            labels |= zip(group, batch["labels"].tolist(), strict=True)
            correct_records |= zip(group, map(bool, sums.correct.tolist()), strict=True)
            given |= zip(group, sums.predicted.tolist() if sums.predicted is not None else (), strict=False)
    module.train(was_training)
    loss, correct, weight = totals.tolist()
    slice_right, of_slice = _counts(dict(enumerate(slices)), correct_records, sorted(set(slices)))
    by_label = _by_label(labels, given, correct_records)
    return Score(correct / weight, loss / weight, *by_label, slice_right, of_slice)


def _by_label(
    labels: Mapping[int, int], given: Mapping[int, int], correct: Mapping[int, bool]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Return what a score counts by label, from each record's label and the one that the model gives it."""
    order = range(max([*labels.values(), *given.values()], default=-1) + 1)
    right, records = _counts(labels, correct, order)
    if not given:
        return right, records, (), ()
    _, predicted = _counts(given, {}, order)
    pairs = Counter((label, given[record]) for record, label in labels.items())
    shown = order if len(order) <= MOST_CONFUSED else range(0)
    return right, records, predicted, tuple(tuple(pairs[label, other] for other in shown) for label in shown)


def _counts(
    groups: Mapping[int, int], correct: Mapping[int, bool], order: Iterable[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return how many records of each group in ``order`` are right, and how many there are."""
    right = Counter(group for record, group in groups.items() if correct.get(record))
    records = Counter(groups.values())
    return tuple(right[group] for group in order), tuple(records[group] for group in order)

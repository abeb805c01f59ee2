"""Scoring of a model on public records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from fedveil.common.model.base import BaseModel
from fedveil.common.model.batching import length_batches
from fedveil.common.model.device import autocast, choose_batch_tokens
from fedveil.common.model.score import Score
from fedveil.common.tasks import Record, Task
from fedveil.common.tasks.featured import Collator


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
) -> Score:
    """Return accuracy and mean loss of any module of the task's kind on ``records`` (at least one).

    ``slices`` are each record's slice of the test data, by its number; empty: no slices. ``collator`` makes the
    batches; None: the task does.
    """
    collator = collator or task
    was_training = module.training
    module.eval()
    totals, correct_records = torch.zeros(3, dtype=torch.float64), dict[int, bool]()
    labels = dict[int, int]()
    tokens = choose_batch_tokens(batch_tokens, device)
    for group in length_batches([collator.size(record) for record in records], tokens):
        batch = {k: v.to(device) for k, v in collator.collate(base, [records[i] for i in group]).items()}
        with autocast(device, precision):
            sums = task.sums(module, batch)
        totals += torch.stack([sums.loss.sum(), sums.correct.sum(), sums.weight.sum()]).double().cpu()
        if task.counted:
            labels |= zip(group, batch["labels"].tolist(), strict=True)
            correct_records |= zip(group, map(bool, sums.correct.tolist()), strict=True)
    module.train(was_training)
    loss, correct, weight = totals.tolist()
    right, of_label = _counts(labels, correct_records, range(max(labels.values(), default=-1) + 1))
    slice_right, of_slice = _counts(dict(enumerate(slices)), correct_records, sorted(set(slices)))
    return Score(correct / weight, loss / weight, right, of_label, slice_right, of_slice)


def _counts(
    groups: Mapping[int, int], correct: Mapping[int, bool], order: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return how many records of each group in ``order`` are right, and how many there are."""
    right = Counter(group for record, group in groups.items() if correct.get(record))
    records = Counter(groups.values())
    return tuple(right[group] for group in order), tuple(records[group] for group in order)

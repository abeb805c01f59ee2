"""Scoring of a model on public records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from fedveil.common.model.base import BaseModel
from fedveil.common.model.batching import length_batches
from fedveil.common.model.device import autocast, choose_batch_tokens
from fedveil.common.model.score import MOST_CONFUSED, Score, half_of_ratio, macro_f1
from fedveil.common.run_lines import Figure
from fedveil.common.tasks import Record, Sums, Task
from fedveil.common.tasks.featured import Collator, FeatureCollator

RIGHT_OPTION = "right option"
"""What a score calls the share of questions of which the right option is the likeliest, by the mean over its tokens."""


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
    totals, counts = torch.zeros(3, dtype=torch.float64), _Counts()
    tokens = choose_batch_tokens(batch_tokens, device)
    for group in length_batches([collator.size(record) for record in records], tokens):
        batch = {k: v.to(device) for k, v in maker.collate(base, [(vectors or records)[i] for i in group]).items()}
        with autocast(device, precision):
            sums = task.sums(module, batch)
        totals += torch.stack([sums.loss.sum(), sums.correct.sum(), sums.weight.sum()]).double().cpu()
        counts.add(sums, group, batch["labels"].tolist() if sums.predicted is not None else (), counted=task.counted)
    counts.shares |= _right_options(module, task, base, records, collator, device, precision)
    module.train(was_training)
    loss, correct, weight = totals.tolist()
    by_slice = _counts(dict(enumerate(slices)), counts.whole, sorted(set(slices)))
    by_label = _by_label(counts.labels, counts.given, counts.whole)
    return counts.figures_of(Score(correct / weight, loss / weight, *by_label, *by_slice, task.scored.headline))


def _right_options(
    module: nn.Module,
    task: Task,
    base: BaseModel,
    records: Sequence[Record],
    collator: Collator,
    device: torch.device,
    precision: torch.dtype,
) -> dict[str, list[float]]:
    """Return for each record with options whether its right one has the least loss of all, by the figure's name."""
    if task.scored.options is None:
        return {}
    right = list[float]()
    for record in records:
        options = task.scored.options(base, record)
        if len(options) > 1:
            batch = {name: values.to(device) for name, values in collator.collate(base, options).items()}
            with autocast(device, precision):
                losses = task.sums(module, batch).losses
            right.append(float(losses[0] < losses[1:].min()))
    return {RIGHT_OPTION: right} if right else {}


class _Counts:
    """Counts what a score has beside accuracy and loss, batch by batch."""

    def __init__(self) -> None:
        self.whole, self.labels, self.given = dict[int, bool](), dict[int, int](), dict[int, int]()
        self.parts: torch.Tensor | None = None
        self.right, self.units = list[int](), list[int]()
        self.correct, self.weight = list[float](), list[float]()
        self.shares: dict[str, list[float]] = {}
        self.ratios: dict[str, tuple[list[float], list[float]]] = {}

    def add(self, sums: Sums, group: Sequence[int], labels: Sequence[int], *, counted: bool) -> None:
        """Add a batch's records: ``group`` are their numbers; without a predicted label they have no ``labels``."""
        if counted:
            self.whole |= zip(group, sums.whole.tolist(), strict=True)
        if counted and sums.predicted is not None:
            self.labels |= zip(group, labels, strict=True)
            self.given |= zip(group, sums.predicted.tolist(), strict=True)
        if sums.parts is not None:
            counts = sums.parts().cpu()
            self.parts = counts.sum(0) if self.parts is None else self.parts + counts.sum(0)
            right, there, given = counts.sum(2).T
            self.right += (2 * right).tolist()
            self.units += (there + given).tolist()
        for name, values in sums.beside.items():
            self.shares.setdefault(name, []).extend(values.tolist())
        for name, (tops, bottoms) in (sums.ratios() if sums.ratios is not None else {}).items():
            both = self.ratios.setdefault(name, ([], []))
            both[0].extend(tops.tolist())
            both[1].extend(bottoms.tolist())
        self.correct += sums.correct.tolist()
        self.weight += sums.weight.tolist()

    def figures_of(self, score: Score) -> Score:
        """Return the score with its figures, and judged by the one that it is named after."""
        found, parts = list[Figure](), tuple[tuple[int, int, int], ...]()
        if self.parts is not None:
            parts = tuple((right, there, given) for right, there, given in self.parts.T.tolist())
            micro, macro = sum(self.right) / max(1, sum(self.units)), macro_f1(parts)
            found.append(Figure("micro F1", micro, half_of_ratio(self.right, self.units)))
            found += [] if macro is None else [Figure("macro F1", macro)]
        for name, values in self.shares.items():
            found.append(Figure(name, sum(values) / len(values), half_of_ratio(values, [1.0] * len(values))))
        for name, (tops, bottoms) in self.ratios.items():
            found.append(Figure(name, sum(tops) / max(1.0, sum(bottoms)), half_of_ratio(tops, bottoms)))
        if not found:
            return score
        first = Figure(score.name, score.accuracy, half_of_ratio(self.correct, self.weight))
        headline = next((figure for figure in found if figure.name == score.name), first)
        figures = (headline, *(figure for figure in found if figure is not headline))
        return replace(score, accuracy=headline.value, figures=figures, parts=parts)


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

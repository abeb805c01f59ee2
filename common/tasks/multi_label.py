"""Classification with several labels a text, such as ICD codes: one sigmoid a label, none of them an answer, too.

A record's loss is the mean of the labels' binary cross-entropies, as the stock class for ``multi_label_classification``
has it: so a loss, and a gradient's length beside it, mean the same for ten codes and for a thousand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from fedveil.common.errors import ConfigError
from fedveil.common.labels import labels_text
from fedveil.common.tasks.base import Batch, Record, Scored, Sums, Wording, targets_of
from fedveil.common.tasks.classification import Classification, SentenceExport
from fedveil.common.tasks.examples import Example
from fedveil.common.tasks.finished import Answer, Export, Finished, Questions, logits_of
from fedveil.common.tasks.roles import LABELS, SEPARATOR, Role
from fedveil.common.tasks.stock_classification import StockClassification, StockExport
from fedveil.common.tasks.text import TextExample

if TYPE_CHECKING:
    from torch import nn

    from fedveil.common.config.run import RunConfig
    from fedveil.common.model.base import BaseModel
    from fedveil.common.tasks.module import TaskModule

THRESHOLD = 0.5
"""Probability from which on a label is given: a logit of 0."""


@dataclass(frozen=True, slots=True)
class SeveralLabels(TextExample):
    """A text with any of the labels, or none."""

    labels: tuple[int, ...] = ()
    """1 of each label that it has and 0 of each other; empty of public words, which have ``label`` alone."""

    def answer(self, names: Sequence[str] = ()) -> str | None:
        """Return the names of its labels, sorted, as one text; without names their numbers."""
        if not self.labels:
            return TextExample.answer(self, names)
        numbers = [number for number, there in enumerate(self.labels) if there]
        return labels_text(sorted(names[number] if names else str(number) for number in numbers))

    @property
    def all_labels(self) -> frozenset[int]:
        """The numbers of the labels that it has."""
        return frozenset(number for number, there in enumerate(self.labels) if there)

    @property
    def stratum(self) -> int | None:
        """The first of its labels, by which data are divided; of none a number after the last."""
        return self.labels.index(1) if 1 in self.labels else len(self.labels)


def _words(text: str, pair: str | None = None) -> Example:
    return SeveralLabels(text=text.strip(), text_pair=pair and pair.strip(), label=0)


def _answers(model: Finished, examples: Sequence[Example]) -> list[list[Answer]]:
    """Return for each example every label with its probability, the likeliest first; those above a half are chosen."""
    rows = logits_of(model, examples).sigmoid().tolist()
    found = ([Answer(name, p, p >= THRESHOLD) for name, p in zip(model.labels, row, strict=True)] for row in rows)
    return [sorted(one, key=lambda answer: -(answer.probability or 0.0)) for one in found]


class SeveralExport(SentenceExport):
    """An encoder and a head on the mean of its tokens, whose logits have a sigmoid each."""

    def code(self, model: Finished, folder: str) -> str:
        """Return code that computes each label's probability."""
        return super().code(model, folder).replace("softmax(-1)", "sigmoid()")

    def adapter_code(self, base: str, settings: Any, *, tuned: bool) -> str:
        """Return code that computes each label's probability."""
        return super().adapter_code(base, settings, tuned=tuned).replace("softmax(-1)", "sigmoid()")


class StockSeveralExport(StockExport):
    """A stock classifier of transformers for several labels."""

    problem_type = "multi_label_classification"


class MultiLabel(Classification):
    """Any of the labels, or none, a record; loss is the mean of the labels' binary cross-entropies."""

    name: ClassVar[str] = "multi-label"
    roles: ClassVar[tuple[Role, ...]] = (*Classification.roles[:2], LABELS, SEPARATOR)
    example: ClassVar[type[Any]] = SeveralLabels
    scored: ClassVar[Scored] = Scored("micro F1", several=True)
    wording: ClassVar[Wording | None] = Wording(_words, _words, _words)
    questions: ClassVar[Questions | None] = Questions(lambda words: _words(*words), _answers)
    export: ClassVar[Export] = SeveralExport()
    readings: ClassVar[dict[str, type[Classification]]] = {}

    def check(self, config: RunConfig) -> None:
        """As every classification's; and no derivatives, which have no row for the first label."""
        super().check(config)
        if config.timeline.with_inputs("jacobians"):
            raise ConfigError(
                f"phases has jacobians, which are of one label a record, and model.task is {self.name!r}: leave phases "
                "empty, or train on features and examples"
            )

    def labels_of(self, example: TextExample, number: int) -> list[int]:
        """Return 0 or 1 for each label; of public words the number of theirs; DataError if it has neither."""
        several = example.labels if isinstance(example, SeveralLabels) else ()
        return list(several) or super().labels_of(example, number)

    def collate(self, base: BaseModel, records: Sequence[Record], size: int = 0) -> Batch:
        """Return int64 tensors of shape (records, tokens), padded on the right, and ``labels``, (records, labels).

        Of records that are no one's that has one column, with the number of a label.
        """
        import torch

        first = [{**record, "labels": record["labels"][:1]} for record in records]
        return {**super().collate(base, first, size), "labels": torch.tensor([record["labels"] for record in records])}

    def made_up(self, like: Record, tokens: Sequence[int], label: int = 0) -> Record:
        """Return a record of one text, of this label; of none, if the like one has labels."""
        labels = [label] if len(like["labels"]) == 1 else [0] * len(like["labels"])
        return {**super().made_up(like, tokens, label), "labels": labels}

    def module(self, encoder: nn.Module, base: BaseModel, classes: int, feature_scale: float) -> TaskModule:
        """Return the encoder with a head on its pooled features, which begins as if a record had one label."""
        made = super().module(encoder, base, classes, feature_scale)
        made.error, made.prior = 0.5 / classes, -math.log(classes - 1)
        return made

    def sums(self, module: nn.Module, batch: Batch) -> Sums:
        """Return binary cross-entropies and right labels, one unit a label of a record."""
        import torch
        import torch.nn.functional as F

        logits = module(batch)
        there, given = targets_of(logits, batch["labels"]).bool(), logits >= 0
        loss = F.binary_cross_entropy_with_logits(logits, there.to(logits.dtype), reduction="none").sum(1)
        correct = (given == there).sum(1).float()
        weight = torch.full_like(loss, logits.shape[1])
        sums = Sums(loss, correct, weight, parts=lambda: torch.stack([given & there, there, given], 1).long())
        return replace(sums, beside={"exact match": sums.whole.float()})


class StockMultiLabel(MultiLabel, StockClassification):
    """Any of the labels, or none, a record; the head reads the pooler."""

    export: ClassVar[Export] = StockSeveralExport()


MultiLabel.readings["stock"] = StockMultiLabel

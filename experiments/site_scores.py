"""Scores of models on a site's own held-out rows, in all and by slice, each with its interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fedveil.common.tasks.examples import Example
from fedveil.common.words import counted, decimal_text, percent_text
from fedveil.reports.scores import ALL, Share, interval_text, ratio, wilson

BLANK = "(blank)"
"""What a slice is called whose rows have nothing in the column."""
Sum = tuple[float, float, float]
"""Of one record: what is right (where records are counted, 1 for a whole answer), the loss, over how much both are."""
Scorer = Callable[[Example], Sum | None]
"""Returns a record's sum; None: the model cannot take the record."""


@dataclass(frozen=True)
class Group:
    """The score of a model on one slice of the held-out rows, or on all of them."""

    name: str
    """``all``, or what the rows have in the column."""
    records: int
    accuracy: Share | None
    """None, as the loss: no record of it was scored."""
    loss: float | None
    """Mean cross-entropy, in nats."""


@dataclass(frozen=True)
class ModelScore:
    """The score of one model."""

    model: str
    groups: list[Group]
    """All rows first, then each slice by its name."""
    unscored: int
    """Rows that the model cannot take."""


@dataclass(frozen=True)
class SiteScores:
    """What a steward reads; nothing of it has noise, and no ε covers it."""

    site: str
    made: str
    """UTC, ISO 8601."""
    rule: str
    """By which rows are held out."""
    held_out: int
    charged: int
    """Held-out rows that the ledger was ever charged for, under whatever name; no score has them."""
    column: str
    """Of the slices; empty: there are none."""
    share: str
    """What the percentages are of: records, tokens, or answers that are right as a whole."""
    models: list[ModelScore]

    def lines(self) -> Iterator[str]:
        """Yield what a terminal shows."""
        left_out = f", without {counted(self.charged, 'row')} that the ledger was charged for" * bool(self.charged)
        yield f"{self.site}: {counted(self.held_out, 'held-out row')} ({self.rule}){left_out}; {self.share}"
        for model in self.models:
            more = f"; {counted(model.unscored, 'row')} it cannot take" if model.unscored else ""
            whole, *slices = model.groups
            yield f"{model.model}: {_said(whole)}{more}"
            for group in slices:
                yield f"  {self.column} = {group.name}: {_said(group)}"


def _said(group: Group) -> str:
    if group.accuracy is None or group.loss is None:
        return "no row is scored"
    interval, loss = interval_text(group.accuracy), decimal_text(group.loss, 4)
    return f"{percent_text(group.accuracy.value)} ({interval}), loss {loss}, {counted(group.records, 'row')}"


def score_model(model: str, examples: Sequence[Example], scorer: Scorer, *, counts: bool, sliced: bool) -> ModelScore:
    """Return a model's score, each record by itself: the shape of a batch would move it by rounding.

    Args:
        model: what it is called.
        examples: of the held-out rows.
        scorer: the model's.
        counts: whether a record is right or wrong as a whole, by its task.
        sliced: whether the examples have a slice.
    """
    sums = [scorer(example) for example in examples]
    groups: dict[str, list[Sum]] = {ALL: []}
    for example, one in zip(examples, sums, strict=True):
        for name in (ALL, *([example.slice or BLANK] if sliced else ())):
            groups.setdefault(name, []).extend([one] if one else [])
    names = [ALL, *sorted(groups.keys() - {ALL})]
    return ModelScore(model, [_group(name, groups[name], counts) for name in names], sums.count(None))


def _group(name: str, sums: Sequence[Sum], counts: bool) -> Group:
    if not sums:
        return Group(name, 0, None, None)
    right, loss, weight = (math.fsum(column) for column in zip(*sums, strict=True))
    share = wilson(round(right), len(sums)) if counts else ratio([one[0] for one in sums], [one[2] for one in sums])
    return Group(name, len(sums), share, loss / weight)

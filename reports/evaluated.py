"""Gains and losses of a run's model on sets of records, beside the model that the run began with."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from fedveil.common.model.score import Z
from fedveil.common.run_lines import RunFile
from fedveil.common.strict_json import SPARSE, Measured
from fedveil.common.words import counted, decimal_text
from fedveil.reports.scores import FigureReport, Share, ratio, share_text, wilson


@dataclass(frozen=True)
class Answer:
    """What one model answers to one record."""

    correct: float
    """Right answers: 1 or 0, or the completion's right tokens, or an answer's right labels."""
    loss: float
    """In nats, over ``weight``."""
    weight: float
    """Answers that both are over: 1, or the completion's tokens, or the labels."""
    predicted: int | None
    """The label that it gives; None: it gives none, or several."""

    @property
    def whole(self) -> bool:
        """Whether the whole answer is right."""
        return self.correct >= self.weight


@dataclass(frozen=True)
class Pair:
    """The answers of two models to one record."""

    before: Answer
    after: Answer
    drift: float | None
    """KL(before || after) in nats, over the record's weight; None as ``Change.drift``."""
    label: int | None
    """None: the record has none."""


@dataclass(frozen=True)
class Change:
    """Scores of two models on the records of one slice."""

    slice: str
    """``all``, or a value of the column."""
    records: int
    before: Share | None
    """Share of right answers with its 95 % interval: of records whose whole answer is right, by Wilson; of a language
    model of the completion's tokens, as a ratio."""
    after: Share | None
    change: Share
    """After less before, -1 to 1, with the 95 % interval of pairs: Agresti and Min's (2005, doi 10.1002/sim.1781), of
    tokens a ratio's."""
    gained: int
    """Records whose whole answer only the model after has right."""
    forgotten: int
    """Records that only the model before has right."""
    p: float
    """McNemar's exact test of gained against forgotten, two-sided."""
    kept: Share | None
    """Share that is still right of what was right before, which is CoDyRA's retention. None: nothing was."""
    drift: Measured | None
    """Mean divergence of the answers, KL(before || after), in nats a record or a completion's token: AlignGuard's
    drift. None: of pairs and of rewards, whose answer is no distribution."""
    loss_before: Measured
    """Mean cross-entropy in nats, a record or a completion's token."""
    loss_after: Measured
    confusion_before: list[list[int]]
    """Records by their label and by the one that they are given; empty: not counted."""
    confusion_after: list[list[int]]

    def lines(self) -> Iterator[str]:
        """Yield what a terminal shows."""
        low, value, high = (f"{100 * end:+.1f}" for end in (self.change.low, self.change.value, self.change.high))
        losses = f"loss {decimal_text(self.loss_before, 4)}, then {decimal_text(self.loss_after, 4)}"
        yield f"before {share_text(self.before)}, after {share_text(self.after)}: {value} points ({low} to {high})"
        yield (
            f"gained {self.gained}, forgotten {self.forgotten} (p {self.p:.2g}), kept {share_text(self.kept)}, "
            f"drift {decimal_text(self.drift, 4)}, {losses}"
        )


@dataclass(frozen=True)
class Evaluation:
    """What one model of a run gained and forgot on one set."""

    set: str
    sha256: str
    """Of the records in any order."""
    left_out: int
    """Records that the run's sites trained on, or nearly the same ones: known where those are a named data set."""
    model: str
    """``final``, or ``rank R``: the adapter cut to its first R columns."""
    labels: list[str]
    column: str
    """Of the slices; empty: there are none."""
    changes: list[Change]
    """All records first, then each slice by its name."""
    figures: list[FigureReport] = field(default_factory=list, metadata=SPARSE)
    """What the task's score has beside, as micro and macro F1, of all records."""

    def lines(self) -> Iterator[str]:
        """Yield what a terminal shows."""
        if self.left_out:
            yield f"{self.set}: {counted(self.left_out, 'record')} left out that sites trained on"
        for change in self.changes:
            sliced = f", {self.column} = {change.slice}" if change is not self.changes[0] else ""
            yield f"{self.set}, {self.model}{sliced} ({counted(change.records, 'record')})"
            yield from (f"    {line}" for line in change.lines())
        for figure in self.figures:
            yield f"    {figure.name}: before {share_text(figure.before)}, after {share_text(figure.after)}"


@dataclass(frozen=True)
class EvaluatedFile(RunFile):
    """The model before and after on other sets (``fedveil evaluate --on``), of each set the last evaluation."""

    NAME: ClassVar[str] = "evaluated.json"
    evaluations: list[Evaluation]


def change_of(name: str, pairs: Sequence[Pair], *, counts: bool, classes: int) -> Change:
    """Return what changed on the records of a slice.

    Args:
        name: of the slice.
        pairs: of its records, at least one.
        counts: whether a record's answer is right or wrong as a whole, by its task.
        classes: number of labels whose confusion is counted; 0: none.
    """
    first, last = [pair.before for pair in pairs], [pair.after for pair in pairs]
    before, after, change = _shares(first, last, counts=counts)
    weight = math.fsum(answer.weight for answer in first)
    drifts = [pair.drift for pair in pairs if pair.drift is not None]
    right = [(pair.before.whole, pair.after.whole) for pair in pairs]
    gained, forgotten, both = (right.count(which) for which in ((False, True), (True, False), (True, True)))
    return Change(
        slice=name,
        records=len(pairs),
        before=before,
        after=after,
        change=change,
        gained=gained,
        forgotten=forgotten,
        p=mcnemar(gained, forgotten),
        kept=wilson(both, both + forgotten),
        drift=math.fsum(drifts) / weight if drifts else None,
        loss_before=math.fsum(answer.loss for answer in first) / weight,
        loss_after=math.fsum(answer.loss for answer in last) / weight,
        confusion_before=_confusion([(pair.label, pair.before.predicted) for pair in pairs], classes),
        confusion_after=_confusion([(pair.label, pair.after.predicted) for pair in pairs], classes),
    )


def mcnemar(gained: int, forgotten: int) -> float:
    """Return the two-sided exact p of McNemar's test.

    >>> round(mcnemar(9, 1), 4), mcnemar(0, 0)
    (0.0215, 1.0)
    """
    from scipy.special import bdtr

    return min(1.0, 2 * float(bdtr(min(gained, forgotten), gained + forgotten, 0.5)))


def _shares(
    first: Sequence[Answer], last: Sequence[Answer], *, counts: bool
) -> tuple[Share | None, Share | None, Share]:
    """Return the shares that are right before and after, and their difference, each with its interval."""
    n, weights = len(first), [answer.weight for answer in first]
    had, has = ([float(one.whole) if counts else one.correct for one in answers] for answers in (first, last))
    moves = [b - a for a, b in zip(had, has, strict=True)]
    if not counts:
        return ratio(had, weights), ratio(has, weights), ratio(moves, weights, lowest=-1.0)
    # Half a record more in each cell of the table of pairs.
    middle, changed = math.fsum(moves) / (n + 2), sum(move != 0 for move in moves) + 1
    half = Z * math.sqrt(max(0.0, changed / (n + 2) - middle * middle) / (n + 2))
    change = Share(math.fsum(moves) / n, max(-1.0, middle - half), min(1.0, middle + half))
    return wilson(round(math.fsum(had)), n), wilson(round(math.fsum(has)), n), change


def _confusion(given: Sequence[tuple[int | None, int | None]], classes: int) -> list[list[int]]:
    pairs = Counter(given)
    if any(None in pair for pair in pairs):
        return []
    return [[pairs[label, other] for other in range(classes)] for label in range(classes)]

"""Scores on the public test part with intervals, of all records, by label and by part, before and after training.

The interval is Wilson's (1927, doi 10.1080/01621459.1927.10502953) at 95 %: with k of n right, p = k / n and z = 1.96,

    (p + z² / 2n ± z √(p (1 - p) / n + z² / 4n²)) / (1 + z² / n),

which holds for few records too, and for none or all of them right. It is of the test part as a sample: the same records
are judged before and after, so that two intervals may overlap where the difference is sure.

Where an answer has several parts, such as labels, F1 = 2 J / (1 + J) rises with J, the share of right ones among the
parts that are there or given, so the ends of J's interval give those of F1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedveil.common.model.score import Z, half_of_ratio
from fedveil.common.model.score import macro_f1 as macro_f1_of
from fedveil.common.other_runs import BesideRow
from fedveil.common.run_lines import Figure, LabelScore
from fedveil.common.words import UNKNOWN, percent_text
from fedveil.privacy.figures import honest_text

ALL = "all"
RARE = 50
"""Test records that have a label, below which it is called rare: its figures say little, whatever their intervals."""


@dataclass(frozen=True)
class Share:
    """A share of records with its 95 % interval, each from 0 to 1."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class LabelReport:
    """The accuracy on the records of one label, or on all."""

    label: str
    """``all``: whatever the label."""
    records: int
    before: Share | None
    """None, as after: there are no records, or no score."""
    after: Share | None


@dataclass(frozen=True)
class FigureReport:
    """A named figure of the score."""

    name: str
    before: Share | None
    """None, as after: it was not scored. Its ends are its value where it has no interval."""
    after: Share | None


@dataclass(frozen=True)
class PartReport:
    """How the model does on one kind of part of an answer, such as a label of several."""

    label: str
    records: int
    """Those that are there."""
    before: Share | None
    """F1 before training; None, as the others: none is there or given."""
    precision: Share | None
    recall: Share | None
    after: Share | None
    """F1."""

    @property
    def rare(self) -> bool:
        """Whether too few are there to say much."""
        return self.records < RARE


@dataclass(frozen=True)
class Confusion:
    """Which labels are taken for which."""

    labels: list[str]
    records: list[list[int]]
    """By their label, and by the one that the model gives them."""


def wilson(right: int, records: int) -> Share | None:
    """Return the share of ``right`` among ``records`` with Wilson's 95 % interval; None without records.

    >>> share = wilson(80, 100)
    >>> round(share.low, 4), round(share.high, 4)
    (0.7112, 0.8666)
    """
    if records < 1:
        return None
    p, tail = right / records, Z * Z / records
    middle, half = p + tail / 2, Z * math.sqrt(p * (1 - p) / records + tail / 4 / records)
    return Share(p, max(0.0, (middle - half) / (1 + tail)), min(1.0, (middle + half) / (1 + tail)))


def ratio(parts: Sequence[float], weights: Sequence[float], *, lowest: float = 0.0) -> Share:
    """Return the share of all parts in all weights, each a record's, with its normal 95 % interval.

    Args:
        parts, weights: of one record or more.
        lowest: that the share can be; 1 is the highest.
    """
    share, half = math.fsum(parts) / math.fsum(weights), half_of_ratio(parts, weights)
    return Share(share, max(lowest, share - half), min(1.0, share + half))


def label_reports(before: Sequence[LabelScore], after: Sequence[LabelScore]) -> list[LabelReport]:
    """Return the accuracy on all records and then by label, in the order of the labels; empty without counts.

    Args:
        before: of the model before round 1; empty: unknown, as where its file is damaged.
        after: of the last round that was scored; empty: none was.
    """
    if not before and not after:
        return []
    had, last = ({score.label: score for score in scores} for scores in (before, after))
    rows = [(ALL, _whole(before), _whole(after)), *((name, had.get(name), last.get(name)) for name in had or last)]
    return [
        LabelReport(name, next(score.records for score in (first, then) if score), _share(first), _share(then))
        for name, first, then in rows
    ]


def macro_f1(scores: Sequence[LabelScore]) -> float | None:
    """Return the mean of F1 over the labels that a record has or is given, 0 to 1; None where this was not counted.

    >>> macro_f1([LabelScore("bad", 3, 4, 3), LabelScore("good", 6, 6, 7)])  # doctest: +ELLIPSIS
    0.890...
    """
    return macro_f1_of([(one.right, one.records, one.predicted) for one in scores if one.predicted is not None])


def figure_reports(before: Sequence[Figure], after: Sequence[Figure]) -> list[FigureReport]:
    """Return the named figures before and after training, in the order of the score; see ``label_reports``."""
    had, last = ({figure.name: _ends(figure) for figure in figures} for figures in (before, after))
    return [FigureReport(name, had.get(name), last.get(name)) for name in had | last]


def _ends(figure: Figure) -> Share:
    half = figure.half or 0.0
    return Share(figure.value, max(0.0, figure.value - half), min(1.0, figure.value + half))


def part_reports(before: Sequence[LabelScore], after: Sequence[LabelScore]) -> list[PartReport]:
    """Return precision, recall and F1 by kind of part; see ``label_reports``."""
    had, last = ({score.label: score for score in scores} for scores in (before, after))
    return [
        PartReport(
            name,
            next(score.records for score in (had.get(name), now) if score),
            f1_share(had.get(name)),
            wilson(now.right, now.predicted or 0) if now else None,
            wilson(now.right, now.records) if now else None,
            f1_share(now),
        )
        for name in had | last
        for now in (last.get(name),)
    ]


def f1_share(score: LabelScore | None) -> Share | None:
    """Return F1 with its 95 % interval; None where no part is there or given.

    >>> share = f1_share(LabelScore("joy", 80, 100, 80))
    >>> round(share.value, 4), round(share.low, 4), round(share.high, 4)
    (0.8889, 0.8312, 0.9286)
    """
    found = wilson(score.right, score.records + (score.predicted or 0) - score.right) if score else None
    return found and Share(*(2 * end / (1 + end) for end in (found.value, found.low, found.high)))


def confusion_of(scores: Sequence[LabelScore]) -> Confusion | None:
    """Return which labels are taken for which; None where this was not counted."""
    counts = [score.confused for score in scores]
    return Confusion([score.label for score in scores], counts) if counts and all(counts) else None


def _whole(scores: Sequence[LabelScore]) -> LabelScore | None:
    """Return the score on the records of all labels; None without scores."""
    records = sum(score.records for score in scores)
    return LabelScore(ALL, sum(score.right for score in scores), records) if scores else None


def _share(score: LabelScore | None) -> Share | None:
    return wilson(score.right, score.records) if score else None


BESIDE = (
    "Means over a sweep's runs, ± half of the 95 % interval. They show whether federating helped, and what privacy "
    "cost. An ε with h holds as long as h sites are honest."
)


def beside_cells(row: BesideRow) -> tuple[str, ...]:
    """Return variant, arm, ε, runs and accuracies of other runs as text.

    >>> beside_cells(BesideRow("head-only", "local-only", None, 0.731, 0.75, 0.012, 3))
    ('head-only', 'local-only', 'no privacy', '3', '73.1 %', '75.0 % ± 1.2')
    >>> beside_cells(BesideRow("sum", "federated", 3.0, 0.731, 0.77, None, 1, honest=3))[2]
    '3 (h = 3)'
    """
    half = "" if row.half is None else f" ± {100 * row.half:.1f}"
    epsilon = "no privacy" if row.epsilon_asked is None else f"{row.epsilon_asked:g}"
    epsilon += honest_text(row.honest)
    accuracies = (percent_text(row.accuracy_before), f"{percent_text(row.accuracy)}{half}")
    return (row.variant, row.arm, epsilon, str(row.runs), *accuracies)


def share_text(share: Share | None) -> str:
    """Return a share with its interval in percent.

    >>> share_text(wilson(80, 100))
    '80.0 % (71.1 to 86.7)'
    """
    if share is None or share.low == share.high:  # a figure without an interval
        return UNKNOWN if share is None else percent_text(share.value)
    return f"{percent_text(share.value)} ({100 * share.low:.1f} to {100 * share.high:.1f})"


def interval_text(share: Share) -> str:
    """Return the 95 % interval of a share in percent."""
    return f"{100 * share.low:.1f} to {100 * share.high:.1f} %"

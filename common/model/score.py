"""The score of a model on public records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedveil.common.run_lines import Figure
from fedveil.common.words import percent_text

Z = 1.959963984540054
"""The 97.5 % quantile of the normal distribution."""
MOST_CONFUSED = 20
"""Labels up to which it is counted which are taken for which."""


@dataclass(frozen=True)
class Score:
    """How the model does on public data."""

    accuracy: float
    """Share of right labels, or of right next tokens of the completion; or the figure ``name`` in its place."""
    loss: float
    """Mean cross-entropy per record, or per token of the completion; in nats."""
    right: tuple[int, ...] = ()
    """Records that the model gets right, by label; empty where a record has no label."""
    records: tuple[int, ...] = ()
    """Records of each label."""
    predicted: tuple[int, ...] = ()
    """Records that the model gives each label."""
    confusion: tuple[tuple[int, ...], ...] = ()
    """Records by their label, and by the one that the model gives them; empty above ``MOST_CONFUSED`` labels."""
    slice_right: tuple[int, ...] = ()
    """Records that the model gets right, by slice of the test data; empty without slices."""
    slice_records: tuple[int, ...] = ()
    """Records of each slice."""
    name: str = "accuracy"
    """What the task is judged by (``Scored.headline``)."""
    figures: tuple[Figure, ...] = ()
    """The headline and what the task's score has beside it; of a task that has nothing beside, none."""
    parts: tuple[tuple[int, int, int], ...] = ()
    """By kind of part: right ones, those there are, and those that the model gives; empty: answers have no parts."""

    def __post_init__(self) -> None:
        # A checkpoint's JSON has lists, and objects for figures.
        figures = (figure if isinstance(figure, Figure) else Figure(**figure) for figure in self.figures)
        object.__setattr__(self, "figures", tuple(figures))
        object.__setattr__(self, "parts", tuple((right, there, given) for right, there, given in self.parts))
        for counts in ("right", "records", "predicted", "slice_right", "slice_records"):
            object.__setattr__(self, counts, tuple(getattr(self, counts)))
        object.__setattr__(self, "confusion", tuple(map(tuple, self.confusion)))


def f1(right: float, units: float) -> float:
    """Return F1, 2 right / (there + given), 0 to 1; 0 where nothing is there or given.

    Args:
        right: parts that are there and given.
        units: those that are there, and those that are given, together.
    """
    return 2 * right / units if units else 0.0


def macro_f1(parts: Sequence[tuple[int, int, int]]) -> float | None:
    """Return the mean of F1 over the kinds that a record has or is given, 0 to 1; None where no kind is.

    >>> macro_f1([(3, 4, 3), (6, 6, 7), (0, 0, 0)])  # doctest: +ELLIPSIS
    0.890...
    """
    shares = [f1(right, there + given) for right, there, given in parts if there + given]
    return sum(shares) / len(shares) if shares else None


def control_words(name: str, records: Sequence[int], predicted: Sequence[int] = ()) -> str:
    """Return what a score must beat without a model, in words; empty where labels are not counted.

    Args:
        name: what the task is judged by: of accuracy alone the share of a label is the score of answering it always.
        records: test records of each label.
        predicted: records to which the model gives each label; empty: not counted.

    >>> control_words("accuracy", (3, 7), (10, 0))
    'one label for every record; the most frequent label alone: 70.0 %'
    """
    if name != "accuracy" or sum(map(bool, records)) < 2:
        return ""
    constant = "one label for every record; " * (sum(map(bool, predicted)) == 1)
    return f"{constant}the most frequent label alone: {percent_text(max(records) / sum(records))}"


def half_of_ratio(tops: Sequence[float], bottoms: Sequence[float]) -> float:
    """Return half of the normal 95 % interval of sum(tops) / sum(bottoms), each a record's; 1 for fewer than two."""
    n, bottom = len(tops), math.fsum(bottoms)
    if n < 2 or not bottom:
        return 1.0
    ratio = math.fsum(tops) / bottom
    spread = math.fsum((top - ratio * below) ** 2 for top, below in zip(tops, bottoms, strict=True)) * n / (n - 1)
    return Z * math.sqrt(spread) / bottom

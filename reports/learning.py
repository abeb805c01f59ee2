"""The layers of an adapter that learnt in a run, from the lines that its server wrote of what the sites sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common.nulls import LEVEL, least_score
from common.run_lines import RoundLine
from common.words import UNKNOWN, decimal_text, number_text

SHOWN_ROUNDS = 8
"""Last rounds whose scores a table shows; the report's JSON has all."""


@dataclass(frozen=True)
class LayerReport:
    """What one layer's changes tell over the rounds that count."""

    layer: str
    numbers: int
    """That sites train in it."""
    scores: list[tuple[int, float | None]]
    """By round, in standard deviations of what noise alone gives; None where that noise is not known."""
    least: float
    """The score above which a layer learns, by the layers of the last round."""
    learnt: int
    """Rounds whose score is above it."""
    agreement: float | None
    """Of the last round: mean cosine of two sites' changes; None of a sum, or of one site."""
    rank: int
    above: int | None
    """Of the last round: singular values of the averaged change above the edge of the noise, of ``rank``."""
    form: str
    """Of the last round: ``across sites`` or ``of the sum``."""


def layer_reports(rounds: Sequence[RoundLine]) -> list[LayerReport]:
    """Return a row for each layer of the last round that has statistics, in its order."""
    told = [line for line in rounds if line.complete and line.learning]
    if not told:
        return []
    last = told[-1].learning
    courses: dict[str, list[tuple[int, float | None]]] = {line.layer: [] for line in last}
    for line in told:
        for own in line.learning:
            if own.layer in courses:
                courses[own.layer].append((line.round_number, own.score))
    least = least_score(len(last))
    return [
        LayerReport(
            layer=own.layer,
            numbers=own.numbers,
            scores=courses[own.layer],
            least=least,
            learnt=sum(score is not None and score > least for _, score in courses[own.layer]),
            agreement=own.agreement,
            rank=own.rank,
            above=own.above,
            form=own.form,
        )
        for own in last
    ]


def learning_sentence(rows: Sequence[LayerReport], *, central: bool = False) -> str:
    """Return what the table of layers is of, what a score means, and what it rests on.

    Args:
        rows: of the table; at least one.
        central: whether a trusted server noised the sum itself.
    """
    first = rows[0]
    if all(score is None for row in rows for _, score in row.scores):
        return (
            "Agreement is the mean cosine of two sites' changes in the last round. There is no score: it needs noise "
            "that is known, of one plain step a round."
        )
    computed = "of the server's noised sum" if central else "from what was sent, which is noised already"
    known = (
        f"A score is in standard deviations of what noise alone gives. Above {first.least:.2f} a layer learns; where "
        f"none does, one round in {1 / LEVEL:.0f} has such a layer by chance. It is computed {computed}, and "
        "costs no privacy."
    )
    if central:
        return f"{known} It rests on the server's own noise, of which it knows how much it drew."
    if first.form == "of the sum":
        return (
            f"{known} The server sees the sum of all sites alone, so the score is of the sum: it rests on the noise "
            "that sites state, and more noise than that raises it."
        )
    return f"{known} It is of what two sites' changes have in common: its mean under noise is 0, however much there is."


LEARNING_COLUMNS = ("layer", "numbers", "scores by round", "rounds that learnt", "agreement", "above the noise's edge")


def learning_cells(row: LayerReport) -> tuple[str, ...]:
    """Return a row of the table of layers as text."""
    shown = row.scores[-SHOWN_ROUNDS:]
    scores = ", ".join(decimal_text(score, 1) for _, score in shown)
    cut = "… " if len(row.scores) > len(shown) else ""
    known = [score for _, score in row.scores if score is not None]
    return (
        row.layer,
        number_text(row.numbers),
        f"{cut}{scores}",
        f"{row.learnt} of {len(known)}" if known else UNKNOWN,
        decimal_text(row.agreement, 2),
        UNKNOWN if row.above is None else f"{row.above} of {row.rank}",
    )

"""The line that the terminal shows after each round."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from fedveil.common.words import decimal_text, natural
from fedveil.privacy.figures import epsilon_text
from fedveil.reports.alike import alike_absences
from fedveil.reports.sites import TOLERANCE

if TYPE_CHECKING:  # a report is made from files alone, without loading what trains
    from fedveil.common.messages.round import Spending
    from fedveil.common.model.score import Score
    from fedveil.server.collect.shown import Shown
    from fedveil.server.members import Member
    from fedveil.server.observers import RoundOutcome


def epsilon_words(
    spendings: Iterable[Spending | None], unit: str, whose: str = "worst site", own: float | None = None
) -> str:
    """Return the federation's figures so far, each the maximum over sites, because their records are disjoint.

    Of a trusted server they are its ledger's. Sites that did not take part in the last round have spent what they had
    before.

    Args:
        figures: of each site.
        unit: of the promise, in a word.
        whose: the figures are.
        own: the figure by all lines of the run (``reports.course.epsilon_by``), which holds where it is the larger: a
            site may tell less than its releases cost; None: not known.
    """
    spent = [one for one in spendings if one]
    if not spent:
        return "privacy OFF, no claim"
    worst = max(spent, key=lambda s: s.epsilon_total)
    total, delta = epsilon_text(max(worst.epsilon_total, own or 0.0)), max(s.delta for s in spent)
    why = ""
    if own is not None and own > worst.epsilon_total + TOLERANCE:
        why = f", by the lines in privacy.jsonl: who counts told {epsilon_text(worst.epsilon_total)}"
    elif math.isinf(worst.epsilon_total):
        why = ", its records were released without privacy before"
    elif worst.epsilon_total > worst.epsilon_budget:
        why = ", its records were charged under other names too"
    return f"ε {total} of {worst.epsilon_budget:g} (δ {delta:g}, {unit}-level, {whose}{why})"


def score_words(score: Score | None) -> str:
    """Return accuracy, what is beside it, and loss, with two blanks behind; nothing of a round that was not scored."""
    return f"{figures_words(score)}  loss {decimal_text(score.loss, 3)}  " if score else ""


def figures_words(score: Score) -> str:
    """Return what the task is judged by and the figures beside it, in percent."""
    beside = {figure.name: figure.value for figure in score.figures}
    figures = {score.name: score.accuracy, **beside}
    return "  ".join(f"{name} {100 * value:.1f} %" for name, value in figures.items())


def round_line(shown: Shown, outcome: RoundOutcome, members: Mapping[str, Member], own: float | None = None) -> str:
    """Return the terminal line of one round, with one more for every refusal; ``members`` are all that counted.

    Of many refusals those of one reason are one line. ``own`` as in ``epsilon_words``.
    """
    got, seconds = outcome.got, shown.seconds(outcome.seconds)
    spent = epsilon_words(shown.spent(got, members), shown.unit, shown.whose, own)
    payload = (got.bytes_down + got.bytes_up) / 1e6
    line = (
        f"round {outcome.round_number}/{shown.rounds}  {score_words(outcome.score)}"
        f"{spent}  {shown.sites(got)}  {payload:.2f} MB" + ("" if seconds is None else f"  {outcome.seconds:.0f} s")
    )
    refused = sorted(got.refusals.values(), key=lambda absence: natural(absence.site))
    rows = alike_absences(refused, len(refused))
    return line + "".join(f"\n  {names} did not take part ({row.kind}): {row.reason}" for names, row in rows)

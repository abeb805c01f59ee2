"""The charts of the page: the courses of ε and of accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence

from common.words import EACH, number_text
from reports.charts import Axis, Chart, Curve, Mark, line_chart
from reports.claim import server_is_trusted
from reports.data import ReportData
from reports.document import Drawing, Section
from reports.sharing import at_h

NAMED_SITES = 4
"""Sites that a line of a chart names one by one."""


def group_text(sites: list[str]) -> str:
    """Return the names of a line's sites: each, or the first and the last of many with their number."""
    if len(sites) <= NAMED_SITES:
        return ", ".join(sites)
    return f"{sites[0]} … {sites[-1]} ({number_text(len(sites))} sites)"


def course_of(data: ReportData, group: str) -> list[Section]:
    """Return the section of the run's course; no section where there is nothing to draw.

    Args:
        data: the report.
        group: where the contents name it.
    """
    central, at = server_is_trusted(data.claim.privacy_mode), at_h(data.sharing)
    curves, left_out = courses_of(data)
    ledger = "the server's ledger" if central else "the sites' own ledgers"
    spent = f"ε by {ledger}{at}; the dashed line is the budget.{left_out}"
    drawn = [(epsilon_chart(data, curves), "Privacy spent over rounds.", spent)]
    if data.headline.epsilon is not None and math.isfinite(data.headline.epsilon):
        text = f"One point a round{at}; right is dearer, up is better."
        drawn.append((accuracy_chart(data), "Accuracy against privacy.", text))
    else:
        text = "On public test data; round 0 is before round 1."
        drawn.append((accuracy_chart(data), "Accuracy over rounds.", text))
    blocks = [Drawing(chart, title, text) for chart, title, text in drawn if chart]
    return [Section("course", "Course of the run", group, blocks)] if blocks else []


def courses_of(data: ReportData) -> tuple[list[Curve], str]:
    """Return the courses of ε and which are left out, in words: of more than ``EACH`` three are drawn."""
    spent = data.spent
    if len(spent) <= EACH:
        return [Curve(group_text(one.sites), one.points) for one in spent], ""
    ended = sorted(spent, key=lambda one: one.points[-1][1])
    ends = {"lowest": ended[0], "middle": ended[len(ended) // 2], "highest": ended[-1]}
    text = (
        f" Of {number_text(len(spent))} different courses the ones that ended lowest, in the middle and highest; "
        "report.json has all."
    )
    return [Curve(f"{word}: {group_text(one.sites)}", one.points) for word, one in ends.items()], text


def epsilon_chart(data: ReportData, curves: Sequence[Curve]) -> Chart | None:
    """Return ε over rounds, one line for all sites that have spent alike, and the budgets; None without a claim."""
    budgets = sorted({spent.budget for spent in data.spent})
    marks = [Mark(budget, f"budget {budget:g}") for budget in budgets]
    if len(budgets) > NAMED_SITES:
        marks = [Mark(budgets[0], f"lowest budget {budgets[0]:g}"), Mark(budgets[-1], f"highest {budgets[-1]:g}")]
    whose = "server" if server_is_trusted(data.claim.privacy_mode) else "site"
    return line_chart(
        "epsilon",
        "Privacy spent over rounds, by site, with the budget",
        Axis("round", whole=True),
        Axis(f"ε spent, by the {whose}'s ledger{at_h(data.sharing)}", from_zero=True),
        curves,
        marks,
    )


def accuracy_chart(data: ReportData) -> Chart | None:
    """Return accuracy against ε, or against rounds where there is no finite ε."""
    y = Axis("accuracy on public test data", percent=True)
    if data.headline.epsilon is None or not math.isfinite(data.headline.epsilon):
        points = [(float(r.round_number), r.accuracy) for r in data.rounds if r.accuracy is not None]
        return line_chart(
            "accuracy", "Accuracy over rounds", Axis("round", whole=True), y, [Curve(data.method, points)]
        )
    course = [(r.epsilon_worst or 0.0, r.accuracy, r.round_number) for r in data.rounds if r.accuracy is not None]
    ends = [] if len(course) < 2 else [course[0], course[-1]]
    whose = "cohort" if server_is_trusted(data.claim.privacy_mode) else f"worst site{at_h(data.sharing)}"
    return line_chart(
        "accuracy",
        f"Accuracy against the privacy spent by the {whose}",
        Axis(f"ε spent, {whose}", from_zero=True),
        y,
        [Curve(data.method, [(epsilon, accuracy) for epsilon, accuracy, _ in course])],
        [Mark(data.headline.epsilon_budget, f"budget {data.headline.epsilon_budget:g}", upright=True)]
        if data.headline.epsilon_budget
        else [],
        [(epsilon, accuracy, f"round {n}" if n else "before") for epsilon, accuracy, n in ends],
    )

"""The charts of the page: what each shows, and which rows of a long table it leaves to the table."""

from __future__ import annotations

import math
from dataclasses import dataclass

from common.words import EACH, counted, number_text
from reports.alike import groups_of_sites
from reports.charts import STYLES, Axis, Chart, Curve, Mark, line_chart
from reports.claim import server_is_trusted
from reports.data import ReportData, Spent
from reports.sharing import at_h

NAMED_SITES = 4
"""Sites that a line of a chart names one by one."""


def group_text(sites: list[str]) -> str:
    """Return the names of a line's sites: each, or the first and the last of many with their number."""
    if len(sites) <= NAMED_SITES:
        return ", ".join(sites)
    return f"{sites[0]} … {sites[-1]} ({number_text(len(sites))} sites)"


@dataclass(frozen=True)
class Courses:
    """Courses of ε that chart and table show, each with its name."""

    shown: list[tuple[str, Spent]]
    of: int
    """How many there are in all."""
    odd: int
    """How many of those that are shown are there because their sites are odd."""

    @property
    def text(self) -> str:
        """What is left out, in words; empty: nothing."""
        if self.of == len(self.shown):
            return ""
        odd = f", and {counted(self.odd, 'odd one')}" if self.odd else ""
        return (
            f" Of {number_text(self.of)} different courses the ones that ended lowest, in the middle and "
            f"highest{odd}; report.json has all."
        )

    def rows(self) -> list[tuple[int, list[float | None]]]:
        """Return the chart as a table: by round, the ε of each course."""
        numbers = sorted({number for _, spent in self.shown for number, _ in spent.points})
        courses = [dict(spent.points) for _, spent in self.shown]
        return [(number, [course.get(number) for course in courses]) for number in numbers]


def courses_of(data: ReportData) -> Courses:
    """Return all courses of ε; of more than ``EACH`` the lowest, the middle, the highest, and some of odd sites.

    A site is odd whose row of the table of sites stands for ``EACH`` sites or fewer, and not for the most.
    """
    spent = data.spent
    if len(spent) <= EACH:
        return Courses([(group_text(one.sites), one) for one in spent], len(spent), 0)
    ended = sorted(spent, key=lambda one: one.points[-1][1])
    ends = {"lowest": ended[0], "middle": ended[len(ended) // 2], "highest": ended[-1]}
    groups = groups_of_sites(data.sites)
    usual = max(groups, key=len, default=[])
    few = {site.site for group in groups if len(group) <= EACH and group is not usual for site in group}
    kept = list(ends.values())
    odd = [one for one in spent if not few.isdisjoint(one.sites) and one not in kept][: STYLES - len(ends)]
    shown = [(f"{word}: {group_text(one.sites)}", one) for word, one in ends.items()]
    shown += [(f"odd: {group_text([site for site in one.sites if site in few])}", one) for one in odd]
    return Courses(shown, len(spent), len(odd))


def epsilon_chart(data: ReportData, courses: Courses) -> Chart | None:
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
        [Curve(name, spent.points) for name, spent in courses.shown],
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

"""The charts of the page: what each shows, and which rows of a long table it leaves to the table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from common.privacy.figures import bound_text, epsilon_text, honest_text
from common.run_lines import BesideRow
from common.words import EACH, counted, number_text, percent_text
from reports.alike import groups_of_sites
from reports.charts import STYLES, Axis, Chart, Curve, Mark, line_chart
from reports.claim import server_is_trusted
from reports.data import ReportData, Spent, setting_of
from reports.intervals import MOST, Dot, Row, interval_chart
from reports.meaning import MeaningReport
from reports.scores import LabelReport, Share
from reports.sharing import at_h

T = TypeVar("T")

NAMED_SITES = 4
"""Sites that a line of a chart names one by one."""
BEFORE_AFTER = ("before training", "after training")
OF_RECORDS = "A dot is the share, its whisker the 95 % interval of the table."


@dataclass(frozen=True)
class Figure:
    """A chart and its caption."""

    chart: Chart
    title: str
    text: str


def attack_figure(meaning: MeaningReport | None) -> Figure | None:
    """Return the bounds on attacks beside guessing; None without bounds."""
    if meaning is None:
        return None
    rows = [
        Row(
            f"at {100 * attack.false_positives:g} % false alarms",
            [Dot(attack.false_positives), Dot(attack.true_positives)],
            f"at most {bound_text(attack.true_positives)}",
        )
        for attack in meaning.bounds.attacks
    ]
    title = f"Members that an attacker finds{_at(meaning)}."
    axis = Axis(f"share of the {meaning.per}s trained on that are found", percent=True, from_zero=True)
    chart = interval_chart("attacks", title, axis, ("by guessing", "by the best attack, at most"), rows)
    return (
        Figure(chart, title, "What any attack may reach, beside guessing. Further right is worse.") if chart else None
    )


def _at(meaning: MeaningReport) -> str:
    return f", h = {meaning.honest_sites}" if meaning.honest_sites else ""


def several_figure(meaning: MeaningReport | None) -> Figure | None:
    """Return the ε of people with several units; None without figures."""
    if meaning is None or not meaning.bounds.several:
        return None
    people = [(1, meaning.epsilon), *((several.units, several.epsilon) for several in meaning.bounds.several)]
    rows = [
        Row(counted(units, meaning.counted.removesuffix("s")), [Dot(value)], f"ε {epsilon_text(value)}")
        for units, value in people
    ]
    title = f"ε of a person with several {meaning.counted}."
    chart = interval_chart(
        "several", title, Axis(f"ε at δ {meaning.delta:g}{_at(meaning)}", from_zero=True), ("ε",), rows
    )
    return Figure(chart, title, f"{meaning.whose}. Further right is less protected.") if chart else None


def label_figure(data: ReportData) -> Figure | None:
    """Return the accuracy by label, of all records first; None without scores."""
    if not data.accuracy:
        return None
    return _scores("labels", "Accuracy by label.", "labels", data.accuracy[:1], data.accuracy[1:])


def slice_figure(data: ReportData) -> Figure | None:
    """Return the accuracy by slice of the public test data, of all records first; None without slices."""
    if not data.slices:
        return None
    name = str(setting_of(data, "data.slice"))
    return _scores("slices", f"Accuracy by {name}.", f"values of {name}", data.accuracy[:1], data.slices)


def beside_figure(data: ReportData) -> Figure | None:
    """Return this run beside others; None where there are none."""
    if not data.beside or data.headline.accuracy_after is None:
        return None
    head = data.headline
    epsilon = "" if head.epsilon is None else f", ε {epsilon_text(head.epsilon)}{at_h(data.sharing)}"
    own = Row(
        "this run",
        [_dot(head.accuracy_before), _dot(head.accuracy_after)],
        _course(head.accuracy_before, head.accuracy_after),
    )
    rows, left = _worst_and_best(data.beside, lambda row: row.accuracy, MOST - 1)
    title = "This run beside others."
    axis = Axis("accuracy on public test data", percent=True)
    chart = interval_chart("beside", title, axis, BEFORE_AFTER, [own, *(_beside(row) for row in rows)])
    text = (
        f"This run: {data.method}{epsilon}. A whisker is the 95 % interval over runs; a single run has none, and so "
        "has this one."
    )
    return Figure(chart, title, text + _left_out(left, "others")) if chart else None


def _beside(row: BesideRow) -> Row:
    epsilon = "no privacy" if row.epsilon_asked is None else f"ε {row.epsilon_asked:g}"
    epsilon += honest_text(row.honest)
    after = Dot(row.accuracy)
    if row.half is not None:
        after = Dot(row.accuracy, max(0.0, row.accuracy - row.half), min(1.0, row.accuracy + row.half))
    name = f"{row.variant}, {row.arm}, {epsilon}"
    return Row(name, [Dot(row.accuracy_before), after], _course(row.accuracy_before, row.accuracy))


def _scores(name: str, title: str, of: str, whole: Sequence[LabelReport], rows: Sequence[LabelReport]) -> Figure | None:
    known = [row for row in rows if row.before or row.after]
    chosen, left = _worst_and_best(known, lambda row: (row.after or row.before or Share(0, 0, 0)).value, MOST - 1)
    drawn = [
        Row(
            "all records" if row in whole else row.label,
            [_interval(row.before), _interval(row.after)],
            _course(*(share.value if share else None for share in (row.before, row.after))),
        )
        for row in [*whole, *chosen]
    ]
    axis = Axis("accuracy on public test data", percent=True)
    chart = interval_chart(name, title, axis, BEFORE_AFTER, drawn)
    return Figure(chart, title, OF_RECORDS + _left_out(left, of)) if chart else None


def _worst_and_best(rows: Sequence[T], value: Callable[[T], float], most: int) -> tuple[list[T], tuple[int, int, int]]:
    """Return rows in their order, or of too many the lowest and the highest; and of how many these are how many."""
    if len(rows) <= most:
        return list(rows), (len(rows), len(rows), 0)
    ranked = sorted(rows, key=value)
    low = most // 2
    return [*ranked[:low], *ranked[low - most :]], (len(rows), low, most - low)


def _left_out(of: tuple[int, int, int], what: str) -> str:
    number, low, high = of
    return f" Of {number} {what} the {low} lowest and the {high} highest; the table has all." if high else ""


def _dot(value: float | None) -> Dot | None:
    return None if value is None else Dot(value)


def _interval(share: Share | None) -> Dot | None:
    return None if share is None else Dot(share.value, share.low, share.high)


def _course(before: float | None, after: float | None) -> str:
    return " → ".join(percent_text(value) for value in (before, after) if value is not None)


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

"""The report as one HTML page: nothing is loaded, nothing runs, everything from elsewhere is escaped."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from common import words
from common.privacy import figures
from reports.alike import alike_absences, alike_releases, alike_sites, participants_text
from reports.audits import NONE_RUN, WHOSE, audit_words, bound_sentences
from reports.charts import Axis, Chart, Curve, Mark, line_chart
from reports.claim import UNTOLD, none_refused, server_is_trusted
from reports.connection import NOT_KNOWN, NOT_RECORDED, SITES_OWN
from reports.data import ReportData, setting_of
from reports.fact_sheet import facts_of
from reports.learning import LEARNING_COLUMNS, learning_cells, learning_sentence
from reports.meaning import attack_sentence, several_sentence, whose_sentence
from reports.page_style import FACTS_STYLE, STYLE
from reports.page_template import FACTS, PAGE
from reports.scores import BESIDE, beside_cells, share_text
from reports.sharing import THIS_RUN, at_h, others_of, rests_on
from reports.sites import distinct
from reports.trials import trials_figure

NAMED_SITES = 4
"""Sites that a line of a chart names one by one."""


@lru_cache(maxsize=2)
def _template(page: str) -> Template:
    """Return a template, compiled once: a server writes the page after every round."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=_shown, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"epsilon": figures.epsilon_text, "remaining": figures.remaining_text}
    for name in ("percent", "number", "numbers", "bytes", "seconds", "value"):
        environment.filters[name] = getattr(words, f"{name}_text")
    environment.filters |= {"audit": audit_words, "figures": distinct}
    environment.filters |= {"attacks": attack_sentence, "several": several_sentence, "bound": figures.bound_text}
    environment.filters |= {"took_part": participants_text, "layer": learning_cells}
    environment.filters |= {"trials": trials_figure}
    environment.filters |= {"share": share_text, "beside": beside_cells}
    return environment.from_string(page)


def to_html(data: ReportData) -> str:
    """Return the whole report as one self-contained page."""
    central = server_is_trusted(data.claim.privacy_mode)
    return _template(PAGE).render(
        data=data,
        central=central,
        at=at_h(data.sharing),
        rests=rests_on(data.sharing),
        others=others_of(data.sharing) if data.sharing else [],
        sums=THIS_RUN,
        untold=UNTOLD,
        not_known=NOT_KNOWN,
        not_recorded=NOT_RECORDED,
        sites_own=SITES_OWN,
        none_refused=none_refused(central=central),
        whose_meaning=whose_sentence(data.meaning, central=central) if data.meaning else "",
        head=data.headline,
        claim=data.claim,
        none_run=NONE_RUN,
        beside=BESIDE,
        slice=str(setting_of(data, "data.slice")),
        bounds=bound_sentences(data.audit_results),
        whose=WHOSE,
        learning=learning_sentence(data.learning, central=central) if data.learning else "",
        learning_columns=LEARNING_COLUMNS,
        style=Markup(STYLE),
        epsilon_chart=epsilon_chart(data),
        accuracy_chart=accuracy_chart(data),
        site_rows=alike_sites(data.sites),
        refusal_rows=alike_absences(data.refusals, len(data.sites)),
        release_rows=alike_releases(data.other_releases, len(data.sites)),
        groups=[_group(spent.sites) for spent in data.spent],
        epsilon_rows=epsilon_rows(data),
    )


def to_fact_sheet(data: ReportData) -> str:
    """Return the fact sheet as one self-contained page."""
    return _template(FACTS).render(
        data=data, claim=data.claim, facts=facts_of(data), style=Markup(STYLE), own_style=Markup(FACTS_STYLE)
    )


def _shown(value: Any) -> Any:
    return words.visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _group(sites: list[str]) -> str:
    if len(sites) <= NAMED_SITES:
        return ", ".join(sites)
    return f"{sites[0]} … {sites[-1]} ({len(sites)} sites)"


def epsilon_chart(data: ReportData) -> Chart | None:
    """Return ε over rounds, one line for all sites that have spent alike, and the budgets; None without a claim."""
    budgets = sorted({spent.budget for spent in data.spent})
    whose = "server" if server_is_trusted(data.claim.privacy_mode) else "site"
    return line_chart(
        "epsilon",
        "Privacy spent over rounds, by site, with the budget",
        Axis("round", whole=True),
        Axis(f"ε spent, by the {whose}'s ledger{at_h(data.sharing)}", from_zero=True),
        [Curve(_group(spent.sites), spent.points) for spent in data.spent],
        [Mark(budget, f"budget {budget:g}") for budget in budgets],
    )


def accuracy_chart(data: ReportData) -> Chart | None:
    """Return accuracy against ε, or against rounds where there is no finite ε."""
    y = Axis("accuracy on public test data", percent=True)
    if data.headline.epsilon is None or not math.isfinite(data.headline.epsilon):
        points = [(float(r.round_number), r.accuracy) for r in data.rounds if r.accuracy is not None]
        return line_chart(
            "accuracy", "Accuracy over rounds", Axis("round", whole=True), y, [Curve(data.strategy, points)]
        )
    course = [(r.epsilon_worst or 0.0, r.accuracy, r.round_number) for r in data.rounds if r.accuracy is not None]
    ends = [] if len(course) < 2 else [course[0], course[-1]]
    whose = "cohort" if server_is_trusted(data.claim.privacy_mode) else f"worst site{at_h(data.sharing)}"
    return line_chart(
        "accuracy",
        f"Accuracy against the privacy spent by the {whose}",
        Axis(f"ε spent, {whose}", from_zero=True),
        y,
        [Curve(data.strategy, [(epsilon, accuracy) for epsilon, accuracy, _ in course])],
        [Mark(data.headline.epsilon_budget, f"budget {data.headline.epsilon_budget:g}", upright=True)]
        if data.headline.epsilon_budget
        else [],
        [(epsilon, accuracy, f"round {n}" if n else "before") for epsilon, accuracy, n in ends],
    )


def epsilon_rows(data: ReportData) -> list[tuple[int, list[float | None]]]:
    """Return the chart of ε as a table: by round, the ε of each group of sites."""
    numbers = sorted({number for spent in data.spent for number, _ in spent.points})
    courses = [dict(spent.points) for spent in data.spent]
    return [(number, [course.get(number) for course in courses]) for number in numbers]

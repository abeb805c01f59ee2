"""The report as one HTML page: nothing is loaded, nothing runs, everything from elsewhere is escaped."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from common import words
from common.privacy import figures
from reports.alike import alike_absences, alike_releases, alike_sites, participants_text
from reports.audits import NONE_RUN, WHOSE, audit_words, bound_note, bound_sentences
from reports.claim import UNTOLD, none_refused, server_is_trusted
from reports.connection import NOT_KNOWN, NOT_RECORDED, SITES_OWN
from reports.data import ReportData, setting_of
from reports.meaning import attack_sentence, several_sentence, whose_sentence
from reports.page_charts import (
    accuracy_chart,
    courses_of,
    epsilon_chart,
)
from reports.page_style import STYLE
from reports.page_template import PAGE
from reports.scores import BESIDE, beside_cells, share_text
from reports.sharing import THIS_RUN, at_h, others_of, rests_on
from reports.sites import distinct
from reports.trials import trials_figure


@lru_cache(maxsize=2)
def _template(page: str) -> Template:
    """Return a template, compiled once: a server writes the page after every round."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=_shown, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"epsilon": figures.epsilon_text, "remaining": figures.remaining_text}
    for name in ("percent", "decimal", "number", "numbers", "bytes", "seconds", "value"):
        environment.filters[name] = getattr(words, f"{name}_text")
    environment.filters |= {"audit": audit_words, "figures": distinct}
    environment.filters |= {"attacks": attack_sentence, "several": several_sentence, "bound": figures.bound_text}
    environment.filters |= {"moment": _moment, "took_part": participants_text}
    environment.filters |= {"trials": trials_figure}
    environment.filters |= {"share": share_text, "beside": beside_cells}
    return environment.from_string(page)


def to_html(data: ReportData) -> str:
    """Return the whole report as one self-contained page."""
    central, courses = server_is_trusted(data.claim.privacy_mode), courses_of(data)
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
        whose_meaning=whose_sentence(central=central) if data.meaning else "",
        made=_made(data),
        head=data.headline,
        claim=data.claim,
        none_run=NONE_RUN,
        beside=BESIDE,
        slice=str(setting_of(data, "data.slice")),
        bounds=bound_sentences(data.audit_results),
        bound_note=bound_note(data.audit_results),
        whose=WHOSE,
        style=Markup(STYLE),
        epsilon_chart=epsilon_chart(data, courses),
        courses=courses,
        accuracy_chart=accuracy_chart(data),
        site_rows=alike_sites(data.sites),
        refusal_rows=alike_absences(data.refusals, len(data.sites)),
        release_rows=alike_releases(data.other_releases, len(data.sites)),
    )


def _made(data: ReportData) -> str:
    """Return in plain words what was trained, by how many sites, and how the run ended."""
    head, base = data.headline, str(setting_of(data, "model.name")).rstrip("/").rpartition("/")[2]
    ended = {"completed": "It came to its planned end.", "unfinished": "It still goes on, or was cut off."}
    most = "at most " if server_is_trusted(data.claim.privacy_mode) else ""
    last = f"The last was of {words.counted(head.last_sites, 'site')} alone. " if head.last_sites else ""
    return (
        f"A computer model, {base}, was trained further by {most}{words.counted(head.sites, 'site')} together, in "
        f"{words.counted(head.rounds_done, 'round')} of {head.rounds_planned} planned. "
        + last * (head.last_sites < head.sites)
        + ended.get(data.status, f"It ended early ({data.status}).")
    )


def _moment(time: str) -> str:
    """Return a time as people read it, to the minute; one that is not UTC in ISO 8601 as it is."""
    date, middle, clock = time.partition("T")
    return f"{date} {clock[:5]} UTC" if middle and clock.endswith("+00:00") else time


def _shown(value: Any) -> Any:
    return words.visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value

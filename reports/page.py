"""The report as one HTML page: nothing is loaded, nothing runs, everything from elsewhere is escaped."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from fedveil.common.words import visible
from fedveil.reports.data import ReportData
from fedveil.reports.document import Bad, Good
from fedveil.reports.page_style import STYLE
from fedveil.reports.page_template import PAGE
from fedveil.reports.result import alarms_of, boxes_of, made_of, promise_of
from fedveil.reports.sections import sections_of


@lru_cache(maxsize=1)
def _template() -> Template:
    """Return the template, compiled once: a server writes the page after every round."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=_shown, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"moment": _moment, "mark": _mark}
    return environment.from_string(PAGE)


def to_html(data: ReportData, progress: str = "") -> str:
    """Return the whole report as one self-contained page, with ``progress`` of a running run below its title."""
    sections = sections_of(data)
    groups: dict[str, list[tuple[str, str]]] = {}
    for section in sections:
        groups.setdefault(section.group, []).append((section.anchor, section.title))
    return _template().render(
        data=data,
        progress=progress,
        made=made_of(data),
        alarms=alarms_of(data),
        promise=promise_of(data),
        boxes=boxes_of(data),
        groups=groups,
        sections=sections,
        style=Markup(STYLE),
    )


def _mark(cell: str) -> str:
    """Return the class of a cell that says how well something is; empty: it says nothing of that."""
    return "ok" if isinstance(cell, Good) else "bad" if isinstance(cell, Bad) else ""


def _moment(time: str) -> str:
    """Return a time as people read it, to the minute; one that is not UTC in ISO 8601 as it is."""
    date, middle, clock = time.partition("T")
    return f"{date} {clock[:5]} UTC" if middle and clock.endswith("+00:00") else time


def _shown(value: Any) -> Any:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value

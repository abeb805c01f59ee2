"""Interval charts as inline SVG: a row for each category, in it a dot for each series with its interval as a whisker.

What a row is called and what its figures are stands in words above its dots, so that it fits a phone and nobody has to
read a length. Series differ by height, shape and filling, never by colour alone.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from common.words import visible
from reports.charts import WIDTH, Axis, Chart, Scale, marker, text_at, ticks

LEFT, RIGHT, TOP, BOTTOM = 14, 14, 6, 46
HEAD, STEP, GAP = 19, 13, 9
"""Pixels of a row: its words, each of its series, and what keeps it from the next."""
ROOM = 36
"""Columns that a row's name has; a longer one loses its middle here, and stands whole in the table."""
MOST = 12
"""Rows of a chart."""


@dataclass(frozen=True)
class Dot:
    """A figure and the interval that it lies in."""

    value: float
    low: float | None = None
    """None, as ``high``: it has no interval."""
    high: float | None = None


@dataclass(frozen=True)
class Row:
    """One category: a dot for each series, None where it has no figure."""

    name: str
    dots: Sequence[Dot | None]
    text: str
    """Its figures in words."""


def interval_chart(name: str, title: str, axis: Axis, series: Sequence[str], rows: Sequence[Row]) -> Chart | None:
    """Return a chart of ``rows`` from top to bottom, or None when there is not one finite figure to show.

    Args:
        name: an identifier, unique in the page.
        title: read aloud by screen readers, together with the figures of each row.
        axis: what the dots are measured by.
        series: names of at most two, of which the last is drawn full; one alone has no legend.
        rows: at most ``MOST``.

    Raises:
        ValueError: there are more rows or series, or a row has not one dot for each series.
    """
    if len(rows) > MOST or not 1 <= len(series) <= 2 or any(len(row.dots) != len(series) for row in rows):
        raise ValueError(f"a chart has at most {MOST} rows and 2 series, and a row a dot for each of them")
    shown = [dot for row in rows for dot in row.dots if dot is not None and math.isfinite(dot.value)]
    if not shown:
        return None
    ends = [end for dot in shown for end in (dot.value, dot.low, dot.high) if end is not None]
    marks = ticks(ends, axis)
    to_x = Scale(marks, LEFT, WIDTH - RIGHT)
    tall = HEAD + STEP * len(series) + GAP
    height = TOP + tall * len(rows) + BOTTOM
    parts = [_axis(axis, marks, to_x, height)]
    parts += [_row(row, TOP + tall * number, to_x) for number, row in enumerate(rows)]
    told = "; ".join(f"{visible(row.name)}: {visible(row.text)}" for row in rows)
    svg = (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="{name}-title {name}-text" class="chart">'
        f'<title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-text">{escape(axis.label)}. {escape(told)}. '
        f"The figures are in the tables of this page.</desc>{''.join(parts)}</svg>"
    )
    whiskers = any(dot.low is not None for dot in shown)
    legend = [(_swatch(number, len(series), whiskers), word) for number, word in enumerate(series)]
    return Chart(name, Markup(svg), legend if len(series) > 1 else [])


def shortened(name: str) -> str:
    """Return a name of at most ``ROOM`` columns; a longer one loses its middle.

    >>> shortened("a" * 30 + "b" * 30)
    'aaaaaaaaaaaaaaaaaaaaaa … bbbbbbbbbbb'
    """
    plain = visible(name)
    if _columns(plain) <= ROOM:
        return plain
    head, tail = plain[:22], plain[-11:]
    while _columns(head) > 22:
        head = head[:-1]
    while _columns(tail) > 11:
        tail = tail[1:]
    return f"{head} … {tail}"


def _columns(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(character) in "FW" else 1 for character in text)


def _axis(axis: Axis, marks: Sequence[float], to_x: Scale, height: int) -> str:
    base = height - BOTTOM
    parts = [f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>']
    for value in marks:
        at = to_x(value)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{base}"/>')
        anchor = "start" if at < LEFT + 8 else "end" if at > WIDTH - RIGHT - 8 else "middle"
        shift = {"start": -LEFT + 2, "end": RIGHT - 2, "middle": 0}[anchor]
        parts.append(text_at(at + shift, base + 18, axis.tick(value), "tick", anchor))
    parts.append(text_at(WIDTH / 2, height - 6, axis.label, "label", "middle"))
    return "".join(parts)


def _row(row: Row, top: float, to_x: Scale) -> str:
    words = top + 14
    parts = [text_at(LEFT, words, shortened(row.name), "row-name", "start")]
    parts.append(text_at(WIDTH - RIGHT, words, row.text, "row-text", "end"))
    for number, dot in enumerate(row.dots):
        if dot is not None and math.isfinite(dot.value):
            parts.append(_dot(dot, number, len(row.dots), top + HEAD + STEP * (number + 0.5), to_x))
    return f'<g class="row">{"".join(parts)}</g>'


def _dot(dot: Dot, number: int, of: int, y: float, to_x: Scale) -> str:
    whisker = ""
    if dot.low is not None and dot.high is not None:
        low, high = to_x(dot.low), to_x(dot.high)
        whisker = (
            f'<path class="whisker" d="M{low:.1f} {y - 3.5:.1f}V{y + 3.5:.1f}M{low:.1f} {y:.1f}H{high:.1f}'
            f'M{high:.1f} {y - 3.5:.1f}V{y + 3.5:.1f}"/>'
        )
    return f'<g class="{_kind(number, of)}">{whisker}{marker(_style(number, of), to_x(dot.value), y)}</g>'


def _style(number: int, of: int) -> int:
    return of - 1 - number


def _kind(number: int, of: int) -> str:
    return f"dot s{_style(number, of)}" + (" hollow" if number < of - 1 else "")


def _swatch(number: int, of: int, whisker: bool) -> Markup:
    line = '<path class="whisker" d="M3 2.5V9.5M3 6H31M31 2.5V9.5"/>' if whisker else ""
    return Markup(
        f'<svg viewBox="0 0 34 12" width="34" height="12" aria-hidden="true"><g class="{_kind(number, of)}">'
        f"{line}{marker(_style(number, of), 17, 6)}</g></svg>"
    )

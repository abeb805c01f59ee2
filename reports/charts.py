"""Line charts as inline SVG: no script, no font, colours from the page's style, so that dark and print follow.

Lines differ by colour, dash and marker, so that no reader depends on colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from common.words import visible

WIDTH, HEIGHT = 460, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 32, 46
STYLES = 6
"""Lines that can be told from each other; further ones share the last style."""

_DASHES = ("", "7 4", "2 3", "9 3 2 3", "5 2", "1 4")


@dataclass(frozen=True)
class Curve:
    """One line of a chart."""

    label: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Mark:
    """A limit across the chart: at a height, or at a place along."""

    value: float
    label: str
    upright: bool = False


@dataclass(frozen=True)
class Axis:
    """One axis: its label with the unit, how its ticks read, whether they are whole numbers."""

    label: str
    whole: bool = False
    percent: bool = False
    from_zero: bool = False

    def tick(self, value: float) -> str:
        """Return the text of one tick."""
        return f"{100 * value:.4g} %" if self.percent else f"{value:.4g}"


@dataclass(frozen=True)
class Chart:
    """A chart and the legend that belongs to it, both ready to be put into a page."""

    name: str
    """An identifier, unique in the page."""
    svg: Markup
    legend: list[tuple[Markup, str]]


def line_chart(
    name: str,
    title: str,
    x: Axis,
    y: Axis,
    curves: Sequence[Curve],
    marks: Sequence[Mark] = (),
    point_labels: Sequence[tuple[float, float, str]] = (),
) -> Chart | None:
    """Return a chart of ``curves``, or None when there is not one finite point to show.

    Args:
        name: an identifier, unique in the page.
        title: read aloud by screen readers, together with the axes and the last value of each line.
        x, y: the axes.
        curves: lines; points that are not finite are left out.
        marks: limits, drawn dashed with their label.
        point_labels: (x, y, text) beside points; the first below its point, the others above.
    """
    drawn = [Curve(curve.label, [p for p in curve.points if all(map(math.isfinite, p))]) for curve in curves]
    drawn = [curve for curve in drawn if curve.points]
    if not drawn:
        return None
    xs = [p[0] for curve in drawn for p in curve.points] + [mark.value for mark in marks if mark.upright]
    ys = [p[1] for curve in drawn for p in curve.points] + [mark.value for mark in marks if not mark.upright]
    x_ticks, y_ticks = ticks(xs, x), ticks(ys, y)
    to_x = Scale(x_ticks, LEFT, WIDTH - RIGHT)
    to_y = Scale(y_ticks, HEIGHT - BOTTOM, TOP)
    parts = [_grid(x, y, x_ticks, y_ticks, to_x, to_y)]
    parts += [_mark(mark, to_x, to_y) for mark in marks]
    parts += [_curve(curve, index, to_x, to_y) for index, curve in enumerate(drawn)]
    for number, (place, height, text) in enumerate(point_labels):
        # A label near the right edge stands to the left of its point.
        end = to_x(place) > WIDTH - RIGHT - 70
        anchor, shift = ("end", -8) if end else ("start", 8)
        parts.append(
            text_at(to_x(place) + shift, to_y(height) + (20 if number == 0 else -9), text, "point-label", anchor)
        )
    ends = "; ".join(f"{visible(c.label)}: {y.tick(c.points[-1][1])} at {x.tick(c.points[-1][0])}" for c in drawn)
    svg = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{name}-title {name}-text" class="chart">'
        f'<title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-text">{escape(y.label)} against {escape(x.label)}. Last values: {escape(ends)}. '
        f"report.json has the figures.</desc>{''.join(parts)}</svg>"
    )
    return Chart(name, Markup(svg), [(_swatch(index), curve.label) for index, curve in enumerate(drawn)])


def ticks(values: Sequence[float], axis: Axis) -> list[float]:
    """Return about five round figures that span ``values``.

    >>> ticks([0.2, 7.9], Axis("ε", from_zero=True))
    [0.0, 2.0, 4.0, 6.0, 8.0]
    """
    low, high = min(values), max(values)
    low = min(0.0, low) if axis.from_zero else low
    if high - low < 1e-9:
        low, high = low - (0.01 if axis.percent else 0.5), high + (0.01 if axis.percent else 0.5)
        low = max(0.0, low) if min(values) >= 0 else low
    if not (axis.from_zero or axis.whole):
        room = 0.08 * (high - low)
        low, high = low - room, high + room
    if axis.percent:
        low, high = max(0.0, low), min(1.0, high)
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * 0.999)
    step = max(1.0, math.ceil(step)) if axis.whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


class Scale:
    """Maps figures to places in the drawing."""

    def __init__(self, marks: Sequence[float], start: float, end: float) -> None:
        self._low, self._span = marks[0], (marks[-1] - marks[0]) or 1.0
        self._start, self._length = start, end - start

    def __call__(self, value: float) -> float:
        """Return the place of a figure, in pixels."""
        return self._start + self._length * (value - self._low) / self._span


def _grid(x: Axis, y: Axis, x_ticks: list[float], y_ticks: list[float], to_x: Scale, to_y: Scale) -> str:
    parts = []
    for value in y_ticks:
        at = to_y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(text_at(LEFT - 8, at + 4.5, y.tick(value), "tick", "end"))
    base = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    for value in x_ticks:
        at = to_x(value)
        parts.append(f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{base}" y2="{base + 4}"/>')
        parts.append(text_at(at, base + 18, x.tick(value), "tick", "middle"))
    parts.append(text_at((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x.label, "label", "middle"))
    parts.append(text_at(4, 11, y.label, "label", "start"))
    return "".join(parts)


def _mark(mark: Mark, to_x: Scale, to_y: Scale) -> str:
    if mark.upright:
        at = to_x(mark.value)
        line = f'<line class="limit" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        return line + text_at(at - 6, HEIGHT - BOTTOM - 8, mark.label, "limit-label", "end")
    at = to_y(mark.value)
    line = f'<line class="limit" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
    return line + text_at(LEFT + 6, at + 15, mark.label, "limit-label", "start")


def _curve(curve: Curve, index: int, to_x: Scale, to_y: Scale) -> str:
    style = min(index, STYLES - 1)
    places = [(to_x(px), to_y(py)) for px, py in curve.points]
    path = " ".join(f"{px:.1f},{py:.1f}" for px, py in places)
    dash = f' stroke-dasharray="{_DASHES[style]}"' if _DASHES[style] else ""
    # Markers of a long run would run into each other; the last point always has one.
    stride = max(1, math.ceil(len(places) / 24))
    marked = [place for number, place in enumerate(reversed(places)) if number % stride == 0]
    return (
        f'<g class="curve s{style}"><polyline points="{path}"{dash}/>'
        + "".join(marker(style, px, py) for px, py in marked)
        + "</g>"
    )


def marker(style: int, x: float, y: float) -> str:
    """Return the shape of a style at a place, as SVG."""
    if style == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.6"/>'
    shapes = {
        1: ((-3.6, -3.6), (3.6, -3.6), (3.6, 3.6), (-3.6, 3.6)),
        2: ((0, -4.6), (4.4, 3.6), (-4.4, 3.6)),
        3: ((0, -5), (5, 0), (0, 5), (-5, 0)),
        4: ((0, 4.6), (4.4, -3.6), (-4.4, -3.6)),
        5: ((-4.6, -1.4), (4.6, -1.4), (4.6, 1.4), (-4.6, 1.4)),
    }
    corners = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in shapes[style])
    return f'<polygon points="{corners}"/>'


def _swatch(index: int) -> Markup:
    style = min(index, STYLES - 1)
    dash = f' stroke-dasharray="{_DASHES[style]}"' if _DASHES[style] else ""
    return Markup(
        f'<svg viewBox="0 0 34 12" width="34" height="12" aria-hidden="true"><g class="curve s{style}">'
        f'<polyline points="1,6 33,6"{dash}/>{marker(style, 17, 6)}</g></svg>'
    )


def text_at(x: float, y: float, text: str, kind: str, anchor: str) -> str:
    """Return words at a place, escaped, as SVG of a class of the page's style."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(visible(text))}</text>'

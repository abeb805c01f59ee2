"""One picture of a run: accuracy and ε over its rounds, as an SVG that stands by itself."""

from __future__ import annotations

from markupsafe import escape

from common.privacy.figures import epsilon_text
from common.words import counted, percent_text, visible
from reports.charts import HEIGHT, WIDTH, Axis, Chart, Curve, line_chart
from reports.data import ReportData
from reports.page import epsilon_chart

GAP, HEAD, FOOT = 24, 56, 16

_STYLE = """
text { font-family: "Source Sans 3", "Segoe UI", "Helvetica Neue", "Noto Sans", Arial, sans-serif; fill: #59636e;
  font-size: 13px; font-variant-numeric: tabular-nums; }
.title { fill: #1c2126; font-size: 17px; font-weight: 600; } .said { font-size: 14px; }
.point-label { fill: #1c2126; font-weight: 600; paint-order: stroke; stroke: #fff; stroke-width: 4px; }
.limit-label { fill: #a61b1b; paint-order: stroke; stroke: #fff; stroke-width: 4px; }
.grid { stroke: #eceef0; } .axis { stroke: #59636e; }
.limit { stroke: #a61b1b; stroke-width: 1.5; stroke-dasharray: 6 4; }
.curve polyline { fill: none; stroke-width: 2.2; stroke-linejoin: round; }
.s0 { stroke: #0072b2; fill: #0072b2; } .s1 { stroke: #d55e00; fill: #d55e00; } .s2 { stroke: #00805f; fill: #00805f; }
.s3 { stroke: #b35a8e; fill: #b35a8e; } .s4 { stroke: #a67600; fill: #a67600; } .s5 { stroke: #5a6b7b; fill: #5a6b7b; }
"""
"""On white wherever it is shown; the palette is the report's, see ``reports.page_style``."""


def to_svg(data: ReportData) -> str:
    """Return the picture; the same run gives the same bytes."""
    charts = [chart for chart in (accuracy_over_rounds(data), epsilon_chart(data)) if chart]
    width = max(len(charts), 1) * (WIDTH + GAP) + GAP
    height = HEAD + HEIGHT + FOOT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(visible(_title(data)))}. {escape(visible(_said(data)))}">',
        f"<style>{_STYLE}</style>",
        f'<rect width="{width}" height="{height}" rx="8" fill="#fff"/>',
        f'<text class="title" x="{GAP}" y="26">{escape(visible(_title(data)))}</text>',
        f'<text class="said" x="{GAP}" y="46">{escape(visible(_said(data)))}</text>',
        *(_placed(chart, GAP + number * (WIDTH + GAP)) for number, chart in enumerate(charts)),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def accuracy_over_rounds(data: ReportData) -> Chart | None:
    """Return accuracy on public data by round; round 0 is the model before training."""
    points = [(float(r.round_number), r.accuracy) for r in data.rounds if r.accuracy is not None]
    ends = [points[0], points[-1]] if len(points) > 1 else []
    return line_chart(
        "accuracy",
        "Accuracy over rounds",
        Axis("round (0: before training)", whole=True),
        Axis("accuracy on public test data", percent=True),
        [Curve(data.strategy, points)],
        point_labels=[(x, y, percent_text(y)) for x, y in ends],
    )


def _title(data: ReportData) -> str:
    values = {setting.key: setting.value for setting in data.settings}
    return f"{data.strategy} on {values.get('model.name')} and {values.get('data.name')}"


def _said(data: ReportData) -> str:
    head = data.headline
    spent = "no privacy claim" if head.epsilon is None else f"ε {epsilon_text(head.epsilon)} at δ {head.delta:g}"
    per = "" if head.epsilon is None else " for each record, the maximum over sites"
    return (
        f"{counted(head.sites, 'site')}, {counted(head.rounds_done, 'round')}: accuracy "
        f"{percent_text(head.accuracy_before)} before, {percent_text(head.accuracy_after)} after; {spent}{per}"
    )


def _placed(chart: Chart, left: int) -> str:
    return f'<svg x="{left}" y="{HEAD}" width="{WIDTH}" height="{HEIGHT}">{chart.svg}</svg>'

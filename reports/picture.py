"""One picture of a run: accuracy and ε over its rounds, as an SVG that stands by itself.

The figures lie beside it as JSON: ``python -m reports.picture FILE.json`` draws the picture anew from them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import escape

from common.privacy.figures import epsilon_text
from common.strict_json import Endless, Measured, from_json, json_of
from common.words import counted, percent_text, visible
from reports.charts import HEIGHT, WIDTH, Axis, Chart, Curve, Mark, line_chart
from reports.claim import server_is_trusted
from reports.data import ReportData
from reports.sharing import Sharing, at_h
from reports.trials import trials_figure

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
.s0 { stroke: #0072b2; fill: #0072b2; }
"""
"""On white wherever it is shown; the colours are the report's, see ``reports.page_style``."""


@dataclass(frozen=True)
class PicturedRound:
    """One round; round 0 is the model before training, or behind a start that sites paid for."""

    number: int
    accuracy: float | None
    """On public test data; None: it was not scored."""
    loss: Measured | None
    epsilon: Endless | None
    """Of the site that has spent most, after this round; None: no claim is made."""
    payload: int
    """Adapter bytes of all messages, both ways."""
    seconds: float | None


@dataclass(frozen=True)
class Picture:
    """The figures of a run's picture."""

    title: str
    sites: int
    delta: float | None
    """The largest of the sites'; None without a claim."""
    budget: float | None
    """The ε of the site that has spent most, at most."""
    rounds: list[PicturedRound]
    before: float | None = None
    """Accuracy before any record was used; None: that of the first round that was scored."""
    per: str = "record"
    """The claim's unit in one word."""
    central: bool = False
    """Whether the server is trusted: then the sites are the most that its cohort has, and ε is its ledger's."""
    honest: int = 0
    """h: sites of each sum that ε rests on; 0: no noise is shared."""
    epsilon_alone: Endless | None = None
    """Of this run's sums if no other site adds its noise; None: none is counted on, or it is not known."""
    trials: str = ""
    """What all trials of a tuning cost together, in words; empty: the run is none."""


def picture_of(data: ReportData) -> Picture:
    """Return the figures of a run from its report."""
    values = {setting.key: setting.value for setting in data.settings}
    # What the ledgers held before round 1: another run may have been charged to them.
    held = max((epsilon for spent in data.spent for number, epsilon in spent.points if number == 0), default=None)
    rounds = [
        PicturedRound(
            number=line.round_number,
            accuracy=line.accuracy,
            loss=line.loss,
            epsilon=line.epsilon_worst if line.round_number or held is None else held,
            payload=(line.bytes_down or 0) + (line.bytes_up or 0),
            seconds=line.seconds,
        )
        for line in data.rounds
        if line.counted
    ]
    title = f"{data.method} on {values.get('model.name')} and {values.get('data.name')}"
    top, per = data.headline, data.claim.per or "record"
    central = server_is_trusted(data.claim.privacy_mode)
    sharing = data.sharing
    honest, alone = (sharing.honest_sites, sharing.epsilon_alone) if sharing else (0, None)
    return Picture(
        title,
        top.sites,
        top.delta,
        top.epsilon_budget,
        rounds,
        top.accuracy_before,
        per,
        central,
        honest,
        alone,
        trials_figure(data.tuning) if data.tuning else "",
    )


def to_svg(picture: Picture) -> str:
    """Return the picture; the same figures give the same bytes."""
    charts = [chart for chart in (_accuracy(picture), _epsilon(picture)) if chart]
    width = max(len(charts), 1) * (WIDTH + GAP) + GAP
    height = HEAD + HEIGHT + FOOT
    title, said = escape(visible(picture.title)), escape(said_of_run(picture))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{title}. {said}">',
        f"<style>{_STYLE}</style>",
        f'<rect width="{width}" height="{height}" rx="8" fill="#fff"/>',
        f'<text class="title" x="{GAP}" y="26">{title}</text>',
        f'<text class="said" x="{GAP}" y="46">{said}</text>',
        *(_placed(chart, GAP + number * (WIDTH + GAP)) for number, chart in enumerate(charts)),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def said_of_run(picture: Picture) -> str:
    """Return the result in one line."""
    scores = [line.accuracy for line in picture.rounds if line.accuracy is not None]
    done = sum(line.number > 0 for line in picture.rounds)
    most = "at most " if picture.central else ""
    words = f"{most}{counted(picture.sites, 'site')}, {counted(done, 'round')}"
    if scores:
        before = scores[0] if picture.before is None else picture.before
        words += f": accuracy {percent_text(before)} before, {percent_text(scores[-1])} after"
    if picture.delta is None:
        return f"{words}; no privacy claim"
    spent = max((line.epsilon for line in picture.rounds if line.epsilon is not None), default=None)
    basis = "by the server's ledger" if picture.central else "the maximum over sites"
    words += (
        f"; ε {epsilon_text(spent)}{at_h(_sharing(picture))} at δ {picture.delta:g} for each {picture.per}, {basis}"
    )
    words += f"; {picture.trials}" if picture.trials else ""
    bare = epsilon_text(picture.epsilon_alone, "not known")
    return f"{words}; alone: ε {bare}" if picture.honest > 1 else words


def _sharing(picture: Picture) -> Sharing | None:
    return Sharing(picture.honest, 0, picture.epsilon_alone, []) if picture.honest else None


def _accuracy(picture: Picture) -> Chart | None:
    points = [(float(line.number), line.accuracy) for line in picture.rounds if line.accuracy is not None]
    ends = [points[0], points[-1]] if len(points) > 1 else []
    return _chart(
        "accuracy",
        "Accuracy over rounds",
        Axis("accuracy on public test data", percent=True),
        points,
        marks=_before_a_paid_start(picture),
        labels=[(x, y, percent_text(y)) for x, y in ends],
    )


def _before_a_paid_start(picture: Picture) -> list[Mark]:
    """Return the accuracy before any record was used, where it is another behind a start that sites paid for."""
    first = next((line.accuracy for line in picture.rounds if not line.number), None)
    if picture.before is None or first is None or picture.before == first:
        return []
    return [Mark(picture.before, f"before {percent_text(picture.before)}")]


def _epsilon(picture: Picture) -> Chart | None:
    points = [(float(line.number), line.epsilon) for line in picture.rounds if line.epsilon is not None]
    budget = [Mark(picture.budget, f"budget {picture.budget:g}")] if picture.budget else []
    axis = Axis(f"ε spent, site that has spent most{at_h(_sharing(picture))}", from_zero=True)
    return _chart("epsilon", "Privacy spent over rounds", axis, points, marks=budget)


def _chart(
    name: str,
    title: str,
    y: Axis,
    points: Sequence[tuple[float, float]],
    marks: Sequence[Mark] = (),
    labels: Sequence[tuple[float, float, str]] = (),
) -> Chart | None:
    x = Axis("round (0: before the first)", whole=True)
    return line_chart(name, title, x, y, [Curve(title, points)], marks, labels)


def _placed(chart: Chart, left: int) -> str:
    return f'<svg x="{left}" y="{HEAD}" width="{WIDTH}" height="{HEIGHT}">{chart.svg}</svg>'


def read_picture(path: Path) -> Picture:
    """Return the figures in a file; DataError if it is not as ``fedveil report --picture`` writes it."""
    return from_json(Picture, json_of(path.read_bytes()), str(path))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        Path(name).with_suffix(".svg").write_text(to_svg(read_picture(Path(name))), encoding="utf-8")

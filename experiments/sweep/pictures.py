"""Pictures of a sweep: accuracy, or loss, against ε and against bytes, with intervals, as one page and two PNGs.

Matplotlib draws them (the extra ``pictures``). The same rows give the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from fedveil.common.errors import ConfigError, DataError
from fedveil.common.files import replace_file
from fedveil.common.words import bytes_text
from fedveil.experiments.sweep.arms import ARMS, FEDERATED
from fedveil.experiments.sweep.file import epsilon_name
from fedveil.experiments.sweep.groups import Group, Interval, groups
from fedveil.experiments.sweep.page import to_page
from fedveil.experiments.sweep.published import Published
from fedveil.experiments.sweep.rows import Row
from fedveil.experiments.sweep.summary import lines_of, table_of
from fedveil.privacy.figures import NO_CLAIM

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#00805f", "#b35a8e", "#a67600", "#5a6b7b")
"""Of variants, the report's; with ``MARKERS`` no reader depends on colour alone."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
NO_EPSILON = 2.2
"""Place of runs without privacy, as a factor of the largest ε."""
SPREAD = 0.035
"""Between neighbouring lines at one ε, of its logarithm: intervals do not cover each other."""
MOST_SPREAD = 0.36
"""Of all lines together: a place is still one ε's."""
MARK_WIDTH, LETTER_WIDTH = 0.55, 0.068
"""Inches of a legend's mark and of a letter at its size, so that no name is cut off."""
PLOT_HEIGHT, ROW_HEIGHT = 4.4, 0.17
"""Inches of what is not the legend, and of each of its rows, so that many names take nothing from the plot."""
PUBLISHED = "published: "
"""Before the legend's names of published figures, which come last."""
PUBLISHED_WIDTH = 0.3
"""Of the part for published figures, where ours is 1. They are of other models and data, so its scale is its own."""


def write_pictures(rows: Sequence[Row], published: Sequence[Published], folder: Path, name: str) -> list[Path]:
    """Write ``<name>.html``, ``<name>-epsilon.png`` and ``<name>-bytes.png``, and return their paths.

    Raises:
        ConfigError: matplotlib is not installed.
        DataError: there is no row, rows have accuracies as well as losses, or a file cannot be written.
    """
    found = groups(rows)
    if not found:
        raise DataError("there is no result to draw: run the sweep first")
    if len({group.labelled for group in found}) > 1:
        raise DataError("some runs are judged by accuracy and some by loss: draw their tables apart")
    drawn = {"epsilon": epsilon_figure(found, published), "bytes": bytes_figure(found)}
    shown = drawn_from(rows, published)
    written = {folder / f"{name}-{kind}.png": png(figure, shown) for kind, figure in drawn.items()}
    page = to_page(name, rows, published, [_svg(figure, f"{name}-{kind}") for kind, figure in drawn.items()])
    written[folder / f"{name}.html"] = page.encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, content in written.items():
            replace_file(path, content)
    except OSError as error:
        raise DataError(f"{folder} cannot be written ({error.strerror}): name another folder") from error
    return list(written)


def epsilon_figure(found: Sequence[Group], published: Sequence[Published]) -> Figure:
    """Return accuracy against ε: a line for each variant and arm, with intervals; beside it, published figures.

    Runs without privacy are drawn behind the largest ε, apart from the lines. Lines that all have one ε are drawn side
    by side. A fitted head is a horizontal line. A language model has its loss instead, and no published figures.
    """
    shown = published if all(group.labelled for group in found) else []
    figure, parts = _figure(8.6, widths=[1.0, PUBLISHED_WIDTH] if shown else [1.0])
    ours = [group for group in found if not ARMS[group.arm].fitted]
    budgets = [group.epsilon_asked for group in ours]
    behind = _at_epsilons(parts[0], budgets)
    lines = list(dict.fromkeys((group.variant, group.arm) for group in ours))
    one = len(set(budgets)) == 1 and len(lines) > 1
    for number, line in enumerate(lines):
        shift = math.exp(min(SPREAD, MOST_SPREAD / len(lines)) * (number - (len(lines) - 1) / 2))
        members = [group for group in ours if (group.variant, group.arm) == line]
        members.sort(key=lambda group: group.epsilon_asked or math.inf)
        joined = [group for group in members if group.epsilon_asked is not None]
        index = _index(found, line[0])
        places = {id(group): number if one else shift * (group.epsilon_asked or behind) for group in members}
        _points(parts[0], [places[id(group)] for group in members], members, index, ARMS[line[1]].fill)
        parts[0].plot(
            [places[id(group)] for group in joined or members],
            [_shown(group).mean for group in joined or members],
            linestyle=ARMS[line[1]].dash,
            linewidth=1.6,
            **_marks(index, ARMS[line[1]].fill),
            label=_line_name(*line, min((group.honest for group in members if group.honest), default=0)),
        )
    if one:
        _side_by_side(parts[0], len(lines), budgets[0])
    _fitted_heads(parts[0], found)
    if shown:
        _published(parts[1], shown)
    _finish(figure, parts, found)
    return figure


def _side_by_side(axes: Axes, lines: int, epsilon: float | None) -> None:
    """Say that places of an axis are no ε: all lines have the one."""
    axes.set_xscale("linear")
    axes.set_xticks([])
    axes.set_xlim(-0.6, lines - 0.4)
    axes.set_xlabel(NO_CLAIM if epsilon is None else f"each at ε {epsilon_name(epsilon)}, at most")


def _published(axes: Axes, published: Sequence[Published]) -> None:
    """Draw figures of other models and data as open marks, a kind for each method, model and data set."""
    behind = _at_epsilons(axes, [item.epsilon for item in published])
    for number, kind in enumerate(dict.fromkeys(item.kind for item in published)):
        items = [item for item in published if item.kind == kind]
        axes.plot(
            [item.epsilon or behind for item in items],
            [100 * item.accuracy for item in items],
            linestyle="none",
            marker=MARKERS[number % len(MARKERS)],
            markerfacecolor="none",
            color="#59636e",
            label=f"{PUBLISHED}{kind}",
        )
    axes.set_title("published:\nother models and data", fontsize=8)
    axes.margins(x=0.15)
    axes.tick_params(axis="y", labelsize=8)


def _at_epsilons(axes: Axes, budgets: Sequence[float | None]) -> float:
    """Mark these ε on a logarithmic axis, and return the place of runs without one."""
    claimed = sorted({epsilon for epsilon in budgets if epsilon is not None})
    behind = NO_EPSILON * (claimed[-1] if claimed else 1.0)
    places = [*claimed, *([behind] if None in budgets else [])]
    _logarithmic(axes, places, [*map(epsilon_name, claimed), *([NO_CLAIM] if None in budgets else [])])
    axes.set_xlabel("ε, at most")
    return behind


def bytes_figure(found: Sequence[Group]) -> Figure:
    """Return accuracy against a run's bytes, all sites and both ways, with a part for each ε and no baselines."""
    sending = [group for group in found if group.payload]
    budgets = sorted({group.epsilon_asked for group in sending}, key=lambda epsilon: epsilon or math.inf)
    figure, parts = _figure(max(7.6, 2.7 * len(budgets)), [1.0] * max(1, len(budgets)), one_scale=True)
    payloads = [group.payload for group in sending if group.payload]
    marks = _decades(min(payloads), max(payloads)) if payloads else []
    for axes, epsilon in zip(parts, budgets, strict=False):
        for group in sending:
            if group.epsilon_asked == epsilon and group.payload:
                name = _line_name(group.variant, FEDERATED, group.honest)
                _points(axes, [group.payload], [group], _index(found, group.variant), ARMS[group.arm].fill, name)
        if sending:
            _fitted_heads(axes, found)
        _logarithmic(axes, marks, [bytes_text(round(mark)).replace(".00", "") for mark in marks])
        axes.set_xlim(marks[0], marks[-1])
        axes.set_xlabel("adapter bytes of a run")
        axes.set_title(NO_CLAIM if epsilon is None else f"ε {epsilon_name(epsilon)}", fontsize=10)
    _finish(figure, parts, found)
    return figure


def _fitted_heads(axes: Axes, found: Sequence[Group]) -> None:
    """Draw the lines that an adapter must beat."""
    for group in found:
        if ARMS[group.arm].fitted:
            axes.axhline(
                _shown(group).mean,
                color=COLOURS[_index(found, group.variant) % len(COLOURS)],
                linestyle=ARMS[group.arm].dash,
                linewidth=1.2,
                label=_line_name(group.variant, group.arm, 0),
            )


def _line_name(variant: str, arm: str, honest: int) -> str:
    """Return a line's name, such as ``sum, h = 3`` or ``probe, pooled``, with the honest sites that ε counts on."""
    return variant + ("" if arm == FEDERATED else f", {arm}") + (f", h = {honest}" if honest else "")


def _shown(group: Group) -> Interval:
    """Return what a group is shown by: its accuracy in per cent, or its loss in nats."""
    if not group.labelled:
        return group.loss
    half = group.accuracy.half
    return Interval(100 * group.accuracy.mean, None if half is None else 100 * half)


def _decades(low: float, high: float) -> list[float]:
    """Return the powers of ten around two figures: of 2e3 and 3e5, those from 1e3 to 1e6."""
    return [10.0**power for power in range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 2)]


def _figure(width: float, widths: Sequence[float], *, one_scale: bool = False) -> tuple[Figure, list[Axes]]:
    """Return a figure of a width in inches and its parts side by side, with one vertical scale or one each."""
    try:
        from matplotlib import rcParams
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ConfigError(
            "pictures are drawn by matplotlib, which is not installed: pip install 'matplotlib>=3.9,<4'"
        ) from error
    # Text stays text, and the same figures give the same bytes.
    rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "fedveil"})
    figure = Figure(figsize=(width, PLOT_HEIGHT), layout="constrained")
    return figure, list(figure.subplots(1, len(widths), width_ratios=widths, sharey=one_scale, squeeze=False)[0])


def _points(
    axes: Axes, places: Sequence[float], members: Sequence[Group], index: int, fill: str, label: str | None = None
) -> None:
    axes.errorbar(
        places,
        [_shown(group).mean for group in members],
        yerr=[_shown(group).half or 0.0 for group in members],
        linestyle="none",
        **_marks(index, fill),
        ecolor=(COLOURS[index % len(COLOURS)], 0.45),
        elinewidth=1.0,
        capsize=2,
        label=label,
    )


def _marks(index: int, fill: str) -> dict[str, Any]:
    """Return how the marks of a variant are drawn."""
    style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
    return {**style, "fillstyle": fill, "markersize": 5}


def _logarithmic(axes: Axes, places: Sequence[float], texts: Sequence[str]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(places, texts, fontsize=9)
    axes.set_xticks([], minor=True)


def _finish(figure: Figure, parts: Sequence[Axes], found: Sequence[Group]) -> None:
    what, unit = ("accuracy", "%") if all(group.labelled for group in found) else ("loss", "nats a token")
    parts[0].set_ylabel(f"{what} on the public test part, {unit}")
    legend: dict[str, Any] = {}
    for axes in parts:
        axes.grid(axis="y", color="#eceef0")
        axes.spines[["top", "right"]].set_visible(False)
        handles, labels = axes.get_legend_handles_labels()
        legend = {**dict(zip(labels, handles, strict=True)), **legend}
    if legend:
        ours = sorted(legend, key=lambda label: label.startswith(PUBLISHED))
        across = int(figure.get_figwidth() / (MARK_WIDTH + LETTER_WIDTH * max(map(len, ours))))
        across = max(1, min(3, across))
        figure.set_figheight(PLOT_HEIGHT + ROW_HEIGHT * math.ceil(len(ours) / across))
        figure.legend(
            [legend[label] for label in ours],
            ours,
            loc="outside lower center",
            ncols=across,
            fontsize=8,
            frameon=False,
        )


def _index(found: Sequence[Group], variant: str) -> int:
    return list(dict.fromkeys(group.variant for group in found)).index(variant)


def drawn_from(rows: Sequence[Row], published: Sequence[Published]) -> str:
    """Return the SHA-256 of what pictures show, which each carries: the rows' table and the published figures."""
    return hashlib.sha256("\n".join([*lines_of(table_of(rows)), *map(repr, published)]).encode()).hexdigest()


def png(figure: Figure, shown: str) -> bytes:
    """Return a figure as a PNG that says which rows it shows."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=160, metadata={"Software": None, "Description": f"rows {shown}"})
    return file.getvalue()


def _svg(figure: Figure, name: str) -> Markup:
    """Return a figure to be put into a page: no declaration, and identifiers of its own."""
    file = io.StringIO()
    metadata: dict[str, Any] = {"Date": None, "Creator": None}
    figure.savefig(file, format="svg", metadata=metadata)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\b(id="|url\(#|xlink:href="#)', rf"\g<1>{name}-", svg)
    return Markup(svg)

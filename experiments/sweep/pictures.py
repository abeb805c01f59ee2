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

from markupsafe import Markup, escape

from fedveil.common.errors import ConfigError, DataError
from fedveil.common.files import replace_file
from fedveil.common.words import bytes_text, percent_text, visible
from fedveil.experiments.sweep.arms import ARMS, FEDERATED
from fedveil.experiments.sweep.file import epsilon_name
from fedveil.experiments.sweep.published import Published
from fedveil.experiments.sweep.rows import Row
from fedveil.experiments.sweep.summary import Group, Interval, filled, groups, markdown_of, notes
from fedveil.privacy.figures import NO_CLAIM
from fedveil.reports.page_style import STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#00805f", "#b35a8e", "#a67600", "#5a6b7b")
"""Of variants, the report's; with ``MARKERS`` no reader depends on colour alone."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
NO_EPSILON = 2.2
"""Where runs without privacy stand: behind the largest ε, times this."""
PICTURE_STYLE = """
.picture { background: #fff; max-width: 62rem; }
.picture figcaption strong { color: #1c2126; }
.picture svg { width: 100%; height: auto; }
"""
"""Beside the report's style: pictures are on white wherever they are shown."""
SPREAD = 0.035
"""Between neighbouring lines at one ε, of its logarithm: intervals do not cover each other."""
MOST_SPREAD = 0.36
"""Of all lines together: a place is still one ε's."""
MARK_WIDTH, LETTER_WIDTH = 0.55, 0.068
"""Inches of a legend's mark and of a letter at its size, so that no name is cut off."""
PLOT_HEIGHT, ROW_HEIGHT = 4.4, 0.17
"""Inches of what is not the legend, and of each of its rows, so that many names take nothing from the plot."""
PUBLISHED_WIDTH = 0.3
"""Of the part for published figures, where ours is 1. They are of other models and data, so its scale is its own."""


def write_pictures(rows: Sequence[Row], published: Sequence[Published], folder: Path, name: str) -> list[Path]:
    """Write ``<name>.html``, ``<name>-epsilon.png`` and ``<name>-bytes.png``, and return their paths.

    Raises:
        ConfigError: matplotlib is not installed.
        DataError: there is no row to draw, or they are judged by different things, or a file cannot be written.
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

    Runs without privacy stand behind the largest ε, apart from the lines: they have no place on the axis. Lines that
    all have one ε stand side by side, on no axis of ε. A fitted head is a line over all of it. Where accuracy is of
    next tokens, the loss stands in its place, and no published figure.
    """
    shown = published if _by_accuracy(found) else []
    figure, parts = _figure(8.6, widths=[1.0, PUBLISHED_WIDTH] if shown else [1.0])
    ours = [group for group in found if not ARMS[group.arm].fitted]
    asked = [group.epsilon_asked for group in ours]
    behind = _at_epsilons(parts[0], asked)
    lines = list(dict.fromkeys((group.variant, group.arm) for group in ours))
    one = len(set(asked)) == 1 and len(lines) > 1
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
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            linestyle=ARMS[line[1]].dash,
            fillstyle=ARMS[line[1]].fill,
            linewidth=1.6,
            markersize=5,
            label=_line_name(*line, min((group.honest for group in members if group.honest), default=0)),
        )
    if one:
        _side_by_side(parts[0], len(lines), asked[0])
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
    for number, kind in enumerate(dict.fromkeys(_kind(item) for item in published)):
        items = [item for item in published if _kind(item) == kind]
        axes.plot(
            [item.epsilon or behind for item in items],
            [100 * item.accuracy for item in items],
            linestyle="none",
            marker=MARKERS[number % len(MARKERS)],
            markerfacecolor="none",
            color="#59636e",
            label=f"published: {kind}",
        )
    axes.set_title("published:\nother models and data", fontsize=8)
    axes.margins(x=0.15)
    axes.tick_params(axis="y", labelsize=8)


def _at_epsilons(axes: Axes, asked: Sequence[float | None]) -> float:
    """Mark the ε of these on a logarithmic axis, and return where those without one stand."""
    claimed = sorted({epsilon for epsilon in asked if epsilon is not None})
    behind = NO_EPSILON * (claimed[-1] if claimed else 1.0)
    places = [*claimed, *([behind] if None in asked else [])]
    _logarithmic(axes, places, [*map(epsilon_name, claimed), *([NO_CLAIM] if None in asked else [])])
    axes.set_xlabel("ε, at most")
    return behind


def bytes_figure(found: Sequence[Group]) -> Figure:
    """Return accuracy against the bytes of a whole run, all sites and both ways, with a part for each ε.

    Baselines are left out: nothing of them needs to travel.
    """
    sending = [group for group in found if group.payload]
    asked = sorted({group.epsilon_asked for group in sending}, key=lambda epsilon: epsilon or math.inf)
    figure, parts = _figure(max(7.6, 2.7 * len(asked)), [1.0] * max(1, len(asked)), one_scale=True)
    payloads = [group.payload for group in sending if group.payload]
    marks = _decades(min(payloads), max(payloads)) if payloads else []
    for axes, epsilon in zip(parts, asked, strict=False):
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
    """Return what a line is called, with the honest sites that its ε counts on.

    >>> _line_name("sum", FEDERATED, 3), _line_name("probe", "pooled", 0)
    ('sum, h = 3', 'probe, pooled')
    """
    return variant + ("" if arm == FEDERATED else f", {arm}") + (f", h = {honest}" if honest else "")


def _by_accuracy(found: Sequence[Group]) -> bool:
    """Whether accuracy is of labels in every group; else all are shown by their loss."""
    return all(group.labelled for group in found)


def _shown(group: Group) -> Interval:
    """Return what a group is shown by: its accuracy in per cent, or its loss in nats."""
    if not group.labelled:
        return group.loss
    half = group.accuracy.half
    return Interval(100 * group.accuracy.mean, None if half is None else 100 * half)


def _decades(low: float, high: float) -> list[float]:
    """Return the powers of ten around two figures.

    >>> _decades(2e3, 3e5)
    [1000.0, 10000.0, 100000.0, 1000000.0]
    """
    return [10.0**power for power in range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 2)]


def _figure(width: float, widths: Sequence[float], *, one_scale: bool = False) -> tuple[Figure, list[Axes]]:
    """Return a figure of so many inches and its parts, side by side, with one vertical scale or one each."""
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
    colour = COLOURS[index % len(COLOURS)]
    axes.errorbar(
        places,
        [_shown(group).mean for group in members],
        yerr=[_shown(group).half or 0.0 for group in members],
        color=colour,
        marker=MARKERS[index % len(MARKERS)],
        linestyle="none",
        fillstyle=fill,
        markersize=5,
        ecolor=(colour, 0.45),
        elinewidth=1.0,
        capsize=2,
        label=label,
    )


def _logarithmic(axes: Axes, places: Sequence[float], texts: Sequence[str]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(places, texts, fontsize=9)
    axes.set_xticks([], minor=True)


def _finish(figure: Figure, parts: Sequence[Axes], found: Sequence[Group]) -> None:
    what = (
        "accuracy on the public test part, %" if _by_accuracy(found) else "loss on the public test part, nats a token"
    )
    parts[0].set_ylabel(what)
    legend: dict[str, Any] = {}
    for axes in parts:
        axes.grid(axis="y", color="#eceef0")
        axes.spines[["top", "right"]].set_visible(False)
        handles, labels = axes.get_legend_handles_labels()
        legend = {**dict(zip(labels, handles, strict=True)), **legend}
    if legend:
        ours = sorted(legend, key=lambda label: label.startswith("published"))
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


def _kind(item: Published) -> str:
    return f"{item.method}, {item.model}, {item.data}"


def drawn_from(rows: Sequence[Row], published: Sequence[Published]) -> str:
    """Return the SHA-256 of what pictures show, which each carries: the rows' table and the published figures."""
    told = [markdown_of(rows).partition("\n\n")[0], *map(repr, published)]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()


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


def to_page(name: str, rows: Sequence[Row], published: Sequence[Published], svgs: Sequence[Markup]) -> str:
    """Return one page that loads nothing: the pictures, the table, and where the published figures are from."""
    what = "Accuracy" if _by_accuracy(groups(rows)) else "Loss"
    titles = (f"{what} against ε", f"{what} against the bytes of a run, all sites and both ways")
    figures = Markup("").join(
        Markup('<figure class="picture"><figcaption><strong>{}</strong></figcaption>{}</figure>').format(title, svg)
        for title, svg in zip(titles, svgs, strict=True)
    )
    table, (needed, more) = markdown_of(rows).partition("\n\n")[0], notes(rows, filled(groups(rows)))
    parts = [
        Markup("<h1>{}</h1>").format(visible(name)),
        Markup("<p>Bars are 95 % intervals of means over seeds.{}</p>").format(
            " Open marks are published figures of other models and data." * bool(published)
        ),
        figures,
        Markup("<h2>Figures</h2>{}<p>{}</p>").format(_table(_cells(table)), _plain(" ".join([*needed, *more]))),
    ]
    if published:
        header = ["method", "model", "data", "ε, as stated", "accuracy", "source", "note"]
        lines = [
            [
                *(item.method, item.model, item.data),
                "none" if item.epsilon is None else epsilon_name(item.epsilon),
                *(percent_text(item.accuracy), item.source, item.note),
            ]
            for item in published
        ]
        parts.append(Markup("<h2>Published, of other models and data</h2>{}").format(_table([header, *lines])))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(visible(name))}</title>'
        f"<style>{STYLE}{PICTURE_STYLE}</style></head><body><main>"
        f"{Markup('').join(parts)}</main></body></html>\n"
    )


def _cells(table: str) -> list[list[str]]:
    """Return header and rows of a Markdown table as plain text."""
    lines = [line for line in table.splitlines() if not line.startswith("|---")]
    return [[_plain(cell.strip()) for cell in line.strip("|").split("|")] for line in lines]


def _plain(text: str) -> str:
    return visible(text.replace("**", "").replace("`", ""))


def _table(lines: Sequence[Sequence[str]]) -> Markup:
    header, *rows = lines
    head = Markup("").join(Markup("<th>{}</th>").format(cell) for cell in header)
    body = Markup("").join(
        Markup("<tr>{}</tr>").format(Markup("").join(Markup("<td>{}</td>").format(cell) for cell in row))
        for row in rows
    )
    return Markup('<div class="scroll"><table><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>').format(
        head, body
    )

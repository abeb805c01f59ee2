"""Pictures of a sweep: accuracy against ε and against bytes, with intervals, as one page and two PNGs.

Matplotlib draws them (the extra ``pictures``). The same rows give the same bytes.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from common.errors import ConfigError, DataError
from common.files import replace_file
from common.privacy.figures import NO_CLAIM
from common.words import percent_text, visible
from experiments.sweep.arms import ARMS, FEDERATED
from experiments.sweep.file import epsilon_name
from experiments.sweep.published import Published
from experiments.sweep.rows import Row
from experiments.sweep.summary import Group, groups, markdown_of
from reports.page_style import STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#00805f", "#b35a8e", "#a67600", "#5a6b7b")
"""Of variants, the report's; with ``MARKERS`` no reader depends on colour alone."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
OPEN_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
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


def write_pictures(rows: Sequence[Row], published: Sequence[Published], folder: Path, name: str) -> list[Path]:
    """Write ``<name>.html``, ``<name>-epsilon.png`` and ``<name>-bytes.png``, and return their paths.

    Raises:
        ConfigError: matplotlib is not installed.
        DataError: there is no row to draw, or a file cannot be written.
    """
    found = groups(rows)
    if not found:
        raise DataError("there is no result to draw: run the sweep first")
    drawn = {"epsilon": epsilon_figure(found, published), "bytes": bytes_figure(found)}
    written = {folder / f"{name}-{kind}.png": _png(figure) for kind, figure in drawn.items()}
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
    """Return accuracy against ε: a line for each variant and arm, with intervals; published figures as open marks."""
    figure, axes = _figure()
    asked = [group.epsilon_asked for group in found] + [figure.epsilon for figure in published]
    claimed = sorted({epsilon for epsilon in asked if epsilon is not None})
    behind = NO_EPSILON * (claimed[-1] if claimed else 1.0)
    lines = list(dict.fromkeys((group.variant, group.arm) for group in found))
    for number, (variant, arm) in enumerate(lines):
        shift = math.exp(SPREAD * (number - (len(lines) - 1) / 2))
        members = [group for group in found if (group.variant, group.arm) == (variant, arm)]
        members.sort(key=lambda group: group.epsilon_asked or math.inf)
        places = [shift * (group.epsilon_asked or behind) for group in members]
        _line(axes, places, members, variant, _index(found, variant), arm)
    for number, kind in enumerate(dict.fromkeys(_kind(item) for item in published)):
        items = [item for item in published if _kind(item) == kind]
        axes.plot(
            [item.epsilon or behind for item in items],
            [100 * item.accuracy for item in items],
            linestyle="none",
            marker=OPEN_MARKERS[number % len(OPEN_MARKERS)],
            markerfacecolor="none",
            color="#59636e",
            label=f"published: {kind}",
        )
    axes.set_xscale("log")
    places = [*claimed, *([behind] if None in asked else [])]
    axes.set_xticks(places, [*map(epsilon_name, claimed), *([NO_CLAIM] if None in asked else [])])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("ε for each record, at most")
    _finish(axes)
    return figure


def bytes_figure(found: Sequence[Group]) -> Figure:
    """Return accuracy against the bytes of a whole run, all sites and both ways; baselines send none."""
    figure, axes = _figure()
    sending = [group for group in found if group.payload]
    for variant in dict.fromkeys(group.variant for group in sending):
        members = [group for group in sending if group.variant == variant]
        places = [group.payload / 1e6 for group in members if group.payload]
        _line(axes, places, members, variant, _index(found, variant), FEDERATED, joined=False)
        for place, group in zip(places, members, strict=True):
            said = NO_CLAIM if group.epsilon_asked is None else f"ε {epsilon_name(group.epsilon_asked)}"
            axes.annotate(
                said,
                (place, 100 * group.accuracy.mean),
                (7, 4),
                textcoords="offset points",
                fontsize=8,
                color="#59636e",
            )
    if sending:
        axes.set_xscale("log")
    axes.set_xlabel("adapter bytes of a run, all sites and both ways, MB")
    _finish(axes)
    return figure


def _figure() -> tuple[Figure, Axes]:
    try:
        from matplotlib import rcParams
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ConfigError(
            "pictures are drawn by matplotlib, which is not installed: pip install 'matplotlib>=3.9,<4'"
        ) from error
    # Text stays text, and the same figures give the same bytes.
    rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "fedveil"})
    figure = Figure(figsize=(7.6, 4.8), layout="constrained")
    return figure, figure.subplots()


def _line(
    axes: Axes,
    places: Sequence[float],
    members: Sequence[Group],
    variant: str,
    index: int,
    arm: str,
    *,
    joined: bool = True,
) -> None:
    means = [100 * group.accuracy.mean for group in members]
    axes.errorbar(
        places,
        means,
        yerr=[100 * (group.accuracy.half or 0.0) for group in members],
        color=COLOURS[index % len(COLOURS)],
        marker=MARKERS[index % len(MARKERS)],
        linestyle=ARMS[arm].dash if joined else "none",
        markersize=5,
        linewidth=1.6,
        elinewidth=1.0,
        capsize=3,
        label=variant if arm == FEDERATED else f"{variant}, {arm}",
    )


def _finish(axes: Axes) -> None:
    axes.set_ylabel("accuracy on the public test part, %")
    axes.grid(axis="y", color="#eceef0")
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _index(found: Sequence[Group], variant: str) -> int:
    return list(dict.fromkeys(group.variant for group in found)).index(variant)


def _kind(item: Published) -> str:
    return f"{item.method}, {item.model}, {item.data}"


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=160, metadata={"Software": None})
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
    titles = ("Accuracy against ε", "Accuracy against bytes")
    figures = Markup("").join(
        Markup('<figure class="picture"><figcaption><strong>{}</strong></figcaption>{}</figure>').format(title, svg)
        for title, svg in zip(titles, svgs, strict=True)
    )
    table, _, notes = markdown_of(rows).partition("\n\n")
    parts = [
        Markup("<h1>{}</h1>").format(visible(name)),
        Markup(
            "<p>Bars are 95 % intervals of means over seeds. Open marks are published figures of other models and data."
            "</p>"
        ),
        figures,
        Markup("<h2>Figures</h2>{}<p>{}</p>").format(_table(_cells(table)), _plain(notes)),
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

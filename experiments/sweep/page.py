"""The page of a sweep: its pictures, its table, and where published figures are from. It loads nothing."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup, escape

from fedveil.common.words import percent_text, visible
from fedveil.experiments.sweep.file import epsilon_name
from fedveil.experiments.sweep.groups import groups
from fedveil.experiments.sweep.published import Published
from fedveil.experiments.sweep.rows import Row
from fedveil.experiments.sweep.summary import more_notes, notes, table_of
from fedveil.reports.page_style import STYLE

PICTURE_STYLE = """
.picture { background: #fff; max-width: 62rem; }
.picture figcaption strong { color: #1c2126; }
.picture svg { width: 100%; height: auto; }
"""
"""Beside the report's style: pictures are on white wherever they are shown."""


def to_page(name: str, rows: Sequence[Row], published: Sequence[Published], svgs: Sequence[Markup]) -> str:
    """Return one page that loads nothing: the pictures, the table, and where the published figures are from."""
    what = "Accuracy" if all(group.labelled for group in groups(rows)) else "Loss"
    titles = (f"{what} against ε", f"{what} against the bytes of a run, all sites and both ways")
    figures = Markup("").join(
        Markup('<figure class="picture"><figcaption><strong>{}</strong></figcaption>{}</figure>').format(title, svg)
        for title, svg in zip(titles, svgs, strict=True)
    )
    table = [[_plain(cell) for cell in cells] for cells in table_of(rows)]
    text = _plain(" ".join([*notes(rows), *more_notes(rows, table[0])]))
    parts = [
        Markup("<h1>{}</h1>").format(visible(name)),
        Markup("<p>Bars are 95 % intervals of means over seeds.{}</p>").format(
            " Open marks are published figures of other models and data." * bool(published)
        ),
        figures,
        Markup("<h2>Figures</h2>{}<p>{}</p>").format(_table(table), text),
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

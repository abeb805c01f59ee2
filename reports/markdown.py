"""The report as Markdown. Every word from elsewhere is escaped, every figure comes from the data."""

from __future__ import annotations

import html
import re

from fedveil.common.words import visible
from fedveil.reports.data import ReportData
from fedveil.reports.document import Block, Items, Table, Terms, Text
from fedveil.reports.result import alarms_of, boxes_of, made_of, promise_of
from fedveil.reports.sections import sections_of

LINKED = re.compile(r"(?i)(?<=w)w(?=w\.)|:(?=//)|(?<=mailto):|(?<=xmpp):|@")
"""The character by which readers of Markdown know a bare address; written as its number it makes no link."""


def plain(text: str) -> str:
    """Return ``text`` so that Markdown shows it as it is, in a table too, and makes no link of an address in it.

    >>> plain("a|b <script> *c* https://d.example")
    'a\\\\|b &lt;script&gt; \\\\*c\\\\* https&#58;//d.example'
    """
    escaped = re.sub(r"([\\`*_\[\]|#~$])", r"\\\1", html.escape(visible(text), quote=False))
    return LINKED.sub(lambda match: f"&#{ord(match.group())};", escaped)


def to_markdown(data: ReportData) -> str:
    """Return the whole report."""
    ended = data.status + (f": {data.reason}" if data.reason else "")
    boxes = [f"- {box.label}: {plain('; '.join([box.figure, *box.notes]))}" for box in boxes_of(data)]
    parts = [
        f"# Run {plain(data.run)}: {plain(data.method)}",
        plain(made_of(data)),
        *(f"> {_text(alarm)}" for alarm in alarms_of(data)),
        "\n".join([f"- status: {plain(ended)}", *boxes]),
        *(f"{'> ' * (text.style != 'claim')}{_text(text)}" for text in promise_of(data)),
    ]
    for section in sections_of(data):
        parts += [f"## {section.title}", *map(_block, section.blocks)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _block(block: Block) -> str:
    match block:
        case Text():
            return _text(block)
        case Items():
            items = "\n".join(f"- {plain(row)}" for row in block.rows)
            return f"{plain(block.title)}\n\n{items}" if block.title else items
        case Terms():
            return _table(Table("", ("", ""), block.rows))
        case Table():
            return f"{plain(block.folded)}\n\n{_table(block)}" if block.folded else _table(block)


def _text(text: Text) -> str:
    label = f"**{text.label}** " if text.label else ""
    return f"**{plain(text.text)}**" if text.style == "claim" else f"{label}{plain(text.text)}"


def _table(table: Table) -> str:
    head = [f"| {' | '.join(map(plain, table.columns))} |", "|" + "---|" * len(table.columns)]
    return "\n".join([*head, *(f"| {' | '.join(map(plain, row))} |" for row in table.rows)])

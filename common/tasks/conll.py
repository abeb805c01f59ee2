"""Reading of CoNLL-like files: a line a word, its label last, and an empty line between records."""

from __future__ import annotations

import re
from pathlib import Path

from fedveil.common.tasks.tables import Table, Unfit

DOCUMENT = "-DOCSTART-"
"""First word of lines that part documents: no record."""


def read_conll(path: Path) -> Table:
    """Return the columns ``text`` and ``label``: the words of each record, and their labels.

    Words and labels are parted by tabs or blanks; what is between the first and the last cell of a line is not read. A
    record with a line that is not such, or not UTF-8, is unread, and no other record with it.
    """
    words: list[object] = []
    labels: list[object] = []
    unread: dict[int, Unfit] = {}
    record: list[tuple[str, str]] = []
    begins: list[int] = []
    wrong: Unfit | None = None
    for number, line in enumerate([*path.read_bytes().split(b"\n"), b""], start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            cells, lacks = _cells_of(text)
        except UnicodeDecodeError:
            cells, lacks = ["?"], "is not UTF-8: save the file as UTF-8"
        if cells and cells[0] != DOCUMENT:
            if lacks and wrong is None:
                wrong = Unfit(str(path), number, "is no word and its label", f"{path} line {number} {lacks}")
            begins += [] if record else [number]
            record.append((cells[0], cells[-1]))
        elif record:
            if wrong:
                unread[len(words)] = wrong
            words.append(None if wrong else [word for word, _ in record])
            labels.append(None if wrong else [label for _, label in record])
            record, wrong = [], None
    columns = {"text": words, "label": labels}
    return Table(str(path), columns, unread=unread, folder=path.parent, unit="line", places=begins)


def _cells_of(line: str) -> tuple[list[str], str]:
    """Return the cells of a line, and what it lacks of a word and its label, in words."""
    cells = [cell for cell in re.split("[ \t]+", line.strip(" \t\r")) if cell]
    # Some corpora have cut texts into words of blanks alone: behind a tab, or alone behind a blank, is no word.
    behind = not line.partition("\t")[0].strip(" ") if "\t" in line else len(cells) == 1 and line.startswith(" ")
    if cells and (behind or not cells[0].strip()):
        return cells, "has no word before its label: write it, or remove the record"
    return cells, "has no label behind its word: write it, or remove the record" if len(cells) == 1 else ""

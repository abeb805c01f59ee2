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
    wrong = ""
    for number, line in enumerate([*path.read_bytes().split(b"\n"), b""], start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip(" \t\r")
            cells = [cell for cell in re.split("[ \t]+", text) if cell]
        except UnicodeDecodeError:
            cells, wrong = ["?"], wrong or f"line {number} is not UTF-8: save the file as UTF-8"
        if cells and cells[0] != DOCUMENT:
            wrong = wrong or ("" if len(cells) > 1 else f"line {number} has no label behind its word")
            record.append((cells[0], cells[-1]))
        elif record:
            if wrong:
                reason = "has a line that is no word and its label"
                unread[len(words)] = Unfit(
                    str(path), len(words) + 1, reason, f"{path} cannot be read as CONLL: {wrong}"
                )
            words.append(None if wrong else [word for word, _ in record])
            labels.append(None if wrong else [label for _, label in record])
            record, wrong = [], ""
    return Table(str(path), {"text": words, "label": labels}, unread=unread, folder=path.parent)

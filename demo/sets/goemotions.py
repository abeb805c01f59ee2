"""GoEmotions: comments with any of 27 emotions, or neutral (Demszky et al. 2020, arXiv 2005.00547; CC BY 4.0).

Each comment has one label or several. The files have no header: text, numbers of labels with commas between, an id.
"""

from __future__ import annotations

from pathlib import Path

from fedveil.common.data.named import NamedDataset, UserFile
from fedveil.common.errors import UnreadableFile
from fedveil.common.tasks.tables import Table

EMOTIONS = (
    *("admiration", "amusement", "anger", "annoyance", "approval", "caring", "confusion", "curiosity", "desire"),
    *("disappointment", "disapproval", "disgust", "embarrassment", "excitement", "fear", "gratitude", "grief", "joy"),
    *("love", "nervousness", "optimism", "pride", "realization", "relief", "remorse", "sadness", "surprise", "neutral"),
)
COLUMNS = ("text", "labels", "id")
WHENCE = "is in goemotions/data of github.com/google-research/google-research"


def read(path: Path) -> Table:
    """Return the columns of a file of GoEmotions, which has no header and no quotes, with the labels' names as lists.

    Raises:
        UnreadableFile: a line has other fields, or a number that is no label's.
    """
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").split("\n") if line]
    for number, row in enumerate(rows, start=1):
        if len(row) != len(COLUMNS) or any(not n.isdecimal() or int(n) >= len(EMOTIONS) for n in row[1].split(",")):
            raise UnreadableFile(f"line {number} of {path} is no text, numbers of labels and id, with tabs between")
    texts, numbers, ids = zip(*rows, strict=True)
    named = [",".join(EMOTIONS[int(number)] for number in of_row.split(",")) for of_row in numbers]
    return Table(str(path), dict(zip(COLUMNS, (list(texts), named, list(ids)), strict=True)))


def _split(name: str, file: str) -> NamedDataset:
    return NamedDataset(
        name=name,
        file=UserFile(f"data/goemotions/{file}.tsv", WHENCE),
        task="multi-label",
        fields={"text": "{text}", "labels": "{labels}"},
        labels={emotion: emotion for emotion in EMOTIONS},
        read=read,
    )


GOEMOTIONS, GOEMOTIONS_DEV = _split("goemotions", "train"), _split("goemotions-dev", "dev")

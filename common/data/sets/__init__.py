"""Data sets that FedVeil names; one source's per file, and ``DATASETS`` is the table of them."""

from __future__ import annotations

from pathlib import Path

from common.data.sets.asdiv import ASDIV
from common.data.sets.base import NamedDataset, UserFile
from common.data.sets.movie_reviews import IMDB, IMDB_ENDINGS, ROTTEN_TOMATOES
from common.data.sets.orange import NEWSGROUPS, NEWSGROUPS_TEST, REUTERS, REUTERS_TEST
from common.data.sets.sentence_pairs import QNLI, QNLI_DEV, SNLI, SNLI_DEV
from common.data.sets.sst2 import SST2, SST2_DEV, SST2_TEST
from common.data.sets.textile_images import TEXTILE_IMAGES

DATASETS: dict[str, NamedDataset] = {
    dataset.name: dataset
    for dataset in (
        *(ROTTEN_TOMATOES, IMDB, IMDB_ENDINGS),
        *(SST2, SST2_DEV, SST2_TEST),
        *(REUTERS, REUTERS_TEST, NEWSGROUPS, NEWSGROUPS_TEST),
        *(SNLI, SNLI_DEV, QNLI, QNLI_DEV),
        ASDIV,
        TEXTILE_IMAGES,
    )
}


def share_sentences(one: str, other: str) -> bool:
    """Return whether two sources are known to hold the same sentences: one data set, or two whose rows say so.

    A source is a name, or the file that a row of the table looks for.
    """
    one, other = _row_of(one), _row_of(other)
    if one == other:
        return True
    pairs = ((one, other), (other, one))
    return any(b in DATASETS[a].shares_sentences_with for a, b in pairs if a in DATASETS)


def _row_of(source: str) -> str:
    files = {Path(row.file.path): name for name, row in DATASETS.items() if isinstance(row.file, UserFile)}
    return source if source in DATASETS else files.get(Path(source), source)


__all__ = ["DATASETS", "NamedDataset", "UserFile", "share_sentences"]

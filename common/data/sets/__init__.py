"""Data sets that FedVeil names; one source's per file, and ``DATASETS`` is the table of them."""

from __future__ import annotations

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
    """Return whether two sources are known to hold the same sentences: one data set, or two whose rows say so."""
    if one == other:
        return True
    pairs = ((one, other), (other, one))
    return any(b in DATASETS[a].shares_sentences_with for a, b in pairs if a in DATASETS)


__all__ = ["DATASETS", "NamedDataset", "UserFile", "share_sentences"]

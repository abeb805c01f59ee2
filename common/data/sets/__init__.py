"""Data sets that FedVeil names; one package's per file, and ``DATASETS`` is the table of them."""

from __future__ import annotations

from common.data.sets.asdiv import ASDIV
from common.data.sets.base import NamedDataset
from common.data.sets.movie_reviews import IMDB, ROTTEN_TOMATOES
from common.data.sets.textile_images import TEXTILE_IMAGES

DATASETS: dict[str, NamedDataset] = {
    dataset.name: dataset for dataset in (ROTTEN_TOMATOES, IMDB, ASDIV, TEXTILE_IMAGES)
}

__all__ = ["DATASETS", "NamedDataset"]

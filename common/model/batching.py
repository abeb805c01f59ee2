"""Batches of records of like length: a logical batch cut into forward passes, and epochs cut into batches.

Scoring does not care in which order records pass, so sorting by length is free and saves the padding.
In training without privacy batches are small, and sorting pays only across several of them. DP-SGD's
batches are a Poisson sample, cut by ``common.model.shapes``, and never made here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from fedveil.common.errors import DataError

WINDOW = 8
"""Batches of an epoch among which records are sorted by length: a quarter fewer tokens on the plain job."""


def length_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Return positions of ``lengths``, longest first, in groups with count × longest ≤ ``budget``.

    Every position appears exactly once; a record longer than the budget gets a group of its own.

    >>> length_batches([3, 9, 4, 8], budget=18)
    [[1, 3], [2, 0]]
    """
    groups: list[list[int]] = []
    for position in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= budget:
            groups[-1].append(position)
        else:
            groups.append([position])
    return groups


def epoch_batches(
    lengths: Sequence[int], sample_rate: float, generator: torch.Generator, skipped: int = 0
) -> Iterator[list[int]]:
    """Yield the batches of a run without privacy, after ``skipped``: positions of ``lengths``, one epoch after another.

    Batches have the private sampler's expected size. Of every ``WINDOW`` batches of a random order each holds records
    of like length, which saves the padding that a batch this small cannot save by itself; they come in a random order
    again. No record comes twice in an epoch; what is too little for a batch at its end begins the next one.

    Raises:
        DataError: there is no record.
    """
    size = len(lengths)
    if not size:
        raise DataError("this site has no records to train on")
    count = max(1, min(size, round(sample_rate * size)))
    pending: list[int] = []
    while True:
        pending += torch.randperm(size, generator=generator).tolist()
        while len(pending) >= count:
            batches = min(WINDOW, len(pending) // count)
            window = sorted(pending[: batches * count], key=lambda i: lengths[i])
            pending = pending[batches * count :]
            for number in torch.randperm(batches, generator=generator).tolist():
                if skipped:
                    skipped -= 1
                else:
                    yield window[number * count : (number + 1) * count]

"""Shapes of private batches: a record's follows from its own length, never from another's.

Arithmetic in floating point depends on the shape of a batch: a matrix product of other sizes may add
in another order. If a record's shape depended on who is beside it, adding one record would move what
others contribute, under a hostile adapter by whole clips. Here every record of a length is computed
in one shape, with rows of filler where there are too few records, so that its gradient is the same to
the last bit in every row and beside any others.

Records are padded to a grid of lengths, about four to an octave. Each is a multiple of 8: with others, rows begin at
addresses of another alignment, and kernels round them otherwise. Each record gets one token of padding at least: where
no row has any, models drop the mask and take another road. Records that are all of one size, as images are, have no
mask and one shape. Small batches waste less on filler, large ones less on calls (``choose_private_tokens``).
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

FINEST = 8
"""What every length is a multiple of, in tokens."""


def longest_within(positions: int) -> int:
    """Return the tokens of the longest record whose shape stays within a model's ``positions``; at least 1.

    >>> longest_within(512), longest_within(514)
    (511, 511)
    """
    return max(1, positions // FINEST * FINEST - 1)


class FixedBatch(dict[str, Tensor]):
    """A batch of a fixed shape: the first ``records`` rows are records, the others filler that counts for nothing."""

    def __init__(self, tensors: dict[str, Tensor], records: int) -> None:
        super().__init__(tensors)
        self.records = records

    @property
    def rows(self) -> int:
        """Number of rows, filler included."""
        return len(next(iter(self.values())))

    def alone(self, row: int) -> FixedBatch:
        """Return a batch of the same shape with one of the records in row 0, and no other record beside it."""
        picked = torch.full((self.rows,), row)
        return FixedBatch({key: value[picked.to(value.device)] for key, value in self.items()}, 1)


@dataclass(frozen=True)
class Shapes:
    """Which shape a record of how many tokens is computed in."""

    longest: int
    """Most tokens of a record."""
    tokens: int
    """Tokens of one forward pass, rows of filler included; a longer record has a pass of its own."""
    most: int = sys.maxsize
    """Most rows of one pass."""
    uniform: bool = False
    """Whether all records are of the longest size, as images are: then one shape without padding serves all."""
    narrow: tuple[tuple[int, int], ...] = ()
    """Lengths with fewer rows than that, and how many: those that a device computes equally (``client.rehearsal``)."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """The grid of lengths, ascending; the last is the next multiple of 8 above ``longest``, or that where all are.

        >>> Shapes(longest=128, tokens=256).lengths
        (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 136)
        >>> Shapes(longest=17, tokens=256, uniform=True).lengths
        (17,)
        """
        if self.uniform:
            return (self.longest,)
        grid, length, top = [], FINEST, (self.longest // FINEST + 1) * FINEST
        while length < top:
            grid.append(length)
            length += max(FINEST, 2 ** (length.bit_length() - 1) // 4)
        if length > top and top - grid[-1] <= FINEST:
            grid.pop()  # hardly shorter than the last: its own batches would be mostly filler
        return (*grid, top)

    def rows_of(self, length: int) -> int:
        """Return the rows of a batch of records of this length; at least 1."""
        return max(1, min(self.most, self.tokens // length, dict(self.narrow).get(length, self.most)))

    def length_of(self, tokens: int) -> int:
        """Return the length in which a record of so many tokens, at most ``longest``, is computed."""
        return self.lengths[0 if self.uniform else bisect_right(self.lengths, tokens)]

    def narrowed(self, length: int, rows: int) -> Shapes:
        """Return these shapes with at most ``rows`` rows for this length."""
        return replace(self, narrow=tuple(sorted((dict(self.narrow) | {length: rows}).items())))

    def groups(self, tokens: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        """Yield (length, positions of ``tokens``): every position once, at most ``rows_of(length)`` in a group.

        Args:
            tokens: each record's number of tokens, at most ``longest`` (of uniform ones exactly): others are no
                records of this run.

        Raises:
            ValueError: a record is longer than that, or shorter where all are of one size.

        >>> list(Shapes(longest=16, tokens=16).groups([3, 9, 4, 8]))
        [(8, [0, 2]), (16, [1]), (16, [3])]
        """
        if max(tokens, default=0) > self.longest:
            raise ValueError(f"a record has more than {self.longest} tokens")
        if self.uniform and min(tokens, default=self.longest) < self.longest:
            raise ValueError(f"a record has fewer than {self.longest} tokens, which all have")
        members: dict[int, list[int]] = {}
        for position, count in enumerate(tokens):
            members.setdefault(self.length_of(count), []).append(position)
        for length in sorted(members):
            rows = self.rows_of(length)
            for start in range(0, len(members[length]), rows):
                yield length, members[length][start : start + rows]

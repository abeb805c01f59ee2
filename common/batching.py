"""Cut a logical batch into forward passes of records of like length.

Under DP-SGD the order of records inside a logical batch changes nothing (a sum of clipped
gradients), so sorting by length is free and saves the padding.
"""

from __future__ import annotations

from collections.abc import Sequence


def length_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Return positions of ``lengths``, longest first, grouped so that count × longest ≤ ``budget``.

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

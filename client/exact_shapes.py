"""The shapes in which a device computes a record to the same bits in every row: what a rehearsal leaves to a model.

Of each length as many rows are tried as the budget of a pass allows, then fewer. All shapes that are left have passed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedveil.client.comparison import check_finite, check_forgets, check_repeats
from fedveil.client.inner_shapes import follow_from_records
from fedveil.common.model.shapes import Shapes
from fedveil.common.tasks.base import WEIGHT
from fedveil.privacy.together import Together

if TYPE_CHECKING:
    from fedveil.client.rehearsal import _Rehearsal

log = logging.getLogger("fedveil.site")


def settle_shapes(rehearsal: _Rehearsal) -> None:
    """Leave in a rehearsal the shapes that this device computes rightly, with the seconds of their passes."""
    if _mixed_inside(rehearsal):
        log.warning("records of this model share products whose sizes they decide: they pass one by one, slowly")
        for length in rehearsal.shapes.lengths:
            rehearsal.shapes = rehearsal.shapes.narrowed(length, 1)
    before = rehearsal.shapes
    try:
        wanted = _narrowed(rehearsal)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or not rehearsal.model.lowers:
            raise
        rehearsal.model.lowers = False  # some layer leaves autocast, and meets a weight of another precision
        wanted = _narrowed(rehearsal)
    if rehearsal.model.device.type != "cpu" and wanted != before and rehearsal.model.attention != "eager":
        rehearsal.model.base.module.set_attn_implementation("eager")  # type: ignore[operator]
        wanted = _narrowed(rehearsal)
    if wanted != before and any(rows == 1 for _, rows in wanted.narrow):
        # Alone in its pass a record is beside no other, whatever the device does.
        log.warning("this device does not compute equal rows to equal bits: some records pass one by one, slowly")
    rehearsal.shapes = wanted


def _mixed_inside(rehearsal: _Rehearsal) -> bool:
    """Return whether the records of a batch are together in products whose sizes follow from what they hold."""
    shapes = rehearsal.shapes
    for length in (shapes.lengths[0], shapes.lengths[-1]):
        rows = shapes.rows_of(length)
        longest = [rehearsal.longest(length, 100 + row) for row in range(rows)]
        batches = (rehearsal.others(length, rows, None), rehearsal.model.fixed_batch(longest, length, rows))
        if rows > 1 and follow_from_records(rehearsal.model, batches):
            return True
    return False


def _narrowed(rehearsal: _Rehearsal) -> Shapes:
    """Return the shapes with as many rows of each length as are equal to the last bit; all of them pass."""
    shapes, first, shown = rehearsal.shapes, dict[int, list[Tensor]](), dict[int, range]()
    with rehearsal.model.many_passes(), rehearsal.steps() as steps:
        for length in shapes.lengths:
            for rows in _fewer(shapes.rows_of(length)):
                gradients = rehearsal.equal_rows(steps, length, rows)
                if gradients is not None:
                    break
            first[length], shown[length] = check_finite(gradients, rehearsal.what), rehearsal.shown(rows)
            if rows < shapes.rows_of(length):
                shapes = shapes.narrowed(length, rows)
        for length in reversed(shapes.lengths):
            began = time.monotonic()
            now = rehearsal.among_others(steps, length, shapes.rows_of(length), shown[length])
            rehearsal.seconds[length] = (time.monotonic() - began) / len(shown[length])
            if not all(map(torch.equal, first[length], now)):
                shapes = shapes.narrowed(length, 1)
                alone = rehearsal.among_others(steps, length, 1, shown[length])
                check_forgets(first[length], alone, rehearsal.model.precision, rehearsal.what)
                again = rehearsal.among_others(steps, length, 1, shown[length])
                check_repeats(alone, again, rehearsal.model.device, rehearsal.what)
        # The clip and the sum need memory too: most of it where most rows are, and in the longest.
        ends = (shapes.lengths[0], shapes.lengths[-1])
        began = time.monotonic()
        fullest = [rehearsal.others(length, shapes.rows_of(length), None) for length in ends]
        # As a step has them: rows of unfolded records come with whose they are.
        parts = [Together(b.records, [(b, range(b.records))]) if WEIGHT in b else b for b in fullest]
        steps.release(parts, rehearsal.model.losses)
        more = time.monotonic() - began - sum(rehearsal.seconds[length] for length in ends)
        rehearsal.clipped = more, sum(map(shapes.rows_of, ends))
    return shapes


def _fewer(rows: int) -> Iterator[int]:
    """Yield numbers of rows to try, most first: others than multiples of 4 are often cut unevenly between threads.

    >>> list(_fewer(13))
    [13, 12, 8, 4, 2, 1]
    """
    yield from sorted({rows, *range(4, rows, 4), *(n for n in (2, 1) if n < rows)}, reverse=True)

"""Rows that belong together: a step sums the gradients of a unit's rows before norm and clip.

What a row is to a batch, a unit is to the clip: one vector, however many rows it comes from. A unit is a person with
several records, or a record that its task unfolds into rows with weights (``Task.unfold``). Rows of one unit may be of
several shapes, and so lie in several batches. Each row is computed in its own shape and its gradient is its own to the
last bit; a unit's rows are added in an order that follows from them alone, in float64. So neither moves with who is
beside. The sums of as many units are held at once as fit ``MOST_BYTES``; a unit is never divided.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedveil.common.model.federated import FederatedModel
    from fedveil.common.model.shapes import FixedBatch, Shapes
    from fedveil.common.tasks import Record

MOST_BYTES = 2**28
"""Memory that a step holds for sums of units' gradients beside the rows' own, unless one unit alone takes more."""
NUMBER = 8
"""Bytes of a number of such a sum."""


@dataclass(frozen=True)
class Together:
    """Whole units of one step, in as many batches as their rows have shapes."""

    units: int
    """How many there are."""
    parts: Iterable[tuple[Any, Sequence[int]]]
    """Batches, fixed ones where units are clipped, each with the unit (from 0) that each of its rows belongs to; filler
    has none."""


def units_at_once(numbers: int) -> int:
    """Return how many units' sums of ``numbers`` trained numbers are held at once; at least 1.

    >>> units_at_once(38_000), units_at_once(10**9)
    (883, 1)
    """
    return max(1, MOST_BYTES // (NUMBER * numbers)) if numbers else 1


def together(
    model: FederatedModel, records: Sequence[Record], members: Sequence[Sequence[int]], shapes: Shapes | None = None
) -> Iterator[Together]:
    """Yield units with all of their rows, each in one piece.

    Args:
        model: whose trained numbers are those that require a gradient once iteration begins.
        records: of all the units.
        members: positions of each unit's records.
        shapes: in which records pass; None: the model's own.
    """
    most = units_at_once(sum(p.numel() for p in model.module.parameters() if p.requires_grad))
    for start in range(0, len(members), most):
        chosen = members[start : start + most]
        rows = [(records[position], unit) for unit, positions in enumerate(chosen) for position in positions]
        yield Together(len(chosen), _parts(model, rows, shapes))


def _parts(
    model: FederatedModel, rows: Sequence[tuple[Record, int]], shapes: Shapes | None
) -> Iterator[tuple[FixedBatch, list[int]]]:
    for batch, positions in model.fixed_groups([record for record, _ in rows], shapes):
        yield batch, [rows[position][1] for position in positions]

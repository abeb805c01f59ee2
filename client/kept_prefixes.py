"""The comparison of kept values with computed ones: where a bit of a made-up record differs, nothing is kept.

What else a model hands from layer to layer, or makes of the layers that are left out, shows here and not in a run.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedveil.client.comparison import ComparedSteps
from fedveil.client.prefixes import MADE_UP, Prefixes
from fedveil.common.log import place_of
from fedveil.common.model.prefix import Form, Prefix
from fedveil.common.tasks import Record

if TYPE_CHECKING:
    from fedveil.client.rehearsal import _Rehearsal

log = logging.getLogger("fedveil.site")


def settle_prefix(rehearsal: _Rehearsal) -> None:
    """Leave a model its prefix, with the form of every length, if its records have the same bits behind it."""
    model = rehearsal.model
    if model.prefix is None or model.head_only:
        return
    try:
        alike = _all_alike(rehearsal, model.prefix)
    except Exception as error:
        log.warning("what leaves the layers below the adapter cannot be kept: %s", place_of(error))
        alike = False
    if not alike:
        log.info("every pass computes the layers below the adapter: this model does not begin behind them")
        model.prefix = None


def _all_alike(rehearsal: _Rehearsal, prefix: Prefix) -> bool:
    model = rehearsal.model
    with model.many_passes(), rehearsal.steps() as steps:
        for length in rehearsal.shapes.lengths:
            rows = rehearsal.shapes.rows_of(length)
            records = [rehearsal.invent(1 + 3 * i % max(1, length - 1), i) for i in range(rows - 1)]
            records.append(rehearsal.longest(length))
            plain = model.fixed_batch(records, length, rows)
            form = prefix.form_of(lambda plain=plain: model.features(plain), rows)  # type: ignore[misc]
            if form is None or prefix.forms.setdefault(length, form) != form:
                return False
            if not _alike(rehearsal, steps, records, length, form):
                return False
    return True


def _alike(rehearsal: _Rehearsal, steps: ComparedSteps, records: Sequence[Record], length: int, form: Form) -> bool:
    """Return whether records have the same bits computed, while they are put by, and kept, in the opposite order."""
    model = rehearsal.model

    def found(order: Sequence[Record]) -> list[Tensor]:
        batch = model.fixed_batch(order, length, len(records))
        return [sample.clone() for sample in steps.samples(batch, model.losses)]

    kept = Prefixes(most=len(records) * form.size)
    computed = found(records)
    with kept.opened(model, MADE_UP, MADE_UP):
        began = time.monotonic()
        put_by = found(records)
        # To put values by takes time as well, on which the forecast of a round counts.
        rehearsal.seconds[length] = max(rehearsal.seconds[length], time.monotonic() - began)
        behind = found(records[::-1])
        whole = all(kept.has(MADE_UP, name) for name in kept.names(MADE_UP))
    return whole and all(
        torch.equal(one, other) and torch.equal(one, last.flip(0))
        for one, other, last in zip(computed, put_by, behind, strict=True)
    )

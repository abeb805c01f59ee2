"""A site's records as the model takes them; what it cannot take is left out, which is to contribute zero.

Under Poisson sampling every record is drawn on its own, and divisor, noise and price follow from public figures. So a
record that is left out changes the sum as one whose gradient is zero, and nobody but the site can tell.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from common.log import place_of
from common.model.federated import FederatedModel
from common.tasks import Record
from common.tasks.examples import Example

log = logging.getLogger("fedveil.site")


def prepared(model: FederatedModel, examples: Sequence[Example]) -> list[Record]:
    """Return the records, in order, of those ``examples`` that the model can take."""
    try:
        records = model.prepare(examples)
    except Exception:  # one of them; which, shows when each passes by itself
        records = [record for example in examples for record in _one(model, example)]
    fitting = [record for record in records if model.task.fits(model.base, record, model.max_length)]
    if len(fitting) < len(records):
        log.warning("records that the model cannot take (too long, empty, of unknown tokens) contribute zero")
    return fitting


def _one(model: FederatedModel, example: Example) -> list[Record]:
    try:
        return model.prepare([example])
    except Exception as error:
        log.warning("a record could not be prepared and contributes zero: %s", place_of(error))
        return []

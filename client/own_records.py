"""A site's records as the model takes them; what it cannot take is left out, which is to contribute zero.

Under Poisson sampling every unit is drawn on its own, and divisor, noise and price follow from public figures. So a
record that is left out changes the sum as one whose gradient is zero, and only the site knows.

Where the unit is a person a site uses a bounded number of each person's records: those whose rows have the least
hashes. Which ones follows from that person's rows alone, no matter who else is there, what the server asks and in
whatever order a file has them. So all that is computed of a person, at any time, is of the same few records.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence

from fedveil.common.errors import MechanismError
from fedveil.common.log import place_of
from fedveil.common.model.federated import FederatedModel
from fedveil.common.tasks import Record
from fedveil.common.tasks.base import OWNER
from fedveil.common.tasks.examples import Example
from fedveil.privacy import Unit
from fedveil.privacy.units import RECORD

log = logging.getLogger("fedveil.site")
STOPS = (KeyboardInterrupt, SystemExit, GeneratorExit)
"""What stops the process for another reason than a record. A panic of a tokenizer in Rust is no ``Exception`` either:
it would end the worker before the round is paid for, and tell that a record did it."""


def prepared(model: FederatedModel, examples: Sequence[Example], unit: Unit = RECORD, most: int = 1) -> list[Record]:
    """Return the records, in order, of those ``examples`` that the model can take and the unit uses.

    Args:
        model: that takes them.
        examples: of one site.
        unit: what is drawn and clipped as one. Where several records belong to one, each says to which.
        most: records of one unit that are used, at most.

    Raises:
        MechanismError: an example belongs to no unit.
    """
    if unit.grouped:
        examples = bounded(examples, most)
    try:
        records: list[Record | None] = list(model.prepare(examples))
    except STOPS:
        raise
    except BaseException:  # one of them; which, shows when each passes by itself
        records = [_one(model, example) for example in examples]
    numbers: dict[str, int] = {}
    made: list[Record] = []
    for example, record in zip(examples, records, strict=True):
        if record is None:
            continue
        if unit.grouped:
            record = {**record, OWNER: numbers.setdefault(example.person, len(numbers))}
        made.append(record)
    fitting = [record for record in made if _fits(model, record)]
    if len(fitting) < len(made):
        log.warning("records that the model cannot take (too long, empty, of unknown tokens) contribute zero")
    return fitting


def bounded(examples: Sequence[Example], most: int) -> list[Example]:
    """Return of each person at most ``most`` examples, those of the least hashes, in the order that they are in.

    Raises:
        MechanismError: an example belongs to no one.
    """
    by_person: dict[str, list[tuple[bytes, int]]] = {}
    for position, example in enumerate(examples):
        if not example.person:
            raise MechanismError("a record is nobody's: no claim about persons would cover it")
        by_person.setdefault(example.person, []).append((_digest(example), position))
    positions = sorted(position for own in by_person.values() for _, position in sorted(own)[:most])
    return [examples[position] for position in positions]


def _digest(example: Example) -> bytes:
    """Return a hash of an example's whole row; one that was read from none has that of what it holds."""
    return hashlib.sha256(example.row or example.canonical(str(example.answer())).encode()).digest()


def _one(model: FederatedModel, example: Example) -> Record | None:
    try:
        (record,) = model.prepare([example])
    except STOPS:
        raise
    except BaseException as error:
        log.warning("a record could not be prepared and contributes zero: %s", place_of(error))
        return None
    return record


def _fits(model: FederatedModel, record: Record) -> bool:
    try:
        return model.collator.fits(model.base, record, model.max_length)
    except Exception as error:  # of a token that is no number, say: some tokenizers have none for what they do not know
        log.warning("a record could not be measured: %s", place_of(error))
        return False

"""Labels as the one text that settings and policies hold: a line of CSV (RFC 4180), so a label may have commas."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable

from fedveil.common.errors import ConfigError


def labels_of(text: str) -> tuple[str, ...]:
    """Return the labels of a line of CSV in their order, without blanks around them; of an empty one none.

    >>> labels_of('bad, "people, names", good')
    ('bad', 'people, names', 'good')

    Raises:
        ConfigError: its quotes do not match.
    """
    if not text.strip():
        return ()
    try:
        (labels,) = csv.reader([text.strip()], strict=True, skipinitialspace=True)
    except (csv.Error, ValueError) as error:
        raise ConfigError(
            f"the labels {text!r} cannot be read ({error}): separate them by commas, and put one that holds a comma "
            "into double quotes"
        ) from error
    return tuple(label.strip() for label in labels)


def labels_text(labels: Iterable[str]) -> str:
    """Return the one text that ``labels_of`` reads as these labels: no two lists have the same.

    >>> labels_text(["bad", "people, names"]), labels_text(["bad,people", "names"])
    ('bad,"people, names"', '"bad,people",names')
    """
    written = io.StringIO()
    csv.writer(written).writerow(list(labels))
    return written.getvalue().removesuffix("\r\n")

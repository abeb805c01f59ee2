"""Plain English prose, public text from which a start can be made (``start.text = "prose"``).

A start asks of a text how words are put together, not what it is about, so prose of any matter does. It is one text for
all data sets, and no record: sentences of FedVeil's own documents as they once were.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from importlib.resources import files

from fedveil.common.errors import DataError

SHA256 = "f96203cf7fcac8bbb94cc3a41ae2cd43b711e5175babd69e9c6cd0d411da3d69"
"""Of the file, in hexadecimal."""


@lru_cache(maxsize=1)
def prose() -> tuple[str, ...]:
    """Return the sentences.

    Raises:
        DataError: the file that comes with FedVeil is missing or altered.
    """
    file = files("fedveil.demo").joinpath("prose.md")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}): install FedVeil again") from error
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise DataError(f"{file} is not the text that FedVeil knows (its SHA-256 differs): install FedVeil again")
    return tuple(content.decode().splitlines())

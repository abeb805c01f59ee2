"""Public text for starts: phrases that come with FedVeil, or a file of the server's, one text a line.

No site ever opens a file that a run's settings name. It knows the text by its fingerprint, which is part of the
settings and of what a task must agree with.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from common.data.phrases import SENTIMENT
from common.errors import DataError

PACKAGED = "phrases"
"""What ``start.text`` calls the phrases that come with FedVeil."""
MADE_UP = "made-up"
"""What it calls words drawn from the base model's vocabulary, which are no text of anyone's."""


def packaged_sha256() -> str:
    """Return the SHA-256 of the packaged phrases, as of a file of them, in hexadecimal."""
    return hashlib.sha256(_packaged()).hexdigest()


def read_text(source: str, sha256: str) -> list[str]:
    """Return the texts of a source, in its order, without empty lines.

    Args:
        source: ``phrases``, or a file in UTF-8.
        sha256: of the source's bytes, in hexadecimal.

    Raises:
        DataError: there is no such file, it holds no text, or its SHA-256 is another.
    """
    try:
        content = _packaged() if source == PACKAGED else Path(source).expanduser().read_bytes()
        texts = [line.strip() for line in content.decode("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"start.text {source!r} cannot be read as UTF-8 text: name a file with a text a line"
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise DataError(f"start.text {source!r} has the SHA-256 {found}, start.text-sha256 is {sha256}: correct one")
    if not texts:
        raise DataError(f"start.text {source!r} holds no text: name a file with a text a line")
    return texts


def _packaged() -> bytes:
    return "".join(f"{phrase}\n" for phrases in SENTIMENT for phrase in phrases).encode()

"""The part of this project that ``flwr run`` sends: what server and sites execute."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedveil.common.bundle import PROJECT, files_of

__all__ = ["PROJECT", "app_folder"]


@contextmanager
def app_folder() -> Iterator[Path]:
    """Yield a folder with ``pyproject.toml`` and the files that its ``fab-include`` names, gone afterwards.

    Flower looks at every file of the folder that it is given, and beside this code lies the environment:
    58,000 files, 8 to 11 seconds of every ``flwr run``.
    """
    with tempfile.TemporaryDirectory(prefix="fedveil-app-") as name:
        folder = Path(name)
        for path, content in files_of(PROJECT).items():
            place = folder / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
        yield folder

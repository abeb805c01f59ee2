"""The part of this project that ``flwr run`` sends: what server and sites execute."""

from __future__ import annotations

import shutil
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent


@contextmanager
def app_folder() -> Iterator[Path]:
    """Yield a folder with ``pyproject.toml`` and the files that its ``fab-include`` names, gone afterwards.

    Flower looks at every file of the folder that it is given, and beside this code lies the environment:
    58,000 files, 8 to 11 seconds of every ``flwr run``.
    """
    settings = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(prefix="fedveil-app-") as name:
        folder = Path(name)
        shutil.copy(PROJECT / "pyproject.toml", folder)
        for pattern in settings["tool"]["flwr"]["app"]["fab-include"]:
            for file in PROJECT.glob(pattern):
                place = folder / file.relative_to(PROJECT)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, place)
        yield folder

"""``pruned.json``, what a pruned model was made of, and other files beside models and adapters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from fedveil.common.errors import DataError
from fedveil.common.files import replace_file
from fedveil.common.run_lines import RunFile
from fedveil.common.strict_json import json_of
from fedveil.contrib.experiments.pruning.units import Kept

NAME = "pruned.json"
FORMAT = "fedveil-pruned/1"


@dataclass(frozen=True)
class Pruned:
    """The large model, the small one, and which units of the large one are in it."""

    large: str
    """As ``model.name`` calls it."""
    large_fingerprint: str
    """SHA-256 of what it computes (``common.model.base.model_fingerprint``)."""
    large_files: str
    """SHA-256 of its files (``common.model.files``)."""
    small_fingerprint: str
    """The same of the small model: what a site's policy pins."""
    task: str
    kept: Kept


@dataclass(frozen=True)
class RecoveredFile(RunFile):
    """Of a recovered adapter, beside it: the model that it was trained on and the one that it is for."""

    NAME: ClassVar[str] = "recovered.json"
    large: str
    """The one that it is for, as ``model.name`` calls it."""
    trained_on: str
    """Fingerprint, SHA-256."""
    recovered_onto: str
    """Fingerprint of ``large``."""
    files: str
    """SHA-256 of the files of ``large``."""


def write_pruned(folder: Path, about: Pruned) -> None:
    """Write ``pruned.json``."""
    put_json(folder / NAME, {"format": FORMAT, **asdict(about)})


def put_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file in one step."""
    replace_file(path, (json.dumps(value, indent=2) + "\n").encode())


def read_pruned(folder: Path) -> Pruned:
    """Return what a folder's ``pruned.json`` says.

    Raises:
        DataError: it is missing, or of an unknown format.
    """
    try:
        content = json_of((folder / NAME).read_bytes())
        if content.pop("format") != FORMAT:
            raise KeyError(FORMAT)
        kept = content.pop("kept")
        sides = {side: tuple(tuple(int(i) for i in index) for index in kept[side]) for side in ("groups", "neurons")}
        return Pruned(**content, kept=Kept(**sides))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder} holds no {NAME} that can be read: name the folder that `prune` wrote") from error

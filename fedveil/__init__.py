"""Federated, differentially private fine-tuning of transformers with low-rank adapters.

An installed FedVeil has its rooms (``fedveil.common``, ``fedveil.server`` and so on) in this folder. A checkout, and a
bundle that Flower has unpacked, have them beside it: there, and nowhere else, the folder above is searched too.
"""

from __future__ import annotations

import tomllib
from pathlib import Path


def _has_rooms_beside(package: Path) -> bool:
    """Return whether a package folder without rooms lies beside FedVeil's own ``pyproject.toml``."""
    settings = package.parent / "pyproject.toml"
    if (package / "common").exists() or not settings.is_file():
        return False
    return bool(tomllib.loads(settings.read_text(encoding="utf-8")).get("project", {}).get("name") == "fedveil")


_PACKAGE = Path(__file__).resolve().parent
if _has_rooms_beside(_PACKAGE):
    __path__.append(str(_PACKAGE.parent))

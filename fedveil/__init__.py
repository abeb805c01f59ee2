"""Federated, differentially private fine-tuning of transformers with low-rank adapters.

``fedveil.run`` trains across simulated sites, ``fedveil.plan`` says before what that costs, and ``fedveil.load`` opens
a run's folder::

    run = fedveil.run("reviews.csv", text="question", label="kind", sites=3, epsilon=3)
    run.history, run.privacy, run.accuracy
    run.predict(["What a film!"])

An installed FedVeil has its rooms (``fedveil.common``, ``fedveil.server`` and so on) in this folder. A checkout, and a
bundle that Flower has unpacked, have them beside it: there, and nowhere else, the folder above is searched too.
"""

from __future__ import annotations

import importlib
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedveil.experiments.api.front import load, plan, run
    from fedveil.experiments.api.planned import Plan
    from fedveil.experiments.api.register import register
    from fedveil.experiments.api.result import Accuracy, Run

__all__ = ["Accuracy", "Plan", "Run", "load", "plan", "register", "run"]

_HOME = "fedveil.experiments.api"
_PLACES = {
    "Accuracy": "result",
    "Plan": "planned",
    "Run": "result",
    "load": "front",
    "plan": "front",
    "register": "register",
    "run": "front",
}
"""Where each name of ``__all__`` is; it is imported on its first use, so that ``import fedveil`` takes no time."""


def _has_rooms_beside(package: Path) -> bool:
    """Return whether a package folder without rooms lies beside FedVeil's own ``pyproject.toml``."""
    settings = package.parent / "pyproject.toml"
    if (package / "common").exists() or not settings.is_file():
        return False
    return bool(tomllib.loads(settings.read_text(encoding="utf-8")).get("project", {}).get("name") == "fedveil")


_PACKAGE = Path(__file__).resolve().parent
if _has_rooms_beside(_PACKAGE):
    __path__.append(str(_PACKAGE.parent))


def __getattr__(name: str) -> object:
    """Return what ``__all__`` names, from where it is."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{_HOME}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""The deployed site that the audits attack: the one that the tests play with, with 40 records and a tiny model."""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent / "tests"
if str(TESTS) not in sys.path:
    sys.path.append(str(TESTS))

from conftest import save_tiny_model, toy_run  # noqa: E402
from one_site import OneSite, clinic  # noqa: E402

__all__ = ["OneSite", "tiny_site"]


def tiny_site(folder: Path) -> OneSite:
    """Return a site in ``folder`` (which must exist); a round there is two private steps at noise 2 and rate 1/4."""
    model = folder / "model"
    model.mkdir()
    return clinic(toy_run(save_tiny_model("bert", model), folder), folder)

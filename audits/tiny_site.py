"""What the audits attack: the tests' tiny models, and the deployed site that they play with."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent / "tests"
if str(TESTS) not in sys.path:
    sys.path.append(str(TESTS))

from conftest import (  # noqa: E402
    FILLER,
    TARGETS,
    save_tiny_model,
    tiny_deberta,
    tiny_tokenizer,
    toy_run,
    write_reviews,
)
from one_site import OneSite, clinic  # noqa: E402

__all__ = [
    "FILLER",
    "TARGETS",
    "OneSite",
    "save_tiny_model",
    "tiny_deberta",
    "tiny_run",
    "tiny_site",
    "tiny_tokenizer",
    "write_reviews",
]


def tiny_run(folder: Path) -> dict[str, Any]:
    """Return settings of a run on the tiny BERT; model and data are in ``folder``, which must exist."""
    model = folder / "model"
    if not model.exists():
        model.mkdir()
        save_tiny_model("bert", model)
    return toy_run(str(model), folder)


def tiny_site(folder: Path, records: int = 40, **settings: Any) -> OneSite:
    """Return a site in ``folder`` (which must exist); a round there is two private steps at noise 2 and rate 1/4.

    Args:
        folder: where model, records and ledger go.
        records: how many it has; it declares 50.
        settings: of the run, with underscores for dots and dashes left out of it: ``{"rounds": 3}``.
    """
    return clinic({**tiny_run(folder), **settings}, folder, records)

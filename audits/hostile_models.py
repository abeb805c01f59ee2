"""Base models that mix records, which a steward may allow in good faith: the run must be refused unpaid.

DeBERTa with shared projections passes its relative positions through the adapted layers as a batch of 1, and the
gradient of that, a sum over all records, is taken for the first one's.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

from audits.faults import SOUND, Fault
from audits.finding import judged
from audits.hostile_state import clips_moved, install
from audits.tiny_site import tiny_deberta, tiny_site, tiny_tokenizer
from client.deadline import Timing
from common.messages.round import Refusal
from common.model.federated import FederatedModel
from common.run_lines import Finding
from common.tasks import Record
from common.tasks.text import TextExample, TextTask

RECORDS = 24


def unrehearsed() -> AbstractContextManager[Any]:
    """Whatever model the server names is trained as it is."""
    return patch("client.app.rehearse", lambda _: Timing({8: 0.0}, {8: 1}, 0.0, 0.0))


UNREHEARSED = Fault("no rehearsal", unrehearsed)


def audit_models(folder: Path, fault: Fault = SOUND) -> Finding:
    """Return whether a site trains a model that mixes its records, and by how many clips one of them would count.

    Args:
        folder: empty; model and records go there.
        fault: SOUND or UNREHEARSED.
    """
    model_folder = folder / "deberta"
    tiny_deberta().save_pretrained(model_folder)
    tiny_tokenizer().save_pretrained(model_folder)
    own: dict[str, Any] = {"model.name": str(model_folder), "adapter.targets": "query_proj,key_proj"}
    site = tiny_site(folder, **own)
    with fault.plant():
        reply = site.ask(site.task())
    trained = not isinstance(reply, Refusal)
    figures: dict[str, int | float | str] = {
        "trained": str(trained),
        "charges": len(site.charges()) if site.ledger.exists() else 0,
        "clips that a record would count": _worst_pair(site.model()),
    }
    return judged("model that mixes records", fault.name, trained, figures)


def _worst_pair(model: FederatedModel) -> float:
    """Return the most clips by which a record moves the sum of itself and another one, factors away from zero."""
    install(model, {"": 0.3})
    records = _records(model)
    return max(clips_moved(model, [records[i], records[i + 1]], [0, 1]) for i in range(RECORDS - 1))


def _records(model: FederatedModel) -> list[Record]:
    task = cast(TextTask, model.task)
    (like,) = model.prepare([TextExample("the film", label=0)])
    known = range(4, len(model.base.processor))
    # All in one shape, so that they pass together.
    return [
        task.made_up(like, [known[(i * i + 3 * i * j + j) % len(known)] for j in range(4 + i % 4)], i % 2)
        for i in range(RECORDS)
    ]

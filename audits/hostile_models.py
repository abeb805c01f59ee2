"""Base models that a steward allows in good faith and that are not what they seem: the run must be refused unpaid.

One mixes records: DeBERTa with shared projections passes its relative positions through the adapted layers as a batch
of 1, and the gradient of that, a sum over all records, is taken for the first one's. Another lies in a folder that
somebody changed after the steward pinned it: none of its files may be opened, since what parses them may run code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

from transformers import AutoConfig, AutoModel, AutoTokenizer

from audits.faults import SOUND, Fault
from audits.finding import judged
from audits.hostile_state import clips_moved, install
from audits.tiny_models import tiny_deberta, tiny_tokenizer
from audits.tiny_site import tiny_site
from fedveil.client.policy import Policy
from fedveil.client.timing import Timing
from fedveil.common.findings import Finding
from fedveil.common.messages.round import Refusal
from fedveil.common.model.federated import FederatedModel
from fedveil.common.tasks import Record
from fedveil.common.tasks.text import TextExample, TextTask

RECORDS = 24


def unrehearsed() -> AbstractContextManager[Any]:
    """Whatever model the server names is trained as it is."""
    return patch("fedveil.client.rehearsals.rehearse", lambda _: Timing({8: 0.0}, {8: 1}, 0.0, 0.0))


def uncompared() -> AbstractContextManager[Any]:
    """Whatever files lie in an allowed model's folder are opened, and the fingerprint is asked afterwards."""
    return patch.object(Policy, "check_files", lambda *_: None)


UNREHEARSED = Fault("no rehearsal", unrehearsed)
UNCOMPARED = Fault("files not compared", uncompared)


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


def audit_files(folder: Path, fault: Fault = SOUND) -> Finding:
    """Return whether transformers opens a model's folder that was changed after it was pinned.

    Args:
        folder: empty; model and records go there.
        fault: SOUND or UNCOMPARED.
    """
    site = tiny_site(folder)
    task, place = site.task(), Path(str(site.settings["model.name"]))
    config = place / "config.json"
    honest, opened = config.read_bytes(), list[str]()
    for change in ("another value", "a file more"):
        if change == "another value":
            config.write_text(json.dumps({**json.loads(honest), "_attn_implementation_internal": "their/code"}))
        else:
            config.write_bytes(honest)
            (place / "adapter_config.json").write_text('{"peft_type": "LORA", "megatron_core": "their_code"}')
        with fault.plant(), _tripwire(opened):
            reply = site.ask(task)
        if not isinstance(reply, Refusal):
            opened.append("trained")
    figures: dict[str, int | float | str] = {
        "opened": ", ".join(opened) or "nothing",
        "charges": len(site.charges()) if site.ledger.exists() else 0,
    }
    return judged("model whose files changed", fault.name, bool(opened) or bool(figures["charges"]), figures)


@contextmanager
def _tripwire(opened: list[str]) -> Iterator[None]:
    """Write down which of transformers' loaders are called, and let none of them open anything."""

    def trip(name: str, *_: Any, **__: Any) -> None:
        opened.append(name)
        raise OSError("the tripwire")

    with ExitStack() as stack:
        for loader in (AutoConfig, AutoModel, AutoTokenizer):
            stack.enter_context(patch.object(loader, "from_pretrained", partial(trip, loader.__name__)))
        yield


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

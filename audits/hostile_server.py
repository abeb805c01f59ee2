"""A server that lies: every lie of the list through the real client, and the old behaviour, which each must find.

What is asked for by settings, records, models, bundles and adapter states stands in modules of their own; here are the
rounds that are asked for again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from audits import hostile_questions, hostile_records
from audits.faults import SOUND, Fault
from audits.finding import judged
from audits.hostile_bundle import (
    BUNDLES,
    DEAR,
    EAGER,
    SUBMITTED,
    audit_bundle,
    audit_dear_bundles,
    audit_submitted,
)
from audits.hostile_models import UNCOMPARED, UNREHEARSED, audit_files, audit_models
from audits.hostile_state import BEHIND_CHARGE, NEIGHBOURS, UNCHECKED, audit_masks, audit_state, default_model
from audits.planted_rows import PUBLIC, TAKEN, audit_claimed_data, audit_claimed_name
from audits.tiny_site import tiny_site
from fedveil.client.ledger.ledger import Ledger
from fedveil.client.ledger.rows import Charge
from fedveil.common.findings import Finding
from fedveil.common.messages.round import Refusal, TrainResult
from fedveil.common.messages.state import AdapterState


def nothing(*_: Any, **__: Any) -> None:
    """Check nothing."""


def forgotten() -> AbstractContextManager[Any]:
    """A run without privacy leaves no trace."""
    return patch("fedveil.client.budget.note_exposure", nothing)


def unpaid() -> AbstractContextManager[Any]:
    """A round that was charged once is free from then on, whatever is asked."""
    pay = Ledger.charge
    receipts: dict[tuple[str, int], Any] = {}

    def once(ledger: Ledger, charge: Charge, **terms: Any) -> Any:
        key = charge.run, charge.round_number
        if key not in receipts:
            receipts[key] = pay(ledger, charge, **terms)
        return receipts[key]

    return patch.object(Ledger, "charge", once)


FORGOTTEN = Fault("no trace of runs without privacy", forgotten)
UNPAID = Fault("a round again is free", unpaid)


def audit_rounds(folder: Path, fault: Fault = SOUND) -> Finding:
    """Return what a server gets that asks the same round again with other states, and after a run without privacy.

    Args:
        folder: empty; model, records and ledger go there.
        fault: SOUND, UNPAID or FORGOTTEN.
    """
    site, wrong = tiny_site(folder), list[str]()
    with fault.plant():
        for times in range(1, 4):
            reply = site.ask(site.task(1, change=_scaled(float(times))))
            if isinstance(reply, TrainResult) and len(site.charges()) < times:
                wrong.append(f"release {times} of round 1 was free")
        site.rule(allow_no_privacy=True)
        opened = replace(site, settings={**site.settings, "privacy.mode": "none"})
        opened.ask(opened.task(1, run="open"))
        after = site.ask(site.task(1, run="later"))
        if not isinstance(after, Refusal):
            wrong.append("a private run after one without privacy claims as if there had been none")
    figures: dict[str, int | float | str] = {"charges": len(site.charges()), "wrong": "; ".join(wrong) or "nothing"}
    return judged("rounds asked for again", fault.name, bool(wrong), figures)


def _scaled(factor: float) -> Callable[[AdapterState], AdapterState]:
    """Return what makes another state of one: the same task a second time is answered from memory, and free."""
    return lambda state: {
        layer: {name: tensor * factor + 0.01 * factor for name, tensor in factors.items()}
        for layer, factors in state.items()
    }


def hostile_server(folder: Path) -> Iterator[Finding]:
    """Yield the findings of every lie, and of the old behaviour behind each; ``folder`` must be empty."""

    def own() -> Path:
        return Path(tempfile.mkdtemp(dir=folder))

    parts: dict[Callable[[Path, Fault], Finding], tuple[Fault, ...]] = {
        hostile_questions.audit_questions: (
            hostile_questions.PINS,
            hostile_questions.NAMES,
            hostile_questions.FINGERPRINTS,
        ),
        hostile_records.audit_records: (
            hostile_records.ROWS,
            hostile_records.COLUMNS,
            hostile_records.APART,
            hostile_records.DIVISIONS,
        ),
        audit_models: (UNREHEARSED,),
        audit_files: (UNCOMPARED,),
        audit_bundle: (BUNDLES,),
        audit_dear_bundles: (DEAR, EAGER),
        audit_submitted: (SUBMITTED,),
        audit_claimed_name: (TAKEN,),
        audit_claimed_data: (PUBLIC,),
        audit_rounds: (UNPAID, FORGOTTEN),
        audit_masks: (UNCHECKED, BEHIND_CHARGE),
    }
    for audit, faults in parts.items():
        for fault in (SOUND, *faults):
            yield audit(own(), fault)
    before = torch.get_num_threads()
    for precision, threads, cases in (
        ("float32", 1, (SOUND, NEIGHBOURS)),
        ("float32", 2, (SOUND,)),
        ("bfloat16", 1, (SOUND,)),
    ):
        torch.set_num_threads(threads)
        model, records = default_model(precision)
        for fault in cases:
            yield audit_state(model, records, fault)
    torch.set_num_threads(before)

"""The cost of a round to a site, as packed fields of its result."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterable
from dataclasses import replace

from fedveil.common.errors import ProtocolError
from fedveil.common.messages.header import Reader, pack_text
from fedveil.common.messages.round import SPENDING_PURPOSES, NoisedCount, Spending
from fedveil.common.packed import Form
from fedveil.privacy.accountant import ERRORS, METHODS, MOST_GRID, REASONS, Accountant, Detour
from fedveil.privacy.events import EVENTS, Event

SPENT = Form(
    Spending,
    {
        "purpose": SPENDING_PURPOSES,
        "steps_round": "I",
        "steps_total": "Q",
        "delta": "d",
        "epsilon_round": "d",
        "epsilon_total": "d",
        "epsilon_budget": "d",
        "epsilon_remaining": "d",
    },
    besides=("event", "accountant"),
)
ACCOUNTANT = Form(Accountant, {"method": METHODS}, besides=("version", "detour"))
DETOUR = Form(
    Detour,
    {"reason": REASONS, "figure": "d", "error": ("", *ERRORS), "grid": tuple(range(MOST_GRID + 1))},
)
COUNT, _EVENT_HASH = struct.Struct("<id"), struct.Struct("<8s")
_VERSION = re.compile(r"[0-9A-Za-z.+!-]{1,40}")
"""What the version of a Python package is made of."""


def pack_spending(spent: Spending) -> bytes:
    """Return figures, event and accountant of a spending; an accountant's detour travels apart."""
    accountant = spent.accountant
    return SPENT.pack(spent) + pack_event(spent.event) + ACCOUNTANT.pack(accountant) + pack_text(accountant.version)


def pack_event(event: Event) -> bytes:
    """Return the hash of an event's names, and its figures."""
    figures = struct.pack(f"<{len(event.figures)}d", *event.figures.values())
    return _event_hash(event.kind, event.figures) + figures


def _event_hash(kind: str, names: Iterable[str]) -> bytes:
    # As JSON, so that no two lists of names are one text, whatever a name contains.
    return hashlib.sha256(json.dumps([kind, *sorted(names)]).encode()).digest()[:8]


def read_spending(reader: Reader) -> Spending:
    """Return the next spending; ProtocolError unless its event has a price here and every figure is possible."""
    figures = reader.fields(SPENT, "spending", endless="epsilon_total")
    event = _read_event(reader)
    method = reader.fields(ACCOUNTANT, "spending")
    version = reader.text("accountant's version")
    if not _VERSION.fullmatch(version):
        raise ProtocolError("the reply's accountant has a version that is none")
    return Spending(**figures, event=event, accountant=Accountant(**method, version=version))


def _read_event(reader: Reader) -> Event:
    known = {_event_hash(name, kind.figures): (name, sorted(kind.figures)) for name, kind in EVENTS.items()}
    (event_hash,) = reader.take(_EVENT_HASH, "spending's event")
    if event_hash not in known:
        raise ProtocolError("the message's spending is of an unknown kind, or has other figures: run the same version")
    name, names = known[event_hash]
    values = reader.take(struct.Struct(f"<{len(names)}d"), "spending's figures")
    if any(value < 0 for value in values):
        raise ProtocolError("the message's spending states a negative figure")
    return Event(name, dict(zip(names, values, strict=True)))


def read_count(reader: Reader, spending: Spending | None) -> NoisedCount:
    """Return the next noised count; ProtocolError if it has no noise, or no spending includes its price."""
    value, noise_std = reader.take(COUNT, "noised count")
    if spending is None or noise_std <= 0:
        raise ProtocolError("the reply has a count without noise, or that no ledger has paid for")
    return NoisedCount(float(value), noise_std)


def read_detour(reader: Reader, spending: Spending | None) -> Spending:
    """Return ``spending`` with the next detour of its accountant; ProtocolError if either is missing."""
    detour = Detour(**reader.fields(DETOUR, "accountant's detour"))
    if spending is None or detour == Detour():
        raise ProtocolError("the reply has an accountant's detour without its spending, or one that is none")
    return replace(spending, accountant=replace(spending.accountant, detour=detour))

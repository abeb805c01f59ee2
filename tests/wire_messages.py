"""Messages of every kind for tests of the wire."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, RecordDict
from hypothesis import settings

from fedveil.common.messages.blocks import Layout, layout_of
from fedveil.common.messages.round import Refusal, Reply, Spending, TrainResult, TrainTask
from fedveil.common.messages.state import AdapterState
from fedveil.common.messages.wire import decode_reply, decode_task, encode_reply, encode_task
from fedveil.privacy.accountant import Accountant
from fedveil.privacy.events import sampled_gaussian

fast = settings(max_examples=25, deadline=None)


ACCOUNTANT = Accountant("pld", "0.6.0")


BASE, START, ONCE = ("0a" * 16, "1b" * 16, "2c" * 16)
"""Fingerprints as they travel."""


# Nonsense.
STATE: AdapterState = {
    "encoder.0.query": {"A": torch.arange(6.0).reshape(2, 3), "B": torch.ones(4, 2)},
    "head": {"bias": torch.zeros(1)},
}


LAYOUT: Layout = layout_of(STATE)


SPENDING = Spending("training", sampled_gaussian(0.8, 0.1), 5, 15, 1e-5, 0.5, 1.5, 8.0, 6.5, ACCOUNTANT)


TASK = TrainTask("17", 3, STATE, {"l": {"A": torch.ones(2, 2)}}, ONCE, BASE, START)


RESULT = TrainResult("17", 3, "site-0", 500, STATE, SPENDING)


REFUSAL = Refusal("17", 3, "site-0", "budget", "spent")


def read_task(record: RecordDict) -> TrainTask:
    return decode_task(record, LAYOUT, layout_of(TASK.basis))


def read_reply(record: RecordDict) -> Reply:
    return decode_reply(record, LAYOUT, "17", 3)


Read = Callable[[RecordDict], Any]


MESSAGES: dict[str, tuple[Callable[[], RecordDict], Read]] = {
    "task": (lambda: encode_task(TASK), read_task),
    "result": (lambda: encode_reply(RESULT), read_reply),
    "refusal": (lambda: encode_reply(REFUSAL), read_reply),
}


each_message = pytest.mark.parametrize("message", MESSAGES)


def with_header(record: RecordDict, **changes: Any) -> RecordDict:
    """Return the record with header fields replaced; None removes a field."""
    fields = {**record.config_records["header"], **changes}
    record["header"] = ConfigRecord({k: v for k, v in fields.items() if v is not None})
    return record


def body(record: RecordDict) -> bytes:
    """Return the packed part of a header."""
    value = record.config_records["header"]["body"]
    assert isinstance(value, bytes)
    return value


def with_bytes(record: RecordDict, position: int, data: bytes) -> RecordDict:
    """Return the record with some bytes of its packed header overwritten."""
    packed = body(record)
    assert position + len(data) <= len(packed), "the planted bytes do not fit the header"
    return with_header(record, body=packed[:position] + data + packed[position + len(data) :])

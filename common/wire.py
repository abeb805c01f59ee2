"""Messages as Flower records, and back: the only place that knows the encoding.

An adapter state travels as one block of raw little-endian float32 in canonical order. Both sides
know the layout (names and shapes) from the run's configuration, so only a hash of it travels:
Fed-SB's few numbers are not drowned in names. Anything that does not fit the expected layout,
is not finite, or comes from another run, round or protocol version is a ProtocolError.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.common.serde import recorddict_to_proto

from common.errors import ProtocolError
from common.messages import PROTOCOL, REFUSAL_KINDS, Refusal, Reply, Spending, TrainResult, TrainTask
from common.tensors import entries
from common.types import AdapterState

STYPE = "fedveil.float32"
Layout = dict[str, dict[str, tuple[int, ...]]]


def layout_of(state: AdapterState) -> Layout:
    """Return names and shapes of a state."""
    return {layer: {name: tuple(t.shape) for name, t in factors.items()} for layer, factors in state.items()}


def _layout_hash(layout: Layout) -> str:
    lines = (f"{layer}/{name}/{layout[layer][name]}" for layer in sorted(layout) for name in sorted(layout[layer]))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


def encode_state(state: AdapterState) -> bytes:
    """Return all tensors as one block of little-endian float32, in canonical order."""
    blocks = [tensor.detach().cpu().float().contiguous().numpy().astype("<f4") for _, _, tensor in entries(state)]
    return b"".join(block.tobytes() for block in blocks)


def decode_state(data: bytes, layout: Layout) -> AdapterState:
    """Return the state of this layout that ``data`` holds.

    Raises:
        ProtocolError: the length does not fit, or a value is not finite.
    """
    sizes = {layer: {name: int(np.prod(shape)) for name, shape in f.items()} for layer, f in layout.items()}
    total = sum(sum(factors.values()) for factors in sizes.values())
    if len(data) != 4 * total:
        raise ProtocolError(f"the adapter payload has {len(data)} bytes, {4 * total} are expected")
    values = np.frombuffer(data, dtype="<f4")
    if not np.isfinite(values).all():
        raise ProtocolError("the adapter payload holds a value that is not finite")
    flat, position = torch.from_numpy(values.astype(np.float32)), 0
    state: AdapterState = {}
    for layer in sorted(layout):
        state[layer] = {}
        for name in sorted(layout[layer]):
            size = sizes[layer][name]
            state[layer][name] = flat[position : position + size].reshape(layout[layer][name]).clone()
            position += size
    return state


def payload_bytes(record: RecordDict) -> int:
    """Return the bytes of adapter payload in an encoded message (0 for a refusal)."""
    return sum(len(array.data) for arrays in record.array_records.values() for array in arrays.values())


def message_bytes(record: RecordDict) -> int:
    """Return the bytes of a whole message's content as Flower serialises it: payload, header and framing."""
    return len(recorddict_to_proto(record).SerializeToString())


def _block(state: AdapterState) -> ArrayRecord:
    data = encode_state(state)
    return ArrayRecord({"state": Array("float32", (len(data) // 4,), STYPE, data)})


def _pack(header: Mapping[str, str | int | float], state: AdapterState | None) -> RecordDict:
    fields: dict[str, Any] = {"protocol": PROTOCOL, **header}
    record = RecordDict()
    if state is not None:
        fields["layout"] = _layout_hash(layout_of(state))
        record["adapter"] = _block(state)
    record["header"] = ConfigRecord(fields)
    return record


def _header(record: RecordDict) -> ConfigRecord:
    header = record.config_records.get("header")
    if header is None:
        raise ProtocolError("the message has no header: it does not come from FedVeil")
    if type(header.get("protocol")) is not int or header["protocol"] != PROTOCOL:
        raise ProtocolError(
            f"the other side speaks protocol {header.get('protocol')!r}, this one {PROTOCOL}: run the same version"
        )
    return header


def _text(header: ConfigRecord, key: str, longest: int = 1000) -> str:
    value = header.get(key)
    if not isinstance(value, str) or len(value) > longest:
        raise ProtocolError(f"the message's {key!r} is not a text of at most {longest} characters")
    return value


def _number(header: ConfigRecord, key: str, kind: type = int) -> float:
    value = header.get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or (kind is int and not isinstance(value, int)):
        raise ProtocolError(f"the message's {key!r} is not a number")
    if not np.isfinite(value):
        raise ProtocolError(f"the message's {key!r} is not finite")
    return kind(value)


def _state(
    record: RecordDict, header: ConfigRecord, layout: Layout, block: str = "adapter", key: str = "layout"
) -> AdapterState:
    arrays = record.array_records.get(block)
    if arrays is None or list(arrays) != ["state"] or arrays["state"].stype != STYPE:
        raise ProtocolError(f"the message carries no {block} block")
    if header.get(key) != _layout_hash(layout):
        raise ProtocolError(f"the {block} block has other layers, factors or shapes than this run's")
    return decode_state(arrays["state"].data, layout)


def encode_task(task: TrainTask) -> RecordDict:
    """Return a task as Flower records."""
    header: dict[str, str | int | float] = {
        "run": task.run,
        "round": task.round_number,
        "base": task.base_fingerprint,
        "start": task.start_fingerprint,
        "basis": task.basis_fingerprint,
    }
    if not task.basis:
        return _pack(header, task.state)
    record = _pack({**header, "basis-layout": _layout_hash(layout_of(task.basis))}, task.state)
    record["basis"] = _block(task.basis)
    return record


def decode_task(record: RecordDict, layout: Layout, basis_layout: Layout | None = None) -> TrainTask:
    """Return the task; the layouts are what the site's own configuration says is sent every round, and once.

    Raises:
        ProtocolError: anything in it is not as expected.
    """
    header = _header(record)
    number = int(_number(header, "round"))
    if number < 0:
        raise ProtocolError(f"the task's round is {number}; rounds count from 0")
    basis: AdapterState = {}
    if "basis" in record.array_records:
        basis = _state(record, header, basis_layout or {}, "basis", "basis-layout")
    return TrainTask(
        run=_text(header, "run"),
        round_number=number,
        state=_state(record, header, layout if number else {}),
        basis=basis,
        basis_fingerprint=_text(header, "basis"),
        base_fingerprint=_text(header, "base"),
        start_fingerprint=_text(header, "start"),
    )


def encode_reply(reply: Reply) -> RecordDict:
    """Return a result or a refusal as Flower records."""
    header: dict[str, str | int | float] = {"run": reply.run, "round": reply.round_number, "site": reply.site}
    if isinstance(reply, Refusal):
        return _pack({**header, "kind": reply.kind, "reason": reply.reason[:1000]}, None)
    header |= {"kind": "result", "public-size": reply.public_size, "private": int(reply.spending is not None)}
    if reply.spending is not None:
        header |= {f"spent.{key}": value for key, value in dataclasses.asdict(reply.spending).items()}
    return _pack(header, reply.contribution)


def decode_reply(record: RecordDict, layout: Layout, run: str, round_number: int) -> Reply:
    """Return the reply; ``layout`` is what the strategy lets a site send.

    Raises:
        ProtocolError: it belongs to another run or round, or anything in it is not as expected.
    """
    header = _header(record)
    site, kind = _text(header, "site", 200), _text(header, "kind", 50)
    if not site.isprintable():
        raise ProtocolError(f"the reply's site name {site!r} holds characters that cannot be printed")
    if _text(header, "run") != run or _number(header, "round") != round_number:
        raise ProtocolError(f"{site} answers run {header['run']!r}, round {header['round']!r}, not this one")
    if kind in REFUSAL_KINDS:
        return Refusal(run, round_number, site, kind, _text(header, "reason"))
    if kind != "result":
        raise ProtocolError(f"{site} sends a reply of unknown kind {kind!r}")
    size = int(_number(header, "public-size"))
    if not 0 < size <= sys.maxsize:
        raise ProtocolError(f"{site} declares the public size {size}; it must be above 0")
    return TrainResult(run, round_number, site, size, _state(record, header, layout), _spending(header))


def _spending(header: ConfigRecord) -> Spending | None:
    if not _number(header, "private"):
        return None
    values: dict[str, float | int | str] = {}
    for item in dataclasses.fields(Spending):
        key = f"spent.{item.name}"
        values[item.name] = (
            _text(header, key) if item.type == "str" else _number(header, key, int if item.type == "int" else float)
        )
    if any(not isinstance(value, str) and value < 0 for value in values.values()):
        raise ProtocolError("the reply states a negative privacy spending")
    return Spending(**values)  # type: ignore[arg-type]

"""Tensors of a task: those that are sent, and those that it names, which the site has acknowledged.

A site acknowledges, with the result by which it answers a task, every tensor of it that the round does not train
(``strategies.job.Job.lasting``). Both sides keep the same list, which follows from the run alone: the site the tensors,
the server their hashes. A later task has a bit for each tensor, whether it is named, and one hash of all that are. A
site that has not exactly these tensors, of this run and its shapes, refuses before a record is read, and is sent all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from fedveil.common.errors import LackingTensors, ProtocolError
from fedveil.common.messages.blocks import (
    Layout,
    check_layout,
    encode_state,
    layout_digest,
    layout_hash,
    layout_of,
    read_state,
)
from fedveil.common.messages.header import LENGTH, Reader
from fedveil.common.messages.state import BASIS, STATE, AdapterState, Place
from fedveil.common.messages.tensors import merge

if TYPE_CHECKING:
    from flwr.app import RecordDict

BLOCKS = {STATE: "adapter", BASIS: "basis"}
"""What the blocks of a task's parts are called."""
Parts = Mapping[str, AdapterState]
NOTHING: Parts = {}
T = TypeVar("T")
NO_BASIS = bytes(8)
"""In place of the hash of a basis's layout, where the task has none."""
HASH_BYTES = 32


def digests(parts: Parts) -> dict[Place, bytes]:
    """Return the SHA-256 of each tensor's place, shape and bytes."""
    found = {}
    for part, layer, name in places_of(parts):
        tensor = parts[part][layer][name]
        where = layout_digest({f"{part}/{layer}": {name: tuple(tensor.shape)}})
        found[part, layer, name] = hashlib.sha256(where + encode_state({layer: {name: tensor}})).digest()
    return found


def pack_tensors(parts: Parts, named: Mapping[Place, bytes]) -> tuple[bytes, dict[str, AdapterState]]:
    """Return the fields of a task's header about its tensors, and the blocks of those that are sent.

    Args:
        parts: of the task, whole; one without a tensor is none.
        named: the hashes of the tensors that are not sent, as ``digests`` makes them.
    """
    state, basis = layout_hash(layout_of(parts[STATE])), layout_hash(layout_of(parts[BASIS]))
    marks = state + (basis if parts[BASIS] else NO_BASIS)
    bits = np.packbits([place in named for place in places_of(parts)]).tobytes() if named else b""
    header = marks + LENGTH.pack(len(bits)) + bits + (mark_of(named) if named else b"")
    sent = {block: _without(parts[part], part, named) for part, block in BLOCKS.items()}
    return header, {block: state for block, state in sent.items() if state}


def read_tensors(
    record: RecordDict, reader: Reader, layouts: Mapping[str, Layout], kept: Parts, precision: str
) -> dict[str, AdapterState]:
    """Return a task's parts, each tensor as it was sent or as it is kept.

    Args:
        record: the message.
        reader: of its header, which has come to the fields about tensors.
        layouts: names and shapes of both parts, as the run has them; the task may have no basis.
        kept: what the site has of this run.
        precision: the run's format.

    Raises:
        LackingTensors: what is kept is not what the task names.
        ProtocolError: anything is not as expected.
    """
    marks = reader.block(len(NO_BASIS), "layout"), reader.block(len(NO_BASIS), "layout")
    due = {STATE: layouts[STATE], BASIS: layouts[BASIS] if marks[1] != NO_BASIS else {}}
    check_layout(marks[0], due[STATE], BLOCKS[STATE])
    if marks[1] != NO_BASIS:
        check_layout(marks[1], due[BASIS], BLOCKS[BASIS])
    named, mark = _read_named(reader, places_of(due))
    found: dict[str, AdapterState] = {part: {} for part in due}
    for part, layer, name in named:
        tensor = kept.get(part, {}).get(layer, {}).get(name)
        if tensor is not None and tuple(tensor.shape) == due[part][layer][name]:
            found[part].setdefault(layer, {})[name] = tensor
    if named and mark_of(digests(found)) != mark:
        raise LackingTensors("this site does not have the tensors that the task names, and needs them all")
    for part, block in BLOCKS.items():
        if sent := _without(due[part], part, named):
            found[part] = merge(found[part], read_state(record, block, reader.nonce, sent, precision))
    # In the order of a state that is sent whole.
    return {part: {k: dict(sorted(state[k].items())) for k in sorted(state)} for part, state in found.items()}


def places_of(parts: Mapping[str, Mapping[str, Mapping[str, T]]]) -> list[Place]:
    """Return where the tensors of a task's parts, or of their layouts, are, in order."""
    return sorted((part, layer, name) for part, held in parts.items() for layer in held for name in held[layer])


def _without(held: Mapping[str, Mapping[str, T]], part: str, named: Collection[Place]) -> dict[str, dict[str, T]]:
    """Return what of a part of a task, or of its layout, is not named."""
    sent = {layer: {n: x for n, x in held[layer].items() if (part, layer, n) not in named} for layer in held}
    return {layer: factors for layer, factors in sent.items() if factors}


def mark_of(named: Mapping[Place, bytes]) -> bytes:
    """Return the SHA-256 of the hashes of tensors, in the order of their places."""
    return hashlib.sha256(b"".join(named[place] for place in sorted(named))).digest()


def _read_named(reader: Reader, places: Collection[Place]) -> tuple[frozenset[Place], bytes]:
    """Return the places that a task names, and the mark of their tensors."""
    (size,) = reader.take(LENGTH, "named tensors")
    if not size:
        return frozenset(), b""
    bits = np.unpackbits(np.frombuffer(reader.block(size, "named tensors"), np.uint8))
    if size != -(-len(places) // 8) or bits[len(places) :].any() or not bits.any():
        raise ProtocolError(f"the task names tensors by {size} bytes of bits, and has {len(places)} of them")
    named = frozenset(place for place, bit in zip(places, bits.tolist(), strict=False) if bit)
    return named, reader.block(HASH_BYTES, "named tensors")

"""Adapter states as blocks of bytes in Flower's records.

A state is one block of little-endian float32 in canonical order. Both sides know its layout from the run's
configuration, so that only a hash of names and shapes travels beside it. ``common.messages.wire`` says what the nonce
before each part of a block is for.
"""

from __future__ import annotations

import hashlib
import math

from flwr.app import Array, ArrayRecord, RecordDict
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE as PART_BYTES

from fedveil.common.errors import ProtocolError
from fedveil.common.later import np, torch
from fedveil.common.messages.state import AdapterState
from fedveil.common.messages.tensors import entries

STYPE, WORDS_STYPE = "f32le", "u32le"
NONCE_BYTES = 16
Layout = dict[str, dict[str, tuple[int, ...]]]
"""Shapes of a state's tensors, by layer and factor."""


def layout_of(state: AdapterState) -> Layout:
    """Return names and shapes of a state."""
    return {layer: {name: tuple(t.shape) for name, t in factors.items()} for layer, factors in state.items()}


def layout_digest(layout: Layout) -> bytes:
    """Return the SHA-256 of names and shapes."""
    lines = (f"{layer}/{name}/{layout[layer][name]}" for layer in sorted(layout) for name in sorted(layout[layer]))
    return hashlib.sha256("\n".join(lines).encode()).digest()


def layout_hash(layout: Layout) -> bytes:
    """Return the first 8 bytes of ``layout_digest``, which travel."""
    return layout_digest(layout)[:8]


def numbers_in(layout: Layout) -> int:
    """Return how many numbers a state of this layout has."""
    return sum(math.prod(shape) for factors in layout.values() for shape in factors.values())


def encode_state(state: AdapterState) -> bytes:
    """Return all tensors as one block of little-endian float32, in canonical order."""
    blocks = [tensor.detach().cpu().float().contiguous().numpy().astype("<f4") for _, _, tensor in entries(state)]
    return b"".join(block.tobytes() for block in blocks)


def decode_state(data: bytes, layout: Layout) -> AdapterState:
    """Return the state of this layout that ``data`` is the block of.

    Raises:
        ProtocolError: the length does not fit, or a value is not finite.
    """
    if len(data) != 4 * numbers_in(layout):
        raise ProtocolError(f"the adapter payload has {len(data)} bytes, {4 * numbers_in(layout)} are expected")
    values = np.frombuffer(data, dtype="<f4")
    if not np.isfinite(values).all():
        raise ProtocolError("the adapter payload holds a value that is not finite")
    places = [(layer, name) for layer in sorted(layout) for name in sorted(layout[layer])]
    sizes = [math.prod(layout[layer][name]) for layer, name in places]
    state: AdapterState = {layer: {} for layer in sorted(layout)}
    for (layer, name), numbers in zip(places, torch.from_numpy(values.astype(np.float32)).split(sizes), strict=True):
        state[layer][name] = numbers.reshape(layout[layer][name]).clone()
    return state


def block_of(name: str, stype: str, data: bytes, nonce: bytes) -> ArrayRecord:
    """Return numbers of four bytes each, with ``nonce`` before each piece that Flower makes a part of."""
    room = PART_BYTES - NONCE_BYTES
    pieces = (nonce + data[start : start + room] for start in range(0, max(1, len(data)), room))
    dtype = "uint32" if stype == WORDS_STYPE else "float32"
    return ArrayRecord({name: Array(dtype, (len(data) // 4,), stype, b"".join(pieces))})


def block_data(array: Array, nonce: bytes | None = None) -> bytes:
    """Return the numbers of a block without the nonces before its parts, which must be ``nonce`` if given.

    Raises:
        ProtocolError: they are not.
    """
    pieces = [array.data[start : start + PART_BYTES] for start in range(0, len(array.data), PART_BYTES)]
    if nonce is not None and not (pieces and all(piece.startswith(nonce) for piece in pieces)):
        raise ProtocolError(f"a block of {len(array.data)} bytes has not the message's nonce before each part")
    return b"".join(piece[NONCE_BYTES:] for piece in pieces)


def read_block(record: RecordDict, block: str, name: str, stype: str, nonce: bytes) -> bytes:
    """Return the numbers of a message's block; ProtocolError if it has none of this name and type."""
    arrays = record.array_records.get(block)
    if arrays is None or list(arrays) != [name] or arrays[name].stype != stype:
        raise ProtocolError(f"the message carries no {block} block")
    return block_data(arrays[name], nonce)


def read_state(record: RecordDict, block: str, nonce: bytes, layout: Layout) -> AdapterState:
    """Return the state of this layout that a message's block holds; errors as for ``read_block`` and decoding."""
    return decode_state(read_block(record, block, "state", STYPE, nonce), layout)


def check_layout(mark: bytes, layout: Layout, block: str) -> None:
    """Raise ProtocolError unless ``mark`` is the layout's hash."""
    if mark != layout_hash(layout):
        raise ProtocolError(f"the {block} block has other layers, factors or shapes than this run's")


def payload_bytes(record: RecordDict) -> int:
    """Return the bytes of adapter payload in an encoded message, without nonces; 0 for a refusal."""
    sizes = (len(array.data) for arrays in record.array_records.values() for array in arrays.values())
    return sum(size - NONCE_BYTES * math.ceil(size / PART_BYTES) for size in sizes)

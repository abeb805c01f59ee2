"""Adapter states as blocks of bytes in Flower's records.

A state is one block in canonical order, in the run's format (``common.messages.formats``). Both sides know its layout
from the run's configuration, so that only a hash of names and shapes travels beside it. ``common.messages.wire`` says
what the nonce before each part of a block is for.
"""

from __future__ import annotations

import hashlib
import math

from flwr.app import Array, ArrayRecord, RecordDict
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE as PART_BYTES

from fedveil.common.errors import ProtocolError
from fedveil.common.later import np
from fedveil.common.messages.formats import FLOAT32, FORMATS
from fedveil.common.messages.state import AdapterState
from fedveil.common.messages.tensors import entries

WORDS_STYPE = "u32le"
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


def bytes_of(layout: Layout, precision: str = FLOAT32) -> int:
    """Return how many bytes the block of a state has in a format of ``FORMATS``."""
    return sum(FORMATS[precision].size(math.prod(shape)) for factors in layout.values() for shape in factors.values())


def encode_state(state: AdapterState, precision: str = FLOAT32) -> bytes:
    """Return all tensors as one block, in canonical order, each rounded by itself."""
    form = FORMATS[precision]
    tensors = (tensor.detach().cpu().float().contiguous().flatten() for _, _, tensor in entries(state))
    return b"".join(form.encode(tensor) for tensor in tensors)


def decode_state(data: bytes, layout: Layout, precision: str = FLOAT32) -> AdapterState:
    """Return the state of this layout that ``data`` is the block of, float32.

    Raises:
        ProtocolError: the length does not fit, or a value is not finite.
    """
    if len(data) != (wanted := bytes_of(layout, precision)):
        raise ProtocolError(f"the adapter payload has {len(data)} bytes, {wanted} are expected")
    state: AdapterState = {layer: {} for layer in sorted(layout)}
    form, begin = FORMATS[precision], 0
    for layer, factors in state.items():
        for name, shape in sorted(layout[layer].items()):
            end = begin + form.size(math.prod(shape))
            factors[name] = form.decode(data[begin:end]).reshape(shape)
            begin = end
    return state


def rounded(state: AdapterState, precision: str) -> AdapterState:
    """Return a state as it arrives in a format of ``FORMATS``."""
    return state if precision == FLOAT32 else decode_state(encode_state(state, precision), layout_of(state), precision)


def block_of(name: str, stype: str, dtype: str, data: bytes, nonce: bytes) -> ArrayRecord:
    """Return numbers, or bytes, of a type of numpy's, with ``nonce`` before each piece that Flower makes a part of."""
    room = PART_BYTES - NONCE_BYTES
    pieces = (nonce + data[start : start + room] for start in range(0, max(1, len(data)), room))
    return ArrayRecord({name: Array(dtype, (len(data) // np.dtype(dtype).itemsize,), stype, b"".join(pieces))})


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


def read_state(record: RecordDict, block: str, nonce: bytes, layout: Layout, precision: str) -> AdapterState:
    """Return the state of this layout that a message's block holds; errors as for ``read_block`` and decoding."""
    return decode_state(read_block(record, block, "state", FORMATS[precision].stype, nonce), layout, precision)


def check_layout(mark: bytes, layout: Layout, block: str) -> None:
    """Raise ProtocolError unless ``mark`` is the layout's hash."""
    if mark != layout_hash(layout):
        raise ProtocolError(f"the {block} block has other layers, factors or shapes than this run's")


def payload_bytes(record: RecordDict) -> int:
    """Return the bytes of adapter payload in an encoded message, without nonces; 0 for a refusal."""
    sizes = (len(array.data) for arrays in record.array_records.values() for array in arrays.values())
    return sum(size - NONCE_BYTES * math.ceil(size / PART_BYTES) for size in sizes)

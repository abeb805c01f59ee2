"""Messages as Flower records, and back: the only place that knows the encoding.

An adapter state travels as one block of raw little-endian float32 in canonical order. Both sides
know the layout (names and shapes) from the run's configuration, so only a hash of it travels, and
the fixed fields travel as one packed header: Fed-SB's few numbers are not drowned in names.
Anything that does not fit the expected layout, is not finite, or comes from another run, round or
protocol version is a ProtocolError.

Flower keeps a message in parts, each named by the hash of its content, and hands a part to every site that names it.
So each message has 16 random bytes of its own, ``nonce``, in its header and at the beginning of every part of its
blocks: nobody who has not got a message can name it, or a part of it, and learn that it was sent or answer it in
another's name. What a repeated task is known by leaves them out. Where messages are signed
(``common.messages.signed``), the header has ``signature`` and, of a task, ``certificate`` as well.

The header record has ``protocol`` (a whole number that every version can read), ``nonce`` and ``body``::

    every message   kind: u8 (place in ``_KINDS``: 0 task, 1 result, then refusals, then sums), round: u32, run: text
    task            fingerprints of base, start and basis: 16 bytes each; layouts of state and basis: 8 bytes each; for
                    a secure sum attempt: u32, number of sites: u16, and of each its name: text, key and signature;
                    if sites may be lost from it then what each has sealed for the receiver: 82 bytes
    result          site: text, public size: i64, layout: 8 bytes, parts: u8, then the parts
      1 spending    figures as in ``_SPENT``; event; accountant as in ``_ACCOUNTANT``; version of dp-accounting: text
      2 count       value: i32, standard deviation of its noise: f64
      4 detour      of the spending's accountant, as in ``_DETOUR``
      8 sum         none in the header; the block ``sum`` of u32 stands in the place of the tensors
     16 next key    key: 32 bytes, signature: 64 bytes; only beside a sum
     32 rank        u32; only where sites declare one
    refusal         site: text, reason: text
    key task        attempt: u32
    key             site: text, key: 32 bytes, signature: 64 bytes
    share task      attempt: u32, number of sites: u16, and of each its name: text, key and signature
    shares          site: text, key: 32 bytes, signature: 64 bytes, number of holders: u16, for each 82 bytes
    survivor task   attempt: u32, number of sites: u16, and of each its name: text
    survivors       site: text, context: 32 bytes, signature: 64 bytes
    unmask task     attempt: u32, number of sites: u16, and of each its name: text, and its signature: 64 bytes
    unmasking       site: text, number of sites: u16, and of each a share: 33 bytes
    event           hash of the names of its kind and figures: 8 bytes; figures in the order of their names: f64 each

Little-endian. A text is its length in bytes (u16) and UTF-8. Fingerprints travel as their first 128
bits; zeros say that there is none.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import secrets
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE as PART_BYTES
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from fedveil.common.errors import ProtocolError
from fedveil.common.messages.round import (
    FINGERPRINT_DIGITS,
    PROTOCOL,
    REFUSAL_KINDS,
    SPENDING_PURPOSES,
    KeyReply,
    KeyTask,
    NoisedCount,
    Refusal,
    Reply,
    ShareReply,
    ShareTask,
    Spending,
    SumAnswer,
    SumReply,
    SumTask,
    SurvivorReply,
    SurvivorTask,
    Task,
    TrainResult,
    TrainTask,
    UnmaskReply,
    UnmaskTask,
)
from fedveil.common.messages.state import AdapterState, below_head
from fedveil.common.messages.tensors import entries
from fedveil.common.packed import Form
from fedveil.privacy.accountant import ERRORS, METHODS, MOST_GRID, REASONS, Accountant, Detour
from fedveil.privacy.events import EVENTS, Event
from fedveil.privacy.secure_sum.attempt import KeyOffer
from fedveil.privacy.secure_sum.identity import SIGNATURE_BYTES
from fedveil.privacy.secure_sum.recovery import SEALED_BYTES, Sharing
from fedveil.privacy.secure_sum.roster import MOST_SITES
from fedveil.privacy.secure_sum.shares import SHARE_BYTES
from fedveil.privacy.secure_sum.survivors import Agreement

STYPE, WORDS_STYPE = "f32le", "u32le"
NONCE_BYTES = 16
EMPTY: Mapping[str, AdapterState] = MappingProxyType({})
Layout = dict[str, dict[str, tuple[int, ...]]]

_PREFIX, _LENGTH = struct.Struct("<BI"), struct.Struct("<H")
_TASK, _RESULT = struct.Struct("<16s16s16s8s8s"), struct.Struct("<q8sB")
_COUNT, _MARK = struct.Struct("<id"), struct.Struct("<8s")
_ATTEMPT, _SITES, _KEY = struct.Struct("<I"), struct.Struct("<H"), struct.Struct("<32s64s")
_SIGNATURE = struct.Struct(f"<{SIGNATURE_BYTES}s")
_SUM_TASKS: dict[str, type[SumTask]] = {
    "key task": KeyTask,
    "share task": ShareTask,
    "survivor task": SurvivorTask,
    "unmask task": UnmaskTask,
}
_SUM_REPLIES: dict[str, type[SumReply]] = {
    "key": KeyReply,
    "shares": ShareReply,
    "survivors": SurvivorReply,
    "unmasking": UnmaskReply,
}
_FOR_SUMS = [kind for pair in zip(_SUM_TASKS, _SUM_REPLIES, strict=True) for kind in pair]
_KINDS = ("train", "result", *REFUSAL_KINDS, *_FOR_SUMS)
_RANK = struct.Struct("<I")
_SPENDING, _COUNTED, _DETOURED, _SUMMED, _NEXT_KEY, _RANKED = 1, 2, 4, 8, 16, 32
"""Bits of a result's ``parts``."""
_SPENT = Form(
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
_ACCOUNTANT = Form(Accountant, {"method": METHODS}, besides=("version", "detour"))
_DETOUR = Form(
    Detour,
    {"reason": REASONS, "figure": "d", "error": ("", *ERRORS), "grid": tuple(range(MOST_GRID + 1))},
)
_VERSION = re.compile(r"[0-9A-Za-z.+!-]{1,40}")
"""What the version of a Python package is made of."""


def layout_of(state: AdapterState) -> Layout:
    """Return names and shapes of a state."""
    return {layer: {name: tuple(t.shape) for name, t in factors.items()} for layer, factors in state.items()}


def _layout_hash(layout: Layout) -> bytes:
    """Return the first 8 bytes of ``layout_digest``."""
    return layout_digest(layout)[:8]


def layout_digest(layout: Layout) -> bytes:
    """Return the SHA-256 of names and shapes."""
    lines = (f"{layer}/{name}/{layout[layer][name]}" for layer in sorted(layout) for name in sorted(layout[layer]))
    return hashlib.sha256("\n".join(lines).encode()).digest()


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
    """Return the bytes of adapter payload in an encoded message (0 for a refusal), without what makes parts unlike."""
    sizes = (len(array.data) for arrays in record.array_records.values() for array in arrays.values())
    return sum(size - NONCE_BYTES * math.ceil(size / PART_BYTES) for size in sizes)


def message_bytes(record: RecordDict) -> int:
    """Return the bytes of a whole message's content as Flower serialises it: payload, header and framing."""
    return len(recorddict_to_proto(record).SerializeToString())


class _Reader:
    """Takes a packed header apart; whatever is not there is a ProtocolError."""

    def __init__(self, record: RecordDict) -> None:
        header = record.config_records.get("header")
        if header is None:
            raise ProtocolError("the message has no header: it does not come from FedVeil")
        if type(header.get("protocol")) is not int or header["protocol"] != PROTOCOL:
            raise ProtocolError(
                f"the other side speaks protocol {header.get('protocol')!r}, this one {PROTOCOL}: run the same version"
            )
        packed, nonce = header.get("body"), header.get("nonce")
        if not isinstance(packed, bytes):
            raise ProtocolError("the message's header is not a block of bytes")
        if not isinstance(nonce, bytes) or len(nonce) != NONCE_BYTES:
            raise ProtocolError(f"the message's header has no nonce of {NONCE_BYTES} bytes")
        self.nonce = nonce
        self._rest = packed
        code, self.round_number = self.take(_PREFIX, "kind and round")
        if code >= len(_KINDS):
            raise ProtocolError(f"the message is of unknown kind {code}")
        self.kind = _KINDS[code]
        self.run = self.text("run")

    def take(self, form: struct.Struct, name: str) -> tuple[Any, ...]:
        """Return the next fields; a float among them is finite."""
        values = form.unpack(self._next(form.size, name))
        _check_finite(values, name)
        return values

    def fields(self, form: Form, name: str, endless: str = "") -> dict[str, Any]:
        """Return the next fields by name; no number is below 0, and none infinite but the one called ``endless``."""
        data = self._next(form.size, name)
        try:
            held = form.unpack(data)
        except ProtocolError as error:
            raise ProtocolError(f"in the message's {name}, {error}") from error
        _check_finite([v for key, v in held.items() if (key, v) != (endless, math.inf)], name)
        if any(isinstance(value, int | float) and value < 0 for value in held.values()):
            raise ProtocolError(f"the message's {name} states a negative figure")
        return held

    def _next(self, size: int, name: str) -> bytes:
        if len(self._rest) < size:
            raise ProtocolError(f"the message's header ends before its {name}")
        data, self._rest = self._rest[:size], self._rest[size:]
        return data

    def text(self, name: str, longest: int = 1000) -> str:
        """Return the next text, of at most ``longest`` characters."""
        (size,) = self.take(_LENGTH, name)
        data, self._rest = self._rest[:size], self._rest[size:]
        try:
            value = data.decode()
        except UnicodeDecodeError as error:
            raise ProtocolError(f"the message's {name} is not UTF-8") from error
        if len(data) != size or len(value) > longest:
            raise ProtocolError(f"the message's {name} is not a text of at most {longest} characters")
        return value

    @property
    def more(self) -> bool:
        """Whether anything is left."""
        return bool(self._rest)

    def end(self) -> None:
        """Refuse a header that goes on after its last field."""
        if self._rest:
            raise ProtocolError(f"the message's header has {len(self._rest)} bytes too many")


def _check_finite(values: Iterable[Any], name: str) -> None:
    if not all(math.isfinite(value) for value in values if isinstance(value, float)):
        raise ProtocolError(f"a figure of the message's {name} is not finite")


def _pack(
    kind: str, round_number: int, run: str, rest: bytes, words: bytes = b"", blocks: Mapping[str, AdapterState] = EMPTY
) -> RecordDict:
    nonce = secrets.token_bytes(NONCE_BYTES)
    try:
        packed = _PREFIX.pack(_KINDS.index(kind), round_number) + _text(run) + rest
    except (ValueError, struct.error) as error:
        raise ProtocolError(f"a message of kind {kind!r} and round {round_number} cannot be sent: {error}") from error
    record = RecordDict({name: _block("state", STYPE, encode_state(state), nonce) for name, state in blocks.items()})
    if words:
        record["sum"] = _block("words", WORDS_STYPE, words, nonce)
    record["header"] = ConfigRecord({"protocol": PROTOCOL, "nonce": nonce, "body": packed})
    return record


def _block(name: str, stype: str, data: bytes, nonce: bytes) -> ArrayRecord:
    """Return numbers of four bytes each, ``nonce`` before each piece that Flower makes a part of."""
    room = PART_BYTES - NONCE_BYTES
    pieces = (nonce + data[start : start + room] for start in range(0, max(1, len(data)), room))
    dtype = "uint32" if stype == WORDS_STYPE else "float32"
    return ArrayRecord({name: Array(dtype, (len(data) // 4,), stype, b"".join(pieces))})


def block_data(array: Array, nonce: bytes | None = None) -> bytes:
    """Return the numbers of a block without the bytes that make its parts unlike; those must be ``nonce`` if given.

    Raises:
        ProtocolError: they are not.
    """
    pieces = [array.data[start : start + PART_BYTES] for start in range(0, len(array.data), PART_BYTES)]
    if nonce is not None and not (pieces and all(piece.startswith(nonce) for piece in pieces)):
        raise ProtocolError(f"a block of {len(array.data)} bytes has not the message's nonce before each part")
    return b"".join(piece[NONCE_BYTES:] for piece in pieces)


def _text(value: str, longest: int = 1000) -> bytes:
    # "replace": half a surrogate pair, as in a file name that is not UTF-8, must not keep a refusal from arriving.
    data = value[:longest].encode(errors="replace")
    return _LENGTH.pack(len(data)) + data


def _mark(fingerprint: str) -> bytes:
    if not fingerprint:
        return bytes(16)
    try:
        data = bytes.fromhex(fingerprint[:FINGERPRINT_DIGITS])
    except ValueError as error:
        raise ProtocolError(f"{fingerprint!r} is not a fingerprint") from error
    if len(data) != 16:
        raise ProtocolError(f"the fingerprint {fingerprint!r} has fewer than {FINGERPRINT_DIGITS} digits")
    return data


def _fingerprint(mark: bytes) -> str:
    return mark.hex() if any(mark) else ""


def _state(record: RecordDict, reader: _Reader, mark: bytes, layout: Layout, block: str = "adapter") -> AdapterState:
    arrays = record.array_records.get(block)
    if arrays is None or list(arrays) != ["state"] or arrays["state"].stype != STYPE:
        raise ProtocolError(f"the message carries no {block} block")
    if mark != _layout_hash(layout):
        raise ProtocolError(f"the {block} block has other layers, factors or shapes than this run's")
    return decode_state(block_data(arrays["state"], reader.nonce), layout)


def round_of(record: RecordDict) -> int:
    """Return the round that a message says it is of; 0 if it cannot be read. For refusals of what cannot be read."""
    try:
        return _Reader(record).round_number
    except ProtocolError:
        return 0


def kind_of_task(record: RecordDict) -> type[Task]:
    """Return which task a message is.

    Raises:
        ProtocolError: it is none.
    """
    kind = _Reader(record).kind
    if kind != "train" and kind not in _SUM_TASKS:
        raise ProtocolError(f"a site expects a task, not a reply of kind {kind!r}")
    return TrainTask if kind == "train" else _SUM_TASKS[kind]


def decode_sum_task(record: RecordDict) -> SumTask:
    """Return what is asked for a secure sum beside a vector; ProtocolError if it is nothing of that."""
    reader = _Reader(record)
    if reader.kind not in _SUM_TASKS:
        raise ProtocolError(f"a task of a secure sum was expected, not {reader.kind!r}")
    (attempt,) = reader.take(_ATTEMPT, "attempt")
    kind = _SUM_TASKS[reader.kind]
    where = reader.run, reader.round_number, attempt
    task: SumTask
    if kind is KeyTask:
        task = KeyTask(*where)
    elif kind is ShareTask:
        task = ShareTask(*where, tuple(_key(reader) for _ in range(_count_of(reader))))
    elif kind is SurvivorTask:
        task = SurvivorTask(*where, tuple(_site(reader) for _ in range(_count_of(reader))))
    else:
        signed = ((_site(reader), *reader.take(_SIGNATURE, "signature")) for _ in range(_count_of(reader)))
        task = UnmaskTask(*where, tuple((site, signature) for site, signature in signed))
    reader.end()
    return task


def _pack_sum_task(task: SumTask) -> RecordDict:
    kind = next(name for name, own in _SUM_TASKS.items() if own is type(task))
    rest = _ATTEMPT.pack(task.attempt)
    if isinstance(task, ShareTask):
        rest += _SITES.pack(len(task.offers)) + b"".join(map(_pack_key, task.offers))
    elif isinstance(task, SurvivorTask):
        rest += _SITES.pack(len(task.survivors)) + b"".join(_text(site, 200) for site in task.survivors)
    elif isinstance(task, UnmaskTask):
        signed = (_text(site, 200) + _SIGNATURE.pack(signature) for site, signature in task.signatures)
        rest += _SITES.pack(len(task.signatures)) + b"".join(signed)
    return _pack(kind, task.round_number, task.run, rest)


def _count_of(reader: _Reader) -> int:
    (sites,) = reader.take(_SITES, "sites")
    if not 0 < sites <= MOST_SITES:
        raise ProtocolError(f"the message names {sites} sites of a sum, and 1 to {MOST_SITES} are possible")
    return int(sites)


def _blocks(reader: _Reader, count: int, size: int, name: str) -> tuple[bytes, ...]:
    form = struct.Struct(f"<{size}s")
    return tuple(reader.take(form, name)[0] for _ in range(count))


def _pack_key(offer: KeyOffer) -> bytes:
    return _text(offer.site, 200) + _KEY.pack(offer.public, offer.signature)


def _key(reader: _Reader) -> KeyOffer:
    site = _site(reader)
    public, signature = reader.take(_KEY, "key")
    return KeyOffer(site, public, signature)


def _site(reader: _Reader) -> str:
    site = reader.text("site", 200)
    if not site.isprintable():
        raise ProtocolError(f"the reply's site name {site!r} holds characters that cannot be printed")
    return site


def encode_task(task: Task) -> RecordDict:
    """Return a task as Flower records."""
    if not isinstance(task, TrainTask):
        return _pack_sum_task(task)
    marks = [_mark(value) for value in (task.base_fingerprint, task.start_fingerprint, task.basis_fingerprint)]
    basis = {"basis": task.basis} if task.basis else {}
    layouts = _layout_hash(layout_of(task.state)), _layout_hash(layout_of(task.basis)) if basis else bytes(8)
    header = _TASK.pack(*marks, *layouts)
    if task.offers:
        header += _ATTEMPT.pack(task.attempt) + _SITES.pack(len(task.offers)) + b"".join(map(_pack_key, task.offers))
        header += b"".join(task.sealed)
    return _pack("train", task.round_number, task.run, header, blocks={"adapter": task.state, **basis})


def decode_task(record: RecordDict, layout: Layout, basis_layout: Layout | None = None) -> TrainTask:
    """Return the task; the layouts are what the site's own configuration says is sent every round, and once.

    Fingerprints come back as their first ``FINGERPRINT_DIGITS`` digits.

    Raises:
        ProtocolError: anything in it is not as expected.
    """
    reader = _Reader(record)
    if reader.kind != "train":
        raise ProtocolError(f"a site expects a task, not a reply of kind {reader.kind!r}")
    base, start, basis_mark, state_layout, once_layout = reader.take(_TASK, "fingerprints")
    attempt, offers, sealed = 0, tuple[KeyOffer, ...](), tuple[bytes, ...]()
    if reader.more:
        (attempt,) = reader.take(_ATTEMPT, "attempt")
        offers = tuple(_key(reader) for _ in range(_count_of(reader)))
        sealed = _blocks(reader, len(offers), SEALED_BYTES, "sealed shares") if reader.more else ()
    reader.end()
    basis: AdapterState = {}
    if "basis" in record.array_records:
        whole = basis_layout or {}
        part = below_head(whole)  # of whoever has the rest
        basis = _state(record, reader, once_layout, part if once_layout == _layout_hash(part) else whole, "basis")
    return TrainTask(
        run=reader.run,
        round_number=reader.round_number,
        state=_state(record, reader, state_layout, layout if reader.round_number else {}),
        basis=basis,
        basis_fingerprint=_fingerprint(basis_mark),
        base_fingerprint=_fingerprint(base),
        start_fingerprint=_fingerprint(start),
        attempt=attempt,
        offers=offers,
        sealed=sealed,
    )


def encode_reply(reply: Reply | SumReply) -> RecordDict:
    """Return a result, what is sent for a sum beside it, or a refusal as Flower records."""
    if isinstance(reply, KeyReply):
        return _pack("key", reply.round_number, reply.run, _pack_key(reply.offer))
    if isinstance(reply, ShareReply):
        sealed = reply.sharing.sealed
        rest = _pack_key(reply.sharing.offer) + _SITES.pack(len(sealed)) + b"".join(sealed)
        return _pack("shares", reply.round_number, reply.run, rest)
    if isinstance(reply, SurvivorReply):
        word = _KEY.pack(reply.agreement.digest, reply.agreement.signature)
        return _pack("survivors", reply.round_number, reply.run, _text(reply.site, 200) + word)
    if isinstance(reply, UnmaskReply):
        rest = _text(reply.site, 200) + _SITES.pack(len(reply.shares)) + b"".join(reply.shares)
        return _pack("unmasking", reply.round_number, reply.run, rest)
    if isinstance(reply, Refusal):
        return _pack(reply.kind, reply.round_number, reply.run, _text(reply.site, 200) + _text(reply.reason))
    present, parts, layout = 0, b"", _layout_hash(layout_of(reply.contribution))
    if reply.spending is not None:
        present, parts = present | _SPENDING, parts + _pack_spending(reply.spending)
    if reply.noised_correct is not None:
        count = _COUNT.pack(round(reply.noised_correct.value), reply.noised_correct.noise_std)
        present, parts = present | _COUNTED, parts + count
    if reply.spending is not None and reply.spending.accountant.detour is not None:
        present, parts = present | _DETOURED, parts + _DETOUR.pack(reply.spending.accountant.detour)
    present |= _SUMMED if reply.words else 0
    if reply.offer is not None:
        present, parts = present | _NEXT_KEY, parts + _KEY.pack(reply.offer.public, reply.offer.signature)
    if reply.rank:
        present, parts = present | _RANKED, parts + _RANK.pack(reply.rank)
    header = _text(reply.site, 200) + _RESULT.pack(reply.public_size, layout, present) + parts
    if not reply.words:
        return _pack("result", reply.round_number, reply.run, header, blocks={"adapter": reply.contribution})
    return _pack("result", reply.round_number, reply.run, header, words=reply.words)


def decode_sum_reply(record: RecordDict, task: SumTask) -> SumAnswer:
    """Return the answer to a task of a secure sum that asks for no vector.

    Raises:
        ProtocolError: it belongs to another run, round or kind of task, or anything in it is not as expected.
    """
    reader = _Reader(record)
    if reader.kind in REFUSAL_KINDS:
        return _refusal(reader, task.run, task.round_number)
    wanted = _KINDS[1 + _KINDS.index(next(name for name, own in _SUM_TASKS.items() if own is type(task)))]
    if reader.kind != wanted:
        raise ProtocolError(f"the server expects a message of kind {wanted!r}, not of kind {reader.kind!r}")
    site = _site(reader)
    _check_asked(reader, site, task.run, task.round_number)
    where = task.run, task.round_number, site
    reply: SumReply
    if isinstance(task, SurvivorTask):
        reply = SurvivorReply(*where, Agreement(site, *reader.take(_KEY, "signature")))
    elif isinstance(task, UnmaskTask):
        reply = UnmaskReply(*where, _blocks(reader, _count_of(reader), SHARE_BYTES, "shares"))
    else:
        offer = KeyOffer(site, *reader.take(_KEY, "key"))
        if isinstance(task, KeyTask):
            reply = KeyReply(*where, offer)
        else:
            reply = ShareReply(*where, Sharing(offer, _blocks(reader, _count_of(reader), SEALED_BYTES, "shares")))
    reader.end()
    return reply


def _check_asked(reader: _Reader, site: str, run: str, round_number: int) -> None:
    if reader.run != run or reader.round_number != round_number:
        raise ProtocolError(f"{site} answers run {reader.run!r}, round {reader.round_number}, not this one")


def _refusal(reader: _Reader, run: str, round_number: int) -> Refusal:
    site = _site(reader)
    _check_asked(reader, site, run, round_number)
    reason = reader.text("reason")
    reader.end()
    return Refusal(run, round_number, site, reader.kind, reason)


def _words(record: RecordDict, reader: _Reader, layout: Layout) -> bytes:
    arrays = record.array_records.get("sum")
    if arrays is None or list(arrays) != ["words"] or arrays["words"].stype != WORDS_STYPE:
        raise ProtocolError("the message carries no sum block")
    numbers = sum(int(np.prod(shape)) for factors in layout.values() for shape in factors.values())
    words = block_data(arrays["words"], reader.nonce)
    if len(words) != 4 * numbers:
        raise ProtocolError(f"the sum block has {len(words)} bytes, {4 * numbers} are expected")
    return words


def decode_reply(record: RecordDict, layout: Layout | Callable[[int], Layout], run: str, round_number: int) -> Reply:
    """Return the reply; ``layout`` is what the strategy lets a site send, perhaps by the rank that it declares.

    Where it is by the rank it is asked for 0 if none is declared, and raises ProtocolError for one that cannot be.

    Raises:
        ProtocolError: it belongs to another run or round, or anything in it is not as expected.
    """
    reader = _Reader(record)
    if reader.kind in REFUSAL_KINDS:
        return _refusal(reader, run, round_number)
    if reader.kind != "result":
        raise ProtocolError(f"the server expects a reply, not a message of kind {reader.kind!r}")
    site = _site(reader)
    _check_asked(reader, site, run, round_number)
    size, mark, present = reader.take(_RESULT, "public size")
    if size < 1:
        raise ProtocolError(f"{site} declares the public size {size}; it must be above 0")
    if present & ~(_SPENDING | _COUNTED | _DETOURED | _SUMMED | _NEXT_KEY | _RANKED):
        raise ProtocolError(f"{site} sends parts that are unknown here ({present})")
    spending = _spending(reader) if present & _SPENDING else None
    counted = _count(reader, spending) if present & _COUNTED else None
    if present & _DETOURED:
        spending = _detoured(reader, spending)
    offer = KeyOffer(site, *reader.take(_KEY, "next key")) if present & _NEXT_KEY else None
    (rank,) = reader.take(_RANK, "rank") if present & _RANKED else (0,)
    reader.end()
    if callable(layout):
        layout = layout(rank)
    elif rank:
        raise ProtocolError(f"{site} declares a rank, which this run does not ask for")
    if present & _SUMMED:
        if mark != _layout_hash({}):
            raise ProtocolError(f"{site} sends a sum and tensors beside it")
        return TrainResult(run, round_number, site, size, {}, spending, counted, _words(record, reader, layout), offer)
    if offer is not None:
        raise ProtocolError(f"{site} sends a key of a secure sum and no vector of one")
    contribution = _state(record, reader, mark, layout)
    return TrainResult(run, round_number, site, size, contribution, spending, counted, rank=rank)


def result_to_bytes(result: TrainResult) -> bytes:
    """Return a result as one block of bytes, for the site's own memory."""
    return recorddict_to_proto(encode_reply(result)).SerializeToString()


def result_from_bytes(data: bytes, layout: Layout, run: str, round_number: int) -> TrainResult:
    """Return the result that ``result_to_bytes`` made; ProtocolError if it is of another round or run."""
    kept = recorddict_from_proto(ProtoRecordDict.FromString(data))
    reply = decode_reply(kept, lambda _: layout, run, round_number)
    if not isinstance(reply, TrainResult):
        raise ProtocolError("what was kept is not a result")
    return reply


def _count(reader: _Reader, spending: Spending | None) -> NoisedCount:
    value, noise_std = reader.take(_COUNT, "noised count")
    if spending is None or noise_std <= 0:
        raise ProtocolError("the reply has a count without noise, or that no ledger has paid for")
    return NoisedCount(float(value), noise_std)


def _pack_spending(spent: Spending) -> bytes:
    accountant = spent.accountant
    return _SPENT.pack(spent) + _pack_event(spent.event) + _ACCOUNTANT.pack(accountant) + _text(accountant.version)


def _pack_event(event: Event) -> bytes:
    return _mark_of(event.kind, event.figures) + struct.pack(f"<{len(event.figures)}d", *event.figures.values())


def _mark_of(kind: str, names: Iterable[str]) -> bytes:
    """Return what says by which names an event is read: a hash of its kind's and of its figures'."""
    # As JSON, so that no two lists of names are one text, whatever stands in a name.
    return hashlib.sha256(json.dumps([kind, *sorted(names)]).encode()).digest()[:8]


def _event(reader: _Reader) -> Event:
    """Return the event of a spending; one that has no price here is refused, whatever else the message says."""
    known = {_mark_of(name, kind.figures): (name, sorted(kind.figures)) for name, kind in EVENTS.items()}
    (mark,) = reader.take(_MARK, "spending's event")
    if mark not in known:
        raise ProtocolError("the message's spending is of an unknown kind, or has other figures: run the same version")
    name, names = known[mark]
    values = reader.take(struct.Struct(f"<{len(names)}d"), "spending's figures")
    if any(value < 0 for value in values):
        raise ProtocolError("the message's spending states a negative figure")
    return Event(name, dict(zip(names, values, strict=True)))


def _spending(reader: _Reader) -> Spending:
    figures = reader.fields(_SPENT, "spending", endless="epsilon_total")
    event = _event(reader)
    method = reader.fields(_ACCOUNTANT, "spending")
    version = reader.text("accountant's version")
    if not _VERSION.fullmatch(version):
        raise ProtocolError("the reply's accountant has a version that is none")
    return Spending(**figures, event=event, accountant=Accountant(**method, version=version))


def _detoured(reader: _Reader, spending: Spending | None) -> Spending:
    detour = Detour(**reader.fields(_DETOUR, "accountant's detour"))
    if spending is None or detour == Detour():
        raise ProtocolError("the reply has an accountant's detour without its spending, or one that is none")
    return replace(spending, accountant=replace(spending.accountant, detour=detour))

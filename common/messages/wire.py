"""Messages as Flower records, and back: the only place that knows the encoding.

An adapter state travels as one block of raw little-endian float32 in canonical order. Both sides
know the layout (names and shapes) from the run's configuration, so only a hash of it travels, and
the fixed fields travel as one packed header: Fed-SB's few numbers are not drowned in names.
Anything that does not fit the expected layout, is not finite, or comes from another run, round or
protocol version is a ProtocolError.

Flower keeps a message in parts, each named by the hash of its content, and hands a part to every site that names it.
So each message has 16 random bytes of its own, ``nonce``, in its header and at the beginning of every part of its
blocks: a party without the message cannot name it, or a part of it, and learn that it was sent or answer it in
another's name. What a repeated task is known by leaves them out. Where messages are signed
(``common.messages.signed``), the header has ``signature`` and, of a task, ``certificate`` as well.

The header record has ``protocol`` (a whole number that every version can read), ``nonce`` and ``body``::

    every message   kind: u8 (place in ``KINDS``: 0 task, 1 result, then refusals, then sums), round: u32, run: text
    task            fingerprints of base, start and basis: 16 bytes each; layouts of state and basis: 8 bytes each;
                    bytes of the next bits: u16, a bit for each tensor of basis and state, 1 where it is named and not
                    sent, and if any is a hash of these: 32 bytes; for a secure sum attempt: u32, number of sites: u16,
                    and of each its name: text, key and signature; if sites may be lost from it then what each has
                    sealed for the receiver: 82 bytes
    result          site: text, public size: i64, layout: 8 bytes, parts: u8, then the parts
      1 spending    figures as in ``SPENT``; event; accountant as in ``ACCOUNTANT``; version of dp-accounting: text
      2 count       value: i32, standard deviation of its noise: f64
      4 detour      of the spending's accountant, as in ``DETOUR``
      8 sum         none in the header; the block ``sum`` of u32 replaces the tensors
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
bits; zeros mean no fingerprint.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from flwr.app import RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from fedveil.common.errors import ProtocolError
from fedveil.common.messages.blocks import (
    WORDS_STYPE,
    Layout,
    check_layout,
    layout_hash,
    layout_of,
    numbers_in,
    read_block,
    read_state,
)
from fedveil.common.messages.formats import FLOAT32
from fedveil.common.messages.header import (
    ATTEMPT,
    KEY,
    Reader,
    pack,
    pack_key,
    pack_several,
    pack_site,
    pack_text,
    read_refusal,
)
from fedveil.common.messages.named import NOTHING, Parts, pack_tensors, read_tensors
from fedveil.common.messages.round import (
    FINGERPRINT_DIGITS,
    REFUSAL_KINDS,
    NoisedCount,
    Refusal,
    Reply,
    Spending,
    SumReply,
    Task,
    TrainResult,
    TrainTask,
)
from fedveil.common.messages.spent import COUNT, DETOUR, pack_spending, read_count, read_detour, read_spending
from fedveil.common.messages.state import BASIS, STATE
from fedveil.common.messages.sum_messages import SUM_TASKS, encode_sum_reply, encode_sum_task
from fedveil.privacy.secure_sum.attempt import KeyOffer
from fedveil.privacy.secure_sum.recovery import SEALED_BYTES

_TASK, _RESULT, _RANK = struct.Struct("<16s16s16s"), struct.Struct("<q8sB"), struct.Struct("<I")
_SPENDING, _COUNTED, _DETOURED, _SUMMED, _NEXT_KEY, _RANKED = 1, 2, 4, 8, 16, 32
"""Bits of a result's ``parts``."""
Layouts = Layout | Callable[[int], Layout]
"""What a site may send: names and shapes, or what they are by the rank that it declares."""


def message_bytes(record: RecordDict) -> int:
    """Return the bytes of a whole message's content as Flower serialises it: payload, header and framing."""
    return len(recorddict_to_proto(record).SerializeToString())


def round_of(record: RecordDict) -> int:
    """Return the round that a message says it is of; 0 if it cannot be read. For refusals of what cannot be read."""
    try:
        return Reader(record).round_number
    except ProtocolError:
        return 0


def kind_of_task(record: RecordDict) -> type[Task]:
    """Return which task a message is.

    Raises:
        ProtocolError: it is no task.
    """
    kind = Reader(record).kind
    if kind != "train" and kind not in SUM_TASKS:
        raise ProtocolError(f"a site expects a task, not a reply of kind {kind!r}")
    return TrainTask if kind == "train" else SUM_TASKS[kind]


def _fingerprint_bytes(fingerprint: str) -> bytes:
    if not fingerprint:
        return bytes(16)
    try:
        data = bytes.fromhex(fingerprint[:FINGERPRINT_DIGITS])
    except ValueError as error:
        raise ProtocolError(f"{fingerprint!r} is not a fingerprint") from error
    if len(data) != 16:
        raise ProtocolError(f"the fingerprint {fingerprint!r} has fewer than {FINGERPRINT_DIGITS} digits")
    return data


def _fingerprint(data: bytes) -> str:
    return data.hex() if any(data) else ""


def encode_task(task: Task) -> RecordDict:
    """Return a task as Flower records."""
    if not isinstance(task, TrainTask):
        return encode_sum_task(task)
    fingerprints = task.base_fingerprint, task.start_fingerprint, task.basis_fingerprint
    tensors, blocks = pack_tensors({STATE: task.state, BASIS: task.basis}, task.named)
    header = _TASK.pack(*map(_fingerprint_bytes, fingerprints)) + tensors
    if task.offers:
        header += ATTEMPT.pack(task.attempt) + pack_several(map(pack_key, task.offers)) + b"".join(task.sealed)
    return pack("train", task.round_number, task.run, header, blocks=blocks, precision=task.precision)


def decode_task(
    record: RecordDict,
    layout: Layout,
    basis_layout: Layout | None = None,
    kept: Parts = NOTHING,
    precision: str = FLOAT32,
) -> TrainTask:
    """Return the task whole; fingerprints come back as their first ``FINGERPRINT_DIGITS`` digits.

    Args:
        record: the message.
        layout, basis_layout: what the site's own configuration says of the state and of the frozen factors.
        kept: the tensors that the site has of this run, by part.
        precision: the run's format.

    Raises:
        LackingTensors: it names others than these.
        ProtocolError: anything in it is not as expected.
    """
    reader = Reader(record)
    if reader.kind != "train":
        raise ProtocolError(f"a site expects a task, not a reply of kind {reader.kind!r}")
    base, start, basis = reader.take(_TASK, "fingerprints")
    layouts = {STATE: layout if reader.round_number else {}, BASIS: basis_layout or {}}
    parts = read_tensors(record, reader, layouts, kept, precision)
    attempt, offers, sealed = _read_attempt(reader) if reader.more else (0, (), ())
    reader.end()
    return TrainTask(
        run=reader.run,
        round_number=reader.round_number,
        state=parts[STATE],
        basis=parts[BASIS],
        basis_fingerprint=_fingerprint(basis),
        base_fingerprint=_fingerprint(base),
        start_fingerprint=_fingerprint(start),
        attempt=attempt,
        offers=offers,
        sealed=sealed,
        precision=precision,
    )


def _read_attempt(reader: Reader) -> tuple[int, tuple[KeyOffer, ...], tuple[bytes, ...]]:
    """Return the fields of a task of a secure sum."""
    (attempt,) = reader.take(ATTEMPT, "attempt")
    offers = reader.several(reader.key)
    return attempt, offers, tuple(reader.block(SEALED_BYTES, "sealed shares") for _ in offers) if reader.more else ()


def encode_reply(reply: Reply | SumReply) -> RecordDict:
    """Return a result, what is sent for a sum beside it, or a refusal as Flower records."""
    if isinstance(reply, Refusal):
        return pack(reply.kind, reply.round_number, reply.run, pack_site(reply.site) + pack_text(reply.reason))
    if not isinstance(reply, TrainResult):
        return encode_sum_reply(reply)
    spending, count, offer = reply.spending, reply.noised_correct, reply.offer
    detour = spending.accountant.detour if spending else None
    parts = {
        _SPENDING: pack_spending(spending) if spending else b"",
        _COUNTED: COUNT.pack(round(count.value), count.noise_std) if count else b"",
        _DETOURED: DETOUR.pack(detour) if detour else b"",
        _NEXT_KEY: KEY.pack(offer.public, offer.signature) if offer else b"",
        _RANKED: _RANK.pack(reply.rank) if reply.rank else b"",
    }
    packed = {bit: data for bit, data in parts.items() if data}
    present = sum(packed) | (_SUMMED if reply.words else 0)
    layout = layout_hash(layout_of(reply.contribution))
    header = pack_site(reply.site) + _RESULT.pack(reply.public_size, layout, present) + b"".join(packed.values())
    where = "result", reply.round_number, reply.run, header
    if reply.words:
        return pack(*where, words=reply.words)
    return pack(*where, blocks={"adapter": reply.contribution}, precision=reply.precision)


def _words(record: RecordDict, reader: Reader, layout: Layout) -> bytes:
    words = read_block(record, "sum", "words", WORDS_STYPE, reader.nonce)
    if len(words) != 4 * numbers_in(layout):
        raise ProtocolError(f"the sum block has {len(words)} bytes, {4 * numbers_in(layout)} are expected")
    return words


def decode_reply(record: RecordDict, layout: Layouts, run: str, round_number: int, precision: str = FLOAT32) -> Reply:
    """Return the reply; ``layout`` is what the strategy lets a site send, perhaps by the rank that it declares.

    It is then called with 0 if none is declared, and raises ProtocolError for one that cannot be.

    Raises:
        ProtocolError: it belongs to another run or round, or anything in it is not as expected.
    """
    reader = Reader(record)
    if reader.kind in REFUSAL_KINDS:
        return read_refusal(reader, run, round_number)
    if reader.kind != "result":
        raise ProtocolError(f"the server expects a reply, not a message of kind {reader.kind!r}")
    site = reader.site_of(run, round_number)
    size, mark, present = reader.take(_RESULT, "public size")
    if size < 1:
        raise ProtocolError(f"{site} declares the public size {size}; it must be above 0")
    if present & ~(_SPENDING | _COUNTED | _DETOURED | _SUMMED | _NEXT_KEY | _RANKED):
        raise ProtocolError(f"{site} sends parts that are unknown here ({present})")
    spending, counted = _read_spent(reader, present)
    offer = KeyOffer(site, *reader.take(KEY, "next key")) if present & _NEXT_KEY else None
    (rank,) = reader.take(_RANK, "rank") if present & _RANKED else (0,)
    reader.end()
    if rank and not callable(layout):
        raise ProtocolError(f"{site} declares a rank, which this run does not ask for")
    layout = layout(rank) if callable(layout) else layout
    if present & _SUMMED:
        if mark != layout_hash({}):
            raise ProtocolError(f"{site} sends a sum and tensors beside it")
        return TrainResult(run, round_number, site, size, {}, spending, counted, _words(record, reader, layout), offer)
    if offer is not None:
        raise ProtocolError(f"{site} sends a key of a secure sum and no vector of one")
    check_layout(mark, layout, "adapter")
    contribution = read_state(record, "adapter", reader.nonce, layout, precision)
    return TrainResult(run, round_number, site, size, contribution, spending, counted, rank=rank, precision=precision)


def _read_spent(reader: Reader, present: int) -> tuple[Spending | None, NoisedCount | None]:
    spending = read_spending(reader) if present & _SPENDING else None
    counted = read_count(reader, spending) if present & _COUNTED else None
    return read_detour(reader, spending) if present & _DETOURED else spending, counted


def result_to_bytes(result: TrainResult) -> bytes:
    """Return a result as one block of bytes, for the site's own memory."""
    return recorddict_to_proto(encode_reply(result)).SerializeToString()


def result_from_bytes(data: bytes, layout: Layout, task: TrainTask) -> TrainResult:
    """Return the result to a task that ``result_to_bytes`` made; ProtocolError if it is of another round or run."""
    record = recorddict_from_proto(ProtoRecordDict.FromString(data))
    reply = decode_reply(record, lambda _: layout, task.run, task.round_number, task.precision)
    if not isinstance(reply, TrainResult):
        raise ProtocolError("what was kept is not a result")
    return reply

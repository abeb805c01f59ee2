"""Blocks and names of a message's parts: no name follows from content, nothing else is read."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.app.message import make_message
from flwr.app.message.arraychunk import ArrayChunk
from flwr.app.metadata import Metadata
from flwr.supercore.inflatable.inflatable_object import InflatableObject, get_all_nested_objects
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_messages import (
    BASE,
    LAYOUT,
    MESSAGES,
    REFUSAL,
    RESULT,
    START,
    STATE,
    TASK,
    body,
    each_message,
    fast,
    read_reply,
    read_task,
    with_bytes,
    with_header,
)

from fedveil.common.errors import ProtocolError
from fedveil.common.messages import blocks, header
from fedveil.common.messages.blocks import block_data, encode_state, payload_bytes
from fedveil.common.messages.formats import Float32
from fedveil.common.messages.round import (
    KeyReply,
    KeyTask,
    ShareReply,
    ShareTask,
    SurvivorReply,
    SurvivorTask,
    TrainTask,
    UnmaskReply,
    UnmaskTask,
)
from fedveil.common.messages.state import AdapterState
from fedveil.common.messages.tensors import count, entries
from fedveil.common.messages.wire import decode_task, encode_reply, encode_task, round_of
from fedveil.privacy.secure_sum import Agreement, KeyOffer, Sharing

BLOCKS = (("task", "adapter"), ("task", "basis"), ("result", "adapter"))


each_block = pytest.mark.parametrize(("message", "block"), BLOCKS)


def with_block(
    record: RecordDict, block: str, data: bytes, stype: str = Float32.stype, name: str = "state"
) -> RecordDict:
    """Return the record with other numbers in a block; each message's nonce stays before them."""
    nonce = record.config_records["header"]["nonce"]
    assert isinstance(nonce, bytes)
    record[block] = ArrayRecord({name: Array("float32", (len(data) // 4,), stype, nonce + data)})
    return record


def numbers(record: RecordDict, block: str) -> bytes:
    """Return the numbers of a block as bytes."""
    return block_data(record.array_records[block]["state"])


def test_the_round_of_a_message_can_be_told_before_it_is_checked() -> None:
    assert round_of(encode_task(TASK)) == 3
    assert round_of(RecordDict()) == round_of(with_header(encode_task(TASK), body=b"x")) == 0


@each_message
@pytest.mark.parametrize("wrong", [None, b"", bytes(15), bytes(17), "x" * 16, 7])
def test_a_message_without_a_nonce_of_its_own_is_refused(message: str, wrong: Any) -> None:
    make, read = MESSAGES[message]
    with pytest.raises(ProtocolError, match="nonce"):
        read(with_header(make(), nonce=wrong))


@each_block
def test_a_block_of_another_message_is_refused(message: str, block: str) -> None:
    make, read = MESSAGES[message]
    record = make()
    record[block] = make().array_records[block]
    with pytest.raises(ProtocolError, match="nonce before each part"):
        read(record)


LARGE: AdapterState = {"l": {"A": torch.zeros(2 * blocks.PART_BYTES // 4)}}
"""As zeros its parts would all be known to everybody."""


SUM_KEY = KeyOffer("site-0", bytes(32), bytes(64))


EVERY_KIND: dict[str, Callable[[], RecordDict]] = {
    "task": lambda: encode_task(TASK),
    "task of round 0": lambda: encode_task(TrainTask("17", 0, {}, {}, "", BASE, START)),
    "task of many parts": lambda: encode_task(replace(TASK, state=LARGE)),
    "key task": lambda: encode_task(KeyTask("17", 1, 0)),
    "share task": lambda: encode_task(ShareTask("17", 1, 0, (SUM_KEY,))),
    "survivor task": lambda: encode_task(SurvivorTask("17", 1, 0, ("site-0",))),
    "unmask task": lambda: encode_task(UnmaskTask("17", 1, 0, (("site-0", bytes(64)),))),
    "result": lambda: encode_reply(replace(RESULT, spending=None)),
    "result of many parts": lambda: encode_reply(replace(RESULT, spending=None, contribution=LARGE)),
    "vector": lambda: encode_reply(replace(RESULT, contribution={}, words=bytes(4 * 9))),
    "refusal": lambda: encode_reply(REFUSAL),
    "key": lambda: encode_reply(KeyReply("17", 1, "site-0", SUM_KEY)),
    "shares": lambda: encode_reply(ShareReply("17", 1, "site-0", Sharing(SUM_KEY, (bytes(82),)))),
    "survivors": lambda: encode_reply(SurvivorReply("17", 1, "site-0", Agreement("site-0", bytes(32), bytes(64)))),
    "unmasking": lambda: encode_reply(UnmaskReply("17", 1, "site-0", (bytes(33),))),
}
"""Every kind of message, made of what anybody may know."""


def parts(record: RecordDict) -> dict[str, InflatableObject]:
    """Return a message and all that Flower takes it apart into, by the names that its objects have at the SuperLink."""
    metadata = Metadata(1, "", 1, 7, "", "3", 1.0, 60.0, "train")  # the same clock, number and round
    return get_all_nested_objects(make_message(metadata, record))


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_no_part_of_a_message_has_a_name_that_follows_from_its_content(kind: str) -> None:
    first, second = (parts(EVERY_KIND[kind]()) for _ in range(2))
    assert len(first) == len(second) >= 3
    assert not set(first) & set(second), "whoever knows the content can name this part, and ask who has it"


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_a_message_without_random_bytes_can_be_named_by_whoever_knows_it(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted fault."""
    monkeypatch.setattr(header.secrets, "token_bytes", bytes)
    assert set(parts(EVERY_KIND[kind]())) == set(parts(EVERY_KIND[kind]()))


@pytest.mark.parametrize("kind", ["task of many parts", "result of many parts"])
def test_each_part_of_a_long_block_begins_with_the_nonce_and_has_more_than_that(kind: str) -> None:
    record = EVERY_KIND[kind]()
    chunks = [part for part in parts(record).values() if isinstance(part, ArrayChunk)]
    assert len(chunks) > 1
    nonce = record.config_records["header"]["nonce"]
    assert isinstance(nonce, bytes)
    assert all(bytes(chunk.data[:16]) == nonce for chunk in chunks), "Flower cuts blocks at other places now"
    assert numbers(record, "adapter") == encode_state(LARGE)
    assert payload_bytes(record) == len(encode_state(LARGE)) + ("task" in kind) * 16


@each_block
def test_a_block_of_another_length_is_refused(message: str, block: str) -> None:
    make, read = MESSAGES[message]
    good = numbers(make(), block)
    for wrong in (good[:-4], good + good[:4], good[:-1], good + b"\0", b""):
        with pytest.raises(ProtocolError, match="bytes"):
            read(with_block(make(), block, wrong))


@each_block
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("last", [False, True])
def test_a_value_that_is_not_finite_is_refused_wherever_it_stands(
    message: str, block: str, value: float, last: bool
) -> None:
    make, read = MESSAGES[message]
    good, bad = numbers(make(), block), struct.pack("<f", value)
    with pytest.raises(ProtocolError, match="finite"):
        read(with_block(make(), block, good[:-4] + bad if last else bad + good[4:]))


@each_block
def test_a_block_that_is_not_ours_is_refused(message: str, block: str) -> None:
    make, read = MESSAGES[message]
    good = numbers(make(), block)
    two = make()
    two[block] = ArrayRecord({n: Array("float32", (len(good) // 4,), Float32.stype, good) for n in ("state", "more")})
    empty = make()
    empty[block] = ArrayRecord({})
    for bad in (
        with_block(make(), block, good, stype="numpy.ndarray"),
        with_block(make(), block, good, stype=""),
        with_block(make(), block, good, name="weights"),
        two,
        empty,
    ):
        with pytest.raises(ProtocolError, match="block"):
            read(bad)


@pytest.mark.parametrize("message", ["task", "result"])
def test_a_missing_adapter_block_is_refused(message: str) -> None:
    make, read = MESSAGES[message]
    record = make()
    del record["adapter"]
    with pytest.raises(ProtocolError, match="no adapter block"):
        read(record)


def other_layouts() -> Iterator[tuple[str, AdapterState]]:
    """Yield states that hold as many numbers as STATE, under other names or shapes."""
    query, head = STATE["encoder.0.query"], STATE["head"]
    yield "transposed", {"encoder.0.query": {"A": query["A"].T, "B": query["B"]}, "head": head}
    yield "flat", {"encoder.0.query": {"A": query["A"].flatten(), "B": query["B"]}, "head": head}
    yield "another layer", {"encoder.1.query": query, "head": head}
    yield "another factor", {"encoder.0.query": {"A": query["A"], "R": query["B"]}, "head": head}
    yield "a factor elsewhere", {"encoder.0.query": {"A": query["A"]}, "head": {**head, "B": query["B"]}}


@pytest.mark.parametrize(("why", "state"), list(other_layouts()), ids=[why for why, _ in other_layouts()])
def test_as_many_numbers_in_another_layout_are_refused(why: str, state: AdapterState) -> None:
    assert count(state) == count(STATE), "the lengths differ, so the layout itself is not tested"
    for bad, read in (
        (encode_reply(replace(RESULT, contribution=state)), read_reply),
        (encode_task(replace(TASK, state=state)), read_task),
    ):
        with pytest.raises(ProtocolError, match="other layers, factors or shapes"):
            read(bad)


def test_a_basis_that_nobody_expects_is_refused() -> None:
    with pytest.raises(ProtocolError, match="basis block"):
        decode_task(encode_task(TASK), LAYOUT)


@pytest.mark.parametrize("pair", [("task", "result"), ("result", "task"), ("refusal", "task")], ids="->".join)
def test_a_message_of_the_other_direction_is_refused(pair: tuple[str, str]) -> None:
    with pytest.raises(ProtocolError):
        MESSAGES[pair[1]][1](MESSAGES[pair[0]][0]())


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.lists(st.integers(0, 9), max_size=3)
)


@each_message
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_header_is_either_read_or_a_protocol_error(message: str, data: st.DataObject) -> None:
    make, read = MESSAGES[message]
    changes = data.draw(st.dictionaries(st.sampled_from(("protocol", "body")), scalars, min_size=1))
    with suppress(ProtocolError):
        read(with_header(make(), **changes))
    size = len(body(make()))
    spoilt = data.draw(st.binary(min_size=1, max_size=12))
    with suppress(ProtocolError):
        read(with_bytes(make(), data.draw(st.integers(0, size - len(spoilt))), spoilt))
    with suppress(ProtocolError):
        read(with_header(make(), body=data.draw(st.binary(max_size=200))))


@each_block
@fast
@given(data=st.binary(max_size=80))
def test_any_bytes_are_either_read_or_a_protocol_error(message: str, block: str, data: bytes) -> None:
    make, read = MESSAGES[message]
    good = numbers(make(), block)
    for payload in (data, (data * len(good))[: len(good)]):
        try:
            got = read(with_block(make(), block, payload))
        except ProtocolError:
            continue
        state = got.contribution if message == "result" else getattr(got, {"adapter": "state"}.get(block, block))
        assert all(tensor.isfinite().all() for _, _, tensor in entries(state)), "a value that is not finite got through"

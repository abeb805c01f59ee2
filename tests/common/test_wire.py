"""The wire format: what is sent comes back, four bytes a number; nonsense is a ProtocolError and nothing else."""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.app.message import make_message
from flwr.app.message.arraychunk import ArrayChunk
from flwr.app.metadata import Metadata
from flwr.supercore.inflatable.inflatable_object import InflatableObject, get_all_nested_objects
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.common.errors import ProtocolError
from fedveil.common.messages import wire
from fedveil.common.messages.round import (
    FINGERPRINT_DIGITS,
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
    SurvivorReply,
    SurvivorTask,
    TrainResult,
    TrainTask,
    UnmaskReply,
    UnmaskTask,
    same_fingerprint,
)
from fedveil.common.messages.state import AdapterState
from fedveil.common.messages.tensors import count, entries
from fedveil.common.messages.wire import (
    STYPE,
    Layout,
    _pack_spending,
    block_data,
    decode_reply,
    decode_state,
    decode_task,
    encode_reply,
    encode_state,
    encode_task,
    layout_of,
    message_bytes,
    payload_bytes,
    result_from_bytes,
    result_to_bytes,
    round_of,
)
from fedveil.common.packed import Form
from fedveil.privacy.accountant import ERRORS, METHODS, MOST_GRID, REASONS, Accountant, Detour
from fedveil.privacy.events import EVENTS, Event, SampledGaussian, sampled_gaussian
from fedveil.privacy.secure_sum import Agreement, KeyOffer, Sharing

fast = settings(max_examples=25, deadline=None)
words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
names = words.filter(str.isprintable)
shapes = st.lists(st.integers(1, 5), min_size=1, max_size=3)
figures = st.floats(0, 1e6)
whole = st.integers(-(2**31), 2**31 - 1).map(float)
ACCOUNTANT = Accountant("pld", "0.6.0")
DETOUR = Detour("noise", 0.05, "OverflowError", 3)
BASE, START, ONCE = ("0a" * 16, "1b" * 16, "2c" * 16)
"""Fingerprints as they travel."""


detours = st.builds(
    Detour, st.sampled_from(REASONS), figures, st.sampled_from(("", *ERRORS)), st.integers(0, MOST_GRID)
).filter(lambda detour: detour != Detour())
accountants = st.builds(
    Accountant,
    st.sampled_from(METHODS),
    st.from_regex(r"[0-9][0-9A-Za-z.+!-]{0,39}", fullmatch=True),
    st.none() | detours,
)


@st.composite
def states(draw: st.DrawFn) -> AdapterState:
    layout = draw(st.dictionaries(words, st.dictionaries(words, shapes, min_size=1, max_size=3), max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    return {
        layer: {name: torch.randn(shape, generator=generator) for name, shape in factors.items()}
        for layer, factors in layout.items()
    }


@st.composite
def spendings(draw: st.DrawFn) -> Spending:
    kinds = {
        "str": st.sampled_from(SPENDING_PURPOSES),
        "int": st.integers(0, 10**6),
        "float": figures,
        "Endless": figures | st.just(math.inf),
        "Accountant": accountants,
        "Event": st.builds(sampled_gaussian, figures, figures, figures),
    }
    return Spending(**{item.name: draw(kinds[str(item.type)]) for item in dataclasses.fields(Spending)})


@st.composite
def results(draw: st.DrawFn) -> TrainResult:
    return TrainResult(
        draw(words),
        draw(st.integers(0, 1000)),
        draw(names),
        draw(st.integers(1, 10**9)),
        draw(states()),
        spending := draw(st.none() | spendings()),
        draw(st.none() | st.builds(NoisedCount, whole, st.floats(1e-3, 1e6))) if spending else None,
    )


refusals = st.builds(Refusal, words, st.integers(0, 1000), names, st.sampled_from(REFUSAL_KINDS), st.text(max_size=50))


def same(left: AdapterState, right: AdapterState) -> bool:
    """Return whether two states are equal bit for bit, names included."""
    return [e[:2] for e in entries(left)] == [e[:2] for e in entries(right)] and all(
        a[2].shape == b[2].shape and torch.equal(a[2], b[2]) and a[2].dtype == b[2].dtype
        for a, b in zip(entries(left), entries(right), strict=True)
    )


def through_flower(record: RecordDict) -> RecordDict:
    """Send a record through Flower's own encoding, as between machines."""
    from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
    from flwr.proto.recorddict_pb2 import RecordDict as Proto

    return recorddict_from_proto(Proto.FromString(recorddict_to_proto(record).SerializeToString()))


@fast
@given(states())
def test_a_block_is_the_numbers_in_canonical_order_as_little_endian_float32(state: AdapterState) -> None:
    by_hand = b"".join(
        struct.pack("<f", float(value))
        for layer in sorted(state)
        for factor in sorted(state[layer])
        for value in state[layer][factor].flatten()
    )
    assert encode_state(state) == by_hand
    assert same(decode_state(by_hand, layout_of(state)), state)


@fast
@given(states(), states(), words, st.integers(1, 1000))
def test_a_task_arrives_as_it_was_sent(state: AdapterState, basis: AdapterState, text: str, number: int) -> None:
    task = TrainTask(text, number, state, basis, ONCE if basis else "", BASE, START)
    record = encode_task(task)
    assert payload_bytes(record) == 4 * (count(state) + count(basis)), "the payload is not four bytes a number"
    got = decode_task(through_flower(record), layout_of(state), layout_of(basis))
    assert replace(got, state={}, basis={}) == replace(task, state={}, basis={})
    assert same(got.state, state)
    assert same(got.basis, basis)


def test_a_task_of_round_0_carries_no_state() -> None:
    record = encode_task(TrainTask("1", 0, {}, {}, "", BASE, START))
    assert payload_bytes(record) == 0
    assert decode_task(through_flower(record), LAYOUT).state == {}
    with pytest.raises(ProtocolError):
        decode_task(encode_task(TrainTask("1", 0, STATE, {}, "", BASE, START)), LAYOUT)
    with pytest.raises(ProtocolError):
        decode_task(encode_task(TrainTask("1", 1, {}, {}, "", BASE, START)), LAYOUT)


@fast
@given(results())
def test_a_result_arrives_as_it_was_sent(result: TrainResult) -> None:
    record = encode_reply(result)
    assert payload_bytes(record) == 4 * count(result.contribution), "the payload is not four bytes a number"
    got = decode_reply(through_flower(record), layout_of(result.contribution), result.run, result.round_number)
    assert isinstance(got, TrainResult)
    assert replace(got, contribution={}) == replace(result, contribution={})
    assert same(got.contribution, result.contribution)


@fast
@given(refusals, states())
def test_a_refusal_arrives_as_it_was_sent_and_carries_no_payload(refusal: Refusal, state: AdapterState) -> None:
    record = encode_reply(refusal)
    assert payload_bytes(record) == 0
    assert decode_reply(through_flower(record), layout_of(state), refusal.run, refusal.round_number) == refusal


def test_a_long_reason_is_cut_so_that_the_refusal_still_arrives() -> None:
    refusal = Refusal("1", 2, "site", "failed", "x" * 5000)
    got = decode_reply(encode_reply(refusal), {}, "1", 2)
    assert got == replace(refusal, reason="x" * 1000)


def test_other_dtypes_travel_as_float32() -> None:
    value = torch.tensor([[1 / 3, -2.0]], dtype=torch.float64)
    state: AdapterState = {"l": {"A": value, "B": value.bfloat16(), "R": value.t()}}
    got = decode_state(encode_state(state), layout_of(state))
    for name, tensor in state["l"].items():
        assert torch.equal(got["l"][name], tensor.float()), f"{name} of dtype {tensor.dtype} arrives as something else"


def test_what_is_decoded_can_be_trained_on_without_touching_its_neighbours() -> None:
    got = decode_state(encode_state(STATE), LAYOUT)
    got["encoder.0.query"]["A"].zero_()
    assert torch.equal(got["encoder.0.query"]["B"], STATE["encoder.0.query"]["B"])


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
BLOCKS = (("task", "adapter"), ("task", "basis"), ("result", "adapter"))
each_block = pytest.mark.parametrize(("message", "block"), BLOCKS)


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


def with_block(record: RecordDict, block: str, data: bytes, stype: str = STYPE, name: str = "state") -> RecordDict:
    """Return the record with other numbers in a block; each message's nonce stays before them."""
    nonce = record.config_records["header"]["nonce"]
    assert isinstance(nonce, bytes)
    record[block] = ArrayRecord({name: Array("float32", (len(data) // 4,), stype, nonce + data)})
    return record


def numbers(record: RecordDict, block: str) -> bytes:
    """Return the numbers of a block as bytes."""
    return block_data(record.array_records[block]["state"])


@each_message
def test_a_message_that_nobody_touched_is_accepted(message: str) -> None:
    make, read = MESSAGES[message]
    read(make())


@each_message
def test_a_message_without_header_or_of_another_protocol_is_refused(message: str) -> None:
    make, read = MESSAGES[message]
    record = make()
    del record["header"]
    for bad in (
        record,
        RecordDict(),
        *(with_header(make(), protocol=v) for v in (0, 1, 2, 3, 4, 6, -1, "5", [5], 5.0, True, None)),
    ):
        with pytest.raises(ProtocolError):
            read(bad)


@each_message
@pytest.mark.parametrize("wrong", ["", b"", None, 1, 1.5, True, ["x"], b"\x00", b"\x01\x03\x00\x00"])
def test_a_header_that_is_no_block_of_bytes_or_too_short_is_refused(message: str, wrong: Any) -> None:
    make, read = MESSAGES[message]
    with pytest.raises(ProtocolError, match="header"):
        read(with_header(make(), body=wrong))


@each_message
def test_a_header_cut_anywhere_or_with_a_byte_too_many_is_refused_in_one_line(message: str) -> None:
    make, read = MESSAGES[message]
    packed = body(make())
    for wrong in [packed[:end] for end in range(len(packed))] + [packed + b"\0"]:
        with pytest.raises(ProtocolError) as error:
            read(with_header(make(), body=wrong))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("message", ["result", "refusal"])
@pytest.mark.parametrize(
    "changes", [{"run": "18"}, {"round_number": 0}, {"round_number": 2}, {"round_number": 2**32 - 1}]
)
def test_a_reply_to_another_run_or_round_is_refused_by_the_sites_name(message: str, changes: dict[str, Any]) -> None:
    good: Any = {"result": RESULT, "refusal": REFUSAL}[message]
    with pytest.raises(ProtocolError, match="site-0 answers"):
        read_reply(encode_reply(replace(good, **changes)))


def test_a_site_joins_whichever_run_it_is_asked_to() -> None:
    assert read_task(encode_task(replace(TASK, run="18"))).run == "18"


@pytest.mark.parametrize("wrong", [-1, 2**32])
def test_a_round_that_does_not_fit_is_not_sent(wrong: int) -> None:
    for send in (
        lambda: encode_task(replace(TASK, round_number=wrong)),
        lambda: encode_reply(replace(RESULT, round_number=wrong)),
    ):
        with pytest.raises(ProtocolError, match="cannot be sent"):
            send()


@pytest.mark.parametrize("wrong", [0, -1, -(2**62)])
def test_a_public_size_that_is_no_size_is_refused(wrong: int) -> None:
    with pytest.raises(ProtocolError, match="public size"):
        read_reply(encode_reply(replace(RESULT, public_size=wrong)))


@each_message
@pytest.mark.parametrize("code", [len(wire._KINDS), 255])
def test_an_unknown_kind_of_message_is_refused(message: str, code: int) -> None:
    make, read = MESSAGES[message]
    with pytest.raises(ProtocolError, match="unknown kind"):
        read(with_bytes(make(), 0, bytes([code])))


def test_texts_too_long_or_not_utf8_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "fedveil.common.messages.wire._text",
        lambda value, longest=0: len(value.encode()).to_bytes(2, "little") + value.encode(),
    )
    cases: list[tuple[Any, str, int]] = [(RESULT, "site", 200), (REFUSAL, "site", 200), (REFUSAL, "reason", 1000)]
    for good, key, longest in cases:
        read_reply(encode_reply(replace(good, **{key: "é" * longest})))
        with pytest.raises(ProtocolError, match=key):
            read_reply(encode_reply(replace(good, **{key: "é" * (longest + 1)})))
    with pytest.raises(ProtocolError, match="run"):
        read_task(encode_task(replace(TASK, run="x" * 1001)))
    with pytest.raises(ProtocolError, match="UTF-8"):
        read_task(with_bytes(encode_task(TASK), 7, b"\xff"))


def test_a_site_name_that_cannot_be_printed_is_refused() -> None:
    with pytest.raises(ProtocolError, match="printed"):
        read_reply(encode_reply(replace(RESULT, site="a\nb")))


def test_half_a_surrogate_pair_does_not_keep_a_refusal_from_arriving() -> None:
    got = read_reply(encode_reply(replace(REFUSAL, reason="file \udcff is missing")))
    assert isinstance(got, Refusal)
    assert got.reason == "file ? is missing"


SPENT_AT = body(encode_reply(RESULT)).index(_pack_spending(SPENDING))
FIGURES = [*range(13, 53, 8), *range(61, 85, 8)]
"""Where the floats of a packed spending begin: its own, and those of its event, behind the hash of their names."""
TOTAL_AT, ACCOUNTANT_AT = 29, 85
"""Where its total is, which is infinite after a release without privacy."""


@pytest.mark.parametrize("position", FIGURES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0])
def test_a_privacy_figure_that_is_negative_or_not_finite_is_refused(position: int, value: float) -> None:
    told = with_bytes(encode_reply(RESULT), SPENT_AT + position, struct.pack("<d", value))
    if (position, value) == (TOTAL_AT, math.inf):
        got = read_reply(told)
        assert isinstance(got, TrainResult)
        assert got.spending == replace(SPENDING, epsilon_total=math.inf)
        return
    with pytest.raises(ProtocolError, match="spending"):
        read_reply(told)


@pytest.mark.parametrize(
    ("position", "code"), [(0, len(SPENDING_PURPOSES)), (0, 255), (ACCOUNTANT_AT, 2), (ACCOUNTANT_AT, 255)]
)
def test_a_spending_of_an_unknown_kind_or_accountant_is_refused(position: int, code: int) -> None:
    with pytest.raises(ProtocolError, match="unknown"):
        read_reply(with_bytes(encode_reply(RESULT), SPENT_AT + position, bytes([code])))


FOREIGN = {
    "a kind that has no row": Event("discrete-laplace", SPENDING.event.figures),
    "a figure more": Event("sampled-gaussian", {**SPENDING.event.figures, "share": 0.5}),
    "a figure less": Event("sampled-gaussian", {"noise_multiplier": 0.8, "sample_rate": 0.1}),
    "another figure": Event("sampled-gaussian", {"noise": 0.8, "sample_rate": 0.1, "clip_norm": 1.0}),
    "none": Event("sampled-gaussian", {}),
}


@pytest.mark.parametrize("event", FOREIGN.values(), ids=FOREIGN)
def test_a_release_that_has_no_price_here_is_refused_with_its_whole_reply(event: Event) -> None:
    record = encode_reply(replace(RESULT, spending=replace(SPENDING, event=event)))
    with pytest.raises(ProtocolError, match="unknown kind, or has other figures"):
        read_reply(record)


def test_an_event_travels_by_the_names_of_its_figures_whatever_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    swapped = Event(SPENDING.event.kind, dict(reversed(list(SPENDING.event.figures.items()))))
    assert wire._pack_event(swapped) == wire._pack_event(SPENDING.event)
    assert wire._pack_event(swapped)[8:] == struct.pack("<3d", 1.0, 0.8, 0.1), "clip, noise, rate: the order of names"
    monkeypatch.delitem(EVENTS, "sampled-gaussian")
    with pytest.raises(ProtocolError, match="unknown kind"):
        read_reply(encode_reply(RESULT))


def test_no_two_kinds_are_taken_for_each_other_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of one kind and its figures that, one after the other, read as those of another kind."""
    for name, figures in (("noise/a", SampledGaussian.figures), ("noise", ("a", *SampledGaussian.figures))):
        kind = type("Kind", (SampledGaussian,), {"name": name, "figures": figures})
        monkeypatch.setitem(EVENTS, name, kind())
    for name in ("noise/a", "noise"):
        event = Event(name, dict.fromkeys(EVENTS[name].figures, 0.5))
        read = read_reply(encode_reply(replace(RESULT, spending=replace(SPENDING, event=event))))
        assert isinstance(read, TrainResult)
        assert read.spending is not None
        assert read.spending.event == event


def test_a_result_with_parts_that_this_version_does_not_know_is_refused() -> None:
    with pytest.raises(ProtocolError, match="parts that are unknown"):
        read_reply(with_bytes(encode_reply(RESULT), SPENT_AT - 1, b"\x81"))


def test_the_order_of_a_dataclass_changes_no_byte_and_its_fields_are_held_to_the_table() -> None:
    by_hand = struct.pack("<BIQ5d", 0, 5, 15, 1e-5, 0.5, 1.5, 8.0, 6.5)
    assert wire._SPENT.pack(SPENDING) == by_hand
    table = wire._SPENT._table
    assert wire._SPENT.unpack(by_hand) == {name: getattr(SPENDING, name) for name in table}
    backwards = [field.name for field in reversed(dataclasses.fields(Spending))]
    reordered = dataclasses.make_dataclass("Reordered", backwards)
    value = reordered(*(getattr(SPENDING, name) for name in backwards))
    assert Form(reordered, table, besides=("event", "accountant")).pack(value) == by_hand
    # Planted fault: packed by the order of the fields, the same spending has other bytes or none.
    by_place = Form(
        reordered, {name: table[name] for name in backwards if name in table}, besides=("event", "accountant")
    )
    assert by_place.pack(value) != by_hand


def test_a_table_that_lacks_a_field_or_has_an_unknown_one_is_an_error_where_it_is_made() -> None:
    table = {"value": "i", "noise_std": "d"}
    Form(NoisedCount, table)
    for wrong, besides in (({"value": "i"}, ()), ({**table, "unit": "B"}, ()), (table, ("value",)), (table, ("unit",))):
        with pytest.raises(TypeError, match="NoisedCount must hold noise_std, value, each once"):
            Form(NoisedCount, wrong, besides)


def test_an_accountant_travels_in_eight_bytes_and_says_the_same_at_the_other_end() -> None:
    assert len(_pack_spending(SPENDING)) == wire._SPENT.size + len(wire._pack_event(SPENDING.event)) + 8
    for accountant in (ACCOUNTANT, replace(ACCOUNTANT, method="rdp", detour=DETOUR)):
        got = read_reply(encode_reply(replace(RESULT, spending=replace(SPENDING, accountant=accountant))))
        assert isinstance(got, TrainResult)
        assert got.spending is not None
        assert got.spending.accountant == accountant
        assert str(got.spending.accountant) == str(accountant)
    assert str(accountant) == (
        "RDP (dp-accounting 0.6.0) (fallback: noise multiplier 0.05 is below 0.1) (failed with OverflowError) "
        "(noise rounded down and rates up, by up to 4.4 %)"
    )


@pytest.mark.parametrize("wrong", ["", "0.6 0", "0.6\n", "<b>", "1" * 41, "é"])
def test_a_version_that_is_none_is_refused(wrong: str) -> None:
    told = replace(RESULT, spending=replace(SPENDING, accountant=Accountant("pld", wrong)))
    with pytest.raises(ProtocolError, match="version"):
        read_reply(encode_reply(told))


DETOURED = replace(RESULT, spending=replace(SPENDING, accountant=Accountant("rdp", "0.6.0", DETOUR)))


@pytest.mark.parametrize(
    ("place", "data"),
    [(0, bytes([len(REASONS)])), (9, bytes([1 + len(ERRORS)])), (10, bytes([MOST_GRID + 1])), (10, b"\xff")]
    + [(1, struct.pack("<d", value)) for value in (math.nan, math.inf, -1.0)],
)
def test_a_detour_that_no_accountant_takes_is_refused(place: int, data: bytes) -> None:
    record = encode_reply(DETOURED)
    at = len(body(record)) - wire._DETOUR.size
    read_reply(record)
    with pytest.raises(ProtocolError, match="detour"):
        read_reply(with_bytes(record, at + place, data))


def test_a_detour_of_no_spending_or_that_is_none_is_refused() -> None:
    with pytest.raises(ProtocolError, match="without its spending, or one that is none"):
        read_reply(
            encode_reply(replace(RESULT, spending=replace(SPENDING, accountant=Accountant("pld", "0.6.0", Detour()))))
        )
    packed = body(encode_reply(replace(RESULT, spending=None)))
    told = packed[:-1] + b"\x04" + wire._DETOUR.pack(DETOUR)
    with pytest.raises(ProtocolError, match="without its spending, or one that is none"):
        read_reply(with_header(encode_reply(RESULT), body=told))


COUNTED = replace(RESULT, noised_correct=NoisedCount(-7.0, 30.0))


def test_a_count_without_noise_or_that_nobody_paid_for_is_refused() -> None:
    got = read_reply(encode_reply(COUNTED))
    assert isinstance(got, TrainResult)
    assert got.noised_correct == COUNTED.noised_correct
    for wrong in (0.0, -30.0, math.nan, math.inf):
        with pytest.raises(ProtocolError, match="count"):
            read_reply(encode_reply(replace(COUNTED, noised_correct=NoisedCount(3.0, wrong))))
    with pytest.raises(ProtocolError, match="paid for"):
        read_reply(encode_reply(replace(COUNTED, spending=None)))
    with pytest.raises(ProtocolError, match="noised count"):
        read_reply(with_header(record := encode_reply(COUNTED), body=body(record)[:-1]))


def test_what_a_site_keeps_of_its_reply_is_the_reply() -> None:
    got = result_from_bytes(result_to_bytes(COUNTED), LAYOUT, "17", 3)
    assert replace(got, contribution={}) == replace(COUNTED, contribution={})
    assert same(got.contribution, STATE)
    with pytest.raises(ProtocolError):
        result_from_bytes(result_to_bytes(COUNTED), LAYOUT, "17", 4)


def test_a_fingerprint_travels_as_its_beginning_and_no_shorter() -> None:
    whole = "3d" * 32
    got = read_task(encode_task(replace(TASK, base_fingerprint=whole)))
    assert got.base_fingerprint == whole[:FINGERPRINT_DIGITS]
    assert same_fingerprint(got.base_fingerprint, whole)
    for other in ("", whole[:30], "4e" + whole[2:], whole + "00"):
        assert not same_fingerprint(other, whole), f"{other!r} passes for {whole!r}"
    for wrong in ("3d" * 15, "no fingerprint", "x" * 64):
        with pytest.raises(ProtocolError, match="fingerprint"):
            encode_task(replace(TASK, base_fingerprint=wrong))


@pytest.mark.parametrize(
    "make",
    [lambda: encode_task(replace(TASK, basis={}, run="9" * 20)), lambda: encode_reply(replace(RESULT, run="9" * 20))],
)
def test_what_travels_beside_the_numbers_is_less_than_3_percent_of_fed_sb(make: Callable[[], RecordDict]) -> None:
    record = make()
    assert message_bytes(record) - payload_bytes(record) < 0.03 * 4 * 48 * 8 * 8


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


LARGE: AdapterState = {"l": {"A": torch.zeros(2 * wire.PART_BYTES // 4)}}
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
    monkeypatch.setattr(wire.secrets, "token_bytes", bytes)
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
    two[block] = ArrayRecord({n: Array("float32", (len(good) // 4,), STYPE, good) for n in ("state", "more")})
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

"""The wire format: what is sent comes back, four bytes a number; nonsense is a ProtocolError and nothing else."""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from flwr.app import RecordDict
from hypothesis import given
from hypothesis import strategies as st
from wire_messages import (
    ACCOUNTANT,
    BASE,
    LAYOUT,
    MESSAGES,
    ONCE,
    REFUSAL,
    RESULT,
    SPENDING,
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
from fedveil.common.messages import header, spent
from fedveil.common.messages.blocks import decode_state, encode_state, layout_of, payload_bytes
from fedveil.common.messages.named import digests
from fedveil.common.messages.round import (
    FINGERPRINT_DIGITS,
    REFUSAL_KINDS,
    SPENDING_PURPOSES,
    NoisedCount,
    Refusal,
    Spending,
    TrainResult,
    TrainTask,
    same_fingerprint,
)
from fedveil.common.messages.state import AdapterState
from fedveil.common.messages.tensors import count, entries
from fedveil.common.messages.wire import (
    decode_reply,
    decode_task,
    encode_reply,
    encode_task,
    message_bytes,
    result_from_bytes,
    result_to_bytes,
)
from fedveil.common.packed import Form
from fedveil.privacy.accountant import ERRORS, METHODS, MOST_GRID, REASONS, Accountant, Detour
from fedveil.privacy.events import EVENTS, Event, SampledGaussian, sampled_gaussian

words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


names = words.filter(str.isprintable)


shapes = st.lists(st.integers(1, 5), min_size=1, max_size=3)


figures = st.floats(0, 1e6)


whole = st.integers(-(2**31), 2**31 - 1).map(float)


DETOUR = Detour("noise", 0.05, "OverflowError", 3)


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
        "Epsilon": figures | st.just(math.inf),
        "Delta": st.floats(0, 1, exclude_max=True),
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
    named = encode_task(replace(task, named=digests({"state": state})))
    assert payload_bytes(named) == 4 * count(basis), "a tensor is named and sent"
    again = decode_task(through_flower(named), layout_of(state), layout_of(basis), {"state": state})
    assert same(again.state, state)
    assert same(again.basis, basis)


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
        *(with_header(make(), protocol=v) for v in (0, 1, 2, 3, 4, 5, 7, -1, "6", [6], 6.0, True, None)),
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
@pytest.mark.parametrize("code", [len(header.KINDS), 255])
def test_an_unknown_kind_of_message_is_refused(message: str, code: int) -> None:
    make, read = MESSAGES[message]
    with pytest.raises(ProtocolError, match="unknown kind"):
        read(with_bytes(make(), 0, bytes([code])))


def test_texts_too_long_or_not_utf8_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def pack_whole(value: str, longest: int = 0) -> bytes:
        return len(value.encode()).to_bytes(2, "little") + value.encode()

    monkeypatch.setattr(header, "pack_text", pack_whole)
    monkeypatch.setattr("fedveil.common.messages.wire.pack_text", pack_whole)
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


SPENT_AT = body(encode_reply(RESULT)).index(spent.pack_spending(SPENDING))


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
    assert spent.pack_event(swapped) == spent.pack_event(SPENDING.event)
    assert spent.pack_event(swapped)[8:] == struct.pack("<3d", 1.0, 0.8, 0.1), "clip, noise, rate: the order of names"
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
    assert spent.SPENT.pack(SPENDING) == by_hand
    table = spent.SPENT._table
    assert spent.SPENT.unpack(by_hand) == {name: getattr(SPENDING, name) for name in table}
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
    assert len(spent.pack_spending(SPENDING)) == spent.SPENT.size + len(spent.pack_event(SPENDING.event)) + 8
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
    at = len(body(record)) - spent.DETOUR.size
    read_reply(record)
    with pytest.raises(ProtocolError, match="detour"):
        read_reply(with_bytes(record, at + place, data))


def test_a_detour_of_no_spending_or_that_is_none_is_refused() -> None:
    with pytest.raises(ProtocolError, match="without its spending, or one that is none"):
        read_reply(
            encode_reply(replace(RESULT, spending=replace(SPENDING, accountant=Accountant("pld", "0.6.0", Detour()))))
        )
    packed = body(encode_reply(replace(RESULT, spending=None)))
    told = packed[:-1] + b"\x04" + spent.DETOUR.pack(DETOUR)
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
    got = result_from_bytes(result_to_bytes(COUNTED), LAYOUT, TASK)
    assert replace(got, contribution={}) == replace(COUNTED, contribution={})
    assert same(got.contribution, STATE)
    with pytest.raises(ProtocolError):
        result_from_bytes(result_to_bytes(COUNTED), LAYOUT, replace(TASK, round_number=4))


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

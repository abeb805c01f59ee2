"""Linear algebra on adapter states: equal to plain float64 loops, and strict about what fits together."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedveil.common.errors import ProtocolError
from fedveil.common.messages.state import HEAD, AdapterState
from fedveil.common.messages.tensors import (
    add,
    clone,
    count,
    fingerprint,
    l2_norm,
    merge,
    scale,
    select,
    start_fingerprint,
    subtract,
    weighted_sum,
)

fast = settings(max_examples=25, deadline=None)
sizes = st.integers(1, 5)
GRID = 2.0**-16


@st.composite
def states(draw: st.DrawFn, number: int = 1) -> list[AdapterState]:
    """Draw ``number`` states of one random layout: two layers of unequal shapes, and a head."""
    rank, out, into, classes = draw(sizes), draw(sizes), draw(sizes), draw(sizes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return [
        {
            "encoder.0": {"A": tensor(rank, into), "B": tensor(out, rank)},
            "encoder.1": {"A": tensor(rank, out + 1), "B": tensor(into + 2, rank)},
            HEAD: {"weight": tensor(classes, into), "bias": tensor(classes)},
        }
        for _ in range(number)
    ]


def a_state() -> AdapterState:
    """Return a state whose values lie on the fingerprint's grid."""
    return {
        "encoder.0": {"A": torch.arange(6.0).reshape(2, 3) * 2**-8, "B": -torch.arange(8.0).reshape(4, 2) * 2**-10},
        HEAD: {"weight": torch.full((2, 3), 0.25), "bias": torch.zeros(2)},
    }


def loop(combine: Callable[..., float], *operands: AdapterState) -> AdapterState:
    """Combine states number by number in Python floats: slow, and obviously right."""
    result: AdapterState = {}
    for layer, factors in operands[0].items():
        result[layer] = {}
        for name, tensor in factors.items():
            out = torch.empty(tensor.shape, dtype=torch.float64)
            for place in product(*map(range, tensor.shape)):
                out[place] = combine(*(float(state[layer][name][place]) for state in operands))
            result[layer][name] = out
    return result


def assert_close(got: AdapterState, want: AdapterState, tolerance: float = 1e-12) -> None:
    assert got.keys() == want.keys(), "another set of layers came back"
    for layer, factors in want.items():
        assert got[layer].keys() == factors.keys(), f"{layer}: another set of factors came back"
        for name, tensor in factors.items():
            assert got[layer][name].shape == tensor.shape, f"{layer}.{name} changed its shape"
            error = float((got[layer][name].double() - tensor.double()).abs().max())
            assert error <= tolerance, f"{layer}.{name} is off by {error:.2e}"


@fast
@given(states(2), st.floats(-10, 10))
def test_sum_difference_and_multiple_equal_a_loop_over_numbers(pair: list[AdapterState], factor: float) -> None:
    left, right = pair
    assert_close(add(left, right), loop(lambda a, b: a + b, left, right))
    assert_close(subtract(left, right), loop(lambda a, b: a - b, left, right))
    assert_close(scale(left, factor), loop(lambda a: factor * a, left))


@fast
@given(states(3), st.lists(st.floats(-3, 3), min_size=3, max_size=3))
def test_a_weighted_sum_equals_a_loop_over_numbers(sites: list[AdapterState], weights: list[float]) -> None:
    want = loop(lambda *values: sum(w * v for w, v in zip(weights, values, strict=True)), *sites)
    assert_close(weighted_sum(weights, sites), want)


@fast
@given(states(2))
def test_the_loop_would_notice_swapped_weights(pair: list[AdapterState]) -> None:
    want = loop(lambda a, b: 0.25 * a + 0.75 * b, *pair)
    with pytest.raises(AssertionError, match="off by"):
        assert_close(weighted_sum([0.75, 0.25], pair), want)


def test_a_weighted_sum_of_float32_survives_cancellation() -> None:
    values = [1e8, 1.0, -1e8]
    sites: list[AdapterState] = [{"l": {"A": torch.full((2, 3), value)}} for value in values]
    naive = sites[0]["l"]["A"] + sites[1]["l"]["A"] + sites[2]["l"]["A"]
    assert float(naive[0, 0]) == 0.0, "this example no longer cancels in float32, so it proves nothing"
    total = weighted_sum([1.0, 1.0, 1.0], sites)["l"]["A"]
    assert torch.equal(total, torch.ones(2, 3)), "the sum was accumulated in float32"
    assert total.dtype == torch.float32, "the sum came back in another dtype than the states'"
    product = weighted_sum([1.0 + 2.0**-30, -1.0], [{"l": {"A": torch.ones(2, 3)}}] * 2)["l"]["A"]
    assert torch.equal(product, torch.full((2, 3), 2.0**-30)), "a weight was rounded to float32"


@pytest.mark.parametrize("weights", [[], [1.0], [0.5, 0.25, 0.25]])
def test_every_state_needs_exactly_one_weight(weights: Sequence[float]) -> None:
    with pytest.raises(ProtocolError, match=f"{len(weights)} weights for 2"):
        weighted_sum(weights, [a_state(), a_state()])


def test_a_sum_of_nothing_is_refused() -> None:
    with pytest.raises(ProtocolError, match="0 weights for 0"):
        weighted_sum([], [])


def _without_layer(state: AdapterState) -> AdapterState:
    return {layer: factors for layer, factors in state.items() if layer != HEAD}


def _renamed_layer(state: AdapterState) -> AdapterState:
    return {layer.replace("encoder.0", "encoder.9"): factors for layer, factors in state.items()}


def _extra_factor(state: AdapterState) -> AdapterState:
    return merge(state, {"encoder.0": {"R": torch.zeros(2, 2)}})


def _without_factor(state: AdapterState) -> AdapterState:
    return {layer: {k: v for k, v in factors.items() if k != "B"} for layer, factors in state.items()}


def _broadcastable_row(state: AdapterState) -> AdapterState:
    return merge(state, {"encoder.0": {"A": torch.ones(1, 3)}})


def _longer(state: AdapterState) -> AdapterState:
    return merge(state, {"encoder.0": {"A": torch.ones(5, 3)}})


@pytest.mark.parametrize(
    "spoil",
    [
        _without_layer,
        _renamed_layer,
        _extra_factor,
        _without_factor,
        _broadcastable_row,
        _longer,
    ],
)
def test_states_that_do_not_fit_together_are_a_protocol_error(spoil: Callable[[AdapterState], AdapterState]) -> None:
    other = spoil(a_state())
    for combine in (add, subtract, lambda a, b: weighted_sum([0.5, 0.5], [a, b])):
        for left, right in ((a_state(), other), (other, a_state())):
            with pytest.raises(ProtocolError):
                combine(left, right)


def test_select_keeps_the_named_factors_and_drops_layers_left_empty() -> None:
    state = a_state()
    kept = select(state, ("B", "absent"))
    assert {layer: set(factors) for layer, factors in kept.items()} == {"encoder.0": {"B"}}
    assert torch.equal(kept["encoder.0"]["B"], state["encoder.0"]["B"])
    assert select(state, ()) == {}


def test_merge_takes_the_changes_and_leaves_the_base_alone() -> None:
    base, changed = a_state(), torch.ones(4, 2)
    merged = merge(base, {"encoder.0": {"B": changed}, "new": {"A": torch.ones(1)}})
    assert torch.equal(merged["encoder.0"]["B"], changed), "the change was lost"
    assert torch.equal(merged["encoder.0"]["A"], base["encoder.0"]["A"]), "a factor without a change moved"
    assert set(merged) == {"encoder.0", HEAD, "new"}
    assert set(base) == {"encoder.0", HEAD}, "merge changed its argument"
    assert not torch.equal(base["encoder.0"]["B"], changed), "merge changed its argument"


@fast
@given(states(1))
def test_a_state_is_the_merge_of_its_parts(drawn: list[AdapterState]) -> None:
    state = drawn[0]
    assert_close(merge(select(state, ("A", "bias")), select(state, ("B", "weight"))), state, 0.0)


def test_a_clone_shares_no_memory() -> None:
    state = a_state()
    copy = clone(state)
    copy["encoder.0"]["A"].add_(1)
    assert torch.equal(state["encoder.0"]["A"], a_state()["encoder.0"]["A"]), "writing to the clone changed the state"


@fast
@given(states(1))
def test_count_and_norm_are_those_of_all_numbers_in_one_row(drawn: list[AdapterState]) -> None:
    numbers = [float(v) for factors in drawn[0].values() for t in factors.values() for v in t.flatten()]
    assert count(drawn[0]) == len(numbers)
    assert l2_norm(drawn[0]) == pytest.approx(sum(v * v for v in numbers) ** 0.5, rel=1e-12)


@fast
@given(st.integers(0, 10**6), st.floats(1.01, 1e4), st.booleans())
def test_a_value_that_moves_by_more_than_two_grid_steps_changes_the_fingerprint(
    place: int, steps: float, down: bool
) -> None:
    state, moved = a_state(), clone(a_state())
    flat = moved["encoder.0"]["B"].view(-1)
    flat[place % len(flat)] += (-1 if down else 1) * 2 * GRID * steps
    assert fingerprint(moved) != fingerprint(state)


@fast
@given(st.randoms(use_true_random=False))
def test_the_last_bits_of_a_value_do_not_change_the_fingerprint(draw: random.Random) -> None:
    state: AdapterState = {
        "l": {"A": torch.tensor([[draw.randint(-(2**16), 2**16) * GRID for _ in range(4)]]).double()}
    }
    moved = {"l": {"A": state["l"]["A"] + torch.tensor([[draw.choice((-1e-9, 1e-9)) for _ in range(4)]]).double()}}
    assert not torch.equal(moved["l"]["A"], state["l"]["A"])
    assert fingerprint(moved) == fingerprint(state)


def _renamed_factor(state: AdapterState) -> AdapterState:
    return {**state, "encoder.0": {"A": state["encoder.0"]["A"], "C": state["encoder.0"]["B"]}}


def _reshaped(state: AdapterState) -> AdapterState:
    return merge(state, {"encoder.0": {"A": state["encoder.0"]["A"].reshape(3, 2)}})


@pytest.mark.parametrize("spoil", [_without_layer, _renamed_layer, _renamed_factor, _extra_factor, _reshaped])
def test_names_and_shapes_are_part_of_the_fingerprint(spoil: Callable[[AdapterState], AdapterState]) -> None:
    assert fingerprint(spoil(a_state())) != fingerprint(a_state())


def test_the_order_in_which_a_state_was_built_is_not_part_of_the_fingerprint() -> None:
    backwards = {k: dict(reversed(v.items())) for k, v in reversed(a_state().items())}
    assert fingerprint(backwards) == fingerprint(a_state())


def test_the_fingerprint_of_a_start_covers_the_factors_and_not_the_head() -> None:
    start = a_state()
    other_head = merge(start, {HEAD: {"bias": torch.ones(2)}})
    other_factor = merge(start, {"encoder.0": {"B": torch.ones(4, 2)}})
    assert start_fingerprint(other_head) == start_fingerprint(start)
    assert start_fingerprint(other_factor) != start_fingerprint(start)

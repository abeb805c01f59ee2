"""Noise that floating point does not betray: a real sum's law, rounded, and an attack that noise in float64 loses to.

Who attacks knows the sampler. Entropy is chosen so that noise falls where the attack looks, since some of these
numbers are drawn once in 1e15.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Context, Decimal, localcontext
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mpmath.ctx_mp import MPContext
from torch import Tensor, nn

from audits.faults import float_noise
from audits.worlds import plan
from fedveil.privacy import dpsgd, randomness
from fedveil.privacy.dpsgd import PrivateSteps
from fedveil.privacy.entropy import replaced_entropy
from fedveil.privacy.grid import noise_grid
from fedveil.privacy.randomness import add_private_noise

pytestmark = pytest.mark.system_entropy

EXACT = MPContext()
EXACT.prec = 400
Draw = Callable[[float, float, float, int], Tensor]
"""Returns so many noised sums, given (sum, low, high, count): std 1, noise from low to high, which are at most 0."""


def first_bits(noise: float, bits: int) -> int:
    """Return the first ``bits`` of Φ(noise)."""
    return int(EXACT.floor(EXACT.ncdf(noise) * 2**bits))


@contextmanager
def entropy(*draws: int, side: int = 0) -> Iterator[None]:
    """Numbers whose W opens with these 96 bits, below 2^95, and goes on in zeros; ``side`` 1 puts noise above 0."""
    first = np.array([(draw >> 32) << 1 | side for draw in draws], dtype=np.uint64)
    second = np.array([draw & (2**32 - 1) for draw in draws] + [0] * (len(draws) % 2), dtype=np.uint32)
    words = np.concatenate([first, second.view(np.uint64)])
    with replaced_entropy(lambda count: words if count > 1 else np.zeros(1, dtype=np.uint64)):
        yield


# --- the law ----------------------------------------------------------------------------------------------------------


def step_of_chance(total: float, std: float, cell: int) -> int:
    """Return the least number of 96 bits whose noise lifts ``total`` to ``cell``, both in steps of the grid."""
    return int(EXACT.ceil(EXACT.ncdf((cell - EXACT.mpf(0.5) - total) / std) * 2**96))


def off_the_law(total: float, std: float, cell: int) -> bool:
    """Return whether the border below ``cell`` is not, to the last of 96 bits, where the Gaussian law has it.

    That the chance of every cell is right to 2⁻⁹⁶ follows, on either side of 0.
    """
    step, wrong = noise_grid(std), False
    border = step_of_chance(total, std / step, cell)
    for side, sign in ((0, 1.0), (1, -1.0)):
        with entropy(border - 1, border, side=side):
            got = add_private_noise(torch.full((2,), sign * total * step, dtype=torch.float64), std) / step
        wrong |= got.tolist() != [sign * (cell - 1), sign * cell]
    return wrong


@settings(max_examples=60, deadline=None)
@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.floats(-10.5, -1e-3))
@example(total=0.0, std=1.0, noise=-8.0)
@example(total=1e-300, std=1.0, noise=-0.001)
@example(total=-0.5, std=1.5, noise=-8.5)
def test_every_cell_has_the_chance_of_the_real_gaussian_to_the_last_bit(total: float, std: float, noise: float) -> None:
    ratio = std / noise_grid(std)
    cell = int(np.floor(total + noise * ratio))
    assert not off_the_law(total, std, cell)


PLACES = [(0.3, -0.1), (0.3, -2.0), (-7.45, -6.6), (100.2, -7.9), (0.0, -8.6), (5.5, -9.5)]


@pytest.mark.parametrize("planted", [{"_DOUBT": 0.0}, {"_TAIL": 99.0, "_DOUBT": 0.0}])
def test_float64_alone_is_off_the_law(planted: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    def off() -> int:
        return sum(off_the_law(total, 1.0, round(total + noise * 1024)) for total, noise in PLACES)

    assert off() == 0
    for name, value in planted.items():
        monkeypatch.setattr(randomness, name, value)
    assert off() >= 3


def test_float64_errs_by_far_less_than_is_allowed_for() -> None:
    draw = random.Random(1)
    # Cephes changes from one approximation to the next at exp(-2) and exp(-32).
    bits = [int(EXACT.exp(-x) * 2**96) + n * 2**40 for x in (2, 32) for n in range(-20, 20)]
    bits += [first_bits(-draw.uniform(0, randomness._TAIL), 96) for _ in range(1500)]
    bits += [first_bits(-(10 ** -draw.uniform(0, 12)), 96) for _ in range(100)]
    distances = [((n >> 32) + ((n & 0xFFFFFFFF) + 0.5) * 2.0**-32) * 2.0**-64 for n in bits]
    for first, quantile in zip(bits, torch.special.ndtri(torch.tensor(distances, dtype=torch.float64)), strict=True):
        got = EXACT.mpf(quantile.item())
        for end in (first, first + 1):  # W is anywhere between
            assert abs((EXACT.ncdf(got) - EXACT.mpf(end) / 2**96) / EXACT.npdf(got)) < randomness._DOUBT / 64


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.floats(-1e12, 1e12), st.floats(1e-3, 1e3))
def test_what_float64_decides_is_what_arithmetic_of_any_precision_decides(seed: int, total: float, std: float) -> None:
    draw = random.Random(seed)
    bits, sums = [draw.getrandbits(95) for _ in range(8)], torch.full((8,), total, dtype=torch.float64)
    for side in (0, 1):
        with entropy(*bits, side=side):
            fast = add_private_noise(sums, std)
            with patch.object(randomness, "_DOUBT", 1.0):
                assert torch.equal(add_private_noise(sums, std), fast)


@pytest.mark.parametrize("count", [1, 2, 7, 100_000])
def test_every_number_takes_96_bits_of_the_operating_systems(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, urandom = list[int](), os.urandom
    monkeypatch.setattr(os, "urandom", lambda size: taken.append(8 * size) or urandom(size))
    add_private_noise(torch.zeros(count), 1.0)
    assert sum(taken) >= 96 * count
    taken.clear()
    float_noise(torch.zeros(count), 1.0)
    assert 0 < sum(taken) < 96 * count


def phi(x: int, digits: int = 150) -> Decimal:
    """Return Φ(x / 64) by its power series, in decimal arithmetic."""
    with localcontext(Context(prec=digits)):
        z, pi = Decimal(x) / 64, Decimal(0)
        for k in range(digits):  # Bailey, Borwein and Plouffe 1997
            pi += (
                Decimal(4) / (8 * k + 1)
                - Decimal(2) / (8 * k + 4)
                - Decimal(1) / (8 * k + 5)
                - Decimal(1) / (8 * k + 6)
            ) / 16**k
        term, total, n = z, z, 0
        while abs(term) > Decimal(10) ** -digits:
            n += 1
            term *= -z * z / (2 * n)
            total += term / (2 * n + 1)
        return total / (2 * pi).sqrt() + Decimal("0.5")


@pytest.mark.parametrize("x", [-1, -64, -300, -512, -545, -640])
def test_mpmath_keeps_half_of_its_guard_bits(x: int) -> None:
    exact = MPContext()
    exact.prec = 96 + 128
    scaled = int(exact.ncdf(exact.mpf(x) / 64) * 2**400)
    with localcontext(Context(prec=150)):
        assert abs(Decimal(scaled) / 2**400 - phi(x)) < Decimal(2) ** -(96 + 64)


# --- what is sent -----------------------------------------------------------------------------------------------------


def _quantiles(bits: np.ndarray) -> Tensor:
    return torch.special.ndtri(torch.from_numpy((bits.astype(np.float64) + 0.5) * 2.0**-52))


def off_the_grid(noised: Callable[[Tensor, float], Tensor], monkeypatch: pytest.MonkeyPatch) -> int:
    """Return how many numbers of a step's gradient are no multiples of the grid, or zeros with a sign."""
    layer, given = nn.Linear(64, 50, bias=False), plan(0.5, noise=1.7, divisor=4.0)
    monkeypatch.setattr(dpsgd, "add_private_noise", noised)
    with PrivateSteps(layer, torch.optim.SGD(layer.parameters(), lr=0.0), given) as steps:
        (sent,) = steps.release([torch.randn(3, 64)], lambda batch: layer(batch).sum(1))
    cells = sent.double() * given.expected_batch_size / noise_grid(0.5 * 1.7)
    return int(((cells != cells.round()) | ((cells == 0) & cells.signbit())).sum())


def test_a_step_hands_over_multiples_of_a_public_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    assert off_the_grid(add_private_noise, monkeypatch) == 0
    assert off_the_grid(float_noise, monkeypatch) > 3000, "numbers beside the grid went unnoticed"


def test_a_zero_does_not_tell_on_which_side_of_it_the_sum_was() -> None:
    step = noise_grid(1.0)
    for total in (-0.4 * step, 0.4 * step, -0.0, 0.0):
        for noise in (-0.05 * step, 0.05 * step):
            with entropy(first_bits(-abs(noise), 96), side=int(noise > 0)):
                got = add_private_noise(torch.tensor([total], dtype=torch.float64), 1.0)
            assert got.item() == 0
            assert not got.signbit().item()


@settings(max_examples=50, deadline=None)
@given(st.floats(-1e30, 1e30), st.floats(1e-6, 1e6))
def test_the_grid_is_a_power_of_two_that_follows_from_the_noise_alone(total: float, std: float) -> None:
    step = noise_grid(std)
    assert step == 2.0 ** round(np.log2(step))
    assert 1024 * step <= std < 2048 * step
    got = add_private_noise(torch.tensor(total, dtype=torch.float64), std) / step
    assert got == got.round()


# --- the attack -------------------------------------------------------------------------------------------------------


def draws_here(total: float, low: float, high: float, count: int) -> Tensor:
    draw, ends = random.Random(3), (first_bits(low, 96), min(first_bits(high, 96), 2**95))
    with entropy(*(draw.randrange(*ends) for _ in range(count))):
        return add_private_noise(torch.full((count,), total, dtype=torch.float64), 1.0)


def draws_of_52_bits(total: float, low: float, high: float, count: int) -> Tensor:
    draw, ends = random.Random(3), (first_bits(low, 52), min(first_bits(high, 52), 2**51))
    bits = np.array([draw.randrange(*ends) for _ in range(count)], dtype=np.uint64)
    return total + _quantiles(bits)


def draws_of_52_bits_on_a_grid(total: float, low: float, high: float, count: int) -> Tensor:
    return (draws_of_52_bits(total, low, high, count) * 2.0**20).round() * 2.0**-20


WINDOWS = {"near zero": (-(2.0**-38), 0.0), "some cells": (-0.02, 0.0), "tail": (-8.0, -7.5)}


def could_be_absent(sent: Tensor, window: str) -> float:
    """Return the share of numbers that 52 bits of noise can make of no record."""
    if window != "tail":
        # Near zero these are odd multiples of √(2π) · 2⁻⁵³; a float32 is fine enough to tell.
        steps = sent / (2 * torch.pi) ** 0.5 * 2.0**53
        return float(((steps.abs() % 2 - 1).abs() < 0.1).double().mean())
    bits = np.array([max(0, first_bits(float(x), 52)) for x in sent], dtype=np.uint64)
    near = torch.stack([(_quantiles(bits + np.uint64(i)) - sent).abs() for i in (0, 1)]).amin(0)
    return float((near < 1.5e-6).double().mean())


def told_apart(draws: Draw, count: int = 400) -> dict[str, float]:
    """Return by window how much likelier a number is called 'absent' without the record than with it (a sum of 0.3)."""
    found = {}
    for window, (low, high) in WINDOWS.items():
        # What the server gets is float32; it looks at numbers in the window.
        absent, present = draws(0.0, low, high, count).float(), draws(0.3, low - 0.3, high - 0.3, count).float()
        found[window] = could_be_absent(absent.double(), window) - could_be_absent(present.double(), window)
    return found


def test_no_number_tells_whether_the_record_is_there() -> None:
    assert all(abs(gap) < 0.1 for gap in told_apart(draws_here).values()), told_apart(draws_here)


@pytest.mark.parametrize(
    ("fault", "window"),
    [(draws_of_52_bits, "near zero"), (draws_of_52_bits, "tail"), (draws_of_52_bits_on_a_grid, "tail")],
    ids=["float64 near zero", "float64 in the tail", "on a grid, in the tail"],
)
def test_the_attack_finds_noise_of_52_bits(fault: Draw, window: str) -> None:
    assert told_apart(fault)[window] > 0.8


def test_in_the_tail_every_cell_is_taken_as_often_as_the_law_says() -> None:
    def empty(draws: Draw) -> float:
        cells = (draws(0.0, -8.0, -7.9, 5000) / noise_grid(1.0)).round().unique()
        return 1 - len(cells) / 103  # from -8192 to -8090

    assert empty(draws_here) == 0
    assert empty(draws_of_52_bits) > 0.8, "cells that are never taken went unnoticed"

"""Privacy figures are never rounded in favour of who claims them, and typed ones read as they were typed."""

from __future__ import annotations

import math
import sys
from decimal import Decimal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedveil.privacy.figures import epsilon_text, most_delta_text, remaining_text

FIGURES = st.floats(0, 1e300) | st.floats(0, 100) | st.integers(0, 10**6).map(lambda n: math.nextafter(n / 1000, 2e3))


@given(FIGURES, st.integers(0, 6))
@example(7.0000000009, 3)
@example(0.9999999995, 3)
@example(5e-324, 4)
def test_what_is_spent_is_never_shown_smaller_nor_what_is_left_larger(value: float, decimals: int) -> None:
    spent, left = (Decimal(text(value, decimals=decimals)) for text in (epsilon_text, remaining_text))
    # A float is the shortest decimal that reads back as it: what a person typed, or the accountant printed.
    assert left <= Decimal(repr(value)) <= spent
    last = Decimal(10) ** (spent.adjusted() - 3) if value >= 10**6 else Decimal(10) ** -decimals
    assert spent - left in (0, last, last / 10), "further away than one unit of the last place"
    assert float(left) <= value <= float(spent)


def test_a_huge_figure_is_short_and_still_not_rounded_down() -> None:
    shown = [epsilon_text(value) for value in (999_999.9999, 10.0**6, 1_234_000.1, sys.float_info.max)]
    assert shown == ["1000000.000", "1.000e+6", "1.235e+6", "1.798e+308"]
    assert remaining_text(1_234_999.9) == "1.234e+6"


@given(st.integers(0, 10**9 - 1))
def test_a_figure_of_three_decimals_reads_as_it_was_typed(thousandths: int) -> None:
    typed = f"{thousandths // 1000}.{thousandths % 1000:03}"
    assert epsilon_text(float(typed)) == remaining_text(float(typed)) == typed


@pytest.mark.parametrize("value", [-0.0, -1e-9, 0.0])
def test_nothing_has_no_sign(value: float) -> None:
    assert epsilon_text(value) == "0.000"


def test_what_is_no_number_reads_as_such() -> None:
    assert [epsilon_text(math.inf), epsilon_text(math.nan), remaining_text(math.inf)] == ["∞", "not a number", "∞"]
    assert [epsilon_text(None), epsilon_text(None, "none"), remaining_text(None)] == ["no claim", "none", "no claim"]


def old_epsilon_text(value: float) -> str:
    """The fault: a ceiling that lets a billionth go."""
    return f"{math.ceil(value * 1000 - 1e-6) / 1000:.3f}"


def test_a_ceiling_that_lets_a_billionth_go_would_be_found() -> None:
    assert Decimal(old_epsilon_text(7.0000000009)) < Decimal("7.0000000009")
    assert Decimal(epsilon_text(7.0000000009)) > Decimal("7.0000000009")


def test_a_delta_that_a_refusal_asks_for_is_one_that_is_taken() -> None:
    """1/2200 in one digit is 0.0005, which is above it: whoever followed that was refused again."""
    for units in (*range(1, 3000), 67_349, 10**6):
        assert 0.9 / units <= float(most_delta_text(units)) <= 1 / units

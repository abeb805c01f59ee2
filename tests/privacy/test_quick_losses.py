"""Tests price with ``quick_losses``: every loss distribution is the library's own, but for rounding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as pld
from quick_losses import OWN, QUICK
from scipy.stats import binom


def distribution(noise: float, rate: float, units: int, interval: float) -> Sequence[tuple[int, float, np.ndarray]]:
    """Return the least loss, the mass at infinity and all other masses, of one release and of 60, both ways."""
    if units == 1:
        held = pld.from_gaussian_mechanism(noise, value_discretization_interval=interval, sampling_prob=rate)
    else:
        chances = binom.pmf(range(units + 1), units, rate).tolist()
        held = pld.from_mixture_gaussian_mechanism(
            noise, list(range(units + 1)), chances, value_discretization_interval=interval
        )
    whole = (held, held.self_compose(60, tail_mass_truncation=1e-12))
    found = [part.to_dense_pmf() for one in whole for part in (one._pmf_remove, one._pmf_add)]
    return [(part._lower_loss, part._infinity_mass, part._probs) for part in found]


def is_the_librarys(noise: float, rate: float, units: int, interval: float) -> bool:
    parts = []
    for functions in (OWN, QUICK):
        with pytest.MonkeyPatch.context() as patch:
            for (kind, name), function in functions.items():
                patch.setattr(kind, name, function)
            parts.append(distribution(noise, rate, units, interval))
    # Where this was written they are equal to the last bit; a processor may take an array's logarithm otherwise.
    return all(
        one[0] == other[0]
        and len(one[2]) == len(other[2])
        and np.allclose([one[1], *one[2]], [other[1], *other[2]], rtol=1e-9, atol=1e-17)
        for one, other in zip(*parts, strict=True)
    )


@pytest.mark.parametrize("noise", [0.5, 1.0, 4.1, 30.0])
@pytest.mark.parametrize("rate", [1.0, 0.9, 0.25, 0.013, 1e-4, 1 - math.exp(-0.25)])  # the last has its edge on a point
def test_a_sampled_gaussian_has_the_librarys_losses(noise: float, rate: float) -> None:
    assert is_the_librarys(noise, rate, 1, 1e-2)


@pytest.mark.parametrize("noise", [1.5, 20.0])
@pytest.mark.parametrize("rate", [1.0, 0.25, 0.01])
@pytest.mark.parametrize("units", [2, 8])
def test_several_units_have_the_librarys_losses(noise: float, rate: float, units: int) -> None:
    assert is_the_librarys(noise, rate, units, 5e-2)


@pytest.mark.parametrize("place", QUICK, ids=lambda place: place[1])
def test_prices_of_the_tests_are_made_of_quick_losses_and_one_that_is_a_hair_off_is_found(
    place: tuple[Any, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = QUICK[place]
    assert getattr(*place) is quick

    def off(*given: Any, **named: Any) -> Any:
        found = quick(*given, **named)
        return (found[0] + 1, found[1]) if isinstance(found, tuple) else found * (1 - 1e-7)

    monkeypatch.setitem(QUICK, place, off)
    assert not (is_the_librarys(1.0, 0.25, 1, 1e-2) and is_the_librarys(1.5, 0.25, 2, 5e-2))

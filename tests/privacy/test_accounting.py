"""What a list of releases costs, against tables, closed forms and slow references."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from fedveil.common.errors import BudgetExhausted, ConfigError
from fedveil.privacy import accounting
from fedveil.privacy.accountant import Method
from fedveil.privacy.accounting import Release, epsilon, epsilon_with_method, gaussian_release
from fedveil.privacy.calibration import noise_multiplier_for
from fedveil.privacy.events import LEAST_NOISE

DELTA = 1e-5
RATE = 64 / 5000
"""Sample rate of the tables below: 5,000 records, an expected batch of 64."""

noises = st.floats(0.6, 8.0)
rates = st.floats(0.01, 0.3)
counts = st.integers(1, 40)
releases = st.builds(gaussian_release, noises, rates, counts)
few = settings(max_examples=8, deadline=None)


def epsilon_of(delta_at: Callable[[float], float], delta: float) -> float:
    """Solve ``delta_at(epsilon) = delta`` for a decreasing ``delta_at``, by halving."""
    low, high = 0.0, 100.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_at(middle) > delta else (low, middle)
    return high


def gaussian_delta(eps: float, noise_multiplier: float) -> float:
    """Balle and Wang 2018 (arXiv 1805.06530), theorem 8: the exact delta of one Gaussian mechanism."""
    mu = 1 / noise_multiplier
    return float(norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * norm.cdf(-mu / 2 - eps / mu))


def sampled_gaussian_delta(eps: float, noise_multiplier: float, sample_rate: float) -> float:
    """Hockey-stick divergence of one Poisson-sampled Gaussian by a Riemann sum, the worse of add and remove."""
    x = np.linspace(-12 * noise_multiplier, 1 + 12 * noise_multiplier, 40_001)
    without = norm.pdf(x, 0, noise_multiplier)
    present = (1 - sample_rate) * without + sample_rate * norm.pdf(x, 1, noise_multiplier)
    step = x[1] - x[0]
    remove = np.maximum(present - math.exp(eps) * without, 0).sum() * step
    add = np.maximum(without - math.exp(eps) * present, 0).sum() * step
    return float(max(remove, add))


@pytest.mark.parametrize("noise_multiplier", [0.5, 1.0, 3.0, 20.0])
def test_one_full_batch_gaussian_costs_what_balle_and_wang_derive(noise_multiplier: float) -> None:
    exact = epsilon_of(lambda eps: gaussian_delta(eps, noise_multiplier), DELTA)
    priced = epsilon([gaussian_release(noise_multiplier, 1.0, 1)], DELTA)
    assert exact <= priced <= exact + 2e-3


def test_n_full_batch_gaussians_cost_as_one_with_noise_divided_by_root_n() -> None:
    exact = epsilon_of(lambda eps: gaussian_delta(eps, 5.0 / math.sqrt(20)), DELTA)
    assert epsilon([gaussian_release(5.0, 1.0, 20)], DELTA) == pytest.approx(exact, abs=2e-3)


@pytest.mark.parametrize(("noise_multiplier", "sample_rate"), [(0.6, 0.0128), (1.0, 0.14), (2.0, 0.5)])
def test_one_sampled_step_costs_what_numerical_integration_finds(noise_multiplier: float, sample_rate: float) -> None:
    exact = epsilon_of(lambda eps: sampled_gaussian_delta(eps, noise_multiplier, sample_rate), DELTA)
    priced = epsilon([gaussian_release(noise_multiplier, sample_rate, 1)], DELTA)
    assert exact - 1e-5 <= priced <= exact + 2e-3


@pytest.mark.parametrize(
    ("rounds", "target", "pld_noise", "rdp_noise"),
    # Noise multipliers that dp-accounting (PLD, RDP) and Opacus (RDP) were found to agree on; 10 steps a round.
    [(20, 8, 0.521, 0.556), (50, 3, 0.803, 0.858), (50, 8, 0.576, 0.608), (200, 3, 1.069, 1.125)],
)
def test_noise_agrees_with_the_calibration_table(
    rounds: int, target: float, pld_noise: float, rdp_noise: float
) -> None:
    assert noise_multiplier_for(target, DELTA, RATE, rounds * 10) == pytest.approx(pld_noise, abs=0.0011)
    assert epsilon([gaussian_release(rdp_noise, RATE, rounds * 10)], DELTA, method="rdp") == pytest.approx(
        target, rel=0.01
    )


def test_a_thousand_steps_cost_239_and_not_the_49_of_an_account_reset_every_round() -> None:
    # Noise multiplier 1, 100 rounds of 10 steps. A reset account shows 0.49 and hides 2.39.
    assert epsilon([gaussian_release(1.0, RATE, 1000)], DELTA) == pytest.approx(2.39, abs=0.005)
    assert epsilon([gaussian_release(1.0, RATE, 10)], DELTA) == pytest.approx(0.49, abs=0.005)


@few
@given(releases)
def test_the_rdp_bound_is_never_below_the_pld_bound(release: Release) -> None:
    # Holds where a step loses about the grid's 1e-3 or more; below that the grid makes the PLD the looser one.
    assert epsilon([release], DELTA) <= epsilon([release], DELTA, method="rdp") + 2e-3


def test_a_step_far_below_the_grid_is_priced_too_high_and_never_too_low() -> None:
    tiny = [gaussian_release(20.0, 0.01, 2000)]
    # Loose by little: 0.088 by PLD, 0.077 by RDP, which is an upper bound as well.
    assert epsilon(tiny, DELTA, method="rdp") < epsilon(tiny, DELTA) < 0.1


@few
@given(noises, rates, counts)
def test_more_noise_costs_less_and_more_steps_or_more_sampling_cost_more(
    noise_multiplier: float, sample_rate: float, count: int
) -> None:
    base = epsilon([gaussian_release(noise_multiplier, sample_rate, count)], DELTA)
    assert epsilon([gaussian_release(noise_multiplier * 1.2, sample_rate, count)], DELTA) <= base + 1e-9
    assert epsilon([gaussian_release(noise_multiplier, sample_rate, count + 5)], DELTA) >= base - 1e-9
    assert epsilon([gaussian_release(noise_multiplier, sample_rate * 1.2, count)], DELTA) >= base - 1e-9
    assert epsilon([gaussian_release(noise_multiplier, sample_rate, count)], DELTA / 10) >= base - 1e-9


@few
@given(st.lists(releases, min_size=1, max_size=2), releases)
def test_another_release_never_makes_the_total_cheaper(history: list[Release], more: Release) -> None:
    assert epsilon([*history, more], DELTA) >= epsilon(history, DELTA) - 1e-9


@given(st.integers(1, 20), st.integers(1, 20))
@few
def test_rounds_cost_together_what_one_long_run_costs(rounds: int, steps: int) -> None:
    by_round = [gaussian_release(1.1, 0.05, steps) for _ in range(rounds)]
    assert epsilon(by_round, DELTA) == epsilon([gaussian_release(1.1, 0.05, rounds * steps)], DELTA)


def test_neither_order_nor_kind_nor_splitting_changes_the_price() -> None:
    a, b = gaussian_release(1.0, 0.05, 10), gaussian_release(2.0, 1.0, 1, purpose="count")
    price = epsilon([a, b], DELTA)
    assert epsilon([b, a], DELTA) == price
    assert (
        epsilon([gaussian_release(1.0, 0.05, 4), b, gaussian_release(1.0, 0.05, 6, purpose="evaluation")], DELTA)
        == price
    )


def test_nothing_released_costs_nothing() -> None:
    assert epsilon([], DELTA) == 0.0
    assert epsilon([], DELTA, method="rdp") == 0.0


@pytest.mark.parametrize("method", ["pld", "rdp"])
def test_a_nearly_free_release_is_never_priced_below_zero(method: Method) -> None:
    # Opacus #585: RDP's conversion gives -0.105 here.
    assert epsilon([gaussian_release(50.0, 1e-3, 1)], 0.1, method=method) == 0.0


def test_the_accountant_is_named_with_its_version() -> None:
    name = str(epsilon_with_method([gaussian_release(1.0, RATE, 10)], DELTA)[1])
    assert name.startswith("PLD (dp-accounting ")
    assert name.endswith("discretisation 1e-3)")


@pytest.mark.parametrize(
    ("release", "delta", "reason"),
    [
        (gaussian_release(0.05, RATE, 10), DELTA, "below 0.1"),
        (gaussian_release(0.5, 1.0, 2000), DELTA, "too large"),
        (gaussian_release(1.0, RATE, 1000), 1e-15, "no finite answer"),
    ],
)
def test_rdp_answers_where_the_pld_cannot_and_says_why(release: Release, delta: float, reason: str) -> None:
    value, name = epsilon_with_method([release], delta)
    assert value == epsilon([release], delta, method="rdp")
    assert name.method == "rdp"
    assert reason in str(name)


def test_rdp_answers_with_a_higher_figure_when_the_pld_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    release = gaussian_release(1.2345, 0.05, 17)
    regular = epsilon([release], DELTA)

    def fail(*_: object) -> None:
        raise MemoryError

    accounting._priced.cache_clear()
    monkeypatch.setattr("dp_accounting.pld.PLDAccountant", fail)
    value, name = epsilon_with_method([release], DELTA)
    accounting._priced.cache_clear()
    assert value >= regular
    assert "MemoryError" in str(name)


def test_an_answer_that_is_no_number_reads_as_infinite_and_never_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    accounting._priced.cache_clear()
    monkeypatch.setattr(accounting, "_compose", lambda *_: math.nan)
    assert epsilon([gaussian_release(1.0, 0.05, 3)], DELTA) == math.inf
    accounting._priced.cache_clear()


@pytest.mark.parametrize("method", ["pld", "rdp"])
@pytest.mark.parametrize("noise_multiplier", [1e200, 1e-200])
def test_a_noise_that_no_accountant_can_work_with_costs_an_infinite_epsilon(
    noise_multiplier: float, method: Method
) -> None:
    value, name = epsilon_with_method([gaussian_release(noise_multiplier, 0.2, 1)], DELTA, method=method)
    assert value == math.inf
    assert "failed with" in str(name)


def test_rdp_does_not_fill_the_terminal_with_warnings(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        epsilon([gaussian_release(0.987, 0.14, 3)], DELTA, method="rdp")
    assert "failed to converge" not in caplog.text


@pytest.mark.parametrize(
    ("target", "sample_rate", "steps"),
    [(8.0, 0.14, 30), (1.0, 0.01, 2000), (3.0, 1.0, 10), (0.5, 0.3, 1), (15.0, 0.01, 50)],
)
def test_calibrated_noise_keeps_the_target_and_one_percent_less_does_not(
    target: float, sample_rate: float, steps: int
) -> None:
    noise = noise_multiplier_for(target, DELTA, sample_rate, steps)
    assert epsilon([gaussian_release(noise, sample_rate, steps)], DELTA) <= target
    assert epsilon([gaussian_release(noise / 1.001, sample_rate, steps)], DELTA) > target
    assert float(f"{noise:.5g}") == noise


def test_calibration_counts_what_is_spent_already() -> None:
    spent = [gaussian_release(1.0, 0.05, 40), gaussian_release(4.0, 1.0, 1, purpose="count")]
    fresh = noise_multiplier_for(5.0, DELTA, 0.05, 100)
    noise = noise_multiplier_for(5.0, DELTA, 0.05, 100, spent)
    assert noise > fresh
    assert epsilon([*spent, gaussian_release(noise, 0.05, 100)], DELTA) <= 5.0
    assert epsilon([*spent, gaussian_release(noise / 1.01, 0.05, 100)], DELTA) > 5.0


def test_calibration_counts_what_is_spent_at_the_very_noise_that_it_tries() -> None:
    spent = [gaussian_release(2.0, 0.1, 500)]
    target = epsilon(spent, DELTA) + 0.5
    noise = noise_multiplier_for(target, DELTA, 0.1, 100, spent)
    assert noise > 2.0
    assert epsilon([*spent, gaussian_release(noise, 0.1, 100)], DELTA) <= target


def test_calibration_refuses_when_the_history_alone_passes_the_budget() -> None:
    with pytest.raises(BudgetExhausted, match=r"is spent already, above the budget of 1 ") as refusal:
        noise_multiplier_for(1.0, DELTA, 0.05, 10, [gaussian_release(1.0, 0.05, 500)])
    assert "\n" not in str(refusal.value)


def test_calibration_refuses_when_what_is_left_is_too_little_for_any_noise() -> None:
    spent = [gaussian_release(1.0, 1.0, 1)]
    with pytest.raises(BudgetExhausted, match="too little is left"):
        noise_multiplier_for(epsilon(spent, DELTA), DELTA, 1.0, 10**15, spent)


def test_an_enormous_budget_gets_the_least_noise_on_offer() -> None:
    assert noise_multiplier_for(1e7, DELTA, 1.0, 1) == LEAST_NOISE


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((0.0, 0.1, 1), "noise-multiplier"),
        ((math.nan, 0.1, 1), "noise-multiplier"),
        ((1.0, 0.0, 1), "sample-rate"),
        ((1.0, 1.1, 1), "sample-rate"),
        ((1.0, 0.1, 0), "count"),
        ((1.0, 0.1, 2.5), "count"),
    ],
)
def test_a_release_that_no_mechanism_makes_is_refused(arguments: tuple[float, float, int], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        gaussian_release(*arguments)


def test_a_delta_of_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="delta"):
        epsilon([gaussian_release(1.0, 0.1, 1)], 0.0)

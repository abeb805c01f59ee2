"""What the ledger says of mixed histories, against accounts made another way.

The independent account works on dp-accounting's distributions directly, one per mechanism, on a grid four
times as fine as the ledger's. Both round against us, and the coarse grid's points are among the fine one's, so
the ledger's figure lies above the fine one, which lies above the truth. Full-batch histories have a closed
form as well (Balle and Wang 2018).
"""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
from dp_accounting.pld import privacy_loss_distribution as pld
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from fedveil.client.ledger.ledger import Ledger
from fedveil.client.ledger.rows import Charge, Receipt
from fedveil.privacy import accounting
from fedveil.privacy.accountant import PLD_INTERVAL
from fedveil.privacy.accounting import Release, epsilon, epsilon_with_method, gaussian_release
from fedveil.privacy.privacy_filter import planned_delta

FINE = PLD_INTERVAL / 4
DELTA = 1e-5


def train(noise: float, rate: float, steps: int) -> Release:
    return gaussian_release(noise, rate, steps)


def initialise(noise: float, rate: float) -> Release:
    return gaussian_release(noise, rate, 1, purpose="initialisation")


def evaluate(noise: float, rounds: int) -> Release:
    return gaussian_release(noise, 1.0, rounds, purpose="evaluation")


Run = list[Release]
HISTORIES: dict[str, tuple[list[Run], list[float]]] = {
    # name: the releases of each run, and each run's delta
    "one run": ([[train(0.75, 0.13, 20)]], [DELTA]),
    "rounds with the same figures": ([[train(0.9, 0.1, 5)] * 4], [DELTA]),
    "noise changes from run to run": ([[train(0.8, 0.1, 10)], [train(1.3, 0.1, 10)]], [DELTA, DELTA]),
    "sample rate changes from run to run": ([[train(1.0, 0.05, 10)], [train(1.0, 0.2, 10)]], [DELTA, DELTA]),
    "a paid start, then training": ([[initialise(5.0, 0.1), train(0.8, 0.11, 35)]], [DELTA]),
    "an evaluation each round": ([[train(1.0, 0.1, 15), evaluate(30.0, 15)]], [DELTA]),
    "start, training, evaluation": ([[initialise(3.0, 0.3), train(1.1, 0.2, 12), evaluate(15.0, 6)]], [DELTA]),
    "only evaluations": ([[evaluate(6.0, 4), evaluate(9.0, 3)], [evaluate(12.0, 5)]], [DELTA, DELTA]),
    "a later run asks for a smaller delta": ([[train(1.0, 0.1, 10)], [train(1.2, 0.15, 5)]], [1e-4, 1e-6]),
    "a later run asks for a larger delta": ([[train(1.0, 0.1, 10)], [evaluate(10.0, 2)]], [1e-6, 1e-4]),
}


def charged(folder: Path, runs: list[Run], deltas: list[float]) -> Receipt:
    """Charge every run to one ledger, opened anew each time, as the first one planned; return the last receipt."""
    planned = tuple(release for run in runs for release in run)
    for number, (releases, delta) in enumerate(zip(runs, deltas, strict=True)):
        with Ledger(folder / "ledger.sqlite") as ledger:
            receipt = ledger.charge(Charge("ward", f"run-{number}", 1, tuple(releases), delta, 500.0, planned=planned))
    return receipt


def independent_epsilon(releases: list[Release], delta: float) -> float:
    """Compose one distribution per release, in the order given, without the code under test."""
    total = pld.identity(value_discretization_interval=FINE)
    for release in releases:
        one = pld.from_gaussian_mechanism(
            release.event.noise_multiplier,
            value_discretization_interval=FINE,
            sampling_prob=release.event.sample_rate,
            pessimistic_estimate=True,
            use_connect_dots=True,
        )
        total = total.compose(one.self_compose(release.count))
    return float(total.get_epsilon_for_delta(delta))


def gaussian_epsilon(releases: list[Release], delta: float) -> float:
    """Full-batch Gaussians compose to one with 1/σ² summed; its delta is known exactly."""
    mu = math.sqrt(sum(release.count / release.event.noise_multiplier**2 for release in releases))

    def excess(eps: float) -> float:
        return float(norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * norm.cdf(-mu / 2 - eps / mu)) - delta

    return float(brentq(excess, 0.0, 100.0, xtol=1e-12))


def test_there_are_ten_histories() -> None:
    assert len(HISTORIES) == 10


@pytest.mark.parametrize("name", HISTORIES)
def test_the_ledger_agrees_with_an_independent_account_and_is_never_below_it(name: str, tmp_path: Path) -> None:
    runs, deltas = HISTORIES[name]
    receipt = charged(tmp_path, runs, deltas)
    assert receipt.accountant.method == "pld"
    assert receipt.delta == min(deltas), "all runs compose at the smallest delta that any of them asked for"
    releases = [release for run in runs for release in run]
    independent = independent_epsilon(releases, planned_delta(releases, min(deltas)))
    assert independent - 1e-9 <= receipt.epsilon_after <= independent + 1e-3


def test_full_batch_histories_agree_with_the_closed_form() -> None:
    runs, _ = HISTORIES["only evaluations"]
    releases = [release for run in runs for release in run]
    exact = gaussian_epsilon(releases, DELTA)
    assert exact <= epsilon(releases, DELTA) <= exact + 1e-3


def test_an_account_that_forgets_a_release_or_takes_another_rate_is_noticed() -> None:
    runs, _ = HISTORIES["start, training, evaluation"]
    whole = independent_epsilon(runs[0], DELTA)
    for planted in (runs[0][:2], runs[0][1:], [runs[0][0], train(1.1, 0.19, 12), runs[0][2]]):
        assert epsilon(planted, DELTA) < whole - 1e-3


@pytest.mark.parametrize(
    ("extreme", "reason"),
    [(train(0.05, 0.1, 2), "below 0.1"), (train(0.3, 1.0, 400), "too large")],
    ids=["hardly any noise", "hundreds of epsilon"],
)
def test_one_extreme_release_hands_the_whole_history_to_rdp_which_says_so(extreme: Release, reason: str) -> None:
    history = [train(1.0, 0.1, 10), extreme]
    value, accountant = epsilon_with_method(history, DELTA)
    assert value == epsilon(history, DELTA, method="rdp") > epsilon(history[:1], DELTA)
    assert str(accountant).startswith("RDP")
    assert reason in str(accountant)


def test_when_the_pld_fails_the_ledger_charges_the_higher_rdp_figure_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    releases = [train(0.9, 0.12, 8), evaluate(20.0, 8)]
    regular = epsilon(releases, DELTA)

    def fail(*_: object) -> None:
        raise OverflowError

    accounting._priced.cache_clear()
    monkeypatch.setattr("dp_accounting.pld.PLDAccountant", fail)
    receipt = charged(tmp_path, [releases], [DELTA])
    accounting._priced.cache_clear()
    assert receipt.epsilon_after >= regular
    assert "OverflowError" in str(receipt.accountant)
    assert str(receipt.accountant).startswith("RDP")


few = settings(max_examples=5, deadline=None)
BASE = [train(1.5, 0.2, 6), evaluate(12.0, 3)]
noises, rates, counts = st.floats(0.7, 5.0), st.floats(0.02, 0.5), st.integers(1, 30)


@few
@given(noises, rates, counts, st.floats(1.05, 2.0))
def test_beside_other_releases_too_more_steps_more_sampling_and_less_noise_cost_more(
    noise: float, rate: float, count: int, factor: float
) -> None:
    def cost(noise: float, rate: float, count: int) -> float:
        return epsilon([*BASE, train(noise, rate, count)], DELTA)

    here = cost(noise, rate, count)
    assert cost(noise, rate, count + 5) > here > epsilon(BASE, DELTA)
    assert cost(noise, min(1.0, rate * factor), count) > here
    assert cost(noise * factor, rate, count) < here


@few
@given(st.lists(st.tuples(noises, rates, counts), min_size=2, max_size=3), st.randoms(use_true_random=False))
def test_neither_the_order_of_releases_nor_their_division_into_rounds_changes_epsilon(
    figures: list[tuple[float, float, int]], draw: random.Random
) -> None:
    history = [train(*one) for one in figures]
    parts = [train(noise, rate, 1) for noise, rate, count in figures for _ in range(count)]
    draw.shuffle(parts)
    assert epsilon(parts, DELTA) == epsilon(history, DELTA)
    # The library itself composes in another order to the same figure, up to rounding.
    shuffled = draw.sample(history, len(history))
    assert independent_epsilon(shuffled, DELTA) == pytest.approx(epsilon(history, DELTA), abs=1e-3)

"""The gain of a server that chooses the next release after it has seen the last one, against the ledger's price."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as pld

from common.privacy.accounting import gaussian_release, least_noise
from common.privacy.events import sampled_gaussian

EPSILON, DELTA, GRID = 8.0, 1e-5, 1e-3


def delta_of_the_best_choice(plans: Sequence[tuple[float, int]]) -> float:
    """Return δ at ``EPSILON`` of one release and then whichever of ``plans``, (rate, steps), is best for its outcome.

    Each plan has the least noise that the ledger lets it have after the first release: one without sampling, at twice
    the noise that would spend the budget. One record more moves its sum by 1: with y the outcome, the loss so far is
    (2 y - 1) / (2 σ²), and what is left to a plan its δ at ``EPSILON`` less that.
    """
    sigma = 2 * least_noise(sampled_gaussian(1.0, 1.0), EPSILON, DELTA, 1)
    first = [gaussian_release(sigma, 1.0, 1)]
    outcome = np.linspace(-10 * sigma, 1 + 10 * sigma, 1501)
    density = np.exp(-((outcome - 1) ** 2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
    left = EPSILON - (2 * outcome - 1) / (2 * sigma**2)
    rows = []
    for rate, steps in plans:
        noise = least_noise(sampled_gaussian(1.0, rate), EPSILON, DELTA, steps, first)
        losses = pld.from_gaussian_mechanism(noise, sampling_prob=rate, value_discretization_interval=GRID)
        whole = losses.self_compose(steps)
        rows.append([whole.get_delta_for_epsilon(value) for value in left])
    return float(np.trapezoid(density * np.max(rows, axis=0), outcome))


@pytest.mark.parametrize("plans", [[(1.0, 1)], [(1.0, 1), (1.0, 2), (1.0, 30)]], ids=["no choice", "of whole batches"])
def test_a_choice_among_whole_batches_gains_nothing(plans: list[tuple[float, int]]) -> None:
    assert 0.95 * DELTA < delta_of_the_best_choice(plans) <= 1.001 * DELTA


def test_a_choice_among_rates_gains_what_the_page_says() -> None:
    """Were it nothing, the page could promise more; were it more, the page would promise too much."""
    assert delta_of_the_best_choice([(1.0, 1), (0.33, 6), (0.1, 40), (0.02, 400)]) == pytest.approx(1.3e-5, abs=5e-7)

"""The bound on how far noise carries the model over a run: what rates it leaves, and that noise keeps to it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedveil.common.config.run import RunConfig
from fedveil.common.errors import ConfigError
from fedveil.common.messages.round import Spending, TrainResult
from fedveil.common.messages.state import HEAD, AdapterState
from fedveil.privacy.accountant import TRAINING, Accountant
from fedveil.privacy.events import sampled_gaussian
from fedveil.server.admission import Admission
from fedveil.server.noise import SitesNoise, SumNoise, noised_at_sites, without_noise
from fedveil.server.optimizer import server_step
from fedveil.server.ruled import within_noise
from fedveil.server.terms import paid_plan
from fedveil.strategies import Contribution, ServerState
from fedveil.strategies.job import Job, configure

BOUND = 0.05
SIZES = (100, 300)
NOISES = (3.0, 2.0)


def job_of(**more: Any) -> Job:
    own: dict[str, Any] = {
        "rounds": 12,
        "privacy.noise-multiplier": 2.0,
        "privacy.epsilon": 50.0,
        "server.optimizer": "momentum",
        "server.momentum": 0.6,
        "server.learning-rate": 30.0,
        "server.most-noise": BOUND,
        "head-rate": 0.5,
        "training.optimizer": "sgd",
        "training.learning-rate": 0.7,
        "training.local-steps": 1,
        "training.sample-rate": 0.5,
    }
    return configure({**own, **more})


def spent_of(result: TrainResult) -> Spending:
    assert result.spending is not None
    return result.spending


def round_of(number: int, state: AdapterState) -> tuple[list[TrainResult], list[Contribution]]:
    accountant, results = Accountant("pld", "0.6.0"), list[TrainResult]()
    for k, (size, noise) in enumerate(zip(SIZES, NOISES, strict=True)):
        event = sampled_gaussian(noise, 0.5, 1.0)
        spent = Spending(TRAINING, event, 1, 12, 1e-5, 0.5, 1.5, 50.0, 48.5, accountant)
        results.append(TrainResult("1", number, f"site-{k}", size, state, spent))
    return results, [Contribution(result.site, result.public_size, state) for result in results]


def rates_of(job: Job, results: list[TrainResult], averaged: list[Contribution]) -> RunConfig:
    noised = noised_at_sites if results[0].spending and job.config.privacy.mode != "none" else without_noise
    return within_noise(job.config, noised(job, averaged, results)[1], results[0].round_number)


def test_noise_alone_ends_within_the_bound_and_near_it() -> None:
    job, draw = job_of(phases="9 adapter+head on examples, 3 head on features"), torch.Generator().manual_seed(3)
    # σ C / (q n) of each site, weighed by size, times the sites' rate; none at more than the run's σ of 2.
    wanted = 0.7 * ((0.25 * 2 / 50) ** 2 + (0.75 * 2 / 150) ** 2) ** 0.5
    state = job.start(
        {"layer": {"A": torch.zeros(40, 50), "B": torch.zeros(30, 40)}, HEAD: {"weight": torch.zeros(40, 50)}}
    )
    for number in range(1, 13):
        results, averaged = round_of(number, state.adapter)
        assert SitesNoise(job, results, averaged).usual() == pytest.approx(wanted)
        changed = {
            layer: {n: t + wanted * torch.randn(t.shape, generator=draw) for n, t in fs.items()}
            for layer, fs in state.adapter.items()
        }
        config = rates_of(job, results, averaged)
        state = replace(server_step(config, state, replace(state, adapter=changed)), round_number=number)
    assert 0.6 * BOUND < float(state.adapter["layer"]["A"].std()) < BOUND * 1.03


def test_head_and_adapter_are_bounded_each_for_itself() -> None:
    job = job_of()
    results, averaged = round_of(1, {})
    config = rates_of(job, results, averaged)
    assert config.server.learning_rate < 30.0
    assert config.head_rate == pytest.approx(1.0)
    slow = rates_of(job_of(**{"head-rate": 1e-4}), results, averaged)
    assert slow.server.learning_rate == pytest.approx(config.server.learning_rate)
    assert slow.server.learning_rate * slow.head_rate == pytest.approx(30.0 * 1e-4)


def rate_where_all_state(times: float, **more: float) -> float:
    """Return the server's rate where every site states so many times the run's noise, or what is said of a site."""
    results, averaged = round_of(1, {})
    told = []
    for result in results:
        event = sampled_gaussian(2.0 * more.get(result.site.replace("-", "_"), times), 0.5, 1.0)
        told.append(replace(result, spending=replace(spent_of(result), event=event)))
    return rates_of(job_of(), told, averaged).server.learning_rate


def test_noise_that_all_sites_add_lowers_the_rate_and_no_single_site_does() -> None:
    """As where all have trained before, and what is left of their budgets asks for more."""
    usual = rate_where_all_state(1.0)
    assert rate_where_all_state(1.5) == pytest.approx(usual / 1.5)
    assert rate_where_all_state(1.5, site_1=1e5) == pytest.approx(usual / 1.5)
    assert rate_where_all_state(1e5, site_0=1.0) == usual
    assert rate_where_all_state(1.0, site_1=1e5) == usual
    assert rate_where_all_state(2.0, site_0=0.5) == rate_where_all_state(1.0, site_0=0.5)
    # Both sites make as much of the average's noise. One that states half of it halves its own part, and nobody else's.
    assert rate_where_all_state(1.0, site_0=0.5) == pytest.approx(usual * math.hypot(1, 1) / math.hypot(0.5, 1))


def test_a_site_that_states_a_lower_sample_rate_would_stop_the_run_and_does_not_count() -> None:
    """Its noise over its batch would be so much larger, at its whole weight: no such reply comes to the average."""
    job = job_of(**{"server.optimizer": "momentum"})
    results, averaged = round_of(1, {})
    lying = replace(results[1], spending=replace(spent_of(results[1]), event=sampled_gaussian(2.0, 2e-6, 1.0)))
    taken = rates_of(job, [results[0], lying], averaged).server.learning_rate
    assert taken < 1e-5 * rates_of(job, results, averaged).server.learning_rate, "the test shows nothing"
    reasons = Admission(job, {}).judge({0: results[0], 1: lying}, ServerState(0, {}, ("B",)), [0, 1])
    assert reasons == {1: "the spending's sample rate 2e-06 is below 0.5, the run's least"}


def test_several_steps_of_a_round_add_their_noise_by_the_squares_of_their_own_rates() -> None:
    plain = {"server.optimizer": "none", "server.most-noise": 0.0}
    job = job_of(
        **plain,
        **{"training.local-steps": 3, "schedule": "linear", "phases": "9 adapter+head on examples, 3 head on features"},
    )
    results, averaged = round_of(4, {})
    rates = [0.7 * (1 - (9 + step) / 27) for step in range(3)]
    site = ((0.25 * 3 / 50) ** 2 + (0.75 * 2 / 150) ** 2) ** 0.5
    assert SitesNoise(job, results, averaged).stated() == pytest.approx(math.hypot(*rates) * site, rel=1e-12)


def test_a_sum_carries_every_sites_part_of_the_noise_over_the_sizes_of_all() -> None:
    summed = {"privacy.mode": "secure-sum", "privacy.honest-sites": 2, "privacy.colluders": 1}
    job = job_of(**summed)
    results, _ = round_of(1, {})
    event = paid_plan(job, results[0]).event
    paid = [replace(one, spending=replace(spent_of(one), event=event)) for one in results]
    paid += [replace(paid[0], site="site-2", public_size=50)]
    wanted = 0.7 * 2.0 / math.sqrt(2) * math.sqrt(3) / (0.5 * 450)
    assert SumNoise(job, paid).exact() == pytest.approx(wanted, rel=1e-12)
    loud = [replace(paid[0], spending=replace(spent_of(paid[0]), event=event.having(noise_multiplier=1e5))), *paid[1:]]
    assert SumNoise(job, loud).exact() > 1e4 * wanted
    assert SumNoise(job, loud).usual() == pytest.approx(wanted, rel=1e-12)


def test_the_rate_follows_from_the_rates_of_the_rounds_of_its_phase_alone() -> None:
    job = job_of(schedule="linear", phases="9 adapter+head on examples, 3 head on features")
    results, averaged = round_of(4, {})
    way = math.hypot(*(1 - done / 9 for done in range(9))) / 0.4
    noise = SitesNoise(job, results, averaged).usual()
    assert rates_of(job, results, averaged).server.learning_rate == pytest.approx(BOUND / (noise * way), rel=1e-12)


@pytest.mark.parametrize("more", [{"server.most-noise": 0.0}, {"server.most-noise": 1e6}, {"privacy.mode": "none"}])
def test_where_nothing_bounds_the_rate_is_as_set(more: dict[str, Any]) -> None:
    job = job_of(**more)
    results, averaged = round_of(1, {})
    assert rates_of(job, results, averaged) == job.config


@pytest.mark.parametrize(
    "more",
    [{"server.optimizer": "adam"}, {"training.optimizer": "adam"}, {"training.weight-decay": 0.1}],
)
def test_what_passes_noise_on_otherwise_is_refused(more: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"server\.most-noise"):
        job_of(**more)

"""Statistics whose null is known, and the noise of a round's numbers: invariants T4 and T5, by simulation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fedveil.contrib.nulls
from fedveil.common.messages.round import Spending, TrainResult
from fedveil.common.messages.state import HEAD, AdapterState
from fedveil.contrib.nulls import Energy, cross_site_energy, least_score, noise_edge
from fedveil.privacy.accountant import INITIALISATION, TRAINING, Accountant
from fedveil.privacy.plan import PrivacyPlan
from fedveil.privacy.record_level import DPSGD
from fedveil.server.aggregation import contributions
from fedveil.server.collect.noise import ServerNoise
from fedveil.server.noise import SitesNoise, StatisticNoise, noised_at_sites, step_noise, with_noises, without_noise
from fedveil.server.terms import paid_plan
from fedveil.strategies import Contribution, ServerState
from fedveil.strategies.job import Job, configure

pytestmark = pytest.mark.rough_prices

SHARES = (0.4, 0.3, 0.2, 0.1)
NOISES = (2.0, 1.0, 0.5, 0.7)
SHAPE = (96, 8)
FULL = (384, 8)
"""Of B in a layer of the default job."""
DRAWS = 600


def noised(signal: Tensor, draw: torch.Generator, noises: Sequence[float] = NOISES) -> list[Tensor]:
    """Return each site's change of a layer: the same signal, and noise of its own."""
    return [signal + noise * torch.randn(signal.shape, generator=draw, dtype=torch.float64) for noise in noises]


def scores(
    signal: Tensor, draws: int = DRAWS, more: float = 1.0, energy: Callable[..., Energy | None] = cross_site_energy
) -> Tensor:
    """Return cross-site scores of so many draws, where every site adds ``more`` times the noise that it states."""
    draw, found = torch.Generator().manual_seed(1), []
    for _ in range(draws):
        told = energy(SHARES, [x.flatten() for x in noised(signal, draw, [more * n for n in NOISES])], NOISES)
        assert told is not None
        found.append(told.score)
    return torch.tensor(found)


def test_t4_under_noise_alone_every_statistic_has_the_mean_the_deviation_and_the_false_keeps_it_says() -> None:
    found = scores(torch.zeros(SHAPE))
    assert abs(float(found.mean())) < 4 / math.sqrt(DRAWS)
    assert abs(float(found.std()) - 1) < 4 / math.sqrt(2 * DRAWS)
    draw, level = torch.Generator().manual_seed(3), 0.05
    for shape in (SHAPE, SHAPE[::-1], (7, 1), (5, 4)):
        noise = torch.randn((2000, *shape), generator=draw, dtype=torch.float64)
        kept = float((torch.linalg.svdvals(noise)[:, 0] > noise_edge(*shape, level)).double().mean())
        assert abs(kept - level) < 4 * math.sqrt(level / 2000), f"{shape}: {kept:.3f} of noise is kept"


def with_own(shares: Sequence[float], changes: Sequence[Tensor], noises: Sequence[float]) -> Energy:
    """Return the energy with each site's own in it: a planted fault."""
    told = cross_site_energy(shares, changes, noises)
    assert told is not None
    own = sum((p * float(x.norm())) ** 2 for p, x in zip(shares, changes, strict=True))
    return replace(told, value=told.value + own)


def test_t4_a_score_with_a_sites_own_energy_in_it_or_of_equal_shares_is_found_out() -> None:
    def as_equals(shares: Sequence[float], changes: Sequence[Tensor], noises: Sequence[float]) -> Energy:
        told, wrong = (cross_site_energy(p, changes, noises) for p in (shares, [1 / len(shares)] * len(shares)))
        assert told is not None
        assert wrong is not None
        return replace(told, deviation=wrong.deviation)

    assert float(scores(torch.zeros(SHAPE), 100, energy=with_own).mean()) > 3
    assert abs(float(scores(torch.zeros(SHAPE), energy=as_equals).std()) - 1) > 0.2


def test_the_energy_is_the_sum_over_pairs_and_the_agreement_of_equal_changes_is_one() -> None:
    draw = torch.Generator().manual_seed(4)
    changes = [x.flatten() for x in noised(torch.ones(SHAPE, dtype=torch.float64), draw)]
    told = cross_site_energy(SHARES, changes)
    pairs = [(j, k) for j in range(4) for k in range(4) if j != k]
    slow = sum(SHARES[j] * SHARES[k] * float(changes[j] @ changes[k]) for j, k in pairs)
    most = sum(SHARES[j] * SHARES[k] * float(changes[j].norm() * changes[k].norm()) for j, k in pairs)
    assert told is not None
    assert (told.score, told.deviation) == (None, None)
    assert told.value == pytest.approx(slow, rel=1e-12)
    assert told.agreement == pytest.approx(slow / most, rel=1e-12)
    same = cross_site_energy(SHARES, [changes[0]] * 4)
    assert same is not None
    assert same.agreement == pytest.approx(1, rel=1e-12)
    nothing = cross_site_energy(SHARES, [0 * change for change in changes])
    assert nothing is not None
    assert nothing.agreement == 0
    assert cross_site_energy([1.0], changes[:1]) is None


def test_t5_noise_that_is_larger_than_stated_does_not_move_the_score() -> None:
    """By 1 %: the margin that sites add where rounding is not known to be exact, which they do not state."""
    nothing, within = torch.zeros(FULL), 4 / math.sqrt(DRAWS)
    assert abs(float(scores(nothing, more=1.01).mean())) < within
    # Planted: with a site's own energy in it, the cross-site score is moved by its noise as well.
    stated, larger = (float(scores(nothing, 100, more, with_own).mean()) for more in (1.0, 1.01))
    assert larger - stated > 0.3


def test_t5_sampling_of_records_does_not_move_the_score() -> None:
    """Sites draw half of 20 records of mean 0 each, and what a draw makes of them has 3 % of the noise's energy."""
    draw, count, numbers = torch.Generator().manual_seed(9), 20, FULL[0] * FULL[1]
    records = []
    for noise in NOISES:
        own = torch.randn(count, numbers, generator=draw, dtype=torch.float64)
        own -= own.mean(0)
        # A number of the sum over a draw has variance Σ x² / 4.
        records.append(own * noise * math.sqrt(0.03 * 4 * numbers) / float(own.norm()))
    across, planted = [], []
    for _ in range(DRAWS):
        noise = [x.flatten() for x in noised(torch.zeros(FULL), draw)]
        drawn = [(torch.rand(count, generator=draw) < 0.5).double() @ own for own in records]
        sent = [x + y for x, y in zip(noise, drawn, strict=True)]
        energies = [energy(SHARES, sent, NOISES) for energy in (cross_site_energy, with_own)]
        across.append(energies[0].score if energies[0] else None)
        planted.append(energies[1].score if energies[1] else None)
    assert abs(float(torch.tensor(across).mean())) < 4 / math.sqrt(DRAWS)
    without = float(scores(torch.zeros(FULL), 100, energy=with_own).mean())
    assert float(torch.tensor(planted).mean()) - without > 0.3, "a site's own energy would go unnoticed"


def test_a_common_signal_is_found_at_the_strength_that_the_formula_says() -> None:
    pairs = sum((SHARES[j] * NOISES[j] * SHARES[k] * NOISES[k]) ** 2 for j in range(4) for k in range(4) if j != k)
    weight = sum(SHARES[j] * SHARES[k] for j in range(4) for k in range(4) if j != k)
    signal = torch.full(SHAPE, 0.1, dtype=torch.float64)
    wanted = weight * float(signal.square().sum()) / math.sqrt(2 * signal.numel() * pairs)
    found = scores(signal)
    assert float(found.mean()) == pytest.approx(wanted, abs=0.3)
    assert least_score(12) == pytest.approx(2.638, abs=1e-3)


def test_the_edge_of_a_wide_matrix_is_the_limit_and_near_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = noise_edge(100, 100, 0.05)
    monkeypatch.setattr(fedveil.contrib.nulls, "WIDE", 50)
    assert noise_edge(100, 100, 0.05) == pytest.approx(drawn, rel=2e-3)


# --- of a round's answers ---------------------------------------------------------------------------------------------

SIZES, TOLD = (100, 300, 50), (2.0, 2.0, 5.0)
OUT = {"query": 5, "dense": 9}
RATE, HEAD_RATE, SAMPLED = 0.7, 3.0, 0.5


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def job_of(**more: Any) -> Job:
    own: dict[str, Any] = {
        "rounds": 4,
        "strategy": "ffa-lora",
        "training.optimizer": "sgd",
        "training.learning-rate": RATE,
        "training.local-steps": 1,
        "training.sample-rate": SAMPLED,
        "server.optimizer": "none",
        "privacy.noise-multiplier": 2.0,
        "privacy.epsilon": 500.0,
        "head-rate": HEAD_RATE,
    }
    return configure({**own, **more})


def state_of(trained: tuple[str, ...] = ("B",)) -> ServerState:
    adapter: AdapterState = {x: {"A": drawn(1, 3, 7), "B": drawn(2, out, 3)} for x, out in OUT.items()}
    return ServerState(0, {**adapter, HEAD: {"weight": drawn(3, 2, 4), "bias": drawn(4, 2)}}, trained)


def answers(job: Job, changes: Sequence[AdapterState], state: ServerState, number: int = 1) -> list[TrainResult]:
    """Return what sites of unlike sizes and noises answer that changed what they train by so much."""
    found = []
    for k, (size, noise, change) in enumerate(zip(SIZES, TOLD, changes, strict=True)):
        result = TrainResult("1", number, f"site-{k}", size, change, None)
        event = paid_plan(job, result).event
        event = event.having(noise_multiplier=event.noise_multiplier * noise / TOLD[0])
        kind = TRAINING if number else INITIALISATION
        spent = Spending(kind, event, 1, 4, 1e-5, 0.5, 1.5, 500.0, 498.5, Accountant("pld", "0.6.0"))
        sent = {x: {n: t + (state.adapter[x][n] if number else 0) for n, t in f.items()} for x, f in change.items()}
        found.append(replace(result, contribution=sent, spending=spent))
    return found


def alike(seed: int, lengths: Sequence[float] = (1.0, 0.5, 2.0)) -> list[AdapterState]:
    """Return three sites' changes in one direction of rank one in each tensor, none of them as long as the next."""
    tensors = {x: {"B": torch.outer(drawn(seed, out), drawn(seed + 1, 3))} for x, out in OUT.items()}
    tensors[HEAD] = {"weight": torch.outer(drawn(seed, 2), drawn(seed + 1, 4)), "bias": drawn(seed + 2, 2)}
    return [{x: {n: length * t for n, t in f.items()} for x, f in tensors.items()} for length in lengths]


def test_the_noise_of_a_rounds_average_is_by_the_shares_noises_and_rates_of_its_sites() -> None:
    job, state = job_of(), state_of()
    # By sizes over variances the second site would have 0.74 of the average, and has half.
    shares = [0.5 * 100 / 108, 0.5, 0.5 * 8 / 108]
    noises = [RATE * noise / (SAMPLED * size) for size, noise in zip(SIZES, TOLD, strict=True)]
    results = answers(job, alike(5, (0.01, 0.01, 0.01)), state)
    averaged = with_noises(job, contributions(job, results, state), results)
    assert all(one.state is result.contribution for one, result in zip(averaged, results, strict=True))
    assert [one.noise for one in averaged] == pytest.approx(noises, rel=1e-12)
    wanted = math.hypot(*(p * t for p, t in zip(shares, noises, strict=True)))
    assert SitesNoise(job, results, averaged).stated() == pytest.approx(wanted, rel=1e-12)


def test_a_change_that_is_shortened_has_its_noise_shortened_with_it() -> None:
    job, state = job_of(), state_of()
    noises = [RATE * noise / (SAMPLED * size) for size, noise in zip(SIZES, TOLD, strict=True)]
    results = answers(job, alike(5, (0.01, 0.01, 3.0)), state)
    averaged = with_noises(job, contributions(job, results, state), results)
    sent = results[2].contribution["dense"]["B"] - state.adapter["dense"]["B"]
    kept = averaged[2].state["dense"]["B"] - state.adapter["dense"]["B"]
    factor = float(kept.norm() / sent.norm())
    assert factor < 0.9, "nothing is shortened"
    assert [one.noise for one in averaged] == pytest.approx([noises[0], noises[1], factor * noises[2]], rel=1e-9)
    shares = [one.weight / math.fsum(one.weight for one in averaged) for one in averaged]
    wanted = math.hypot(shares[0] * noises[0], shares[1] * noises[1], shares[2] * factor * noises[2])
    assert SitesNoise(job, results, averaged).stated() == pytest.approx(wanted, rel=1e-9)


def test_the_noise_of_a_paid_starts_mean_is_that_of_its_sites_shares_and_of_what_was_shortened() -> None:
    paid = {"strategy": "fed-sb", "adapter.start": "dp-gradient", "start.noise-multiplier": 4.0}
    job, state = job_of(**paid, **{"start.sample-rate": 0.25}), state_of(("R",))
    own = [4.0 * noise / TOLD[0] / (0.25 * size) for size, noise in zip(SIZES, TOLD, strict=True)]
    for lengths in ((0.1, 0.1, 0.1), (0.1, 0.1, 90.0)):
        changes = [{x: {"G": length * drawn(7, out, 7)} for x, out in OUT.items()} for length in lengths]
        results = answers(job, changes, state, 0)
        averaged = contributions(job, results, state)
        parts = [float(a.state["dense"]["G"].norm()) / length for a, length in zip(averaged, lengths, strict=True)]
        shares, factor = [0.5 * 100 / 108, 0.5, 0.5 * 8 / 108], parts[2] / parts[0]
        assert (factor < 0.9) == (lengths[2] > 1)
        wanted = math.hypot(shares[0] * own[0], shares[1] * own[1], shares[2] * factor * own[2])
        assert StatisticNoise(job, results, averaged).exact() == pytest.approx(wanted, rel=1e-9)


def test_a_trusted_servers_noise_is_what_it_drew_and_without_privacy_there_is_none() -> None:
    assert (ServerNoise(0.3).usual(), ServerNoise(0.3).exact()) == (0.3, 0.3)
    results, free = answers(job_of(), alike(5), state_of()), job_of(**{"privacy.mode": "none"})
    parts, noise = without_noise(free, [Contribution(one.site, 1.0, one.contribution) for one in results], results)
    assert [one.noise for one in parts] == [0.0] * 3
    assert (noise.usual(), noise.exact()) == (0.0, 0.0)


def test_the_noise_of_round_0_is_that_of_what_it_released() -> None:
    job, state = job_of(), state_of()
    results = answers(job, alike(5), state)
    assert isinstance(noised_at_sites(job, contributions(job, results, state), results)[1], SitesNoise)
    released = [replace(result, round_number=0) for result in results]
    assert isinstance(noised_at_sites(job, contributions(job, results, state), released)[1], StatisticNoise)


class NoisedWhole(PrivacyPlan):
    """Noises what leaves a site, and not its steps."""

    def outgoing(self, contribution: AdapterState, received: AdapterState) -> AdapterState:
        return super().outgoing(contribution, received)


def test_of_a_site_that_noises_what_leaves_it_no_steps_noise_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DPSGD, "plans", NoisedWhole)
    job, state = job_of(), state_of()
    results = answers(job, alike(5), state)
    assert [step_noise(job, result) for result in results] == [None] * 3
    assert SitesNoise(job, results, contributions(job, results, state)).exact() is None


def test_what_sites_add_beyond_the_runs_noise_counts_by_what_they_are_known_by_or_not_at_all() -> None:
    """The second states as much as the run, so nobody is counted at more; a shortened change has less of its own."""
    job, state = job_of(), state_of()
    results = answers(job, alike(5, (0.01, 0.01, 0.01)), state)
    parts = with_noises(job, contributions(job, results, state), results)
    halved = [replace(one, noise=0.5 * (one.noise or 0.0)) for one in parts]
    whole = SitesNoise(job, results, parts).stated()
    assert SitesNoise(job, results, halved).stated() == pytest.approx(0.5 * whole, rel=1e-12)
    shares = [one.weight / math.fsum(one.weight for one in parts) for one in parts]
    wanted = math.hypot(*(p * RATE * 2.0 / (SAMPLED * size) for p, size in zip(shares, SIZES, strict=True)))
    for known in (parts, halved):
        assert SitesNoise(job, results, known).usual() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(
    "more",
    [{"training.local-steps": 2}, {"training.optimizer": "adam"}, {"training.weight-decay": 0.1}],
    ids=["steps", "optimizer", "decay"],
)
def test_the_noise_of_a_change_is_known_of_a_plain_step(more: dict[str, Any]) -> None:
    state, plain = state_of(), job_of()
    job = job_of(**more)
    for held, is_known in ((plain, True), (job, False)):
        results = answers(held, alike(5), state)
        averaged = contributions(held, results, state)
        assert all((step_noise(held, result) is not None) == is_known for result in results)
        assert (SitesNoise(held, results, averaged).exact() is not None) == is_known

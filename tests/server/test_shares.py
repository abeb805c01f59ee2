"""How much of the average one site can be: its share, whatever it tells of its noise, its size or its update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from admitted import DEAR_START, NUMBERS, STATE, answer, plan
from hypothesis import given
from hypothesis import strategies as st
from made_run import told

from fedveil.common.errors import BudgetExhausted, ConfigError
from fedveil.common.messages.round import TrainResult
from fedveil.common.messages.state import HEAD
from fedveil.common.messages.tensors import l2_norm
from fedveil.privacy import MECHANISMS
from fedveil.server import aggregation
from fedveil.server.admission import Admission
from fedveil.server.aggregation import capped, contributions, warn_of_noise
from fedveil.server.optimizer import BETA2
from fedveil.server.plausible import honest_norm, largest_norm
from fedveil.server.terms import least_plan, usual_noise
from fedveil.strategies import Moments, ServerState
from fedveil.strategies.job import Job, configure

PRIVATE: dict[str, Any] = {"server.optimizer": "none", "training.optimizer": "sgd", "training.learning-rate": 0.1}
OPEN: dict[str, Any] = {**PRIVATE, "privacy.mode": "none"}
PLAIN: dict[str, Any] = {**OPEN, "server.optimizer": "adam", "training.learning-rate": 1.0, "training.local-steps": 1}
NOISE_TIMES = {"noise": 100.0, "boundless noise": 1e5}

LONGEST, LONGEST_OPEN = MECHANISMS["dp-sgd"].longest, MECHANISMS["none"].longest


def round_of(job: Job, sites: int = 4, **told: Any) -> list[TrainResult]:
    """Return what honest sites of one size send in round 1: noise of the size that they tell, each its own."""
    if job.mechanism.charged:
        results = [answer(job, plan(job), **told) for _ in range(sites)]
    else:
        results = [replace(answer(configure(PRIVATE), plan(configure(PRIVATE))), spending=None) for _ in range(sites)]
    length = l2_norm(results[0].contribution)
    return [replace(r, site=f"site-{i}", contribution=update(length, i)) for i, r in enumerate(results)]


def update(length: float, seed: int) -> dict[str, dict[str, torch.Tensor]]:
    tensor = torch.randn(NUMBERS, generator=torch.Generator().manual_seed(seed))
    return {"layer": {"B": tensor * (length / float(tensor.norm()))}}


def long_as_allowed(job: Job, liar: TrainResult, seed: int = 99) -> TrainResult:
    """Return the answer with the largest update that is plausible by what it tells."""
    length = 0.999 * largest_norm(job, least_plan(job, liar), liar, STATE)
    return replace(liar, contribution=update(length, seed))


def part_of(job: Job, results: list[TrainResult]) -> float:
    """Return how much of the average the last of the results is: its weighted length, of all."""
    assert Admission(job, {}).judge(dict(enumerate(results)), STATE, range(9)) == {}, "a lie is dropped: no case"
    averaged = contributions(job, results, STATE)
    lengths = [c.weight * l2_norm(c.state) for c in averaged]
    return lengths[-1] / sum(lengths)


def bound(longest: float, share: float = 0.25) -> float:
    return longest * share / (longest * share + 1 - share) + 1e-6


def as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weigh by public sizes alone and let every update be as long as it is."""
    monkeypatch.setattr(aggregation, "usual_noise", lambda *_: math.inf)
    monkeypatch.setattr(aggregation, "factors_of", lambda _, results, __: [1.0] * len(results))


def liar_among(job: Job, lie: str) -> list[TrainResult]:
    *honest, last = round_of(job)
    if lie in NOISE_TIMES and last.spending:
        spent = told(last.spending, noise_multiplier=NOISE_TIMES[lie] * plan(job).event.noise_multiplier)
        last = replace(last, spending=spent)
    return [*honest, long_as_allowed(job, last)]


@pytest.mark.parametrize("lie", [*NOISE_TIMES, "length"])
def test_a_site_that_lies_about_its_noise_or_sends_all_that_is_plausible_is_no_more_than_its_share(
    lie: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = configure(PRIVATE)
    results = liar_among(job, lie)
    # Telling 100 times the noise multiplies the length by less: the signal's part of the bound stays.
    assert part_of(job, results) < (0.05 if lie in NOISE_TIMES else bound(LONGEST))
    as_before(monkeypatch)
    assert part_of(job, results) > 0.9, "the fault is not found"


def test_without_privacy_a_long_update_is_shortened_too(monkeypatch: pytest.MonkeyPatch) -> None:
    job = configure(OPEN)
    *honest, last = round_of(job)
    results = [*honest, replace(last, contribution=update(99 * l2_norm(last.contribution), 99))]
    assert part_of(job, results) < bound(LONGEST_OPEN)
    as_before(monkeypatch)
    assert part_of(job, results) > 0.9, "the fault is not found"


def test_a_site_that_declares_99_times_the_others_size_is_half_the_average_at_most() -> None:
    sizes = [100, 100, 100, 9_900]
    job, free = configure(OPEN), configure({**OPEN, "max-share": 1.0})
    results = [replace(r, public_size=n) for r, n in zip(round_of(job), sizes, strict=True)]
    assert part_of(job, results) == pytest.approx(0.5)
    assert part_of(free, results) > 0.97, "the fault is not found"


def test_a_large_site_that_is_held_down_is_said_where_that_costs_noise(caplog: pytest.LogCaptureFixture) -> None:
    def said(settings: dict[str, Any], sizes: list[int]) -> list[str]:
        caplog.clear()
        job = configure(settings)
        results = [replace(r, public_size=n) for r, n in zip(round_of(job), sizes, strict=True)]
        warn_of_noise(job, results)
        return [record.getMessage() for record in caplog.records if "max-share" in record.getMessage()]

    uneven = [100, 100, 100, 9_900]
    # Shares of 1/6 and 1/2 in place of 1/102 and 99/102; a site's noise is as one over its size.
    times = math.hypot(*(1 / 6 / 100,) * 3, 1 / 2 / 9_900) / math.hypot(*(1 / 10_200,) * 4)
    (words,) = said(PRIVATE, uneven)
    assert f"the largest site, 9900 of 10200 in all, so the noise of the average is {times:.1f} times" in words
    assert said({**PRIVATE, "max-share": 1.0}, uneven) == []
    assert said(PRIVATE, [100, 100, 100, 150]) == []
    assert said(OPEN, uneven) == [], "no noise is there to grow"


def test_without_privacy_uneven_sites_can_have_the_plain_average_by_public_sizes() -> None:
    sizes, plain = (5_000, 214, 146), {**OPEN, "max-share": 1.0, "shorten-updates": False}
    sent = [update(length, seed)["layer"]["B"] for seed, length in enumerate((1.0, 0.2, 9.0))]
    wanted = sum((n / sum(sizes) * B.double() for n, B in zip(sizes, sent, strict=True)), torch.zeros(()).double())
    state = ServerState(0, {"layer": {"B": torch.zeros(NUMBERS, dtype=torch.float64)}}, ("B",))

    def gap(settings: dict[str, Any]) -> float:
        job = configure({**settings, "strategy": "ffa-lora"})
        results = [
            replace(r, public_size=n, contribution={"layer": {"B": B}})
            for r, n, B in zip(round_of(job, 3), sizes, sent, strict=True)
        ]
        averaged = job.strategy.server_update(state, contributions(job, results, state))
        return float((averaged.adapter["layer"]["B"].double() - wanted).abs().max())

    assert gap(plain) < 1e-7  # factors travel as float32
    for bound in plain.keys() - OPEN.keys():
        assert gap({key: value for key, value in plain.items() if key != bound}) > 1e-3, f"{bound} does nothing"


@pytest.mark.parametrize("mode", [name for name, row in MECHANISMS.items() if row.claims])
def test_updates_are_shortened_wherever_something_is_promised(mode: str) -> None:
    unit = {"privacy.unit": "site", "privacy.cohort": 20} if mode == "client-level" else {}
    honest = {"privacy.honest-sites": 3} if mode == "secure-sum" else {}
    own = {**unit, **honest, "strategy": "ffa-lora", "privacy.mode": mode, "training.optimizer": "sgd"}
    configure(own)
    with pytest.raises(ConfigError, match=r"needs shorten-updates True, because under a promise"):
        configure({**own, "shorten-updates": False})


def test_equal_noise_weighs_by_public_sizes_to_the_last_bit() -> None:
    for settings in (PRIVATE, OPEN, {}):
        job = configure(settings)
        results = [replace(r, public_size=n) for r, n in zip(round_of(job, 3), (50, 70, 90), strict=True)]
        averaged = contributions(job, results, STATE)
        assert [c.weight for c in averaged] == [50.0, 70.0, 90.0]
        assert all(c.state is r.contribution for c, r in zip(averaged, results, strict=True))


def test_weights_are_sizes_over_told_variances_and_less_noise_than_the_runs_buys_nothing() -> None:
    job = configure(PRIVATE)
    usual = plan(job).event.noise_multiplier
    results = [answer(job, plan(job), noise_multiplier=usual * times) for times in (1.0, 2.0, 0.7)]
    weights = [c.weight for c in contributions(job, results, STATE)]
    assert [w / weights[0] for w in weights] == pytest.approx([1.0, 0.25, 1.0])


def test_an_update_is_shortened_in_its_own_direction_from_what_the_site_received() -> None:
    job = configure(OPEN)
    held = {"layer": {"B": torch.full((NUMBERS,), 0.5)}}
    moved = [{"layer": {"B": 0.5 + u["layer"]["B"]}} for u in (update(1.0, 1), update(1.1, 2), update(30.0, 3))]
    results = [replace(r, contribution=c) for r, c in zip(round_of(job, 3), moved, strict=True)]
    averaged = contributions(job, results, ServerState(0, held, ("B",)))
    assert all(torch.equal(a.state["layer"]["B"], m["layer"]["B"]) for a, m in zip(averaged[:2], moved, strict=False))
    change = averaged[2].state["layer"]["B"] - 0.5
    assert torch.allclose(change, update(1.1 * LONGEST_OPEN, 3)["layer"]["B"], atol=1e-6)


def test_one_of_two_sites_is_three_quarters_of_the_average_at_most_whatever_size_it_declares() -> None:
    job, free = configure(OPEN), configure({**OPEN, "max-share": 1.0})
    results = [replace(r, public_size=n) for r, n in zip(round_of(job, 2), (10, 990), strict=True)]
    assert part_of(job, results) == pytest.approx(0.75)
    assert part_of(free, results) == pytest.approx(0.99), "the fault is not found"


def test_two_sites_of_sizes_that_differ_less_are_averaged_by_them() -> None:
    job = configure(OPEN)
    results = [replace(r, public_size=n) for r, n in zip(round_of(job, 2), (10, 29), strict=True)]
    assert [c.weight for c in contributions(job, results, STATE)] == [10.0, 29.0]


def test_one_of_two_sites_that_sends_all_that_is_plausible_is_shortened_to_what_is_likely() -> None:
    job = configure(PRIVATE)
    honest, last = round_of(job, 2)
    results = [honest, long_as_allowed(job, last)]
    kept, shortened = contributions(job, results, STATE)
    assert kept.state is honest.contribution
    likely = honest_norm(job, least_plan(job, last), last, STATE)
    assert l2_norm(shortened.state) == pytest.approx(LONGEST * likely, rel=1e-5)
    assert l2_norm(results[1].contribution) > 4 * LONGEST * likely, "a case in which nothing is shortened"


def told_by(site: TrainResult, lie: str, job: Job) -> TrainResult:
    """Return a site's answer that is as long as allowed by what it tells."""
    if lie == "size":
        site = replace(site, public_size=1)
    if lie == "noise" and site.spending:
        spent = told(site.spending, noise_multiplier=100 * plan(job).event.noise_multiplier)
        site = replace(site, spending=spent)
    return long_as_allowed(job, site)


@pytest.mark.parametrize(("lie", "least"), [("noise", 0.98), ("size", 0.85)])
def test_one_of_two_sites_can_be_nearly_the_whole_average_as_the_page_says_and_one_of_three_cannot(
    lie: str, least: float
) -> None:
    """Share times length is what counts, and two have no middle that a length could be held to."""
    job = configure(PRIVATE)
    honest, last = round_of(job, 2)
    assert part_of(job, [honest, told_by(last, lie, job)]) > least
    three = round_of(job, 3)
    assert part_of(job, [*three[:2], told_by(three[-1], lie, job)]) < bound(LONGEST, 1 / 3)
    text = (Path(__file__).parents[2] / "docs" / "concepts" / "mechanisms.md").read_text(encoding="utf-8")
    (row,) = (line for line in text.splitlines() if line.startswith("| two |"))
    assert "By length, one of two can be nearly the whole average" in row


def after(length: float) -> ServerState:
    """Return the state of a server's Adam whose only change until now was so long."""
    moments = Moments(update(length, 7), {"layer": {"B": (1 - BETA2) * update(length, 7)["layer"]["B"].double() ** 2}})
    return replace(STATE, optimizer=replace(moments, steps={"layer": 1}))


def of_lengths(job: Job, lengths: Sequence[float]) -> list[TrainResult]:
    results = round_of(job, len(lengths))
    return [
        replace(r, contribution=update(length, i)) for i, (r, length) in enumerate(zip(results, lengths, strict=True))
    ]


def lengths_of(job: Job, lengths: Sequence[float], state: ServerState) -> list[float]:
    """Return how long updates of these lengths are in the average; none of them is dropped."""
    results = of_lengths(job, lengths)
    assert Admission(job, {}).judge(dict(enumerate(results)), state, range(9)) == {}
    return [l2_norm(c.state) for c in contributions(job, results, state)]


@pytest.mark.parametrize("little", [0.0, 1e-12, 1e-3], ids=str)
def test_a_site_that_has_something_left_to_learn_counts_where_the_others_have_nothing(little: float) -> None:
    job, usual = configure(PLAIN), 0.5
    for length in (0.4, 0.5, 20.0):
        found = lengths_of(job, [little, little, length], after(usual))
        assert found == pytest.approx([little, little, min(length, usual)], rel=1e-5)
    results = of_lengths(job, [little, little, 0.4])
    if little < 1e-3:
        told = Admission(job, {}).judge(dict(enumerate(results)), STATE, range(9))
        assert list(told) == [2], "the fault is not found: without a memory the round's median alone counts"


def test_where_the_others_learn_their_middle_bounds_an_update_and_not_what_was_usual() -> None:
    job = configure(PLAIN)
    assert lengths_of(job, [1.0, 1.0, 50.0], after(0.5)) == pytest.approx([1.0, 1.0, LONGEST_OPEN], rel=1e-5)
    results = of_lengths(job, [1.0, 1.0, 101.0])
    told = Admission(job, {}).judge(dict(enumerate(results)), after(0.5), range(9))
    assert told == {2: "the update's norm 101 is above 100 times the round's median 1"}


def test_one_of_two_sites_is_no_longer_than_a_few_usual_changes_after_the_first_round() -> None:
    job = configure(PLAIN)
    assert lengths_of(job, [0.4, 40.0], after(0.5)) == pytest.approx([0.4, LONGEST_OPEN * 0.5], rel=1e-5)
    results = of_lengths(job, [0.4, 1e20])
    told = Admission(job, {}).judge(dict(enumerate(results)), after(0.5), range(9))
    assert told == {1: "the update's norm 1e+20 is above 100 times the usual change's 0.5"}
    assert lengths_of(job, [0.4, 40.0], STATE) == pytest.approx([0.4, 40.0], rel=1e-5), "nothing is usual in round 1"


def test_what_was_usual_bounds_nothing_where_the_settings_do() -> None:
    job = configure(PRIVATE)
    results = round_of(job, 4)
    for state in (STATE, after(1e-9), after(1e9)):
        assert [c.state for c in contributions(job, results, state)] == [r.contribution for r in results]


def test_one_site_alone_is_all_of_the_average_and_stays_as_long_as_it_is() -> None:
    job = configure(OPEN)
    (result,) = round_of(job, 1)
    (only,) = contributions(job, [result], STATE)
    assert (only.weight, only.state) == (result.public_size, result.contribution)


def test_the_runs_own_noise_is_what_a_site_without_rules_adds() -> None:
    for settings in (PRIVATE, DEAR_START, {"privacy.noise-multiplier": 2.0}):
        job = configure(settings)
        assert usual_noise(job, answer(job, plan(job))) == plan(job).event.noise_multiplier
    job = configure(DEAR_START)
    first = replace(answer(job, plan(job)), round_number=0)
    assert usual_noise(job, first) == 0.7 < plan(job).event.noise_multiplier, "round 0 has a noise of its own"


def test_a_run_whose_budget_is_too_small_for_every_round_weighs_by_the_least_noise() -> None:
    job = configure({"strategy": "fed-sb", "adapter.start": "dp-gradient", "start.noise-multiplier": 0.3})
    with pytest.raises(BudgetExhausted):  # a site whose policy counts on fewer rounds may have answered
        plan(job)
    reply = answer(job, plan(configure(PRIVATE)))
    assert usual_noise(job, reply) == least_plan(job, reply).event.noise_multiplier


@pytest.mark.parametrize("share", [0.0, 1.5, -1.0])
def test_a_share_is_above_0_and_at_most_1(share: float) -> None:
    with pytest.raises(ConfigError, match="max-share"):
        configure({"max-share": share})


@given(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=8), st.floats(0.01, 1.0))
def test_capped_weights_keep_the_bound_and_their_order_and_lower_no_more_than_needed(
    weights: list[float], most: float
) -> None:
    lowered = capped(weights, most)
    assert max(lowered) <= max(most, 1 / len(weights)) * sum(lowered) * (1 + 1e-9)
    assert all(b <= a or lowered == [1.0] * len(weights) for a, b in zip(weights, lowered, strict=True))
    if max(weights) <= most * sum(weights) * (1 - 1e-9):
        assert lowered == weights


def test_the_module_says_the_figures_that_the_documents_have() -> None:
    text = (Path(__file__).parents[2] / "docs" / "concepts" / "mechanisms.md").read_text(encoding="utf-8")
    assert f"{LONGEST:g} times" in text
    assert f"{LONGEST_OPEN:g} times" in text


def noise_of_rank(job: Job, rank: int, out: int = 300) -> tuple[TrainResult, ServerState]:
    """Return a site's answer of noise alone on a head and so many columns, and the state that it is a change of."""
    draw, own = torch.Generator().manual_seed(rank), plan(job)
    way = own.gradient_noise_std * job.config.site_rate(1, 0)
    shapes = {"layer": {"B": (out, rank)}, HEAD: {"weight": (2, 400)}}
    faster = {"layer": 1.0, HEAD: job.config.site_head_rate}
    sent = {
        layer: {n: faster[layer] * way * torch.randn(s, generator=draw) for n, s in fs.items()}
        for layer, fs in shapes.items()
    }
    held = {layer: {n: torch.zeros(s) for n, s in fs.items()} for layer, fs in shapes.items()}
    return replace(answer(job, own), contribution=sent), ServerState(0, held, ("B",))


def test_sites_of_unlike_ranks_are_measured_alike_where_the_head_moves_faster() -> None:
    job = configure({**PRIVATE, "head-rate": 30.0, "privacy.noise-multiplier": 60.0, "privacy.epsilon": 50.0})
    assert job.config.site_head_rate == 30.0
    parts, before = [], []
    for rank in (1, 64):
        result, state = noise_of_rank(job, rank)
        length, least = l2_norm(result.contribution), least_plan(job, result)
        parts.append(length / honest_norm(job, least, result, state))
        told = result.spending.event if result.spending else None
        numbers = 300 * rank + 800
        before.append(length / (30.0 * job.config.site_rate(1, 0) * least.longest_gradient(numbers, told)))
    assert all(part < 1 for part in parts)
    assert parts[0] / parts[1] == pytest.approx(1.0, abs=0.35)
    assert before[0] / before[1] > 2.5, "the whole way at the head's rate measures them as unlike"

"""A server that chooses the next release after it has seen the last one gets no more than its data set's budget.

So does who chooses the runs of a trusted server by what earlier ones have shown.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as pld
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from fedveil.client.ledger.ledger import Ledger
from fedveil.client.ledger.rows import Charge, Receipt
from fedveil.common.errors import BudgetExhausted, LedgerError
from fedveil.privacy import privacy_filter
from fedveil.privacy.accounting import Release, epsilon, gaussian_release
from fedveil.privacy.events import Event, SampledGaussian, SummedGaussian, sampled_gaussian
from fedveil.privacy.meaning import epsilon_of_several
from fedveil.privacy.privacy_filter import (
    ORDER_SHARES,
    PLANNED_SHARE,
    Commitment,
    commitment_to,
    price,
    price_of_several,
    promised,
    promised_noise,
)
from fedveil.server import ledger as server_ledger
from fedveil.server.ledger import ServerLedger

EPSILON, DELTA, GRID = 8.0, 1e-5, 1e-3
Price = Callable[[list[Release]], float]


def at_most(release: Callable[[float], Release], before: list[Release], price: Price) -> Release:
    """Return a release with the least noise that a price lets it have after others."""
    least = brentq(lambda log: min(price([*before, release(math.exp(log))]), 1e3) - EPSILON, -1.5, 4.0, xtol=5e-4)
    return release(math.exp(least + 5e-4))


def delta_of_the_best_choice(first: Release, plans: Sequence[tuple[float, int]], price: Price) -> float:
    """Return δ at ``EPSILON`` of one release and then whichever of ``plans``, (rate, steps), is best for its outcome.

    Each plan has the least noise that ``price`` lets it have after the first release. One record more moves its sum by
    1 where it is drawn: with y the outcome, σ its noise and q its rate, the loss so far is
    log(1 - q + q exp((2 y - 1) / (2 σ²))), and what is left to a plan its δ at ``EPSILON`` less that.
    """
    sigma, rate = first.event.noise_multiplier, first.event.sample_rate
    outcome = np.linspace(-10 * sigma, 1 + 10 * sigma, 1501)

    def around(centre: float) -> np.ndarray:
        return np.exp(-((outcome - centre) ** 2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))

    density = (1 - rate) * around(0.0) + rate * around(1.0)
    left = EPSILON - np.log(density / around(0.0))
    rows = []
    for rate, steps in plans:
        chosen = at_most(lambda noise, rate=rate, steps=steps: gaussian_release(noise, rate, steps), [first], price)
        noise = chosen.event.noise_multiplier
        losses = pld.from_gaussian_mechanism(noise, sampling_prob=rate, value_discretization_interval=GRID)
        whole = losses.self_compose(steps)
        rows.append(np.asarray(whole.get_delta_for_epsilon(left[::-1]))[::-1])
    return float(np.trapezoid(density * np.max(rows, axis=0), outcome))


CHOICES = [(1.0, 1), (0.33, 6), (0.1, 40)]


@cache
def whole() -> Release:
    return gaussian_release(2 * promised_noise(sampled_gaussian(1.0, 1.0), EPSILON, DELTA, 1), 1.0, 1)


@cache
def sampled() -> Release:
    return gaussian_release(promised_noise(sampled_gaussian(1.0, 0.33), EPSILON, DELTA, 6), 0.33, 1)


def of_the_ledger(planned: Release) -> Price:
    commitment = commitment_to([planned], [])
    return lambda releases: price(releases, commitment, DELTA)[0]


def of_the_servers_ledger(planned: Release) -> Price:
    """Return the price that a trusted server's ledger has for releases of runs, the first of which planned this."""
    plan = commitment_to([planned], [])

    def found(releases: list[Release]) -> float:
        *held, added = (
            server_ledger.Charge("run", 1, release.event, DELTA, "")
            for release in releases
            for _ in range(release.count)
        )
        return server_ledger._price(held, added, plan, math.inf).epsilon_total

    return found


def as_if_fixed(releases: list[Release]) -> float:
    return epsilon(releases, DELTA)


@pytest.mark.parametrize(("first", "count", "least"), [(whole, 1, 0.95), (sampled, 6, 0.0)])
def test_no_choice_of_rates_gains_anything(first: Callable[[], Release], count: int, least: float) -> None:
    found = delta_of_the_best_choice(first(), CHOICES, of_the_ledger(dataclasses.replace(first(), count=count)))
    assert least * DELTA < found <= 1.001 * DELTA


def check_that_no_choice_of_a_site_rate_gains_anything() -> None:
    """Let whoever starts runs choose the second one by the first one's outcome: all sites once, or a third of them."""
    price_of = of_the_servers_ledger(dataclasses.replace(sampled(), count=6))
    assert delta_of_the_best_choice(sampled(), CHOICES[:2], price_of) <= 1.001 * DELTA


def test_no_choice_of_noise_site_rate_and_rounds_gains_anything_from_a_trusted_server() -> None:
    check_that_no_choice_of_a_site_rate_gains_anything()


def test_a_servers_ledger_that_composes_a_plan_that_is_kept_to_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault is its price before it wrote plans down."""
    monkeypatch.setattr(server_ledger, "price", lambda spent, plan, delta: promised(spent, delta))
    with pytest.raises(AssertionError, match=r"assert 1\.19\d*e-05 <= "):
        check_that_no_choice_of_a_site_rate_gains_anything()


def test_a_price_as_if_all_were_fixed_is_found_out() -> None:
    """The planted fault is composition without a filter; what it gives away is what the page says."""
    assert delta_of_the_best_choice(sampled(), CHOICES, as_if_fixed) == pytest.approx(1.37e-5, abs=3e-7)


STEP, OTHER, START = (gaussian_release(*figures, 1) for figures in ((0.9, 0.3), (1.1, 0.2), (3.0, 0.1)))
PLAN = commitment_to([START, dataclasses.replace(STEP, count=5)], [])


def times(release: Release, count: int) -> Release:
    return dataclasses.replace(release, count=count)


def test_what_keeps_to_the_plan_is_priced_as_one_list_in_any_order_and_beyond_its_end() -> None:
    planned = promised([START, times(STEP, 5)], DELTA)[0]
    assert price([times(STEP, 5), START], PLAN, DELTA)[0] == planned
    assert price([START, *[STEP] * 5], PLAN, DELTA)[0] == planned
    assert price([START, times(STEP, 7)], PLAN, DELTA)[0] == promised([times(START, 2), times(STEP, 7)], DELTA)[0]
    part = price([times(STEP, 2)], PLAN, DELTA)[0]
    assert part == promised([START, times(STEP, 2)], DELTA)[0], "the start may still be asked for, and counts"
    assert price([START], PLAN, DELTA)[0] == promised([START], DELTA)[0], "a step counts before any was taken"
    assert price([], PLAN, DELTA)[0] == 0.0, "nothing is spent by a plan"
    for clip in (0.1, 5.0):
        scaled = gaussian_release(0.9, 0.3, 1, clip_norm=clip)
        assert price([scaled], PLAN, DELTA)[0] == price([STEP], PLAN, DELTA)[0], "no price depends on a clip"


@pytest.mark.parametrize(
    "spent", [[OTHER], [STEP, OTHER], [times(START, 2)], [gaussian_release(0.9, 1.0, 1)]], ids=lambda s: f"{len(s)}"
)
def test_anything_else_is_priced_at_one_order_and_says_so(spent: list[Release]) -> None:
    value, accountant = price(spent, PLAN, DELTA)
    assert value > promised(spent, DELTA)[0]
    assert "not as the data set's first run planned, at order" in str(accountant)


def test_what_departs_is_priced_as_the_formula_has_it_for_plain_gaussians() -> None:
    plan, spent = commitment_to([OTHER], []), [gaussian_release(2.0, 1.0, 3)]
    assert sum(ORDER_SHARES.values()) == pytest.approx(1.0, abs=1e-12), "more than all of the rest of δ is given away"

    def by_hand(order: int) -> float:
        left = ORDER_SHARES[order] * (1 - PLANNED_SHARE) * DELTA
        return 3 * order / (2 * 2.0**2) + math.log1p(-1 / order) - math.log(left * order) / (order - 1)

    assert price(spent, plan, DELTA)[0] == pytest.approx(min(map(by_hand, ORDER_SHARES)), rel=1e-9)


def test_little_that_departs_costs_little() -> None:
    """One order alone, the best for ε = 8, would make it six."""
    small = [gaussian_release(9.0, 0.1, 5)]
    assert price(small, PLAN, DELTA)[0] < 0.5


def test_another_run_of_the_same_kind_counts_the_plans_other_releases_again_and_no_more() -> None:
    """Rounds again, with a count in each: the count of one round more is in the second run's list."""
    count = gaussian_release(30.0, 1.0, 1, purpose="evaluation")
    plan = commitment_to([times(STEP, 10), times(count, 10)], [])
    twice = [times(STEP, 20), times(count, 20)]
    for spent in ([times(STEP, 11), times(count, 11)], [times(STEP, 8), times(count, 11)]):
        found = price(spent, plan, DELTA)[0]
        assert found == promised([times(STEP, 11), times(count, 20)], DELTA)[0]
    assert price(twice, plan, DELTA)[0] == promised(twice, DELTA)[0]


def test_every_list_of_a_plan_holds_those_before_it() -> None:
    """A row, so that what was released is drawn from one list that the budget alone ends."""
    plan, before = commitment_to([times(STEP, 3), times(START, 2)], []), [0, 0]
    for steps in range(1, 12):
        listed = privacy_filter._as_planned([times(STEP, steps)], plan)
        assert listed is not None
        now = [sum(r.count for r in listed if r.event == event) for event in (START.event, STEP.event)]
        assert now == [2 * math.ceil(steps / 3), steps]
        assert all(held <= more for held, more in zip(before, now, strict=True))
        before = now


def test_a_release_that_is_not_gaussian_is_never_taken_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = commitment_to([gaussian_release(4.0, 1.0, 6)], [])
    monkeypatch.setattr(SampledGaussian, "gaussian", False)
    assert price([gaussian_release(4.0, 1.0, 6)], plan, DELTA)[0] > 0
    assert not plan.whole
    assert price_of_several([gaussian_release(4.0, 1.0, 6)], plan, 3, DELTA) == math.inf


def test_what_is_not_gaussian_has_no_price_after_a_plan_of_whole_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = commitment_to([gaussian_release(4.0, 1.0, 6)], [])
    figures = {"noise_multiplier": 4.0, "sample_rate": 1.0, "clip_norm": 1.0, "honest_sites": 2}
    other = Release(Event(SummedGaussian.name, figures), 1)
    assert price([other], plan, DELTA)[0] < math.inf
    monkeypatch.setattr(SummedGaussian, "gaussian", False)
    assert plan.whole
    assert price([other], plan, DELTA)[0] == math.inf
    assert price_of_several([other], plan, 3, DELTA) == math.inf


def test_the_noise_of_whole_batches_after_a_sampled_start_fits_the_plans_part_of_delta() -> None:
    noise = promised_noise(sampled_gaussian(1.0, 1.0), EPSILON, DELTA, 6, [START])
    assert 0.999 * EPSILON < promised([START, gaussian_release(noise, 1.0, 6)], DELTA)[0] <= EPSILON


def test_a_plan_of_whole_batches_takes_every_later_release_for_one() -> None:
    plan = commitment_to([gaussian_release(4.0, 1.0, 6)], [])
    value, accountant = price([gaussian_release(4.0, 1.0, 6), gaussian_release(5.0, 0.1, 2)], plan, DELTA)
    assert value == epsilon([gaussian_release(4.0, 1.0, 6), gaussian_release(5.0, 1.0, 2)], DELTA)
    assert "taken as 1" in str(accountant)
    assert "taken as 1" not in str(price([gaussian_release(3.0, 1.0, 2)], plan, DELTA)[1])


figures = st.tuples(st.floats(0.7, 5.0), st.sampled_from([0.02, 0.3, 1.0]), st.integers(1, 8))


@settings(max_examples=25, deadline=None)
@given(st.lists(figures, min_size=1, max_size=2), st.lists(figures, min_size=1, max_size=3))
def test_no_history_is_cheaper_than_if_it_had_been_fixed(
    planned: list[tuple[float, float, int]], spent: list[tuple[float, float, int]]
) -> None:
    plan = commitment_to([gaussian_release(*one) for one in planned], [])
    history = [gaussian_release(*one) for one in spent]
    assert price(history, plan, DELTA)[0] >= epsilon(history, DELTA) - 1e-9


def test_a_person_who_departs_is_priced_as_at_rate_1() -> None:
    plan = commitment_to([times(STEP, 5)], [])
    left = (1 - PLANNED_SHARE) * DELTA
    assert price_of_several([OTHER], plan, 3, DELTA) == pytest.approx(
        epsilon([gaussian_release(1.1 / 3, 1.0, 1)], left), rel=0.01
    )
    assert price_of_several([STEP], plan, 3, DELTA) < price_of_several([OTHER], plan, 3, DELTA)
    assert price_of_several([STEP], plan, 3, DELTA) == epsilon_of_several([STEP], 3, PLANNED_SHARE * DELTA)
    whole, sampled = gaussian_release(4.0, 1.0, 6), gaussian_release(5.0, 0.1, 2)
    as_whole = [whole, gaussian_release(5.0, 1.0, 2)]
    found = price_of_several([whole, sampled], commitment_to([whole], []), 3, DELTA)
    assert found == epsilon_of_several(as_whole, 3, DELTA) > epsilon_of_several([whole, sampled], 3, DELTA)


# --- in a ledger ---


def charge(ledger: Ledger, *releases: Release, run: str = "first", **terms: Any) -> Receipt:
    asked = {"dataset": "ward", "round_number": 1, "delta": DELTA, "max_epsilon": EPSILON, **terms}
    records = asked.pop("records", ())
    return ledger.charge(Charge(run=run, releases=releases, **asked), records=records)


def test_the_first_charge_commits_its_runs_plan_and_no_later_one_does(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        assert ledger.plans.of("ward") is None
        with pytest.raises(BudgetExhausted):
            charge(ledger, STEP, max_epsilon=0.1)
        assert ledger.plans.of("ward") is None, "a refused charge committed a plan"
        charge(ledger, START, planned=(START, times(STEP, 5)))
        charge(ledger, STEP, planned=(OTHER,), run="second")
    with Ledger(path) as ledger:
        assert ledger.plans.of("ward") == Commitment((START, times(STEP, 5)))
        assert ledger.epsilon("ward", DELTA) == promised([START, STEP], DELTA)[0]


def departing(path: Path) -> None:
    """Train most of a budget as planned, then ask for what fits by composition alone."""
    noise = promised_noise(sampled_gaussian(1.0, 0.33), EPSILON, DELTA, 6)
    step, other = gaussian_release(noise, 0.33, 5), gaussian_release(4.0, 0.1, 10)
    assert epsilon([step, other], DELTA) < EPSILON
    with Ledger(path) as ledger:
        charge(ledger, step, planned=(times(step, 6),))
        with pytest.raises(BudgetExhausted, match="first run planned something else"):
            charge(ledger, other, run="second")
        charge(ledger, times(step, 1))


def test_what_departs_is_refused_where_it_does_not_fit_and_the_plan_goes_on(tmp_path: Path) -> None:
    departing(tmp_path / "ledger.sqlite")


def test_a_ledger_without_the_filter_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privacy_filter, "price", lambda spent, plan, delta: promised(spent, delta))
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        departing(tmp_path / "ledger.sqlite")


def test_another_name_of_the_same_records_has_its_own_first_plan(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        charge(ledger, STEP, planned=(times(STEP, 5),), records=[1, 2])
        charge(ledger, OTHER, dataset="clinic", planned=(times(OTHER, 3),), records=[2, 3])
        plans = [ledger.plans.of(name) for name in ("ward", "clinic")]
        assert [plan.releases for plan in plans if plan] == [(times(STEP, 5),), (times(OTHER, 3),)]
        assert ledger.epsilon("ward", DELTA) == price([STEP, OTHER], PLAN, DELTA)[0], "its history departs"
        assert ledger.epsilon("clinic", DELTA) == promised([OTHER], DELTA)[0]


def test_a_name_that_is_charged_for_anothers_round_first_has_that_runs_plan(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.remember("clinic", [2, 3])
        charge(ledger, STEP, planned=(times(STEP, 5),), records=[1, 2])
        assert ledger.plans.of("clinic") == ledger.plans.of("ward") == Commitment((times(STEP, 5),))
        charge(ledger, OTHER, dataset="clinic", planned=(OTHER,), run="second", records=[3])
        assert ledger.epsilon("clinic", DELTA) == price([STEP, OTHER], PLAN, DELTA)[0], "what came later is planned"


@pytest.mark.parametrize("act", ["UPDATE plans SET run = 'mine'", "DELETE FROM plans"])
def test_a_plan_can_neither_be_changed_nor_removed(tmp_path: Path, act: str) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        charge(ledger, STEP)
        with pytest.raises(Exception, match="only ever added"):
            ledger._file._connection.execute(act)


def test_a_plan_that_cannot_be_read_stops_the_site(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        charge(ledger, STEP)
        db = ledger._file._connection
        db.execute("DROP TRIGGER no_plan_update")
        db.execute('UPDATE plans SET releases = \'[["no-kind", "{}", 1]]\'')
        with pytest.raises(LedgerError, match="damaged, or of another version"):
            charge(ledger, STEP)


# --- in a trusted server's ledger ---


def spend(path: Path, release: Release, *planned: Release, run: str = "first", budget: float = EPSILON) -> float:
    """Charge a run's rounds one by one; return the ε of all that the file holds."""
    for number in range(1, release.count + 1):
        spent = ServerLedger(path, "site").charge(run, number, release.event, DELTA, budget, planned)
    return spent.epsilon_total


def plan_in(path: Path) -> list[Any]:
    plan: list[Any] = json.loads(path.read_text(encoding="utf-8"))["first_plan"]
    return [(one["event"]["figures"]["noise_multiplier"], one["count"]) for one in plan]


def test_the_first_charge_of_a_servers_ledger_commits_its_runs_plan_and_no_later_one_does(tmp_path: Path) -> None:
    path = tmp_path / "sites.json"
    with pytest.raises(BudgetExhausted):
        spend(path, STEP, times(STEP, 5), budget=0.1)
    assert not path.exists(), "a refused charge committed a plan"
    assert spend(path, STEP, times(STEP, 5)) == promised([STEP], DELTA)[0]
    assert (
        spend(path, OTHER, OTHER, run="second") == price([STEP, OTHER], commitment_to([times(STEP, 5)], []), DELTA)[0]
    )
    assert plan_in(path) == [(0.9, 5)]


@pytest.mark.parametrize("rate", [0.3, 1.0])
def test_a_first_run_and_more_of_the_same_cost_what_was_planned(tmp_path: Path, rate: float) -> None:
    """Also rounds that a resumed run repeats, and a second run with the first one's figures."""
    path, step = tmp_path / "sites.json", gaussian_release(3.0, rate, 1)
    for run, count in (("first", 4), ("first", 6), ("second", 9)):
        held = count - len(ServerLedger(path, "site").charges())
        assert spend(path, times(step, held), times(step, 4), run=run) == promised([times(step, count)], DELTA)[0]


def departing_rounds(path: Path) -> None:
    """As ``departing``, of a trusted server's rounds."""
    noise = promised_noise(sampled_gaussian(1.0, 0.33), EPSILON, DELTA, 6)
    step, other = gaussian_release(noise, 0.33, 1), gaussian_release(4.0, 0.1, 1)
    spend(path, times(step, 5), times(step, 6))
    with pytest.raises(BudgetExhausted, match="first run planned something else"):
        spend(path, times(other, 10), times(other, 10), run="second")
    assert spend(path.with_name("other.json"), times(step, 6), times(step, 6)) <= EPSILON


def test_rounds_that_depart_are_refused_where_they_do_not_fit(tmp_path: Path) -> None:
    departing_rounds(tmp_path / "sites.json")


def test_a_servers_ledger_without_the_filter_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_ledger, "price", lambda spent, plan, delta: promised(spent, delta))
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        departing_rounds(tmp_path / "sites.json")


def test_whole_cohorts_take_every_later_rate_for_one_and_a_refusal_says_so(tmp_path: Path) -> None:
    path, whole = tmp_path / "sites.json", gaussian_release(4.0, 1.0, 1)
    spend(path, whole, whole)
    later = gaussian_release(5.0, 0.1, 1)
    assert spend(path, later, later, run="second") == epsilon([whole, gaussian_release(5.0, 1.0, 1)], DELTA)
    with pytest.raises(BudgetExhausted, match="rates count as 1"):
        spend(path, later, later, run="third", budget=0.1)

"""A second run on the same records fits into what earlier ones have left, to its last round."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_run import MadeRun
from typer.testing import CliRunner
from wards import clinic

from fedveil.cli.main import app
from fedveil.client import budget
from fedveil.client.budget import plan_of
from fedveil.client.ledger.ledger import Ledger
from fedveil.client.ledger.rows import Terms
from fedveil.client.policy import Policy
from fedveil.client.site import Site
from fedveil.common.config.text import to_toml
from fedveil.common.errors import BudgetExhausted, ConfigError, PolicyRefusal
from fedveil.common.messages.round import TrainTask
from fedveil.common.run_lines import PrivacyLine, read_lines
from fedveil.common.starts import PaidStart
from fedveil.experiments.in_process import run_in_process, simulated_nodes
from fedveil.experiments.planner.earlier import earlier_runs
from fedveil.experiments.planner.find import find
from fedveil.experiments.planner.forecast import forecast
from fedveil.experiments.planner.price import priced_rounds, simulated_sizes, site_plans
from fedveil.privacy.accountant import EVALUATION, TRAINING
from fedveil.privacy.accounting import Release, alone, gaussian_release
from fedveil.privacy.events import Event, SummedGaussian, sampled_gaussian
from fedveil.privacy.figures import epsilon_text
from fedveil.privacy.privacy_filter import (
    FRESH,
    History,
    commitment_to,
    noise_after,
    price,
    price_after,
    promised,
    promised_noise,
)
from fedveil.privacy.steps import nothing
from fedveil.server.collect import trusted
from fedveil.server.ledger import ServerLedger
from fedveil.strategies.job import Job, configure

DELTA = 1e-5
SUM: dict[str, Any] = {
    "recipe": "plain",
    "privacy.mode": "secure-sum",
    "privacy.honest-sites": 3,
    "training.local-steps": 1,
    "training.optimizer": "sgd",
}
TRUSTED: dict[str, Any] = {
    "recipe": "plain",
    "privacy.mode": "client-level",
    "privacy.unit": "site",
    "privacy.cohort": 20,
}


def train(site: Site, run: str, **settings: Any) -> list[float]:
    """Pay for every round of a run; return what the records have spent after each."""
    job = configure({"privacy.delta": DELTA, "rounds": 4, **settings})
    return [pay(site, job, run, number) for number in begin(job)]


def begin(job: Job) -> list[int]:
    """Return the rounds of a run, with round 0 where its start is paid for."""
    return [*([0] if isinstance(job.origin, PaidStart) else []), *range(1, job.config.rounds + 1)]


def pay(site: Site, job: Job, run: str, number: int) -> float:
    return budget.pay_round(site, job, TrainTask(run, number, {}, {}, "", "", ""), nothing)[1].epsilon_total


def noises(site: Site, run: str) -> set[float]:
    with Ledger(site.ledger_path) as ledger:
        own = [entry for entry in ledger.entries() if entry.run == run and entry.purpose == TRAINING]
    return {entry.event.noise_multiplier for entry in own}


# --- the noise --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "steps"), [(1.0, 6), (0.3, 6)])
def test_it_is_the_least_that_fits(rate: float, steps: int) -> None:
    event = sampled_gaussian(1.0, rate)
    first = gaussian_release(promised_noise(event, 2.0, DELTA, steps), rate, steps)
    beside = [gaussian_release(30.0, 1.0, steps, "evaluation")]
    history = History((first,), commitment_to([first], []))
    fresh = event.having(noise_multiplier=promised_noise(event, 5.0, DELTA, steps, beside))
    found = noise_after(history, fresh, steps, beside, 5.0, DELTA)
    assert found is not None
    assert found > fresh.noise_multiplier

    def after(noise: float) -> float:
        whole = [first, *beside, Release(event.having(noise_multiplier=noise), steps)]
        return price(whole, history.commitment, DELTA)[0]

    assert after(found) <= 5.0 < after(found / 1.002)


@pytest.mark.parametrize(("rate", "steps", "more"), [(1.0, 12, 1.07), (1 / 3, 6, 1.38)])
def test_it_is_as_much_more_as_the_page_says(rate: float, steps: int, more: float) -> None:
    event = sampled_gaussian(1.0, rate)
    first = gaussian_release(promised_noise(event, 2.0, DELTA, steps), rate, steps)
    history = History((first,), commitment_to([first], []))
    fresh = event.having(noise_multiplier=promised_noise(event, 6.5, DELTA, steps))
    found = noise_after(history, fresh, steps, (), 6.5, DELTA)
    assert found is not None
    assert found / fresh.noise_multiplier == pytest.approx(more, abs=0.005)


def test_it_is_the_runs_own_where_that_fits() -> None:
    """Also where a little more would be another release than planned, and dearer."""
    step = gaussian_release(2.0, 0.3, 4)
    history = History((step,), commitment_to([step], []))
    most = price([step, step], history.commitment, DELTA)[0]
    assert noise_after(history, step.event, 4, (), most, DELTA) == 2.0
    other = step.event.having(noise_multiplier=2.01)
    assert price([step, Release(other, 4)], history.commitment, DELTA)[0] > most


@pytest.mark.parametrize(
    ("rate", "steps", "first", "most"), [(0.33, 4, 2.0, 3.0), (0.1, 20, 3.0, 5.0), (0.33, 6, 4.0, 6.5)]
)
def test_it_is_that_of_the_first_plan_where_that_is_the_cheapest(
    rate: float, steps: int, first: float, most: float
) -> None:
    noise = promised_noise(sampled_gaussian(1.0, rate), first, DELTA, steps)
    step = gaussian_release(noise, rate, steps)
    history = History((step,), commitment_to([step], []))
    fresh = sampled_gaussian(promised_noise(step.event, most, DELTA, steps), rate)
    assert noise_after(history, fresh, steps, (), most, DELTA) == noise
    assert price([step, step], history.commitment, DELTA)[0] <= most


def test_where_a_site_asks_for_more_than_the_first_plan_had_it_is_the_least_that_still_fits() -> None:
    """A little more than planned departs, and is dearer than planned: the run would end before its last round."""
    step = gaussian_release(promised_noise(sampled_gaussian(1.0, 0.33), 4.0, DELTA, 6), 0.33, 6)
    planned, history = step.event.noise_multiplier, History((step,), commitment_to([step], []))

    def after(noise: float) -> float:
        return price([step, gaussian_release(noise, 0.33, 6)], history.commitment, DELTA)[0]

    def found(least: float, most: float = 6.5) -> float | None:
        fresh = sampled_gaussian(promised_noise(step.event, most, DELTA, 6), 0.33)
        return noise_after(history, fresh, 6, (), most, DELTA, least=least)

    least = 1.01 * planned
    assert after(least) > 6.5, "what is asked for fits as it is, and shows nothing"
    more = found(least)
    assert more is not None
    assert more > least
    assert after(more) <= 6.5 < after(more / 1.002)
    assert found(0.9 * planned) == planned, "a site that asks for less than was planned"
    assert found(1.1 * more) == 1.1 * more, "a site that asks for more than is needed"
    assert found(least, 4.5) is None, "nothing that the site allows fits into 4.5"


@pytest.mark.parametrize("planned", [1.4, 9.0], ids=["the first plan's is too little", "the first plan's fits as well"])
def test_after_runs_that_departed_it_is_the_least_that_fits(planned: float) -> None:
    """Where the first plan's own noise fits as well, it is more than is needed."""
    first, other = gaussian_release(planned, 0.3, 4), gaussian_release(4.0, 0.3, 4)
    history = History((first, other), commitment_to([first], []))

    def after(noise: float) -> float:
        return price([*history.releases, gaussian_release(noise, 0.3, 4)], history.commitment, DELTA)[0]

    most = 1.25 * price(history.releases, history.commitment, DELTA)[0]
    assert (after(planned) <= most) is (planned == 9.0)
    found = noise_after(history, sampled_gaussian(0.5, 0.3), 4, (), most, DELTA)
    assert found is not None
    assert after(found) <= most < after(found / 1.002)


def test_without_a_history_it_is_what_was_promised() -> None:
    event = sampled_gaussian(1.0, 0.3)
    least = promised_noise(event, 2.0, DELTA, 6)
    assert noise_after(FRESH, event.having(noise_multiplier=0.5 * least), 6, (), 2.0, DELTA) == pytest.approx(
        least, 1e-3
    )
    assert noise_after(FRESH, event, 6, (), 0.0, DELTA) is None


def test_there_is_none_where_nothing_is_left() -> None:
    for rate in (1.0, 0.3):
        step = gaussian_release(1.0, rate, 6)
        history = History((step,), commitment_to([step], []))
        spent = price([step], history.commitment, DELTA)[0]
        assert noise_after(history, step.event, 6, (), spent - 1e-3, DELTA) is None


# --- what came before -------------------------------------------------------------------------------------------------


def test_what_came_before_a_run_is_what_was_charged_before_its_first_round(tmp_path: Path) -> None:
    site = clinic(tmp_path)
    train(site, "first", **{"privacy.epsilon": 2.0})
    train(site, "second", **{"privacy.epsilon": 4.0})
    train(site, "first", **{"privacy.epsilon": 8.0, "privacy.noise-multiplier": 50.0, "rounds": 1})
    with Ledger(site.ledger_path) as ledger:
        assert ledger.history("ward", "first") == History()
        held = ledger.history("ward", "second")
        assert {release.event.noise_multiplier for release in held.releases} < noises(site, "first")
        assert held.commitment == ledger.plans.of("ward")
        assert list(ledger.history("ward", "third").releases) == ledger.spent("ward")
        assert ledger.history("clinic", "third") == History()
    with Ledger(site.ledger_path) as ledger:
        # A run of the same name on other records is none of these.
        other = replace(site, name="clinic", dataset_id="clinic")
        train(other, "second", **{"privacy.epsilon": 2.0})
        train(site, "fourth", **{"privacy.epsilon": 8.0, "privacy.noise-multiplier": 50.0, "rounds": 1})
        assert len(ledger.history("clinic", "second").releases) == 0
        assert ledger.history("ward", "second") == held


# --- at a site --------------------------------------------------------------------------------------------------------


def check_that_a_second_run_ends(folder: Path, policy: Policy | None = None, **settings: Any) -> None:
    site = clinic(folder, policy)
    train(site, "first", **{"privacy.epsilon": 2.0, **settings})
    spent = train(site, "second", **{"privacy.epsilon": 6.5, **settings})
    assert len(spent) == len(begin(configure({"rounds": 4, **settings})))
    most = min(6.5, policy.epsilon if policy else math.inf)
    assert 0.99 * most < spent[-1] <= most
    assert len(noises(site, "second")) == 1, "the noise changed from round to round"
    fresh = plan_of(configure({"privacy.delta": DELTA, "rounds": 4, **settings}), site, Terms(most, DELTA))
    assert min(noises(site, "second")) > fresh.event.noise_multiplier


WAYS: dict[str, dict[str, Any]] = {
    "whole batches": {"training.sample-rate": 1.0},
    "a third": {"training.sample-rate": 0.33},
    "a start that is paid for": {"strategy": "ffa-lora", "adapter.start": "dp-eva", "recipe": "plain"},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_second_run_has_all_of_its_rounds(way: str, tmp_path: Path) -> None:
    check_that_a_second_run_ends(tmp_path, **WAYS[way])


def test_a_second_run_has_all_of_its_rounds_where_the_site_asks_for_more_noise_by_then(tmp_path: Path) -> None:
    """Its least is a little more than the first plan's noise, which would do; so much departs from that plan."""
    settings = {"training.sample-rate": 0.33, "rounds": 6, "training.local-steps": 1}
    site = clinic(tmp_path)
    train(site, "first", **{"privacy.epsilon": 4.0, **settings})
    (planned,) = noises(site, "first")
    site = clinic(tmp_path, Policy(min_noise_multiplier=1.01 * planned))
    spent = train(site, "second", **{"privacy.epsilon": 6.5, **settings})
    assert 0.99 * 6.5 < spent[-1] <= 6.5
    assert min(noises(site, "second")) > 1.01 * planned


@pytest.mark.parametrize("rate", [1.0, 0.33])
def test_a_third_run_after_one_that_departed_has_the_least_noise_with_which_it_ends(
    rate: float, tmp_path: Path
) -> None:
    site, settings = clinic(tmp_path), {"training.sample-rate": rate, "rounds": 2}
    train(site, "first", **settings, **{"privacy.epsilon": 2.0})
    train(site, "second", **settings, **{"privacy.epsilon": 4.0, "privacy.noise-multiplier": 8.0})
    spent = train(site, "third", **settings, **{"privacy.epsilon": 6.5})
    assert len(spent) == 2
    assert 0.998 * 6.5 < spent[-1] <= 6.5


def test_a_second_run_keeps_the_policys_budget(tmp_path: Path) -> None:
    check_that_a_second_run_ends(tmp_path, Policy(epsilon=4.0, delta=DELTA))


@pytest.mark.parametrize("rate", [1.0, 0.33])
def test_a_second_run_leaves_room_for_its_counts_and_none_for_rounds_that_it_may_not_join(
    rate: float, tmp_path: Path
) -> None:
    policy = Policy(epsilon=6.5, delta=DELTA, max_rounds=2, send_noised_metrics=True, metrics_noise=8.0)
    site, settings = clinic(tmp_path, policy), {"training.sample-rate": rate}
    train(site, "first", **{"privacy.epsilon": 2.0, "rounds": 2, **settings})
    job = configure({"privacy.delta": DELTA, "rounds": 4, "privacy.epsilon": 8.0, **settings})
    spent = [pay(site, job, "second", number) for number in (1, 2)]
    assert 0.98 * 6.5 < spent[-1] <= 6.5
    with pytest.raises(PolicyRefusal):
        pay(site, job, "second", 3)


def test_the_first_plan_is_of_the_rounds_that_the_site_may_join(tmp_path: Path) -> None:
    """A plan of more counts would make every later round dearer."""
    site = clinic(tmp_path, Policy(epsilon=6.5, delta=DELTA, max_rounds=2, send_noised_metrics=True))
    train(site, "first", **{"privacy.epsilon": 6.5, "training.sample-rate": 0.33, "training.local-steps": 3}, rounds=1)
    job = configure({"privacy.delta": DELTA, "rounds": 4, "training.sample-rate": 0.33, "training.local-steps": 3})
    other = replace(site, dataset_id="lab")
    pay(other, job, "second", 1)
    with Ledger(site.ledger_path) as ledger:
        planned = [ledger.plans.of(name) for name in ("ward", "lab")]
    counts = [{held.purpose: held.count for held in plan.releases} for plan in planned if plan is not None]
    assert counts == [{TRAINING: 3, EVALUATION: 1}, {TRAINING: 6, EVALUATION: 2}]


def test_a_site_that_calibrates_as_if_nothing_were_spent_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ledger, "history", lambda *_: History())
    with pytest.raises(BudgetExhausted):
        check_that_a_second_run_ends(tmp_path)


def test_noise_that_the_run_sets_is_used_as_it_is(tmp_path: Path) -> None:
    site = clinic(tmp_path)
    train(site, "first", **{"privacy.epsilon": 2.0})
    train(site, "second", **{"privacy.epsilon": 20.0, "privacy.noise-multiplier": 1.5})
    assert noises(site, "second") == {1.5}
    with pytest.raises(BudgetExhausted):
        train(site, "third", **{"privacy.epsilon": 8.0, "privacy.noise-multiplier": 1.5})
    assert noises(site, "third") <= {1.5}, "noise that the run sets is another where it does not fit"


def test_noise_is_never_below_the_policys_least_whatever_a_history_would_need(tmp_path: Path) -> None:
    site = clinic(tmp_path, Policy(min_noise_multiplier=40.0))
    for run in ("first", "second"):
        train(site, run, **{"privacy.epsilon": 4.0, "rounds": 1})
        assert noises(site, run) == {40.0}


def test_a_run_that_nothing_is_left_for_is_refused_by_the_ledger_in_its_own_words(tmp_path: Path) -> None:
    site = clinic(tmp_path)
    train(site, "first", **{"privacy.epsilon": 3.0})
    with pytest.raises(BudgetExhausted, match=r"refuses round 1 of run 'second' .* the budget is 2 at delta"):
        train(site, "second", **{"privacy.epsilon": 2.0})


def test_the_noise_stays_when_another_run_comes_between(tmp_path: Path) -> None:
    site = clinic(tmp_path)
    job = configure({"privacy.delta": DELTA, "rounds": 4, "privacy.epsilon": 6.0})
    train(site, "first", **{"privacy.epsilon": 2.0})
    pay(site, job, "second", 1)
    train(site, "third", **{"privacy.epsilon": 4.0, "rounds": 1})
    pay(site, job, "second", 2)
    assert len(noises(site, "second")) == 1


# --- where sites share a noise ----------------------------------------------------------------------------------------


def test_a_sum_that_could_not_end_is_refused_before_its_first_round_and_told_what_would_do(tmp_path: Path) -> None:
    site = clinic(tmp_path)
    train(site, "first", **SUM, **{"privacy.epsilon": 2.0})
    with pytest.raises(
        BudgetExhausted,
        match=r"^earlier runs leave too little of the budget of 6\.5 .* share one noise: set privacy\.noise",
    ) as refused:
        train(site, "second", **SUM, **{"privacy.epsilon": 6.5})
    assert not noises(site, "second"), "a refused run was charged"
    told = re.search(r"noise-multiplier to ([\d.]+)", str(refused.value))
    assert told is not None
    spent = train(site, "second", **SUM, **{"privacy.epsilon": 6.5, "privacy.noise-multiplier": float(told[1])})
    assert 6.4 < spent[-1] <= 6.5
    with pytest.raises(BudgetExhausted, match="share one noise: ask for fewer rounds"):
        train(site, "third", **SUM, **{"privacy.epsilon": 6.4})


def test_a_sum_that_has_begun_is_ended_by_the_ledger_alone(tmp_path: Path) -> None:
    """Here the steward lowers the budget after round 1, to what both rounds cost without the first run."""
    site = clinic(tmp_path, Policy(epsilon=8.0, delta=DELTA, max_rounds=2))
    settings = {**SUM, "training.sample-rate": 1.0}
    train(site, "first", **settings, **{"privacy.epsilon": 2.0, "rounds": 1})
    job = configure({"privacy.delta": DELTA, "rounds": 4, "privacy.epsilon": 8.0, **settings})
    pay(site, job, "second", 1)
    step = plan_of(job, site, Terms(math.inf, math.inf)).release(2)
    lowered = replace(site, policy=replace(site.policy, epsilon=1.001 * promised([step], DELTA)[0]))
    with pytest.raises(BudgetExhausted, match="refuses round 2 of run 'second'"):
        pay(lowered, job, "second", 2)


def test_a_sum_is_asked_for_no_more_rounds_than_the_site_may_join(tmp_path: Path) -> None:
    """Two of four rounds fit into what is left, and all four do not."""
    settings = {**SUM, "training.sample-rate": 1.0}
    job = configure({"privacy.delta": DELTA, "rounds": 4, "privacy.epsilon": 6.5, **settings})
    for rounds in (4, 2):
        site = clinic(tmp_path / str(rounds), Policy(epsilon=6.5, delta=DELTA, max_rounds=rounds))
        train(site, "first", **settings, **{"privacy.epsilon": 2.0, "rounds": 2})
        if rounds == 4:
            with pytest.raises(BudgetExhausted, match="share one noise"):
                pay(site, job, "second", 1)
        else:
            assert pay(site, job, "second", 1) < pay(site, job, "second", 2) <= 6.5


def test_a_sum_whose_site_has_a_stricter_budget_goes_on_until_that_ends(tmp_path: Path) -> None:
    site = clinic(tmp_path, Policy(epsilon=5.0, delta=DELTA))
    settings = {**SUM, "training.sample-rate": 1.0}
    train(site, "first", **settings, **{"privacy.epsilon": 5.0, "privacy.noise-multiplier": 1000.0, "rounds": 1})
    job = configure({"privacy.delta": DELTA, "rounds": 4, "privacy.epsilon": 8.0, **settings})
    assert pay(site, job, "second", 1) < 5.0
    with pytest.raises(BudgetExhausted, match="refuses round 2 of run 'second'"):
        pay(site, job, "second", 2)


# --- at a trusted server ----------------------------------------------------------------------------------------------


def check_that_a_second_run_of_a_trusted_server_ends(folder: Path) -> None:
    path = folder / "sites.json"
    for run, most, delta in (("first", 2.0, 0.1 * DELTA), ("second", 6.5, DELTA)):
        job = configure({**TRUSTED, "privacy.delta": delta, "privacy.epsilon": most, "rounds": 5})
        for number in range(1, 6):
            ledger = ServerLedger(path, "site")
            plan = trusted.sums_plan(job, ledger.history(run), ledger.first_event(run))
            planned = [plan.release(5)]
            spent = ledger.charge(run, number, plan.event, plan.delta, most, planned).epsilon_total
        assert 0.99 * most < spent <= most
    found = {(charge.run, charge.event.noise_multiplier) for charge in ServerLedger(path, "site").charges()}
    assert len(found) == 2, "the noise changed from round to round"


def test_a_second_run_of_a_trusted_server_has_all_of_its_rounds(tmp_path: Path) -> None:
    check_that_a_second_run_of_a_trusted_server_ends(tmp_path)


def test_the_noise_of_a_trusted_servers_run_stays_when_another_run_came_before_its_first_round(tmp_path: Path) -> None:
    job, ledger = configure({**TRUSTED, "rounds": 5}), ServerLedger(tmp_path / "sites.json", "site")
    plan = trusted.sums_plan(job, ledger.history("late"))
    other = sampled_gaussian(20.0, plan.event.sample_rate)
    ledger.charge("other", 1, other, plan.delta, 8.0)
    ledger.charge("late", 1, plan.event, plan.delta, 8.0)
    again = trusted.sums_plan(job, ledger.history("late"), ledger.first_event("late"))
    assert again == plan
    assert trusted.sums_plan(job, ledger.history("late")) != plan


@pytest.mark.parametrize("noise", [3.0, 40.0])
def test_noise_that_a_trusted_servers_run_sets_itself_stays_whether_or_not_it_fits(
    noise: float, tmp_path: Path
) -> None:
    job = configure({**TRUSTED, "rounds": 5, "privacy.epsilon": 2.0, "privacy.noise-multiplier": noise})
    ledger = ServerLedger(tmp_path / "sites.json", "site")
    ledger.charge("other", 1, sampled_gaussian(20.0, 1.0), DELTA, 8.0)
    assert trusted.sums_plan(job, ledger.history("late")).event.noise_multiplier == noise


def test_a_trusted_server_that_forgets_earlier_runs_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ServerLedger, "history", lambda *_: History())
    with pytest.raises(BudgetExhausted):
        check_that_a_second_run_of_a_trusted_server_ends(tmp_path)


# --- what a coordinator plans -----------------------------------------------------------------------------------------


def check_that_the_plan_of_a_second_run_is_what_it_does(toy_settings: dict[str, Any], folder: Path) -> None:
    nodes = simulated_nodes(2, folder / "ledgers")
    first = run_in_process({**toy_settings, "privacy.epsilon": 2.0, "privacy.delta": 1e-4}, nodes, run="first")
    job = configure({**toy_settings, "privacy.epsilon": 6.5})
    planned = forecast(job, simulated_sizes(job, 2), calibrated=False, history=earlier_runs([first], job).history)
    second = run_in_process({**toy_settings, "privacy.epsilon": 6.5}, nodes, run="second")
    told = [line.spent for line in read_lines(PrivacyLine, second) if line.site == "site-0" and line.spent]
    assert [spent.epsilon_total for spent in told] == [one.epsilon for one in planned.rounds]
    assert {spent.event.noise_multiplier for spent in told} == {planned.plans[0].event.noise_multiplier}
    assert planned.rounds_within == job.config.rounds == len(told)
    assert planned.spent == pytest.approx(told[0].epsilon_total - told[0].epsilon_round)
    assert find(job, "noise", planned.history).value == planned.plans[0].event.noise_multiplier


@pytest.mark.usefixtures("rough_prices")
def test_the_plan_of_a_second_run_is_what_it_does(toy_settings: dict[str, Any], tmp_path: Path) -> None:
    check_that_the_plan_of_a_second_run_is_what_it_does(toy_settings, tmp_path)


@pytest.mark.parametrize("rate", [1.0, 0.33])
def test_the_plan_of_a_run_with_a_paid_start_is_what_its_ledger_charges(rate: float, tmp_path: Path) -> None:
    """The start takes the whole batch: alone it would have all of δ, beside steps at a lower rate it has not."""
    start = {"strategy": "fed-sb", "adapter.start": "dp-gradient", "start.noise-multiplier": 4.0}
    asked = {**start, "start.sample-rate": 1.0, "training.sample-rate": rate, "recipe": "plain", "rounds": 2}
    site, job = clinic(tmp_path), configure({**asked, "privacy.delta": DELTA})
    rows = priced_rounds(job, site_plans(job, [site.public_size])[0])
    assert [row.round_number for row in rows] == [0, 1, 2]
    assert [row.epsilon for row in rows] == [pay(site, job, "run", number) for number in begin(job)]


def test_a_search_finds_the_rate_and_the_noise_of_the_first_plan() -> None:
    step = gaussian_release(1.5, 0.3, 6)
    history = History((step,), commitment_to([step], []), DELTA)
    most = price([step, step], history.commitment, DELTA)[0]
    asked = {"recipe": "plain", "rounds": 6, "training.local-steps": 1, "privacy.delta": DELTA}
    job = configure({**asked, "privacy.epsilon": 1.01 * most, "training.sample-rate": 0.3})
    assert find(job, "noise", history).value == 1.5
    set_noise = configure({**asked, "privacy.epsilon": 1.01 * most, "privacy.noise-multiplier": 1.5})
    assert find(set_noise, "sample-rate", history).value == 0.3
    assert find(configure({**set_noise.settings(), "training.sample-rate": 0.3}), "rounds", history).value == 6


def test_what_a_history_costs_alone_is_priced_by_its_plan_alone() -> None:
    step = Release(Event(SummedGaussian.name, {**sampled_gaussian(2.0, 0.3).figures, "honest_sites": 3}), 6)
    bare = History((step,), commitment_to([step], [])).changed(alone)
    assert price_after(bare, (), DELTA)[0] == promised(alone([step]), DELTA)[0]


def made(folder: Path, settings: dict[str, Any], **noise: float) -> Path:
    run = MadeRun(folder, {"recipe": "plain", "rounds": 1, **settings}, noise=noise)
    return run.start().round(1, 0.8).end().folder


def test_the_site_that_has_spent_most_in_all_stands_for_all(tmp_path: Path) -> None:
    runs = [made(tmp_path / "0", {}, north=1.0, south=2.0), made(tmp_path / "1", {}, north=3.0, south=0.9)]
    history = earlier_runs(runs, configure({})).history
    assert [release.event.noise_multiplier for release in history.releases] == [2.0, 0.9]
    assert history.commitment.releases == history.releases[:1]
    assert earlier_runs([], configure({})).history == History()


@pytest.mark.parametrize(
    ("earlier", "settings", "words"),
    [
        ({"privacy.mode": "none"}, {}, "was without privacy, so no ε holds for its records"),
        ({}, TRUSTED, "protects a record and this one a site: no ε holds for both"),
        ({}, {"privacy.epsilon": 0.1}, "earlier runs leave too little of epsilon 0.1"),
    ],
    ids=["without privacy", "another unit", "nothing left"],
)
def test_what_no_plan_comes_after_is_said_in_one_line(
    earlier: dict[str, Any], settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    folder = made(tmp_path / "run", earlier)
    path = tmp_path / "settings.toml"
    path.write_text(to_toml(settings), encoding="utf-8")
    asked = ["plan", "-c", str(path), "--sizes", "60,60", "--find", "noise", "--after", str(folder)]
    told = CliRunner().invoke(app, asked)
    assert told.exit_code == 1
    assert words in " ".join(told.output.split())


def test_a_plan_after_a_run_says_what_that_has_spent(toy_settings: dict[str, Any], tmp_path: Path) -> None:
    folder, path = made(tmp_path / "run", {}), tmp_path / "settings.toml"
    path.write_text(to_toml(toy_settings), encoding="utf-8")
    asked = ["plan", "-c", str(path), "--sizes", "60,60", "--no-calibration", "--after", str(folder)]
    told = CliRunner().invoke(app, asked, env={"COLUMNS": "80"})
    assert told.exit_code == 0, told.output
    spent = max(line.spent.epsilon_total for line in read_lines(PrivacyLine, folder) if line.spent)
    assert f"Earlier runs have spent ε {epsilon_text(spent)}, which is counted here" in " ".join(told.output.split())


def test_a_site_whose_ledger_held_more_is_named_whoever_released_most(tmp_path: Path) -> None:
    """South told more than anybody, and north released more in the folder: what is known of north counts."""
    before = {"south": [gaussian_release(1.0, 0.05, 20)]}
    run = MadeRun(tmp_path / "run", {"rounds": 1}, noise={"north": 1.0, "south": 1.1}, earlier=before)
    found = earlier_runs([run.start().round(1, 0.8).end().folder], configure({}))
    assert [release.event.noise_multiplier for release in found.history.releases] == [1.0]
    (note,) = found.notes
    told, own, counted = map(float, re.findall(r"(?<= )\d+\.\d+", note))
    assert note.startswith("south says")
    assert told > counted > own


def test_folders_that_cannot_say_what_was_spent_are_refused_or_warned_of(tmp_path: Path) -> None:
    folder, job = made(tmp_path / "run", {}), configure({})
    with pytest.raises(ConfigError, match="named twice"):
        earlier_runs([folder, folder], job)
    assert earlier_runs([folder], job).notes == ()
    lines = folder / PrivacyLine.NAME
    whole = lines.read_text(encoding="utf-8")

    def with_totals(total: str) -> None:
        lines.write_text(re.sub(r'"epsilon_total": ?[^,}]+', f'"epsilon_total": {total}', whole), encoding="utf-8")

    with_totals("3.2")
    notes = earlier_runs([folder], job).notes
    assert all("held ε 3.200 in all, more than these runs cost it" in note for note in notes)
    assert [note.split()[0] for note in notes] == ["north", "south"]
    with_totals("Infinity")
    with pytest.raises(ConfigError, match="were released without privacy"):
        earlier_runs([folder], job)
    lines.write_text(whole[:30] + "\n" + whole, encoding="utf-8")
    with pytest.raises(ConfigError, match="is damaged, so what it spent is not known"):
        earlier_runs([folder], job)
    lines.write_text(whole, encoding="utf-8")
    config = folder / "config.json"
    config.write_text(config.read_text(encoding="utf-8").replace('"rounds"', '"roundz"'), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"run.* is not of this version: .*roundz"):
        earlier_runs([folder], job)

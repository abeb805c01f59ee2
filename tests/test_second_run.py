"""A second run on the same records fits into what earlier ones have left, to its last round."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from made_run import MadeRun
from typer.testing import CliRunner

from cli.main import app
from client import budget
from client.budget import plan_of
from client.deadline import Deadline
from client.ledger.ledger import Ledger
from client.ledger.rows import Terms
from client.policy import Policy
from client.site import Site
from common.config.text import to_toml
from common.errors import BudgetExhausted
from common.messages.round import TrainTask
from common.privacy.accounting import Release, gaussian_release
from common.privacy.events import sampled_gaussian
from common.privacy.figures import epsilon_text
from common.privacy.privacy_filter import History, commitment_to, noise_after, price, promised_noise
from common.run_lines import PrivacyLine, read_lines
from common.tasks.examples import Dataset
from experiments.in_process import run_in_process, simulated_nodes
from experiments.planner.earlier import history_of
from experiments.planner.find import find
from experiments.planner.forecast import forecast
from experiments.planner.price import simulated_sizes
from server import trusted
from server.ledger import ServerLedger
from strategies.job import Job, configure

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


def clinic(folder: Path, policy: Policy | None = None) -> Site:
    data = Dataset("ward", (), ("bad", "good"))
    return Site("ward", data, "ward", 2000, folder / "ledger.sqlite", policy or Policy())


def train(site: Site, run: str, **settings: Any) -> list[float]:
    """Pay for every round of a run; return what the records have spent after each."""
    job = configure({"privacy.delta": DELTA, "rounds": 4, **settings})
    return [pay(site, job, run, number) for number in range(1, job.config.rounds + 1)]


def pay(site: Site, job: Job, run: str, number: int) -> float:
    return budget.pay_round(site, job, TrainTask(run, number, {}, {}, "", "", ""), Deadline())[1].epsilon_total


def noises(site: Site, run: str) -> set[float]:
    with Ledger(site.ledger_path) as ledger:
        return {entry.event.noise_multiplier for entry in ledger.entries() if entry.run == run}


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


# --- at a site --------------------------------------------------------------------------------------------------------


def check_that_a_second_run_ends(folder: Path, policy: Policy | None = None, **settings: Any) -> None:
    site = clinic(folder, policy)
    train(site, "first", **{"privacy.epsilon": 2.0, **settings})
    spent = train(site, "second", **{"privacy.epsilon": 6.5, **settings})
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


def test_a_second_run_keeps_the_policys_budget(tmp_path: Path) -> None:
    check_that_a_second_run_ends(tmp_path, Policy(epsilon=4.0, delta=DELTA))


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
    with pytest.raises(BudgetExhausted, match=r"the sites of a sum share one noise: set privacy\.noise") as refused:
        train(site, "second", **SUM, **{"privacy.epsilon": 6.5})
    assert not noises(site, "second"), "a refused run was charged"
    told = re.search(r"noise-multiplier to ([\d.]+)", str(refused.value))
    assert told is not None
    spent = train(site, "second", **SUM, **{"privacy.epsilon": 6.5, "privacy.noise-multiplier": float(told[1])})
    assert 6.4 < spent[-1] <= 6.5
    with pytest.raises(BudgetExhausted, match="share one noise: ask for fewer rounds"):
        train(site, "third", **SUM, **{"privacy.epsilon": 6.4})


# --- at a trusted server ----------------------------------------------------------------------------------------------


def check_that_a_second_run_of_a_trusted_server_ends(folder: Path) -> None:
    path = folder / "sites.json"
    for run, most in (("first", 2.0), ("second", 6.5)):
        job = configure({**TRUSTED, "privacy.delta": DELTA, "privacy.epsilon": most, "rounds": 5})
        for number in range(1, 6):
            ledger = ServerLedger(path, "site")
            plan = trusted.sums_plan(job, ledger.history(run))
            planned = [plan.release(5)]
            spent = ledger.charge(run, number, plan.event, DELTA, most, planned).epsilon_total
        assert 0.99 * most < spent <= most
    found = {(charge.run, charge.event.noise_multiplier) for charge in ServerLedger(path, "site").charges()}
    assert len(found) == 2, "the noise changed from round to round"


def test_a_second_run_of_a_trusted_server_has_all_of_its_rounds(tmp_path: Path) -> None:
    check_that_a_second_run_of_a_trusted_server_ends(tmp_path)


def test_a_trusted_server_that_forgets_earlier_runs_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ServerLedger, "history", lambda *_: History())
    with pytest.raises(BudgetExhausted):
        check_that_a_second_run_of_a_trusted_server_ends(tmp_path)


# --- what a coordinator plans -----------------------------------------------------------------------------------------


def check_that_the_plan_of_a_second_run_is_what_it_does(toy_settings: dict[str, Any], folder: Path) -> None:
    nodes = simulated_nodes(2, folder / "ledgers")
    first = run_in_process({**toy_settings, "privacy.epsilon": 2.0}, nodes, run="first")
    job = configure({**toy_settings, "privacy.epsilon": 6.5})
    planned = forecast(job, simulated_sizes(job, 2), calibrated=False, history=history_of([first], job))
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


def made(folder: Path, settings: dict[str, Any], **noise: float) -> Path:
    run = MadeRun(folder, {"recipe": "plain", "rounds": 1, **settings}, noise=noise)
    return run.start().round(1, 0.8).end().folder


def test_the_site_that_has_spent_most_in_all_stands_for_all(tmp_path: Path) -> None:
    runs = [made(tmp_path / "0", {}, north=1.0, south=2.0), made(tmp_path / "1", {}, north=3.0, south=0.9)]
    history = history_of(runs, configure({}))
    assert [release.event.noise_multiplier for release in history.releases] == [2.0, 0.9]
    assert history.commitment.releases == history.releases[:1]
    assert history_of([], configure({})) == History()


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


def test_a_plan_after_a_run_says_what_that_has_spent(tmp_path: Path) -> None:
    folder = made(tmp_path / "run", {})
    asked = ["plan", "--sizes", "60,60", "--no-calibration", "--after", str(folder)]
    told = CliRunner().invoke(app, asked, env={"COLUMNS": "80"})
    assert told.exit_code == 0, told.output
    spent = max(line.spent.epsilon_total for line in read_lines(PrivacyLine, folder) if line.spent)
    assert f"Earlier runs have spent ε {epsilon_text(spent)}, which is counted here" in " ".join(told.output.split())

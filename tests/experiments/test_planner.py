"""What ``fedveil plan`` says before a run is what the run does, and every answer of ``--find`` holds."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_run import spent
from rich.console import Console
from typer.testing import CliRunner

from audits.tiny_models import write_reviews
from fedveil.cli.main import app
from fedveil.common.config.phases import ADAPTER, HEAD, Phase, Schedule
from fedveil.common.config.shipped import EXPERIMENTS
from fedveil.common.config.text import to_toml
from fedveil.common.errors import BudgetExhausted, ConfigError, PrivacyError
from fedveil.common.run_lines import PrivacyLine, RoundLine, read_lines
from fedveil.experiments.in_process import run_in_process
from fedveil.experiments.planner import find as plan_find
from fedveil.experiments.planner import forecast as forecasts
from fedveil.experiments.planner.calibration import Calibration, alignment_of, feature_seconds, round_seconds
from fedveil.experiments.planner.find import RATES, Found, find
from fedveil.experiments.planner.forecast import Forecast, forecast
from fedveil.experiments.planner.price import last_within, signal_to_noise, simulated_sizes
from fedveil.experiments.planner.tables import larger_encoder, print_forecast, print_found
from fedveil.experiments.sweep.groups import groups
from fedveil.experiments.sweep.rows import read_rows, results_file
from fedveil.privacy.accounting import gaussian_release
from fedveil.privacy.figures import epsilon_text
from fedveil.privacy.plan import gaussian_plan
from fedveil.privacy.privacy_filter import promised
from fedveil.strategies import STRATEGIES
from fedveil.strategies.job import configure

MEASURED = Calibration(64, 1, "cpu", 0.1, 0.01, 2.0, 500.0, 0.0, (0.1, 0.2))


@pytest.fixture(autouse=True)
def few_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a map of 16 features be of few made-up records, each of which is a pass at every site and at the server."""
    monkeypatch.setattr("fedveil.common.starts.public_metric.MADE", 48)


def planned(settings: dict[str, Any], sizes: tuple[int, ...] = (60, 60), *, calibrated: bool = False) -> Forecast:
    return forecast(configure(settings), sizes, calibrated=calibrated)


def run_plan(tmp_path: Path, settings: dict[str, Any], *words: str) -> Any:
    path = tmp_path / "settings.toml"
    path.write_text(to_toml(settings), encoding="utf-8")
    return CliRunner().invoke(app, ["plan", "-c", str(path), *words], env={"COLUMNS": "80"})


def check_that_plan_is_run(settings: dict[str, Any], sites: int = 2) -> None:
    job = configure(settings)
    before = forecast(job, simulated_sizes(job, sites), calibrated=False)
    folder = run_in_process(settings, sites)
    own = [line for line in read_lines(PrivacyLine, folder) if line.site == "site-0"]
    assert [round_.epsilon for round_ in before.rounds] == [spent(line).epsilon_total for line in own]
    assert [round_.steps for round_ in before.rounds] == [spent(line).steps_total for line in own]
    assert before.plans[0].event.noise_multiplier == spent(own[-1]).event.noise_multiplier
    assert before.plans[0].event.sample_rate == spent(own[-1]).event.sample_rate
    rounds = read_lines(RoundLine, folder)
    down, up = before.traffic.run(sites)
    assert sum(line.bytes_down for line in rounds) == down
    assert sum(line.bytes_up for line in rounds) == up


SUMMED = {
    "privacy.mode": "secure-sum",
    "privacy.honest-sites": 2,
    "training.optimizer": "sgd",
    "training.local-steps": 1,
}


HEAD_ALONE = {"adapter.name": "none", "strategy": "fedavg-lora"}


@pytest.mark.usefixtures("rough_prices")
@pytest.mark.parametrize(("own", "sites"), [({}, 2), (SUMMED, 3), (HEAD_ALONE, 2)], ids=["plain", "sum", "head"])
def test_the_plan_is_what_the_run_does(own: dict[str, Any], sites: int, toy_settings: dict[str, Any]) -> None:
    check_that_plan_is_run({**toy_settings, **own}, sites)


PHASES = {
    "strategy": "fedavg-lora",
    "rounds": 4,
    "adapter.name": "lora-metric",
    "adapter.start": "public-metric",
    "start.text": "made-up",
    "start.records": 8,
    "head.metric": "public",
    "server.optimizer": "momentum",
    "server.learning-rate": 0.5,
    "training.sample-rate": 1.0,
    "phases": "1 head on features, 2 adapter on jacobians, 1 head on features",
}


@pytest.mark.usefixtures("rough_prices")
def test_the_plan_of_a_sum_in_three_phases_is_what_the_run_does(toy_settings: dict[str, Any], tmp_path: Path) -> None:
    settings = {**toy_settings, **SUMMED, **PHASES}
    check_that_plan_is_run(settings, 3)
    before = planned(settings, (60, 60, 60))
    head = planned({**settings, "adapter.name": "none", "phases": ""}, (60, 60, 60)).traffic
    assert before.traffic.up_run == 2 * before.traffic.up + 2 * head.up, "the adapter's rounds, and the head's"
    assert before.traffic.once_down > 0
    told = " ".join(run_plan(tmp_path, settings, "--sites", "3", "--no-calibration").stdout.split())
    assert "one site and round in which the adapter moves; run: 3 sites, 4 rounds" in told
    assert f"fedavg-lora * │ {before.traffic.down:,} │ {before.traffic.up:,} │" in told


@pytest.mark.usefixtures("rough_prices")
def test_factors_that_are_not_made_anew_around_the_head_are_planned_once(toy_settings: dict[str, Any]) -> None:
    own = {
        "strategy": "ffa-lora",
        "adapter.start": "eva",
        "start.records": 8,
        "rounds": 3,
        "phases": "1 head on features, 2 adapter+head on examples",
    }
    settings = {**toy_settings, **own, "training.optimizer": "sgd", "training.local-steps": 1}
    assert planned(settings).traffic.once_down > 0
    check_that_plan_is_run(settings)


@pytest.mark.usefixtures("rough_prices")
def test_attempts_at_a_sum_that_are_thrown_away_have_their_price(toy_settings: dict[str, Any], tmp_path: Path) -> None:
    settings = {**toy_settings, **SUMMED, "rounds": 3, "round-retries": 1}
    before = planned(settings, (60, 60, 60))
    plan, epsilons = before.plans[0], [one.epsilon for one in before.rounds]
    assert [one.attempts for one in before.thrown_away] == [1, 3]
    for one in before.thrown_away:
        cost = promised([plan.release(3 + one.attempts)], plan.delta)[0]
        assert one.epsilon == cost > plan.max_epsilon >= epsilons[-1]
        assert one.epsilon_alone > one.epsilon
        louder = dataclasses.replace(plan, event=plan.event.having(noise_multiplier=one.noise_multiplier))
        assert promised([louder.release(3 + one.attempts)], plan.delta)[0] <= plan.max_epsilon
        assert one.noise_multiplier > plan.event.noise_multiplier
    assert before.traffic.message_up - before.traffic.up < 400, "a vector costs far more than its words"
    assert planned({**settings, "round-retries": 0}, (60, 60, 60)).thrown_away == []
    assert planned(toy_settings).thrown_away == []
    said = run_plan(tmp_path, settings, "--sizes", "60,60,60", "--no-calibration").stdout
    assert "the budget pays for 0 such attempts beside the 3 rounds" in " ".join(said.split())
    assert max(map(len, said.splitlines())) <= 80


@pytest.mark.usefixtures("rough_prices")
@pytest.mark.parametrize(("honest", "more"), [(1, (2, 4)), (2, (3, 4)), (3, (4,))])
def test_the_plan_of_a_sum_names_its_honest_sites_and_what_more_of_them_make(
    honest: int, more: tuple[int, ...], toy_settings: dict[str, Any], tmp_path: Path
) -> None:
    """Four sites, of which one may collude, or two where each adds all of the noise: a sum has three at least."""
    colluders = 2 if honest == 1 else 1
    settings = {**toy_settings, **SUMMED, "privacy.honest-sites": honest, "privacy.colluders": colluders}
    before = planned(settings, (60,) * 4)
    plan, count = before.plans[0], before.job.config.total_steps
    noise, rate = plan.event.noise_multiplier, plan.event.sample_rate
    wanted = {n: promised([gaussian_release(noise * (n / honest) ** 0.5, rate, count)], plan.delta)[0] for n in more}
    assert before.more_honest == pytest.approx(wanted, abs=1e-6)
    said = run_plan(tmp_path, settings, "--sizes", "60,60,60,60", "--no-calibration").stdout
    assert max(map(len, said.splitlines())) <= 80
    (told,) = re.findall(r"That is the price of the sum, (.*? After the run, .*?)\. ", " ".join(said.split()))
    claims = [f"if {'all ' if n == 4 else ''}{n} sites of each sum are honest (h = {n})" for n in more]
    for claim, price in zip(claims, wanted.values(), strict=True):
        assert f"{claim}: ε {epsilon_text(price)}" in told
    if honest == 1:
        assert told.startswith("whatever other sites do (h = 1)")
        assert ("alone" in said, "ε of the sum, h = 1" in said) == (False, True)
    else:
        assert told.startswith(f"if {honest} sites of each sum are honest (h = {honest})")
        assert f"if no other site adds its noise (alone): ε {epsilon_text(before.epsilon_alone)}" in told
        assert "ε alone" in said


@pytest.mark.parametrize(
    ("honest", "words"), [(1, "whatever other sites do"), (2, "if 2 sites of each sum are honest")]
)
def test_an_answer_for_a_sum_names_its_honest_sites(honest: int, words: str, toy_settings: dict[str, Any]) -> None:
    job = configure({**toy_settings, **SUMMED, "privacy.honest-sites": honest, "privacy.colluders": 2})
    screen = io.StringIO()
    print_found(Console(file=screen, width=200), job, (60,) * 4, Found("rounds", 3, 1.0, 8.0, None, None))
    assert f", {words} (h = {honest})" in screen.getvalue()


@pytest.mark.usefixtures("rough_prices")
def test_the_plan_of_a_language_model_is_what_the_run_does(toy_generation: dict[str, Any]) -> None:
    check_that_plan_is_run({**toy_generation, "strategy": "fed-svd"})


@pytest.mark.usefixtures("rough_prices")
def test_a_paid_initialisation_is_round_0_of_the_plan_and_travels_once(toy_settings: dict[str, Any]) -> None:
    settings = {**toy_settings, "strategy": "fed-sb", "adapter.start": "dp-gradient", "rounds": 1}
    check_that_plan_is_run(settings)
    before = planned(settings)
    assert [round_.round_number for round_ in before.rounds] == [0, 1]
    assert before.traffic.once_up > before.traffic.up
    assert before.traffic.once_down > before.traffic.down


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_table_of_bytes_equals_the_encoded_messages_of_every_strategy(
    name: str, toy_settings: dict[str, Any]
) -> None:
    before = planned({**toy_settings, "strategy": name, "privacy.mode": "none"})
    assert before.payloads[name] == (before.traffic.down, before.traffic.up)
    assert before.traffic.message_up > before.traffic.up


def test_the_bytes_of_the_head_alone_stand_beside_those_of_other_strategies_on_their_own_adapters(
    toy_settings: dict[str, Any], tmp_path: Path
) -> None:
    before = planned({**toy_settings, **HEAD_ALONE})
    own = before.payloads.pop("fedavg-lora")
    assert own == (before.traffic.down, before.traffic.up)
    for name, pair in before.payloads.items():
        # Some choose by the noise of one plain step.
        other = planned({**toy_settings, "strategy": name, "training.local-steps": 1, "training.optimizer": "sgd"})
        assert pair == (other.traffic.down, other.traffic.up), name
        assert pair > own, f"{name} is said to send a head alone as well"
    named_nowhere = planned({**toy_settings, **HEAD_ALONE, "adapter.targets": "nowhere"})
    assert named_nowhere.payloads == {"fedavg-lora": own}
    said = run_plan(tmp_path, {**toy_settings, **HEAD_ALONE}, "--sites", "2", "--no-calibration").stdout
    assert "bytes of the head alone *" in said
    assert max(map(len, said.splitlines())) <= 80


def test_the_features_of_a_head_alone_are_in_the_time_of_the_run(toy_settings: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    result = run_plan(
        tmp_path, {**toy_settings, **HEAD_ALONE}, "--sizes", "60,90", "--workers", "1", "--json", str(path)
    )
    assert result.exit_code == 0, result.output
    assert "the features of all records are" in " ".join(result.output.split())
    content = json.loads(path.read_text(encoding="utf-8"))
    each = content["calibration"]["feature_seconds"]
    assert each > 0
    assert content["feature_seconds_simulated"] == pytest.approx(150 * each)
    assert content["feature_seconds_deployed"] == pytest.approx(90 * each)
    plain = planned(toy_settings, calibrated=True)
    assert plain.feature_seconds == (0.0, 0.0), "features are counted where none are computed"


def test_the_derivatives_of_a_linearised_run_are_in_its_time(toy_settings: dict[str, Any]) -> None:
    more = {"phases": "3 adapter on jacobians every 2", "rounds": 3, "training.local-steps": 1}
    forecast = planned({**toy_settings, **more}, calibrated=True)
    measured, features = forecast.calibration, forecast.feature_seconds
    assert measured is not None
    assert features is not None
    assert measured.feature_seconds > 0
    # Rounds 1 and 2 have one linearisation, round 3 another.
    assert features[1] == pytest.approx(2 * max(forecast.sizes) * measured.feature_seconds)
    assert measured.alignment is not None


def test_the_time_of_a_run_has_its_features_once(toy_settings: dict[str, Any], tmp_path: Path) -> None:
    featured = dataclasses.replace(MEASURED, feature_seconds=0.5)
    once = Schedule((Phase(9, (HEAD,), "features"),))
    assert feature_seconds(featured, once, [60, 90, 60], workers=2) == (60.0, 45.0)
    # Rounds 1 to 3, 4 to 6 and 7 have a linearisation each, and the last two the features of what came of them.
    moved, head = Phase(7, (ADAPTER,), "jacobians", 3), Phase(2, (HEAD,), "features")
    scored = dataclasses.replace(featured, scored_seconds=0.25)
    assert feature_seconds(scored, Schedule((moved, head)), [60], workers=1) == (60 * (3 * 0.5 + 0.25),) * 2
    both = Schedule((Phase(3, (HEAD,), "features"), dataclasses.replace(moved, rounds=4), head))
    assert feature_seconds(scored, both, [60], workers=1) == (60 * (2 * 0.5 + 2 * 0.25),) * 2
    before = dataclasses.replace(planned({**toy_settings, **HEAD_ALONE}), calibration=featured, workers=2)
    console = Console(width=80, record=True, file=io.StringIO())
    print_forecast(console, before)
    seconds, features = before.round_seconds, before.feature_seconds
    assert seconds is not None
    assert features == (30.0, 30.0)
    lines = [line for line in console.export_text().splitlines() if "each site" in line and "│" in line]
    assert f"{seconds[1] * before.job.config.rounds + 30.0:.0f} s" in lines[-1], "the run's time lacks the features"


def test_without_privacy_there_is_no_claim_but_bytes_and_time(tmp_path: Path, toy_settings: dict[str, Any]) -> None:
    result = run_plan(tmp_path, {**toy_settings, "privacy.mode": "none"}, "--sites", "2")
    assert result.exit_code == 0, result.output
    assert "nothing is promised about any record" in " ".join(result.output.split())
    assert "adapter bytes" in result.output
    assert "a machine like this for each site" in result.output
    assert "ε of each site" not in result.output


def test_the_plan_says_if_so_many_records_have_another_recipe(tmp_path: Path, toy_settings: dict[str, Any]) -> None:
    kept = ("model.name", "model.max-length", "data.test-size", "privacy.delta", "output")
    own = {"data.name": "records.csv", "data.labels": "bad,good", "privacy.epsilon": 0.5, "rounds": 10}
    settings = {**{key: toy_settings[key] for key in kept if key in toy_settings}, **own}
    told = run_plan(tmp_path, settings, "--sizes", "9000,9000", "--no-calibration")
    assert "is of the recipe 'head-only'; with data.records = 18000, as these sites have, it is 'metric'" in " ".join(
        told.stdout.split()
    )
    for more, sizes in (({}, "900,900"), ({"data.records": 2000}, "9000,9000")):
        told = run_plan(tmp_path, {**settings, **more}, "--sizes", sizes, "--no-calibration")
        assert "as these sites have" not in told.stdout


def test_sizes_are_enough_no_record_of_a_site_is_needed(tmp_path: Path, toy_settings: dict[str, Any]) -> None:
    public = write_reviews(tmp_path / "public.csv", 40)
    settings = {**toy_settings, "data.name": str(tmp_path / "at-the-sites-only.csv"), "data.test": str(public)}
    result = run_plan(tmp_path, settings, "--sizes", "90, 50", "--no-calibration")
    assert result.exit_code == 0, result.output
    assert "22.5" in result.output
    assert "12.5" in result.output


def test_no_calibration_takes_no_step(toy_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a step was taken")

    monkeypatch.setattr(forecasts, "calibrate", fail)
    assert planned(toy_settings).calibration is None


def test_a_calibration_leaves_the_model_as_it_was_and_measures_something(toy_settings: dict[str, Any]) -> None:
    before = planned(toy_settings, calibrated=True)
    measured = before.calibration
    assert measured is not None
    assert measured.records == 40
    assert measured.record_seconds > 0
    assert measured.score_seconds > 0
    assert measured.peak_mib > 50
    assert measured.alignment is not None
    assert 0 <= measured.alignment[0] <= measured.alignment[1] <= 1
    model = forecasts.ServerModel(configure(toy_settings)).model
    for layer, factors in model.read().items():
        assert all(torch.equal(tensor, model.start[layer][name]) for name, tensor in factors.items())


def test_simulated_sites_declare_what_they_will_declare_in_the_run(toy_settings: dict[str, Any]) -> None:
    assert simulated_sizes(configure(toy_settings), 3) == (67, 67, 66)
    assert simulated_sizes(configure(toy_settings), 1) == (200,)


@pytest.mark.parametrize(
    ("quantity", "settings"),
    [
        ("noise", {"privacy.epsilon": 3.0}),
        ("rounds", {"privacy.noise-multiplier": 1.5, "privacy.epsilon": 2.0}),
        ("sample-rate", {"privacy.noise-multiplier": 1.5, "privacy.epsilon": 2.0}),
    ],
)
def test_an_answer_stays_within_the_budget_and_the_next_one_does_not(quantity: str, settings: dict[str, Any]) -> None:
    base = {"rounds": 3, "training.local-steps": 2, "training.sample-rate": 0.2, "privacy.delta": 1e-3, **settings}
    found = find(configure(base), quantity)
    costs = []
    for value in (found.value, found.next_value):
        config = configure({**base, "privacy.noise-multiplier": 1.5, found.setting: value}).config
        releases = [gaussian_release(config.privacy.noise_multiplier, config.training.sample_rate, config.total_steps)]
        costs.append(promised(releases, 1e-3)[0])
    assert costs == [found.epsilon, found.next_epsilon]
    assert costs[0] <= found.budget < costs[1]


def test_an_answer_pays_for_the_initialisation_first() -> None:
    base = {"strategy": "fed-sb", "privacy.noise-multiplier": 1.0, "privacy.delta": 1e-3, "privacy.epsilon": 5.0}
    free = find(configure(base), "rounds")
    paid = find(configure({**base, "adapter.start": "dp-gradient", "start.noise-multiplier": 0.5}), "rounds")
    assert paid.value < free.value


def test_an_answer_that_does_not_stand_its_check_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_find, "last_within", lambda fits, most: 500)
    with pytest.raises(PrivacyError, match="did not stand its check"):
        find(configure({"privacy.noise-multiplier": 0.8}), "rounds")


def test_the_search_says_so_where_the_budget_is_not_what_ends_it() -> None:
    found = find(configure({"privacy.noise-multiplier": 90.0, "rounds": 1}), "sample-rate")
    assert (found.value, found.next_value, RATES[-1]) == (1.0, None, 1.0)


@pytest.mark.parametrize(
    ("quantity", "settings", "said"),
    [
        ("rounds", {"privacy.noise-multiplier": 0.5, "privacy.epsilon": 0.1}, "^.*not even one round.*$"),
        ("noise", {"privacy.mode": "none"}, "no budget"),
    ],
)
def test_what_cannot_be_found_is_said_in_one_line(quantity: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises((BudgetExhausted, ConfigError), match=said) as refusal:
        find(configure(settings), quantity)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sizes", "60,0"], "whole numbers above 0"),
        (["--sizes", f"60,1{'0' * 5000}"], "whole numbers above 0"),
        (["-c", f"privacy.epsilon=1{'0' * 400}"], "cannot read the value of 'privacy.epsilon'"),
        (["--sizes", "60", "--sites", "2"], "not both"),
        (["--find", "round"], "did you mean 'rounds'?"),
        (["--find", "rounds"], "set privacy.noise-multiplier"),
        (["-c", "privcy.epsilon=3.0"], "did you mean 'privacy.epsilon'?"),
        (["--sizes", "60,6000"], "1/6000"),
        (["--find", "noise", "--json", "/nowhere/plan.json"], "cannot be written"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    words: list[str], said: str, tmp_path: Path, toy_settings: dict[str, Any]
) -> None:
    result = run_plan(tmp_path, toy_settings, *words)
    assert result.exit_code == 1
    lines = [line for line in result.stderr.splitlines() if line.startswith("fedveil:")]
    assert len(lines) == 1
    assert said in lines[0]


def test_the_plan_is_not_written_over_its_settings(tmp_path: Path, toy_settings: dict[str, Any]) -> None:
    (tmp_path / "mine.toml").write_text("rounds = 3\n", encoding="utf-8")
    words = ["-c", str(tmp_path / "mine.toml"), "--find", "noise", "--json", str(tmp_path / "mine.toml")]
    result = run_plan(tmp_path, toy_settings, *words)
    assert (result.exit_code, "is read by this command and is not overwritten" in result.stderr) == (1, True)
    assert (tmp_path / "mine.toml").read_text(encoding="utf-8") == "rounds = 3\n"


def test_a_budget_that_ends_before_the_run_is_a_warning(toy_settings: dict[str, Any]) -> None:
    before = planned({**toy_settings, "rounds": 6, "privacy.noise-multiplier": 0.9, "privacy.epsilon": 5.0})
    ends = before.rounds_within
    assert ends is not None
    assert before.rounds[ends - 1].epsilon <= 5.0 < before.rounds[ends].epsilon
    assert any(f"ends after round {ends}: rounds {ends + 1} to 6" in warning for warning in before.warnings)


def test_a_large_site_that_is_held_down_is_a_warning_and_its_noise_counts(toy_settings: dict[str, Any]) -> None:
    sizes = (4000, 100, 100)
    settings = {**toy_settings, "privacy.noise-multiplier": 1.0, "privacy.delta": 1e-5}
    held = planned(settings, sizes)
    believed = planned({**settings, "max-share": 1.0}, sizes)
    # Shares of 1/2, 1/4, 1/4 in place of 40/42, 1/42, 1/42; a site's noise is as one over its records.
    by_shares = math.hypot(1 / 2 / 4000, 1 / 4 / 100, 1 / 4 / 100)
    by_size = math.hypot(1 / 4200, 1 / 4200, 1 / 4200)
    assert held.noise_of_shares == pytest.approx(by_shares / by_size)
    assert held.signal is not None
    assert believed.signal is not None
    assert held.signal.noise / believed.signal.noise == pytest.approx(by_shares / by_size)
    assert any("holds down the largest site, 4000 of 4200 in all" in warning for warning in held.warnings)
    assert believed.noise_of_shares == 1.0
    assert not any("max-share" in warning for warning in believed.warnings)
    alike = planned(settings, (400, 300, 300))
    assert not any("max-share" in warning for warning in alike.warnings)


def test_the_plan_fits_80_columns_and_its_file_says_the_same(tmp_path: Path, toy_settings: dict[str, Any]) -> None:
    path = tmp_path / "plan.json"
    result = run_plan(tmp_path, toy_settings, "--sizes", "60,70", "--json", str(path))
    assert result.exit_code == 0, result.output
    tables = [line for line in result.stdout.splitlines() if not line.startswith("written to")]
    assert max(map(len, tables)) <= 80
    content = json.loads(path.read_text(encoding="utf-8"))
    assert [site["public_size"] for site in content["sites"]] == [60, 70]
    assert epsilon_text(content["rounds"][-1]["epsilon"]) in result.stdout
    assert f"{content['bytes_down_total']:,}" in result.stdout
    assert f"{content['signal_to_noise']['run'][0]:.2f}" in result.stdout


def test_the_plan_says_what_it_costs_that_sites_may_be_lost(tmp_path: Path, toy_settings: dict[str, Any]) -> None:
    settings = {**toy_settings, **SUMMED, "privacy.drop-outs": 1}
    told = run_plan(tmp_path, settings, "--sizes", "60,70,60,70", "--no-calibration").stdout
    assert "1 site may be lost from a sum, and a run begins with 4 sites or more. The noise" in " ".join(told.split())
    assert "(3 / 2) = 1.22 times" in " ".join(told.split())
    assert "gone for good end the run once fewer than 3 are left" in " ".join(told.split())
    told = run_plan(tmp_path, settings, "--sizes", "60,70,60", "--no-calibration").stdout
    assert "begins with 4 sites or more: 3 sites are too few" in " ".join(told.split())
    told = run_plan(tmp_path, {**settings, "min-sites": 4}, "--sizes", "60,70,60,70", "--no-calibration").stdout
    assert "begins with 5 sites or more: 4 sites are too few" in " ".join(told.split())


def test_noise_at_the_server_is_as_long_as_drawn_noise() -> None:
    sizes, numbers = (100, 300), 2000
    plans = [gaussian_plan(2.0, 1.5, 0.1, 0.1 * size, 1e-5, 8.0) for size in sizes]
    draw = torch.Generator().manual_seed(3)
    lengths = [
        sum(
            size / 400 * plan.gradient_noise_std * torch.randn(numbers, generator=draw)
            for size, plan in zip(sizes, plans, strict=True)
        ).norm()
        / 2.0
        for _ in range(20)
    ]
    signal = signal_to_noise(plans, sizes, 16, numbers, alignment=(0.5, 0.6))
    assert signal.noise == pytest.approx(float(torch.stack(lengths).mean()), rel=0.02)
    assert signal.step == pytest.approx(0.5 / signal.noise)
    assert signal.run == pytest.approx((4 * 0.5 / signal.noise, 4 * 0.6 / signal.noise))


def test_only_a_job_whose_signal_is_surely_below_the_threshold_is_warned_of() -> None:
    plan = gaussian_plan(1.0, 1.0, 0.1, 10.0, 1e-5, 8.0)
    unmeasured = signal_to_noise([plan], (100,), 1, 10_000)
    assert unmeasured.run_bound == pytest.approx(0.1)
    assert unmeasured.too_low
    many = signal_to_noise([plan], (100,), 10_000, 10_000, alignment=(0.0, 1.0))
    assert not many.too_low, "nothing is known of the signal here"
    assert signal_to_noise([plan], (100,), 10_000, 10_000, alignment=(0.0, 0.001)).too_low


def test_alignment_is_the_length_of_the_mean_and_not_of_what_records_add_to_it() -> None:
    draw = torch.Generator().manual_seed(1)
    aligned = torch.zeros(500).index_fill(0, torch.tensor([0]), 0.3)
    means = [aligned + 0.03 * torch.randn(500, generator=draw) for _ in range(8)]
    estimate, upper = alignment_of(means)
    assert estimate == pytest.approx(0.3, abs=0.03)
    assert estimate < upper < 0.4
    nothing, upper = alignment_of([0.03 * torch.randn(500, generator=draw) for _ in range(8)])
    assert nothing < 0.1, "the length of one such mean is 0.67"
    assert alignment_of([aligned, aligned]) == pytest.approx((0.3, 1.0))


def test_sites_share_the_workers_and_a_deployed_round_waits_for_the_slowest() -> None:
    # Five steps: a site's round takes 5 (0.1 + 0.01 b) s, scoring 2 s.
    here, deployed = round_seconds(MEASURED, 5, [90.0, 10.0, 30.0, 10.0], workers=2)
    assert deployed == pytest.approx(5.0 + 2.0)
    assert here == pytest.approx(max(5.0, 1.0 + 2.0 + 1.0) + 2.0)
    assert round_seconds(MEASURED, 5, [90.0], 1, scored=0.25) == pytest.approx((5.5, 5.5))


def test_a_round_that_is_not_scored_takes_no_scoring(toy_settings: dict[str, Any]) -> None:
    def seconds(rounds: int, every: int) -> float:
        told = {**toy_settings, "rounds": rounds, "evaluate-every": every}
        found = dataclasses.replace(planned(told), calibration=MEASURED, workers=2).round_seconds
        assert found is not None
        return found[1]

    # Of seven rounds the third, the sixth and the last are scored, two seconds each.
    assert 7 * (seconds(7, 1) - seconds(7, 3)) == pytest.approx(4 * 2.0)


@given(st.integers(0, 400), st.integers(1, 300))
def test_the_last_that_fits_is_found(limit: int, most: int) -> None:
    assert last_within(lambda n: n <= limit, most) == min(limit, most)


def test_a_plan_says_what_a_larger_encoder_gained_and_cost_by_the_rows() -> None:
    def plan(recipe: str, model: str = "all-MiniLM-L6-v2", task: str = "classification", epsilon: float = 8.0) -> str:
        named = SimpleNamespace(name=model, task=task)
        config = SimpleNamespace(recipe=recipe, rounds=37, model=named, privacy=SimpleNamespace(epsilon=epsilon))
        return larger_encoder(cast(Forecast, SimpleNamespace(job=SimpleNamespace(config=config), round_seconds=None)))

    rows = read_rows(results_file(EXPERIMENTS / "results", "mpnet"))
    (large,) = (one for one in groups(rows) if (one.variant, one.arm) == ("metric", "federated"))
    usual = [row for row in read_rows(results_file(EXPERIMENTS / "results", "rotten-tomatoes")) if row.seed == 1]
    small = next(
        one for one in groups(usual) if (one.variant, one.arm, one.epsilon_asked) == ("metric", "federated", 8.0)
    )
    words = (
        f"{100 * large.accuracy.mean:.1f} % where this one has {100 * small.accuracy.mean:.1f} % (rotten-tomatoes, ε 8"
    )
    assert words in plan("metric"), "rows of other divisions were compared"
    assert "(sst2, ε 3, 3 runs of each)" in plan("metric", epsilon=1.0) == plan("metric", epsilon=3.0)
    assert plan("metric") != plan("head-only")
    others = (plan("plain"), plan("metric", "another"), plan("metric", task="multi-label"))
    assert others == ("",) * 3

"""Trials of settings: priced together beforehand, charged together, and none paid twice."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from carded_runs import with_adapter
from composed_losses import composed_losses, epsilon_at
from made_run import MadeRun
from report_forms import fedveil

from audits.tiny_models import write_reviews
from fedveil.client.ledger.ledger import Ledger
from fedveil.common.config.text import to_toml
from fedveil.common.errors import ConfigError, PrivacyError, RunFailed
from fedveil.common.other_runs import TuningFile
from fedveil.common.run_lines import Reached, ResultFile, read_file
from fedveil.deploy.server_folder import ServerFolder, make_server
from fedveil.experiments import tune
from fedveil.experiments.tune import BUDGET, Tuning, read_tuning
from fedveil.privacy.accounting import Release, gaussian_release
from fedveil.privacy.events import sampled_gaussian
from fedveil.privacy.figures import epsilon_text
from fedveil.reports import report_of
from fedveil.reports.trials import TRIAL_ALONE
from fedveil.server import checkpoint

DELTA = 1e-3


def trials_file(folder: Path, settings: dict[str, Any], trials: dict[str, dict[str, Any]], **more: str) -> Path:
    """Write a sweep of trials over a base configuration, and return it."""
    (folder / "base.toml").write_text(to_toml(settings), encoding="utf-8")
    tables = [f"[variants.{name}.settings]\n{to_toml(own)}" for name, own in trials.items()]
    axes = "".join(f"{key} = {value}\n" for key, value in ({"seeds": "[1]", "epsilons": "[4.0]"} | more).items())
    head = f'base = "base.toml"\nsites = 2\n{axes}'
    (folder / "trials.toml").write_text("\n".join([head, *tables]), encoding="utf-8")
    return folder / "trials.toml"


@pytest.fixture
def base(toy_settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    reviews = write_reviews(tmp_path / "all.csv", 120, 3)
    more = {"rounds": 1, "training.local-steps": 1, "privacy.epsilon": 4.0, "privacy.delta": DELTA}
    return {**toy_settings, "data.name": str(reviews), **more}


THREE = {
    "slow": {"training.learning-rate": 0.01},
    "fast": {"training.learning-rate": 0.1},
    "often": {"rounds": 2},
}


def test_the_total_is_the_composition_of_all_trials_and_the_noise_the_least(
    base: dict[str, Any], tmp_path: Path
) -> None:
    """By a convolution of losses without any accountant; with a little less noise it would not fit."""
    tuning = read_tuning(trials_file(tmp_path, base, THREE))

    def together(noise: float) -> float:
        return epsilon_at(composed_losses([(base["training.sample-rate"], noise, 4)], 1), 0.9 * DELTA)

    second = together(tuning.noise_multiplier)
    assert second - 1e-3 <= tuning.epsilon <= 1.001 * second + 1e-3
    assert tuning.epsilon <= 4.0 < together(0.995 * tuning.noise_multiplier)
    alone = tuning.alone
    assert max(alone.values()) < tuning.epsilon < sum(alone.values())
    assert alone["slow"] == alone["fast"] < alone["often"]


def check_that_every_ledger_holds_all_trials(tuning: Tuning, folder: Path) -> None:
    for name in ("site-0", "site-1"):
        with Ledger(folder / "ledgers" / f"{name}.sqlite") as ledger:
            assert ledger.epsilon(name, DELTA) == tuning.epsilon, "the sites paid for something else than was printed"


def test_the_ledgers_are_charged_what_was_printed(base: dict[str, Any], tmp_path: Path) -> None:
    """Through the command line; called again nothing is run, and nothing paid."""
    two = {name: THREE[name] for name in ("slow", "often")}
    file, folder = trials_file(tmp_path, base, two), tmp_path / "out"
    tuning = read_tuning(file)
    code, said = fedveil("tune", file, "--output", folder, "--yes")
    assert code == 0, said
    flat = " ".join(said.split())
    assert "no discount for publishing one holds" in flat
    assert "its score is flattered" in flat
    check_that_every_ledger_holds_all_trials(tuning, folder)
    runs = [path.parent for name in two for path in (folder / name).glob(f"*/{ResultFile.NAME}")]
    reached = [read_file(ResultFile, run).reached for run in runs]
    assert len(runs) == 2
    assert [one.epsilon for one in reached if one][-1] == tuning.epsilon
    scores = [one.accuracy for one in reached if one]
    for run, score in zip(runs, scores, strict=True):
        told = read_file(TuningFile, run)
        assert told == TuningFile(2, scores.index(max(scores)) == runs.index(run), tuning.epsilon, DELTA), score
    assert fedveil("tune", file, "--output", folder, "--yes")[0] == 0
    check_that_every_ledger_holds_all_trials(tuning, folder)
    other = trials_file(tmp_path, base, {**two, "slow": {"training.learning-rate": 0.2}})
    code, said = fedveil("tune", other, "--output", folder, "--yes")
    assert (code, "holds other trials" in said) == (1, True)


def test_without_a_yes_nothing_is_run(base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("typer.confirm", lambda _: False)
    code, said = fedveil("tune", trials_file(tmp_path, base, THREE), "--output", tmp_path / "out")
    assert (code, "nothing was run, and nothing is charged" in said) == (0, True)
    assert not (tmp_path / "out").exists()


def test_a_ledger_for_each_trial_is_found_out(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the discount held: every trial would begin with a budget of its own."""
    sound, count = tune.simulated_nodes, Counter[str]()

    def apart(sites: int, ledgers: Path) -> Any:
        count["trials"] += 1
        return sound(sites, ledgers if count["trials"] == 1 else ledgers.with_name(f"ledgers-{count['trials']}"))

    monkeypatch.setattr(tune, "simulated_nodes", apart)
    two = {name: THREE[name] for name in ("slow", "fast")}
    tuning = read_tuning(trials_file(tmp_path, base, two))
    tune.tune(tuning, tmp_path / "out", tune.simulated(tuning, tmp_path / "out"), lambda _: None)
    with pytest.raises(AssertionError, match="paid for something else"):
        check_that_every_ledger_holds_all_trials(tuning, tmp_path / "out")


def test_a_trial_that_was_cut_off_goes_on_and_the_others_are_not_paid_again(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = {name: THREE[name] for name in ("slow", "fast")}
    tuning, folder = read_tuning(trials_file(tmp_path, base, two)), tmp_path / "out"
    sound = tune.run_in_process

    def cut_off(settings: Any, nodes: Any, trial: str) -> Path:
        path = sound(settings, nodes, trial)
        if trial == "fast":
            raise KeyboardInterrupt
        return path

    with monkeypatch.context() as patch:
        patch.setattr(tune, "run_in_process", cut_off)
        with pytest.raises(KeyboardInterrupt):
            tune.tune(tuning, folder, tune.simulated(tuning, folder), lambda _: None)
    tune.tune(tuning, folder, tune.simulated(tuning, folder), lambda _: None)
    check_that_every_ledger_holds_all_trials(tuning, folder)
    with Ledger(folder / "ledgers" / "site-0.sqlite") as ledger:
        assert Counter(entry.run for entry in ledger.entries()) == {"slow": 1, "fast": 1}


def test_a_trial_that_is_killed_between_rounds_goes_on_from_its_checkpoint(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning = read_tuning(trials_file(tmp_path, {**base, "rounds": 3}, {"slow": THREE["slow"], "fast": THREE["fast"]}))
    folder, sound, rounds = tmp_path / "out", checkpoint.save_checkpoint, list[int]()

    def dies(place: Path, saved: Any) -> None:
        sound(place, saved)
        rounds.append(saved.state.round_number)
        if len(rounds) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fedveil.server.records.save_checkpoint", dies)
        with pytest.raises(KeyboardInterrupt):
            tune.tune(tuning, folder, tune.simulated(tuning, folder), lambda _: None)
    tune.tune(tuning, folder, tune.simulated(tuning, folder), lambda _: None)
    assert rounds == [0, 1, 2]
    check_that_every_ledger_holds_all_trials(tuning, folder)
    with Ledger(folder / "ledgers" / "site-0.sqlite") as ledger:
        assert Counter(entry.run for entry in ledger.entries()) == {"slow": 3, "fast": 3}


@pytest.mark.parametrize(
    ("trials", "more", "said"),
    [
        ({"one": {}}, {}, "two or more, one seed, one ε"),
        ({"a": {}, "b": {"rounds": 2}}, {"seeds": "[1, 2]"}, "two or more, one seed, one ε"),
        ({"a": {}, "b": {"rounds": 2}}, {"epsilons": "[1.0, 2.0]"}, "two or more, one seed, one ε"),
        ({"a": {}, "b": {"rounds": 2}}, {"baselines": '["pooled"]'}, "two or more, one seed, one ε"),
        ({"a": {}, "b": {"privacy.epsilon": 1.0}}, {}, "the sweep's own"),
        ({"a": {}, "b": {"privacy.noise-multiplier": 1.0}}, {}, "follows from ε here"),
        ({"a": {}, "b": {"privacy.delta": 1e-4}}, {}, "'a' and 'b' differ in privacy.delta"),
        ({"a": {}, "b": {"data.test-size": 17}}, {}, "'a' and 'b' differ in data.test-size"),
        ({"a": {}, "b": {"training.larning-rate": 1.0}}, {}, "learning-rate"),
        ({"a": {}, "b": {}}, {"sties": "2"}, "'sites'"),
        ({"a": {}, "b": {}}, {}, "'a' and 'b' have the same settings"),
    ],
)
def test_a_file_that_is_none_is_refused_in_one_line(
    base: dict[str, Any], tmp_path: Path, trials: Any, more: Any, said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        read_tuning(trials_file(tmp_path, base, trials, **more))
    assert "\n" not in str(caught.value)


def test_trials_without_privacy_and_trials_that_fit_no_budget_are_refused(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="'none', whose price is not each site's own"):
        read_tuning(trials_file(tmp_path, base, THREE, epsilons='["none"]'))
    site = {"privacy.mode": "client-level", "privacy.unit": "site", "privacy.cohort": 50, "privacy.delta": 1e-3}
    with pytest.raises(ConfigError, match="'client-level', whose price is not each site's own"):
        read_tuning(trials_file(tmp_path, {**base, **site}, THREE))
    summed = {"privacy.mode": "secure-sum", "privacy.honest-sites": 2, "training.local-steps": 1}
    summed |= {"training.optimizer": "sgd", "training.weight-decay": 0.0}
    with pytest.raises(ConfigError, match="'secure-sum', whose price is not each site's own: choose under 'dp-sgd'"):
        read_tuning(trials_file(tmp_path, {**base, **summed}, THREE))
    monkeypatch.setattr(tune, "paid_before", lambda _: [Release(sampled_gaussian(0.5, 0.5), 10)])
    with pytest.raises(PrivacyError, match="no noise keeps all trials, their initialisations included"):
        read_tuning(trials_file(tmp_path, base, THREE))


def test_scores_on_the_jobs_own_records_are_refused_where_sites_are_simulated_alone(
    base: dict[str, Any], tmp_path: Path
) -> None:
    file = trials_file(tmp_path, {**base, "data.test": base["data.name"]}, THREE)
    with pytest.raises(ConfigError, match=r"data.test is data.name itself"):
        read_tuning(file)
    assert len(read_tuning(file, simulated=False).trials) == len(THREE), "real sites train on records of their own"


def first_is_best(tuning: Tuning, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make up a run for each trial, each on top of those before; the first scores best."""
    trained: list[MadeRun] = []

    def conduct(_: Any, __: Any, trial: str) -> Path:
        earlier = [gaussian_release(1.2, 0.05, 5)] * len(trained)
        run = MadeRun(folder / trial, {"rounds": 1}, earlier={"north": earlier, "south": earlier}).start()
        accuracy = 0.8 - 0.1 * len(trained)
        run.round(1, accuracy)
        epsilon = max(line["epsilon_total"] for line in run.lines("privacy.jsonl"))
        run.end(reached=Reached(0.6, accuracy, epsilon, 1))
        trained.append(with_adapter(run))
        return run.folder

    monkeypatch.setattr(tune, "run_in_process", conduct)
    best, _ = tune.tune(tuning, folder, tune.simulated(tuning, folder), lambda _: None)
    assert best.trial == next(iter(tuning.trials))
    return best.folder


FORMS = ("report.md", "report.html", "adapter/README.md")


@pytest.mark.parametrize("ledger_holds_more", [False, True])
def test_every_form_of_the_chosen_trials_report_has_the_price_of_all(
    base: dict[str, Any], tmp_path: Path, ledger_holds_more: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first trial is the best, so that its own ε leaves out both that came after it."""
    tuning = read_tuning(trials_file(tmp_path, base, THREE))
    # A site's ledger may hold more than the trials: then the larger figure is told.
    tuning = replace(tuning, delta=1e-5, epsilon=0.1 if ledger_holds_more else 7.0)
    folder = first_is_best(tuning, tmp_path / "out", monkeypatch)
    reached = [read_file(ResultFile, tmp_path / "out" / name).reached for name in tuning.trials]
    own, last = (one.epsilon or 0.0 for one in (reached[0], reached[-1]) if one)
    assert own < last
    told = epsilon_text(last if ledger_holds_more else 7.0)
    assert epsilon_text(own) != told
    key = tmp_path / "server.pem"
    assert fedveil("keygen", key)[0] == 0
    code, summary = fedveil("report", folder, "--sign", key)
    code, verified = fedveil("verify", folder, "--key", key.with_suffix(".pub.pem"))
    assert (code, verified.startswith("valid: ")) == (0, True)
    for name in FORMS:
        text = (folder / name).read_text(encoding="utf-8")
        assert epsilon_text(own) in text, f"{name} does not say what the run spent itself"
        assert told in text, f"{name} hides what the trials cost together"
    for words in (summary, verified):
        assert f"all 3 trials together: ε {told} at δ 1e-05" in words
    assert json.loads((folder / "report.json").read_text())["tuning"]["epsilon"] == pytest.approx(float(told), abs=1e-3)
    assert json.loads((folder / "report.signed.json").read_text())["epsilon_trials"] == pytest.approx(
        float(told), abs=1e-3
    )
    meaning = report_of(folder).meaning
    assert meaning is not None
    assert TRIAL_ALONE in meaning.caution


def test_a_report_never_tells_less_of_all_trials_than_of_one_and_says_if_the_file_is_damaged(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning = replace(read_tuning(trials_file(tmp_path, base, THREE)), delta=1e-5, epsilon=7.0)
    folder = first_is_best(tuning, tmp_path / "out", monkeypatch)
    place = folder / TuningFile.NAME
    place.write_text(place.read_text().replace("7.0", "0.001"))
    data = report_of(folder)
    assert data.tuning is not None
    assert data.tuning.epsilon == data.headline.epsilon
    place.write_text("{")
    (problem,) = report_of(folder).problems
    assert "one of several trials, and what all of them cost is missing here" in problem


def test_trials_on_a_server_are_submitted_once_each_with_what_was_printed(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the command line; the second submission fails, and the same command goes on with it."""
    make_server(tmp_path / "server", ["127.0.0.1"])
    file = trials_file(tmp_path, base, THREE)
    tuning, asked = read_tuning(file), list[tuple[Any, ...]]()

    def stand_in(folder: ServerFolder, settings: Mapping[str, Any], say: Any, **how: Any) -> Path:
        asked.append((folder.path, {**settings, BUDGET: 4.0}, how))
        assert settings[BUDGET] == 10.0, "a ledger that held something before has no room for the trials"
        if len(asked) == 2:
            raise RunFailed("the server is silent")
        (name,) = (name for name, own in tuning.trials.items() if own == asked[-1][1])
        run = MadeRun(tmp_path / "runs" / name, {"rounds": 1}).start()
        run.round(1, 0.7)
        run.end(reached=Reached(0.6, 0.7, 1.0, 1))
        return with_adapter(run).folder

    monkeypatch.setattr("fedveil.deploy.submit.submit", stand_in)
    words = ("tune", file, "--server", tmp_path / "server", "--sites", 2, "--ledger-epsilon", 10)
    code, said = fedveil(*words, "--output", tmp_path / "out", "--yes")
    assert (code, "the server is silent" in said) == (1, True)
    code, said = fedveil(*words, "--output", tmp_path / "out", "--yes")
    assert code == 0, said
    names = ["slow", "fast", "fast", "often"]
    assert asked == [(tmp_path / "server", tuning.trials[name], {"sites": 2, "once": True}) for name in names]
    told = [read_file(TuningFile, tmp_path / "runs" / name) for name in THREE]
    assert [one.chosen for one in told] == [True, False, False]
    assert {one.epsilon for one in told} == {tuning.epsilon}
    assert fedveil(*words, "--output", tmp_path / "out", "--yes")[0] == 0
    assert len(asked) == 4, "a trial that was paid is submitted again"

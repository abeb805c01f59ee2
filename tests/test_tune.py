"""Trials of settings: priced together beforehand, charged together, and none paid twice."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_run import MadeRun
from test_card import with_adapter
from test_meaning import composed_losses, epsilon_at
from test_report import fedveil

from audits.tiny_models import write_reviews
from client.ledger.ledger import Ledger
from common.config.text import to_toml
from common.errors import ConfigError, PrivacyError, RunFailed
from common.privacy.accounting import Release, gaussian_release
from common.privacy.events import sampled_gaussian
from common.privacy.figures import epsilon_text
from common.run_lines import Reached, TuningFile, read_file
from deploy.server_folder import ServerFolder, make_server
from experiments import tune
from experiments.tune import NOISE, STATE, Conduct, Tuning, conduct_trials, read_tuning, simulated, spent
from reports import report_of
from reports.picture import picture_of, said_of_run
from reports.trials import TRIAL_ALONE

DELTA = 1e-3


def trials_file(folder: Path, settings: dict[str, Any], trials: dict[str, dict[str, Any]], **more: Any) -> Path:
    """Write a file of trials over a base configuration, and return it."""
    (folder / "base.toml").write_text(to_toml(settings), encoding="utf-8")
    tables = [f"[trials.{name}]\n{to_toml(own)}" for name, own in trials.items()]
    head = to_toml({"base": "base.toml", "sites": 2, **more})
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
    alone = {trial.name: trial.epsilon for trial in tuning.trials}
    assert max(alone.values()) < tuning.epsilon < sum(alone.values())
    assert alone["slow"] == alone["fast"] < alone["often"]


def test_what_a_ledger_may_hold_leaves_the_noise_and_the_price_of_the_trials(
    base: dict[str, Any], tmp_path: Path
) -> None:
    """Earlier runs need room in the ledger, and cost the trials no noise."""
    plain = read_tuning(trials_file(tmp_path, base, THREE))
    roomy = read_tuning(trials_file(tmp_path, base, THREE, **{"ledger-epsilon": 10.0}))
    assert (roomy.noise_multiplier, roomy.epsilon, roomy.budget) == (plain.noise_multiplier, plain.epsilon, 4.0)
    assert {trial.settings["privacy.epsilon"] for trial in plain.trials} == {4.0}
    assert {trial.settings["privacy.epsilon"] for trial in roomy.trials} == {10.0}
    assert [trial.epsilon for trial in roomy.trials] == [trial.epsilon for trial in plain.trials]


def check_that_every_ledger_holds_all_trials(tuning: Tuning, folder: Path) -> None:
    held = spent(folder, DELTA)
    assert list(held) == ["site-0", "site-1"]
    assert set(held.values()) == {tuning.epsilon}, "the sites paid for something else than was printed"


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
    outcomes = json.loads((folder / STATE).read_text())["outcomes"]
    assert [row["trial"] for row in outcomes] == ["slow", "often"]
    assert [row["epsilon"] for row in outcomes] == sorted(row["epsilon"] for row in outcomes)
    assert outcomes[-1]["epsilon"] == tuning.epsilon
    best = max(outcomes, key=lambda row: row["accuracy"])
    for row in outcomes:
        told = read_file(TuningFile, Path(row["folder"]))
        assert told == TuningFile(2, row["trial"] == best["trial"], tuning.epsilon, DELTA)
    again = fedveil("tune", file, "--output", folder, "--yes")
    assert again[0] == 0
    assert "2 of 2 trials are there already" in again[1]
    check_that_every_ledger_holds_all_trials(tuning, folder)
    other = trials_file(tmp_path, base, {**two, "slow": {"training.learning-rate": 0.2}})
    code, said = fedveil("tune", other, "--output", folder, "--yes")
    assert (code, "is of other trials" in said) == (1, True)


def test_without_a_yes_nothing_is_run(base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("typer.confirm", lambda _: False)
    code, said = fedveil("tune", trials_file(tmp_path, base, THREE), "--output", tmp_path / "out")
    assert (code, "nothing was run, and nothing is charged" in said) == (0, True)
    assert not (tmp_path / "out").exists()


def test_a_ledger_for_each_trial_is_found_out(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the discount held: every trial would begin with a budget of its own."""
    from experiments import in_process

    sound, count = in_process.simulated_nodes, Counter[str]()

    def apart(sites: int, ledgers: Path) -> Any:
        count["trials"] += 1
        return sound(sites, ledgers if count["trials"] == 1 else ledgers.with_name(f"ledgers-{count['trials']}"))

    monkeypatch.setattr(in_process, "simulated_nodes", apart)
    two = {name: THREE[name] for name in ("slow", "fast")}
    tuning = read_tuning(trials_file(tmp_path, base, two))
    conduct_trials(tuning, tmp_path / "out", simulated(tuning, tmp_path / "out"), lambda _: None)
    with pytest.raises(AssertionError, match="paid for something else"):
        check_that_every_ledger_holds_all_trials(tuning, tmp_path / "out")


def test_a_trial_is_not_taken_for_one_whose_name_ends_in_its_own(base: dict[str, Any], tmp_path: Path) -> None:
    two = {"not-fast": THREE["slow"], "fast": THREE["fast"]}
    tuning, folder = read_tuning(trials_file(tmp_path, base, two)), tmp_path / "out"
    conduct_trials(tuning, folder, simulated(tuning, folder), lambda _: None)
    told = json.loads((folder / STATE).read_text())["outcomes"]
    assert [one["trial"] for one in told] == ["not-fast", "fast"]
    assert len({one["folder"] for one in told}) == 2, "one run is told as two trials"


def test_a_trial_that_was_cut_off_goes_on_and_the_others_are_not_paid_again(
    base: dict[str, Any], tmp_path: Path
) -> None:
    two = {name: THREE[name] for name in ("slow", "fast")}
    tuning, folder = read_tuning(trials_file(tmp_path, base, two)), tmp_path / "out"
    conduct = simulated(tuning, folder)

    def cut_off(trial: str, settings: Any) -> Path:
        path = conduct(trial, settings)
        if trial == "fast":
            raise KeyboardInterrupt
        return path

    with pytest.raises(KeyboardInterrupt):
        conduct_trials(tuning, folder, cut_off, lambda _: None)
    tuned = conduct_trials(tuning, folder, conduct, lambda _: None)
    assert [outcome.trial for outcome in tuned.outcomes] == ["slow", "fast"]
    check_that_every_ledger_holds_all_trials(tuning, folder)
    with Ledger(folder / "ledgers" / "site-0.sqlite") as ledger:
        assert Counter(entry.run for entry in ledger.entries()) == {"slow": 1, "fast": 1}


@pytest.mark.parametrize(
    ("trials", "more", "said"),
    [
        ({"one": {}}, {}, "at least two trials"),
        ({"a": {}, "b": {"privacy.epsilon": 1.0}}, {}, "the same for all"),
        ({"a": {}, "b": {"privacy.noise-multiplier": 1.0}}, {}, "given to every trial"),
        ({"a": {}, "b": {"resume": "1"}}, {}, "given to every trial"),
        ({"a": {}, "b": {"training.larning-rate": 1.0}}, {}, "learning-rate"),
        ({"a": {}, "b": {}}, {"sties": 2}, "'sites'"),
        ({"a": {}, "b": {}}, {"sites": 0}, "above 0"),
        ({"a": {}, "b": {"rounds": 2}}, {"ledger-epsilon": 3.9}, "at least privacy.epsilon, 4"),
        ({"a": {}, "b": {"rounds": 2}}, {"ledger-epsilon": "ten"}, "ledger-epsilon is 'ten'"),
        ({"a": {}, "b": {"rounds": 2}}, {"ledger-epsilon": float("nan")}, "ledger-epsilon is nan"),
        ({"a": {}, "b": {"rounds": 2}}, {"ledger-epsilon": float("inf")}, "ledger-epsilon is inf"),
        ({"a": {}, "b": {"rounds": 2}}, {"ledger-epsilon": True}, "ledger-epsilon is True"),
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
    with pytest.raises(ConfigError, match="costs no budget"):
        read_tuning(trials_file(tmp_path, {**base, "privacy.mode": "none"}, THREE))
    site = {"privacy.mode": "client-level", "privacy.unit": "site", "privacy.cohort": 50, "privacy.delta": 1e-3}
    with pytest.raises(ConfigError, match="whose budget is the server's, which trials do not count"):
        read_tuning(trials_file(tmp_path, {**base, **site}, THREE))
    summed = {"privacy.mode": "secure-sum", "privacy.honest-sites": 2, "training.local-steps": 1}
    summed |= {"training.optimizer": "sgd", "training.weight-decay": 0.0}
    with pytest.raises(ConfigError, match="counts on honest sites, trial by trial: choose under 'dp-sgd'"):
        read_tuning(trials_file(tmp_path, {**base, **summed}, THREE))
    monkeypatch.setattr(tune, "paid_before", lambda _: [Release(sampled_gaussian(0.5, 0.5), 10)])
    with pytest.raises(PrivacyError, match="what their starts release costs more"):
        read_tuning(trials_file(tmp_path, base, THREE))


def made_trials(folder: Path) -> Conduct:
    """Return what makes up a run for each trial, each on top of those before; the first scores best."""
    trained: list[MadeRun] = []

    def conduct(trial: str, _: Any) -> Path:
        earlier = [gaussian_release(1.2, 0.05, 5)] * len(trained)
        run = MadeRun(folder / trial, {"rounds": 1}, earlier={"north": earlier, "south": earlier}).start()
        accuracy = 0.8 - 0.1 * len(trained)
        run.round(1, accuracy)
        epsilon = max(line["epsilon_total"] for line in run.lines("privacy.jsonl"))
        run.end(reached=Reached(0.6, accuracy, epsilon, 1))
        trained.append(with_adapter(run))
        return run.folder

    return conduct


def first_is_best(tuning: Tuning, folder: Path) -> Path:
    best = conduct_trials(tuning, folder, made_trials(folder), lambda _: None).best
    assert best.trial == tuning.trials[0].name
    return Path(best.folder)


FORMS = ("report.md", "report.html", "facts.html", "adapter/README.md", "deployment.yaml", "annex.md")


@pytest.mark.parametrize("ledger_holds_more", [False, True])
def test_every_form_of_the_chosen_trials_report_has_the_price_of_all(
    base: dict[str, Any], tmp_path: Path, ledger_holds_more: bool
) -> None:
    """The first trial is the best, so that its own ε leaves out both that came after it."""
    tuning = read_tuning(trials_file(tmp_path, base, THREE))
    # A site's ledger may hold more than the trials: then the larger figure is told.
    tuning = replace(tuning, delta=1e-5, epsilon=0.1 if ledger_holds_more else 7.0)
    folder = first_is_best(tuning, tmp_path / "out")
    outcomes = json.loads((tmp_path / "out" / STATE).read_text())["outcomes"]
    own, last = outcomes[0]["epsilon"], outcomes[-1]["epsilon"]
    assert own < last
    told = epsilon_text(last if ledger_holds_more else 7.0)
    assert epsilon_text(own) != told
    key = tmp_path / "server.pem"
    assert fedveil("keygen", key)[0] == 0
    code, summary = fedveil("report", folder, "--sign", key, "--registry", "--annex")
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
    assert f"all 3 trials together: ε {told}" in said_of_run(picture_of(report_of(folder)))


def test_a_report_never_tells_less_of_all_trials_than_of_one_and_says_if_the_file_is_damaged(
    base: dict[str, Any], tmp_path: Path
) -> None:
    tuning = replace(read_tuning(trials_file(tmp_path, base, THREE)), delta=1e-5, epsilon=7.0)
    folder = first_is_best(tuning, tmp_path / "out")
    place = folder / TuningFile.NAME
    place.write_text(place.read_text().replace("7.0", "0.001"))
    data = report_of(folder)
    assert data.tuning is not None
    assert data.tuning.epsilon == data.headline.epsilon
    place.write_text("{")
    (problem,) = report_of(folder).problems
    assert "one of several trials, and what all of them cost is missing here" in problem


def test_trials_on_a_server_are_submitted_once_each_in_order_with_what_was_printed(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the command line; the second submission fails, and the same command goes on with it."""
    make_server(tmp_path / "server", ["127.0.0.1"])
    file = trials_file(tmp_path, base, THREE)
    tuning, conduct, asked = read_tuning(file), made_trials(tmp_path / "runs"), list[tuple[Any, ...]]()

    def stand_in(folder: ServerFolder, settings: Mapping[str, Any], say: Any, **how: Any) -> Path:
        asked.append((folder.path, dict(settings), how))
        if len(asked) == 2:
            raise RunFailed("the server is silent")
        (trial,) = (trial.name for trial in tuning.trials if trial.settings == dict(settings))
        return conduct(trial, settings)

    monkeypatch.setattr("deploy.submit.submit", stand_in)
    words = ("tune", file, "--server", tmp_path / "server", "--sites", 2, "--patience", 7, "--output", tmp_path / "out")
    code, said = fedveil(*words, "--yes")
    assert (code, "the server is silent" in said) == (1, True)
    code, said = fedveil(*words, "--yes")
    assert code == 0, said
    assert "1 of 3 trials are there already" in said
    assert "charged to each ledger" not in said, "the sites' ledgers are theirs, and not here"
    names = ["slow", "fast", "fast", "often"]
    wanted = {trial.name: trial.settings for trial in tuning.trials}
    # ``once``: a trial that ended before its outcome was written down is not run, and paid, again.
    how = {"sites": 2, "patience": 7.0, "once": True}
    assert asked == [(tmp_path / "server", wanted[name], how) for name in names]
    assert {settings[NOISE] for _, settings, _ in asked} == {tuning.noise_multiplier}
    told = [read_file(TuningFile, tmp_path / "runs" / name) for name in THREE]
    assert [one.chosen for one in told] == [True, False, False]
    outcomes = json.loads((tmp_path / "out" / STATE).read_text())["outcomes"]
    assert {one.epsilon for one in told} == {max(tuning.epsilon, outcomes[-1]["epsilon"])}
    assert fedveil(*words, "--yes")[0] == 0
    assert len(asked) == 4, "a trial that was paid is submitted again"

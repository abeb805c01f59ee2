"""The steward's rules win: the stricter figure holds, what is not allowed is refused by name, before any charge."""

from __future__ import annotations

import csv
import dataclasses
import logging
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fedveil.client.site
from audits.bands import out_of_band, related
from audits.faults import same_seeds
from audits.tiny_models import write_questions
from audits.tiny_site import OneSite, clinic, pins
from fedveil.client.budget import plan_of
from fedveil.client.evaluation import noised_correct
from fedveil.client.ledger.ledger import Ledger
from fedveil.client.ledger.rows import Terms
from fedveil.client.policy import Policy
from fedveil.client.policy_file import load_policy
from fedveil.client.process import in_simulation
from fedveil.client.site import Site, check_job, open_site
from fedveil.common.config.flat import Scalar, to_mapping
from fedveil.common.config.text import to_toml
from fedveil.common.data.partition import division_of
from fedveil.common.data.sources import load_dataset, train_and_test
from fedveil.common.errors import ConfigError, PolicyRefusal
from fedveil.common.messages.round import Spending
from fedveil.common.model.federated import FederatedModel
from fedveil.common.run_lines import RoundLine, read_lines
from fedveil.common.tasks.examples import Dataset
from fedveil.experiments.in_process import run_in_process, simulated_nodes
from fedveil.privacy.accountant import EVALUATION
from fedveil.privacy.accounting import gaussian_release
from fedveil.privacy.privacy_filter import promised
from fedveil.strategies.job import configure

DIGITS = "0123456789abcdef0123456789abcdef"
PUBLIC = 50
WHOLE = 'task = "classification"\ntext = "text"\nlabel = "label"\nlabels = ["bad", "good"]\nmax-length = 128\n'


def spent(site: OneSite, round_number: int = 1, run: str = "1") -> Spending:
    spending = site.train(round_number, run).spending
    assert spending is not None
    return spending


def refusal(site: OneSite, *parts: str, round_number: int = 1) -> None:
    """Check that a round is refused by policy, with every part in the reason."""
    got = site.refuse(round_number)
    assert got.kind == "policy", got
    for part in parts:
        assert part in got.reason


def test_the_stricter_budget_holds_and_the_noise_is_calibrated_for_it(site: OneSite) -> None:
    site.settings["privacy.noise-multiplier"] = 0.0
    proposed = spent(site, run="before")
    assert (proposed.epsilon_budget, proposed.delta) == (8.0, 1e-3)
    site.node["dataset-id"] = "another"
    site.node["ledger"] = str(site.ledger.with_name("fresh.sqlite"))
    site.rule(epsilon=2.0, delta=1e-4)
    own = spent(site)
    assert (own.epsilon_budget, own.delta) == (2.0, 1e-4)
    assert own.event.noise_multiplier > 2 * proposed.event.noise_multiplier
    whole = promised([gaussian_release(own.event.noise_multiplier, 0.25, 4 * own.steps_round)], 1e-4)[0]
    assert 1.9 < whole <= 2.0, "the noise is not that of four rounds within the site's own budget"


def test_a_laxer_policy_changes_nothing(site: OneSite) -> None:
    site.rule(epsilon=80.0, delta=0.02, min_noise_multiplier=0.1)
    own = spent(site)
    assert (own.epsilon_budget, own.delta, own.event.noise_multiplier) == (8.0, 1e-3, 2.0)


def test_two_runs_that_propose_other_budgets_share_the_stewards(site: OneSite) -> None:
    rounds = promised([gaussian_release(2.0, 0.25, 4)], 1e-3)[0] + 1e-6
    site.rule(epsilon=rounds, delta=1e-3)
    site.settings["privacy.epsilon"] = 100.0
    spent(site, run="a")
    site.rule()  # the ledger remembers
    assert spent(site, run="b").epsilon_budget == rounds
    assert site.refuse(2, "b").kind == "budget"


def test_a_server_sets_no_budget_of_own_records(site: OneSite, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it proposes: an ε of a million, and hardly any noise."""
    site.settings |= {"privacy.epsilon": 1e6, "privacy.noise-multiplier": 0.01}
    site.rule(epsilon=None, delta=None)
    refusal(site, "the site's policy has no budget", "epsilon = 3.0")
    assert not site.charges()
    # The planted fault: a policy that leaves the budget to the run.
    with monkeypatch.context() as patch:
        patch.setattr(Policy, "lacks_budget", False)
        site.train()
    site.rule(epsilon=1.0, delta=1e-4)
    site.memory.clear()
    assert site.refuse().kind == "budget"


def test_a_policy_pins_the_rate_of_steps_and_of_starts(site: OneSite) -> None:
    site.rule(sample_rate=1.0)
    refusal(site, "sample-rate = 1", "training.sample-rate = 0.25")
    site.settings["training.sample-rate"] = 1.0
    site.train()
    site.settings |= {"strategy": "fed-sb", "adapter.start": "dp-gradient", "start.sample-rate": 0.1}
    site.rule(sample_rate=1.0)
    refusal(site, "sample-rate = 1", "start.sample-rate = 0.1")
    site.settings["start.sample-rate"] = 1.0
    load_policy(Path(str(site.node["policy"]))).check_job(configure(site.settings), private=True)


def test_the_least_noise_holds(site: OneSite) -> None:
    site.rule(min_noise_multiplier=3.5)
    assert spent(site).event.noise_multiplier == 3.5


def test_rounds_and_steps_of_a_run_end_where_the_policy_says(site: OneSite) -> None:
    site.rule(max_rounds=2)
    site.train(1)
    site.train(2)
    refusal(site, "max-rounds = 2", "3 rounds", round_number=3)
    site.rule(max_steps=3)
    site.train(1, "another-run")
    got = site.refuse(2, "another-run")
    assert (got.kind, "max-steps = 3" in got.reason, "4 steps" in got.reason) == ("policy", True, True)


def test_steps_are_those_that_were_taken_whatever_a_round_says_later(site: OneSite) -> None:
    site.rule(max_steps=5)
    for number, steps in ((1, 4), (2, 1)):
        site.settings["training.local-steps"] = steps
        site.train(number)
    refusal(site, "max-steps = 5", "6 steps", round_number=3)


def test_a_server_that_asks_the_same_round_again_gets_no_more_rounds_than_the_policy_has(site: OneSite) -> None:
    site.rule(max_rounds=2)
    site.train(1)
    site.train(1)  # answered with the reply that was kept: no further one
    site.memory.clear()
    site.train(1)
    for other in (1, 2):
        site.memory.clear()
        refusal(site, "max-rounds = 2", "3 rounds", round_number=other)
    assert site.charges() == [("1", 1, "training")] * 2


def test_noise_is_calibrated_for_the_rounds_that_the_policy_allows(site: OneSite) -> None:
    site.settings["privacy.noise-multiplier"] = 0.0
    site.rule(max_rounds=2)
    two = spent(site)
    assert 7.9 < promised([gaussian_release(two.event.noise_multiplier, 0.25, 2 * two.steps_round)], 1e-3)[0] <= 8.0


@pytest.mark.parametrize(
    ("rules", "parts"),
    [
        ({"strategies": ["fed-sb", "fed-svd"]}, ("strategies = fed-sb, fed-svd", "ffa-lora")),
        ({"head_policies": ["frozen"]}, ("head-policies = frozen", "trained")),
        (
            {"models": [f"mini={DIGITS}+{DIGITS}"]},
            (f"models = mini={DIGITS}+{DIGITS}", "model.name"),
        ),
        ({"models": None}, ("models = all-MiniLM-L6-v2, SmolLM2-135M-Instruct", "model.name")),
        ({"text": "note"}, ("text = 'note'", "data.text = 'text'")),
        ({"max_length": 23}, ("max-length = 23", "model.max-length = 24")),
    ],
)
def test_what_is_not_allowed_is_refused_with_both_values(
    site: OneSite, rules: dict[str, Any], parts: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    site.rule(**rules)
    with caplog.at_level(logging.WARNING, "fedveil.site"):
        refusal(site, *parts)
    assert parts[0] in caplog.text, "the site's own log does not say what was refused"


def test_what_is_allowed_goes_on(site: OneSite) -> None:
    model = site.model().base
    site.rule(
        strategies=["ffa-lora"],
        head_policies=["trained"],
        models=[f"{model.name}={model.fingerprint[:32]}+{model.files[:32]}"],
    )
    site.train()


def test_a_site_is_deployed_unless_ray_simulates_in_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who simulates is told everything, and needs no policy; that Ray is installed or imported says nothing."""
    for ray, simulated in (
        (SimpleNamespace(is_initialized=lambda: False), False),
        (SimpleNamespace(is_initialized=lambda: True), True),
    ):
        monkeypatch.setitem(sys.modules, "ray", ray)
        assert in_simulation() is simulated
    monkeypatch.delitem(sys.modules, "ray")
    assert not in_simulation()


def test_a_deployed_site_joins_no_run_without_privacy_unless_its_policy_says_so(site: OneSite) -> None:
    site.settings["privacy.mode"] = "none"
    refusal(site, "allow-no-privacy = false", "'none'")
    site.rule(strategies=["ffa-lora"])
    refusal(site, "allow-no-privacy = false")
    site.rule(allow_no_privacy=True, max_rounds=1)
    assert site.train().spending is None
    refusal(site, "max-rounds = 1", round_number=2)


def write_notes(path: Path) -> None:
    """Write reviews that have the text twice: in ``text``, and, in other words, in ``note``."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text", "note", "label"])
        writer.writeheader()
        writer.writerows({"text": r["text"], "note": f"a {r['text']}", "label": r["label"]} for r in rows)


def check_that_another_column_is_no_new_budget(site: OneSite) -> None:
    """Play M1 of the hostile server: the same file under another id, read through another column, then as pairs."""
    write_notes(Path(str(site.node["data"])))
    first = spent(site)
    for number, asked in enumerate(({"data.text": "note"}, {"data.text-pair": "note"}), start=2):
        site.node["dataset-id"] = f"renamed-{number}"
        site.settings |= asked
        site.rule()  # the steward agrees
        again = spent(site, run=str(number))
        assert again.epsilon_total > first.epsilon_total, "records have a fresh budget under another name"
        assert again.epsilon_total == promised([gaussian_release(2.0, 0.25, 2 * number)], 1e-3)[0]
    with Ledger(site.ledger) as ledger:
        assert ledger.epsilon("clinic", 1e-3) == again.epsilon_total


def test_the_same_file_under_another_id_or_through_another_column_stays_on_one_budget(
    site: OneSite, toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_that_another_column_is_no_new_budget(site)
    # Planted fault: rows are known by what the run's columns make of them.
    monkeypatch.setattr("fedveil.common.data.rows._row_digest", lambda *_: b"")
    fedveil.client.site._own_data.cache_clear()
    with pytest.raises(AssertionError, match="a fresh budget"):
        check_that_another_column_is_no_new_budget(clinic(toy_settings, tmp_path, 40, 1))
    fedveil.client.site._own_data.cache_clear()


def test_a_refusal_by_policy_lets_the_others_go_on(toy_settings: dict[str, Any], tmp_path: Path) -> None:
    settings = {**toy_settings, "rounds": 1, "data.labels": "bad,good"}
    (tmp_path / "policy.toml").write_text(to_toml({**pins(settings), "strategies": ["fed-sb"]}), encoding="utf-8")
    nodes = simulated_nodes(2, tmp_path)
    nodes[1] |= {"policy": str(tmp_path / "policy.toml"), "data": "records.csv", "public-size": 100}
    line = read_lines(RoundLine, run_in_process(settings, nodes))[0]
    assert line.participants == ["site-0"]
    assert [(r.site, r.kind) for r in line.refusals] == [("site-1", "policy")]
    assert "strategies = fed-sb" in line.refusals[0].reason


# The noised count.


def test_no_count_is_sent_unless_the_policy_says_so(site: OneSite) -> None:
    assert site.train().noised_correct is None
    assert site.charges() == [("1", 1, "training")]


def test_a_count_is_noised_and_paid_for_with_the_round(site: OneSite, monkeypatch: pytest.MonkeyPatch) -> None:
    site.rule(send_noised_metrics=True, metrics_noise=12.0)
    result = site.train()
    assert result.noised_correct is not None
    assert result.noised_correct.noise_std == 12.0
    assert result.noised_correct.value == round(result.noised_correct.value)
    assert site.charges() == [("1", 1, "training"), ("1", 1, EVALUATION)]
    with Ledger(site.ledger) as ledger:
        assert ledger.entries()[1].event.sample_rate == 1.0
    assert result.spending is not None
    # The counts of later rounds are in the plan, so they count from the first one on.
    rounds = configure(site.settings).config.rounds
    both = [gaussian_release(2.0, 0.25, result.spending.steps_round), gaussian_release(12.0, 1.0, rounds)]
    assert result.spending.epsilon_total == promised(both, 1e-3)[0] > promised(both[:1], 1e-3)[0]

    monkeypatch.setattr("fedveil.client.evaluation.add_private_noise", lambda total, std: total)
    exact, model, config = site.train(2).noised_correct, site.model(), configure(site.settings).config
    records = model.prepare(load_dataset(config.data, config.model.task, str(site.node["data"])).examples)
    model.write(model.start)
    assert exact is not None
    assert exact.value == round(model.score(records).accuracy * len(records))


@pytest.mark.parametrize("number", [0, 1])
def test_no_record_reaches_the_model_before_its_round_is_paid_for(
    site: OneSite, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    events, charge = list[str](), Ledger.charge
    ways = {name: getattr(FederatedModel, name) for name in ("batch", "fixed_batch")}
    data = configure(site.settings).config.data
    examples = load_dataset(data, "classification", str(site.node["data"])).examples
    own = [record["input_ids"] for record in site.model().prepare(examples)]

    def seen(way: str) -> Any:
        def look(model: FederatedModel, records: Any, *shape: int) -> Any:
            # What is made up to try the model out is no one's record.
            events.extend("record" for record in records if record["input_ids"] in own)
            return ways[way](model, records, *shape)

        return look

    def paid(ledger: Ledger, *arguments: Any, **terms: Any) -> Any:
        receipt = charge(ledger, *arguments, **terms)
        events.append("paid")
        return receipt

    for way in ways:
        monkeypatch.setattr(FederatedModel, way, seen(way))
    monkeypatch.setattr(Ledger, "charge", paid)
    if number:
        site.rule(send_noised_metrics=True)
    else:
        site.settings.update({"strategy": "fed-sb", "adapter.start": "dp-gradient", "start.sample-rate": 0.9})
    task = site.task(number)
    site.ask(task if number else dataclasses.replace(task, state={}, basis={}, basis_fingerprint=""))
    assert "record" in events
    assert events.index("paid") == 0, "a record was used before its round was paid for"


def counts_of_nothing(site: OneSite) -> torch.Tensor:
    """Return a thousand noised counts over no record at noise 12, every seed set before the first."""
    model = site.model()
    same_seeds()
    return torch.tensor([noised_correct(model, [], 12.0) for _ in range(1000)])


def test_the_count_carries_the_noise_that_is_paid_for_and_follows_no_seed(
    site: OneSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = counts_of_nothing(site), counts_of_nothing(site)
    assert not out_of_band(float((first / 12.0).pow(2).sum()), 1000)
    assert not related(first, second)

    monkeypatch.setattr(
        "fedveil.client.evaluation.add_private_noise", lambda total, std: total + torch.randn(()) * std / 2
    )
    first, second = counts_of_nothing(site), counts_of_nothing(site)
    assert out_of_band(float((first / 12.0).pow(2).sum()), 1000), "half the noise went unnoticed"
    assert related(first, second), "noise that follows a seed went unnoticed"


def test_the_training_noise_leaves_room_for_the_initialisation(site: OneSite, tmp_path: Path) -> None:
    dear = {"adapter.start": "dp-gradient", "start.noise-multiplier": 1.0, "start.sample-rate": 0.5}
    job = configure({**site.settings, "privacy.noise-multiplier": 0.0, "strategy": "fed-sb", **dear})
    here = Site("ward", Dataset("ward", (), ("bad", "good")), "ward", PUBLIC, tmp_path / "ward.sqlite")
    plan = plan_of(job, here, Terms(math.inf, math.inf))
    assert job.origin.release() is not None
    whole = [job.origin.release(), plan.release(job.config.total_steps)]
    assert 7.9 < promised(whole, job.config.privacy.delta)[0] <= 8.0


def test_the_count_is_not_paid_for_when_it_cannot_exist(toy_generation: dict[str, Any], tmp_path: Path) -> None:
    site = clinic(toy_generation, tmp_path)
    site.node["data"] = str(write_questions(tmp_path / "own.csv", 30))
    site.rule(send_noised_metrics=True)
    assert site.train().noised_correct is None
    assert site.charges() == [("1", 1, "training")]


def test_the_training_noise_leaves_room_for_every_count(site: OneSite) -> None:
    site.settings["privacy.noise-multiplier"] = 0.0
    site.rule(send_noised_metrics=True, metrics_noise=2.0)
    last = [spent(site, n) for n in (1, 2, 3, 4)][-1]
    assert 7.8 < last.epsilon_total <= 8.0
    assert last.event.noise_multiplier > 1.01 * plain_noise(site)


def plain_noise(site: OneSite) -> float:
    site.rule(min_noise_multiplier=0.0)
    site.node.update({"ledger": str(site.ledger.with_name("plain.sqlite"))})
    site.memory.clear()
    return spent(site, run="plain").event.noise_multiplier


# The file.


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epsilom = 1", "did you mean 'epsilon'"),
        ("max-round = 3", "did you mean 'max-rounds'"),
        ("epsilon = 1", "set both"),
        ("sample-rate = 1.5", "sample-rate"),
        ("delta = 1e-5", "set both"),
        ("epsilon = 0.0\ndelta = 1e-5", "above 0"),
        ("epsilon = nan\ndelta = nan", "set both"),
        ("epsilon = 1\ndelta = 0.5", "below 0.5"),
        ("max-rounds = 0", "above 0"),
        ("max-steps = -1", "above 0"),
        ("max-rounds = 2.5", "whole number"),
        ("metrics-noise = 0", "above 0"),
        ("metrics-noise = 1e6", "metrics-noise must be below 100000"),
        ("min-noise-multiplier = 1e200", "min-noise-multiplier must be below 100000"),
        ("min-noise-multiplier = -1", "at least 0"),
        ("allow-no-privacy = 1", "true or false"),
        ('strategies = "fed-sb"', "list"),
        ("strategies = []", "at least one"),
        ('strategies = ["fedsb"]', "did you mean 'fed-sb'"),
        ('strategies = ["fed-sb,ffa-lora"]', "without commas"),
        ('head-policies = ["thawed"]', "head-policies"),
        ('mechanisms = ["dp-sg"]', "mechanisms is 'dp-sg'; choose .*did you mean 'dp-sgd'"),
        ('mechanisms = ["none"]', "mechanisms names 'none', which promises nothing .* set allow-no-privacy = true"),
        ('mechanisms = "dp-sgd"', "list"),
        ("mechanisms = []", "at least one"),
        (f'models = ["mini={"0" * 31}+{DIGITS}"]', "at least 32"),
        (f'models = ["mini={DIGITS}+{"0" * 31}"]', "at least 32"),
        (f'models = ["mini={DIGITS}"]', "write NAME=FINGERPRINT.FILES"),
        (f'models = ["mini={DIGITS[2:]}zz+{DIGITS}"]', "0-9, a-f"),
        (f'models = ["mini={DIGITS}+{DIGITS[2:]}zz"]', "0-9, a-f"),
        ('models = ["0123456789ab"]', "'0123456789ab': write NAME=FINGERPRINT.FILES"),
        ('models = ["=0123456789ab"]', "write NAME=FINGERPRINT.FILES"),
        ('labels = ["a", "b"]', "labels is pinned, but task is not"),
        ("max-length = 20", "max-length is pinned, but task is not"),
        ("max-length = -1", "at least 0"),
        ('task = "clasification"', "did you mean 'classification'"),
        ('task = "classification"\ntext = "t"\nmax-length = 9', "label, labels is not"),
        ('task = "causal-lm"\nprompt = "q"\ncompletion = "a"', "max-length is not"),
        (f'{WHOLE}prompt = "q"', "prompt is pinned, which the task 'classification' does not read"),
        (WHOLE.replace('"good"', '"bad"'), "name at least 2 different"),
        (WHOLE.replace('["bad", "good"]', '"bad,good"'), "labels must be a list"),
        (WHOLE.replace('["bad", "good"]', "[0, 1]"), "labels must be a list"),
        ("[site]\nepsilon = 1", "text, a number"),
        ("epsilon = ", "cannot be read"),
    ],
)
def test_a_policy_that_is_not_right_is_an_error_that_says_what(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words) as error:
        load_policy(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_policy_that_is_not_there_or_broken_stops_the_site(site: OneSite) -> None:
    site.node["policy"] = str(site.ledger.with_name("nowhere.toml"))
    assert site.refuse().kind == "failed"
    site.rule(epsilom=1.0)
    assert "did you mean 'epsilon'" in site.refuse().reason


def test_a_delta_above_one_over_the_size_and_a_figure_said_twice_stop_the_site(site: OneSite) -> None:
    site.rule(epsilon=3.0, delta=0.1)
    assert f"1/{PUBLIC}" in site.refuse().reason
    site.rule(public_size=60)
    assert "'public-size' stands in the node configuration and in the policy" in site.refuse().reason
    del site.node["public-size"]
    assert site.train().public_size == 60


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"public_size": 50}, "did you mean 'public-size'"),
        ({"public-size": None}, "'public-size' is needed beside 'data'"),
        ({"public-size": 0}, "'public-size' is needed"),
        ({"public-size": True}, "'public-size' is True: give a whole number"),
        ({"public-size": "50"}, "'public-size' is '50': give a whole number"),
        ({"public-size": -1}, "'public-size' is -1: give a whole number"),
        ({"rank": 0}, "'rank' is 0: give a whole number of columns, at least 1"),
        ({"rank": True}, "'rank' is True"),
        ({"rank": "4"}, "'rank' is '4'"),
        ({"data": None, "partition-id": 0}, "give 'data' in the node's settings, or 'partition-id' and 'num-part"),
        ({"data": None, "partition-id": 2, "num-partitions": 2}, "partition-id is 2 and its num-partitions 2: give"),
        ({"data": None, "partition-id": -1, "num-partitions": 2}, "partition-id is -1 and its num-partitions 2"),
        ({"data": None, "partition-id": 0, "num-partitions": 0}, "partition-id is 0 and its num-partitions 0"),
        ({"data": None, "partition-id": "1", "num-partitions": 2}, "partition-id is '1' and its num-partitions 2"),
        ({"data": None, "partition-id": False, "num-partitions": 2}, "partition-id is False and its num-partitions 2"),
    ],
    ids=str,
)
def test_a_setting_of_the_node_that_is_none_stops_the_site(site: OneSite, node: dict[str, Any], words: str) -> None:
    named = {key: value for key, value in {**site.node, **node}.items() if value is not None}
    with pytest.raises(ConfigError, match=words):
        open_site(named, configure(site.settings).config, "1", simulated=False)


def test_every_rule_has_a_line_in_the_docs() -> None:
    text = (Path(__file__).parents[2] / "docs" / "reference" / "policy.md").read_text(encoding="utf-8")
    for key in to_mapping(Policy()):
        assert f"`{key}`" in text, f"docs/reference/policy.md does not say what {key} is"


def declared(name: str, *, simulated: bool = False, **node: Scalar) -> int:
    """Return the size that the first of two parts of the data set ``name`` is declared to have."""
    config = configure({"data.name": name, "data.partition": "iid", "data.test-size": 40}).config
    settings: dict[str, Scalar] = {"site": "ward", "partition-id": 0, "num-partitions": 2, **node}
    return open_site(settings, config, "1", simulated=simulated).public_size


def test_a_part_of_a_public_data_set_has_a_public_size_without_a_declaration(site: OneSite) -> None:
    site.rule(epsilon=1.0, delta=1e-4)
    assert declared("rotten-tomatoes", policy=site.node["policy"]) == 4200
    assert declared(str(site.settings["data.name"]), simulated=True) == 100


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "natural"])
def test_a_part_of_what_may_be_anybodys_is_refused_before_anything_is_read(
    partition: str, site: OneSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.rule(epsilon=1.0, delta=1e-4, public_size=60)
    part: dict[str, Scalar] = {"partition-id": 0, "num-partitions": 2, "policy": site.node["policy"]}
    monkeypatch.setattr("fedveil.common.data.sources.load_dataset", lambda *_: pytest.fail("records are read"))
    monkeypatch.setattr("fedveil.client.site.load_dataset", lambda *_: pytest.fail("records are read"))
    for name in (str(site.settings["data.name"]), "hub:clinic/gated-notes", "/srv"):
        job = configure({**site.settings, "data.name": name, "data.partition": partition, "data.key": "author"})
        node = {**part, "division": division_of(job.config)}
        refusals = []
        for ask in (
            lambda node=node, job=job: check_job(node, job, simulated=False),
            lambda node=node, job=job: open_site(node, job.config, "1", simulated=False),
        ):
            with pytest.raises(
                PolicyRefusal, match="would depend on all of its records; give each site its"
            ) as refusal:
                ask()
            refusals.append(str(refusal.value))
        assert refusals[0] == refusals[1]
        assert "\n" not in refusals[0]


def test_one_record_more_moves_dozens_of_a_division_which_is_why(site: OneSite) -> None:
    file = Path(str(site.settings["data.name"]))
    config = configure({"data.name": str(file), "data.partition": "iid", "data.test-size": 40}).config
    node: dict[str, Scalar] = {"partition-id": 0, "num-partitions": 2}

    def texts() -> set[str]:
        for kept in (fedveil.client.site._partition, train_and_test):
            kept.cache_clear()
        return {example.text for example in open_site(node, config, "1", simulated=True).data.examples}

    before = texts()
    file.write_text(f"{file.read_text(encoding='utf-8')}a film of its own,good,a1\n", encoding="utf-8")
    assert len(texts() ^ before) > 20


def test_a_part_of_a_hub_data_set_is_an_experiments(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"text": [f"note {i}" for i in range(80)], "label": ["bad", "good"] * 40})
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: rows)
    assert declared("hub:clinic/gated-notes", simulated=True) == 20

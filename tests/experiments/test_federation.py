"""A whole federation in one process, from settings to the files it leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_run import spent

from audits.tiny_models import NEED_PLAIN_STEP, PLAIN_STEP, toy_run, write_reviews
from audits.tiny_site import pins
from fedveil.client.ledger.ledger import Ledger
from fedveil.client.ledger.rows import Charge
from fedveil.common.config.flat import Scalar
from fedveil.common.config.text import to_toml
from fedveil.common.errors import ConfigError, RunFailed
from fedveil.common.messages.wire import round_of
from fedveil.common.run_lines import BaselineFile, ConfigFile, PrivacyLine, ResultFile, RoundLine, read_file, read_lines
from fedveil.common.strict_json import to_json
from fedveil.experiments.evaluate import evaluate_run
from fedveil.experiments.in_process import run_in_process, simulated_nodes
from fedveil.privacy.accounting import gaussian_release
from fedveil.privacy.privacy_filter import promised
from fedveil.reports import markdown_report
from fedveil.strategies import STRATEGIES
from fedveil.strategies.job import configure
from fedveil.strategies.options import known_settings
from fedveil.strategies.payload import payload, preset_adapter

pytestmark = [pytest.mark.rough_prices, pytest.mark.one_length]

PRIVACY_FIELDS = [
    *("round", "site", "unit", "adjacency", "adversary", "sampler", "purpose", "event"),
    *("steps_round", "steps_total", "delta", "epsilon_round", "epsilon_total", "epsilon_budget", "epsilon_remaining"),
    *("accountant", "head"),
]
ROUND_FIELDS = ["round", "strategy", "participants", "accuracy", "loss", "bytes_down", "bytes_up", "seconds"]


# Of each pair of a head and a mechanism some strategy has a run, and of each strategy both heads and both mechanisms.
RUNS = [
    *((name, "trained", "dp-sgd") for name in STRATEGIES.core),
    *((name, "frozen", "none") for name in STRATEGIES.core),
    *(("fed-svd", "trained", "none"), ("fed-svd", "frozen", "dp-sgd")),
]
# Tiny BERT, both of its layers: query, value, attention output (16 × 16), intermediate (24 × 16), output (16 × 24).
SHAPES = 2 * [(16, 16), (16, 16), (16, 16), (24, 16), (16, 24)]


@pytest.fixture(scope="module")
def whole(prices: None, model_folder: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of three rounds, of which the first is not scored."""
    del prices
    own = {"rounds": 3, "privacy.noise-multiplier": 1.5, "privacy.epsilon": 50.0, "evaluate-every": 2}
    settings = toy_run(model_folder("bert"), tmp_path_factory.mktemp("whole"))
    return run_in_process({**settings, "model.max-length": 15, **own}, 2)


def test_two_runs_in_one_folder_are_two(toy_settings: dict[str, Any]) -> None:
    toy_settings["rounds"] = 1
    first = run_in_process(toy_settings, 2)
    kept = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    second = run_in_process(toy_settings, 2)
    assert second.parent == first.parent
    assert second != first
    assert {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == kept
    paid = [[spent(line).epsilon_total for line in read_lines(PrivacyLine, folder)] for folder in (first, second)]
    assert paid[0] == paid[1], "simulated sites begin anew"
    name = first.name.rpartition("-")[2]
    with pytest.raises(ConfigError, match=f"{first} holds a run already: give this one another id, or set resume"):
        run_in_process(toy_settings, 2, name)


def test_a_second_run_on_the_same_ledgers_is_charged_on_top_and_refused_in_words(
    toy_settings: dict[str, Any], tmp_path: Path
) -> None:
    nodes, more = simulated_nodes(2, tmp_path / "ledgers"), {**toy_settings, "privacy.epsilon": 12.0}
    first, second = run_in_process(toy_settings, nodes), run_in_process(more, nodes)
    ends = [max(spent(line).epsilon_total for line in read_lines(PrivacyLine, folder)) for folder in (first, second)]
    assert ends[0] < ends[1] <= 12.0
    with pytest.raises(RunFailed, match=r"site-0, site-1 \(budget\): .*12"):
        run_in_process(more, nodes)


@pytest.mark.parametrize(("strategy", "head", "mode"), RUNS)
def test_every_strategy_runs_with_and_without_privacy(
    toy_settings: dict[str, Any], strategy: str, head: str, mode: str
) -> None:
    folder = run_in_process({**toy_settings, "strategy": strategy, "privacy.mode": mode, "head.policy": head}, 3)
    rounds, privacy = read_lines(RoundLine, folder), read_lines(PrivacyLine, folder)
    assert [line.round_number for line in rounds] == [1, 2]
    assert all(set(to_json(line)) >= set(ROUND_FIELDS) for line in rounds)
    assert [(line.round_number, line.site) for line in privacy] == [(r, f"site-{i}") for r in (1, 2) for i in range(3)]
    assert all(set(to_json(line)) >= set(PRIVACY_FIELDS) for line in privacy)
    assert all(head in line.head for line in privacy)
    assert (rounds[0].bytes_down, rounds[0].bytes_up) == tuple(3 * sent for sent in sent_once(strategy, head))
    assert "held out as the test set" in (folder / "run.log").read_text(encoding="utf-8").splitlines()[0]
    assert rounds[-1].accuracy == evaluate_run(folder).accuracy, "the saved adapter does not score like the run"
    if mode == "none":
        assert all(line.spent is None and "nothing is promised" in line.accountant for line in privacy)
        assert "Privacy was OFF" in (folder / "report.md").read_text()
        for path in folder.glob("ledgers/*"):
            with Ledger(path) as ledger:
                assert ledger.entries() == [], "a run without privacy has nothing to charge"
                assert [row.round_number for row in ledger.exposures()] == [1, 2]
    else:
        assert 0 < spent(privacy[0]).epsilon_total < spent(privacy[-1]).epsilon_total <= 8.0


def sent_once(strategy: str, head: str) -> tuple[int, int]:
    """Return the bytes that one site receives and sends in round 1."""
    kind, numbers_of_head = STRATEGIES[strategy], 2 * 16 + 2
    down, up = payload(kind(), preset_adapter(kind, 3), SHAPES)
    return (down + 4 * numbers_of_head, up + 4 * numbers_of_head) if head == "trained" else (down, up)


@pytest.mark.parametrize("strategy", sorted({*STRATEGIES} - {*STRATEGIES.core}))
def test_payload_is_exactly_the_numbers_that_the_strategy_sends(toy_settings: dict[str, Any], strategy: str) -> None:
    own = PLAIN_STEP if strategy in NEED_PLAIN_STEP else {"training.local-steps": 1}
    settings = {**toy_settings, **own, "strategy": strategy, "rounds": 1, "privacy.mode": "none"}
    (line,) = read_lines(RoundLine, run_in_process(settings, 1))
    assert (line.bytes_down, line.bytes_up) == sent_once(strategy, "trained")


@pytest.mark.parametrize(
    ("strategy", "down", "up"),
    [("fedavg-lora", "AB", "AB"), ("ffa-lora", "B", "B"), ("fed-sb", "R", "R"), ("fed-svd", "BM", "B")],
)
def test_each_strategy_sends_the_factors_of_its_paper_and_no_other(strategy: str, down: str, up: str) -> None:
    numbers = {
        "A": sum(3 * n for _, n in SHAPES),
        "B": sum(3 * m for m, _ in SHAPES),
        "R": 9 * len(SHAPES),
        "M": 9 * len(SHAPES),
    }
    kind = STRATEGIES[strategy]
    found = payload(kind(), preset_adapter(kind, 3), SHAPES)
    assert found == (4 * sum(numbers[f] for f in down), 4 * sum(numbers[f] for f in up))


def test_learning_without_privacy_works(toy_settings: dict[str, Any]) -> None:
    settings = {**toy_settings, "privacy.mode": "none", "rounds": 4, "training.local-steps": 12}
    folder = run_in_process({**settings, "training.learning-rate": 0.02, "strategy": "fedavg-lora"}, 2)
    reached = read_file(ResultFile, folder).reached
    assert reached is not None
    assert reached.accuracy >= 0.7, f"labels are in the words, yet accuracy is {reached.accuracy}"


def test_generation_lowers_the_loss_on_held_out_completions(toy_generation: dict[str, Any]) -> None:
    settings = {**toy_generation, "privacy.mode": "none", "training.local-steps": 8, "training.learning-rate": 0.05}
    folder = run_in_process(settings, 2)
    before = read_file(BaselineFile, folder).loss
    last = read_lines(RoundLine, folder)[-1]
    assert last.loss is not None
    assert last.loss < before - 0.1
    assert last.loss == pytest.approx(evaluate_run(folder).loss, abs=1e-6)


def test_epsilon_of_all_rounds_is_that_of_one_long_run_and_the_sum_of_the_rounds(whole: Path) -> None:
    own = [spent(line) for line in read_lines(PrivacyLine, whole) if line.site == "site-1"]
    assert own[-1].epsilon_total == pytest.approx(promised([gaussian_release(1.5, 0.25, 6)], 1e-3)[0], abs=1e-9)
    assert own[-1].steps_total == 6
    reset = promised([gaussian_release(1.5, 0.25, 2)], 1e-3)[0]
    assert own[-1].epsilon_total > 1.2 * reset, "a ledger that forgets between rounds would report less"
    assert sum(line.epsilon_round for line in own) == pytest.approx(own[-1].epsilon_total, abs=1e-9)


def test_a_spent_site_refuses_and_the_others_go_on(toy_settings: dict[str, Any], tmp_path: Path) -> None:
    nodes = simulated_nodes(3, tmp_path / "ledgers")
    with Ledger(tmp_path / "ledgers" / "site-1.sqlite") as ledger:
        for round_number in range(1, 40):
            ledger.charge(Charge("site-1", "earlier", round_number, (gaussian_release(0.6, 0.25, 2),), 1e-3, 1e6))
    folder = run_in_process(toy_settings, nodes)
    first = read_lines(RoundLine, folder)[0]
    assert first.participants == ["site-0", "site-2"]
    assert [r.kind for r in first.refusals] == ["budget"]
    assert "site-1" in first.refusals[0].reason
    assert {line.site for line in read_lines(PrivacyLine, folder)} == {"site-0", "site-2"}


def test_the_run_ends_early_and_well_when_every_budget_is_spent(toy_settings: dict[str, Any]) -> None:
    three_of_six = promised([gaussian_release(1.0, 0.25, 6)], 1e-3)[0] + 1e-6
    settings = {**toy_settings, "rounds": 6, "privacy.noise-multiplier": 1.0, "privacy.epsilon": three_of_six}
    folder = run_in_process(settings, 2)
    result = read_file(ResultFile, folder)
    assert (result.status, result.reached and result.reached.rounds) == ("stopped", 3)
    assert "budget" in result.reason
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert result.reached is not None
    assert result.reached.epsilon is not None
    assert result.reached.epsilon <= three_of_six


def test_a_site_with_budget_for_three_rounds_of_six_trains_three_and_refuses_three(
    toy_settings: dict[str, Any], tmp_path: Path
) -> None:
    policy, budget = tmp_path / "policy.toml", promised([gaussian_release(1.0, 0.25, 6)], 1e-3)[0] + 1e-6
    nodes = simulated_nodes(2, tmp_path / "ledgers")
    more = {"rounds": 6, "privacy.noise-multiplier": 1.0, "privacy.epsilon": 50.0, "privacy.delta": 1e-3}
    settings = {**toy_settings, **more, "data.labels": "bad,good"}
    nodes[1] |= {"policy": str(policy), "public-size": 100, "data": str(write_reviews(tmp_path / "own.csv", 100, 1))}
    policy.write_text(to_toml({**pins(settings), "epsilon": budget, "delta": 1e-3}), encoding="utf-8")
    folder = run_in_process(settings, nodes)
    lines = read_lines(RoundLine, folder)
    assert [line.participants for line in lines] == [["site-0", "site-1"]] * 3 + [["site-0"]] * 3
    refusals = [[(r.site, r.kind) for r in line.refusals] for line in lines]
    assert refusals == [[]] * 3 + [[("site-1", "budget")]] * 3
    assert read_file(ResultFile, folder).status == "completed"
    totals = [spent(line).epsilon_total for line in read_lines(PrivacyLine, folder) if line.site == "site-1"]
    assert len(totals) == 3
    assert max(totals) <= budget
    with Ledger(tmp_path / "ledgers" / "site-1.sqlite") as ledger:
        assert [entry.round_number for entry in ledger.entries()] == [1, 2, 3], "a refused round was charged"
    for said in (folder / "report.md", folder / "report.html", folder / "run.log"):
        text = said.read_text(encoding="utf-8")
        assert "site-1" in text
        assert "budget" in text, f"{said.name} does not say why site-1 was missing"


def test_a_site_that_may_join_three_rounds_of_six_counts_in_three_with_the_noise_of_three(
    toy_settings: dict[str, Any], tmp_path: Path
) -> None:
    policy = tmp_path / "policy.toml"
    nodes = simulated_nodes(2, tmp_path / "ledgers")
    settings = {**toy_settings, "rounds": 6, "data.labels": "bad,good"}
    nodes[1] |= {"policy": str(policy), "public-size": 100, "data": str(write_reviews(tmp_path / "own.csv", 100, 1))}
    policy.write_text(to_toml({**pins(settings), "max-rounds": 3}), encoding="utf-8")
    folder = run_in_process(settings, nodes)
    lines = read_lines(RoundLine, folder)
    assert [line.participants for line in lines] == [["site-0", "site-1"]] * 3 + [["site-0"]] * 3
    refusals = [(r.site, r.kind) for line in lines[3:] for r in line.refusals]
    assert refusals == [("site-1", "policy")] * 3
    assert read_file(ResultFile, folder).status == "completed"
    noise = {line.site: spent(line).event.noise_multiplier for line in read_lines(PrivacyLine, folder)}
    assert noise["site-1"] < 0.95 * noise["site-0"], "both have the same noise, so the test shows nothing"
    with Ledger(tmp_path / "ledgers" / "site-1.sqlite") as ledger:
        assert [entry.round_number for entry in ledger.entries()] == [1, 2, 3], "a refused round was charged"


def test_a_failing_site_is_named_with_its_reason_and_two_under_one_name_count_once(
    toy_settings: dict[str, Any], tmp_path: Path
) -> None:
    nodes = simulated_nodes(3, tmp_path / "ledgers")
    nodes = [{**nodes[0], "site": "same"}, {**nodes[1], "site": "same"}, {**nodes[2], "ledgr": "typo"}]
    line = read_lines(RoundLine, run_in_process({**toy_settings, "rounds": 1}, nodes))[0]
    assert line.participants == ["same"]
    reasons = {refusal.site: refusal.reason for refusal in line.refusals}
    assert "did you mean 'ledger'" in reasons.pop("site-2")
    assert ["another node already answered" in reason for reason in reasons.values()] == [True]


def test_a_run_in_which_no_site_succeeds_fails_with_every_reason(toy_settings: dict[str, Any], tmp_path: Path) -> None:
    nodes = [{"partition-id": i, "num-partitions": 2, "ledger": str(tmp_path)} for i in range(2)]
    with pytest.raises(RunFailed, match=r"round 1: 0 sites succeeded.*site-0.*site-1"):
        run_in_process(toy_settings, nodes)
    results = list(Path(toy_settings["output"]).glob("*/result.json"))
    assert read_file(ResultFile, results[0].parent).status == "failed"


def own_node(settings: dict[str, Any], folder: Path) -> dict[str, Scalar]:
    """Return a site with a file of its own, whose policy lets it into a run of ``settings`` with two labels."""
    policy = folder / "clinic.toml"
    policy.write_text(to_toml(pins({**settings, "data.labels": "bad,good"})), encoding="utf-8")
    own = {"site": "clinic", "data": settings["data.name"], "policy": str(policy)}
    return {**own, "ledger": str(folder / "l.db")}


def test_a_site_with_its_own_file_takes_part(toy_settings: dict[str, Any], tmp_path: Path) -> None:
    own = own_node(toy_settings, tmp_path) | {"public-size": 200}
    folder = run_in_process({**toy_settings, "data.labels": "bad,good"}, [own])
    assert read_lines(PrivacyLine, folder)[0].site == "clinic"


def test_a_site_with_its_own_file_must_declare_a_size_and_know_the_labels(
    toy_settings: dict[str, Any], tmp_path: Path
) -> None:
    own = own_node(toy_settings, tmp_path)
    with pytest.raises(RunFailed, match=r"public-size"):
        run_in_process({**toy_settings, "data.labels": "bad,good"}, [own])
    with pytest.raises(RunFailed, match=r"data\.labels"):
        run_in_process(toy_settings, [{**own, "public-size": 200}])


def test_delta_above_one_over_the_size_is_refused(toy_settings: dict[str, Any]) -> None:
    with pytest.raises(RunFailed, match=r"privacy\.delta is 0\.1"):
        run_in_process({**toy_settings, "privacy.delta": 0.1}, 2)


@pytest.mark.parametrize(
    ("init", "mode", "releases"),
    [
        ("orthonormal", "dp-sgd", []),
        ("public-gradient", "dp-sgd", []),
        ("dp-gradient", "dp-sgd", ["initialisation"]),
        ("nonprivate-gradient", "none", []),
    ],
)
def test_fed_sb_initialisations_cost_what_they_use(
    toy_settings: dict[str, Any], tmp_path: Path, init: str, mode: str, releases: list[str]
) -> None:
    settings = {**toy_settings, "strategy": "fed-sb", "adapter.start": init, "privacy.mode": mode}
    if init == "public-gradient":
        with pytest.raises(ConfigError, match="without a charge"):
            configure({**settings, "start.data": toy_settings["data.name"]})
        settings["start.data"] = str(write_reviews(tmp_path / "public.csv", 60, seed=9))
    folder = run_in_process(settings, 2)
    lines = read_lines(PrivacyLine, folder)
    assert [spent(line).purpose for line in lines if line.round_number == 0 and line.spent] == releases * 2
    if releases:
        with Ledger(folder / "ledgers" / "site-0.sqlite") as ledger:
            kinds = [entry.purpose for entry in ledger.entries()]
        assert kinds == ["initialisation", "training", "training"]
        own = [line for line in lines if line.site == "site-0"]
        whole = [
            gaussian_release(spent(own[0]).event.noise_multiplier, 0.1, 1),
            gaussian_release(spent(own[1]).event.noise_multiplier, 0.25, 4),
        ]
        assert spent(own[-1]).epsilon_total == pytest.approx(promised(whole, 1e-3)[0], abs=1e-9)
        assert spent(own[-1]).epsilon_total <= 8.0, "the training noise must leave room for the initialisation"
    lines = read_lines(RoundLine, folder)
    rounds = [line for line in lines if line.round_number]
    if len(lines) > len(rounds):
        asked = len(lines[0].participants)
        assert lines[0].round_number == 0
        assert asked == (0 if init == "public-gradient" else 2)
        assert (lines[0].bytes_up > rounds[0].bytes_up) == (asked > 0), "whole gradients are more than R"
    assert (len(lines) > len(rounds)) == init.endswith("gradient")
    assert (rounds[0].bytes_down > rounds[1].bytes_down) == (init != "orthonormal")
    assert rounds[1].bytes_down == rounds[1].bytes_up, "after the first round only R and the head travel"


def test_fed_sb_refuses_the_published_initialisation_under_privacy(toy_settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"raw gradients of private records.*use 'public-gradient'"):
        run_in_process({**toy_settings, "strategy": "fed-sb", "adapter.start": "nonprivate-gradient"}, 2)


def test_a_site_that_lost_its_tensors_gets_them_within_the_round(
    toy_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import fedveil.experiments.in_process as in_process

    whole = in_process.answer

    def forgetful(content: Any, node: Any, settings: Any, run: str, memory: Any, **more: Any) -> Any:
        if round_of(content) == 2 and node["partition-id"] == 0 and "basis" not in content.array_records:
            memory.clear()
        return whole(content, node, settings, run, memory, **more)

    monkeypatch.setattr(in_process, "answer", forgetful)
    settings = {**toy_settings, "strategy": "fed-sb", "adapter.start": "nonprivate-gradient", "privacy.mode": "none"}
    line = read_lines(RoundLine, run_in_process(settings, 2))[1]
    assert line.participants == ["site-0", "site-1"]
    assert line.refusals == []


def test_seeds_decide_everything_without_privacy_and_nothing_with_it(toy_settings: dict[str, Any]) -> None:
    def adapter(mode: str, run: str) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        folder = run_in_process({**toy_settings, "privacy.mode": mode, "rounds": 1}, 2, run)
        return load_file(str(folder / "adapter" / "adapter_model.safetensors"))

    plain, again = adapter("none", "1"), adapter("none", "2")
    assert all(torch.equal(plain[name], again[name]) for name in plain), "a run without privacy is reproducible"
    noised, other = adapter("dp-sgd", "3"), adapter("dp-sgd", "4")
    assert any(not torch.equal(noised[name], other[name]) for name in noised), "noise must not follow from seeds"


def test_the_report_says_what_the_claim_rests_on(whole: Path) -> None:
    text = markdown_report(whole)
    for words in ("one training record", "add or remove one record", "sees every upload", "Poisson", "site-1", "PLD"):
        assert words in text, f"the report does not say {words!r}"
    settings = read_file(ConfigFile, whole).settings
    assert set(settings) <= set(known_settings())


def test_rounds_that_are_not_scored_have_no_score_in_their_line_and_the_last_one_always_is(whole: Path) -> None:
    lines = read_lines(RoundLine, whole)
    assert [line.accuracy is None for line in lines] == [True, False, False]
    assert [line.loss is None for line in lines] == [True, False, False]
    reached = read_file(ResultFile, whole).reached
    assert reached is not None
    assert reached.accuracy == lines[-1].accuracy
    said = [line for line in (whole / "run.log").read_text(encoding="utf-8").splitlines() if line.startswith("round ")]
    assert ["accuracy" in line for line in said] == [False, True, True]
    for report in ("report.md", "report.html"):
        assert "–" in (whole / report).read_text(encoding="utf-8"), f"{report} hides that a round has no score"

"""Judges as a reward: their numbers, who may be one, and what a run says of the runs that it begins with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_library import world as library_world  # noqa: F401

from audits.judges import audit_judges, pair_run
from fedveil.common.derived import EarlierFile, sources_in, together
from fedveil.common.errors import ConfigError, DataError, ModelNotLoaded
from fedveil.common.model.base import load_base_model
from fedveil.common.model.files import files_digest
from fedveil.common.run_lines import RoundLine, read_file, read_lines
from fedveil.contrib.tasks.judging import Judge
from fedveil.contrib.tasks.pairs import Pair, rows_of_pair
from fedveil.experiments.evaluate import load_result
from fedveil.experiments.evaluate_on import evaluate_on
from fedveil.experiments.in_process import run_in_process
from fedveil.experiments.serving.merge import merge_run
from fedveil.reports.data import report_of
from fedveil.reports.derived import sources_of
from fedveil.strategies.job import configure

Folder = Callable[[str], str]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def judge(model_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a private run of a judge, and the merged judge."""
    folder = tmp_path_factory.mktemp("judge")
    run = run_in_process({**pair_run(model_folder("bert"), "bradley-terry", folder), "rounds": 2}, 2)
    merge_run(run, folder / "merged")
    return run, folder / "merged"


@pytest.fixture
def prompts(model_folder: Folder, tmp_path: Path, judge: tuple[Path, Path]) -> dict[str, Any]:
    """Return the settings of a run whose one reward is the judge's."""
    rows = [{"prompt": f"the film {i} was", "completion": "warm"} for i in range(60)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    pairs = pair_run(model_folder("llama"), "dpo", tmp_path)
    return {key: value for key, value in pairs.items() if not key.startswith("preference.")} | {
        "model.task": "grpo",
        "model.max-length": 24,
        "data.name": str(path),
        "data.test-size": 10,
        "rollout.rewards": "judge:1",
        "rollout.judge": str(judge[1]),
        "rollout.judge-sha256": files_digest(judge[1]),
        "rounds": 1,
    }


@pytest.mark.rough_prices
def test_a_judge_gives_the_number_of_its_run_and_reads_each_answer_alone(judge: tuple[Path, Path]) -> None:
    result = load_result(judge[0] / "adapter")
    pairs = [("the film", "the warm film"), ("", "the awful film"), ("a long question " * 9, "lovely")]
    own = Judge(str(judge[1]), files_digest(judge[1]))
    found = own.numbers(pairs, CPU)
    for (question, answer), number in zip(pairs, found, strict=True):
        (record,) = result.task.prepare(result.base, [Pair(question=question, chosen=answer, rejected="-")], 39)
        row = {key: torch.tensor([value]) for key, value in rows_of_pair(record)[0].items()}
        with torch.no_grad():
            assert number == pytest.approx(float(result.module(row)[0, 0].sigmoid()), rel=1e-4)
        assert own.numbers([(question, answer)], CPU) == [pytest.approx(number, rel=1e-6)]
    assert len(set(found)) == 3


@pytest.mark.rough_prices
def test_a_policy_learns_by_a_judge_and_the_claim_has_the_judges_run(
    prompts: dict[str, Any], judge: tuple[Path, Path]
) -> None:
    folder = run_in_process(prompts, 2)
    lines = read_lines(RoundLine, folder)
    assert not any(line.refusals or line.failures for line in lines)
    figures = {figure.name: figure.value for figure in lines[-1].figures}
    assert 0 < figures["judge"] == figures["reward"] < 1
    (source,) = read_file(EarlierFile, folder).sources
    (known,) = sources_of(judge[0])
    assert (source.run, source.epsilon, source.claim) == (known.run, known.epsilon, known.claim)
    data = report_of(folder)
    assert data.headline.epsilon is not None
    assert known.epsilon is not None
    total = data.headline.epsilon + known.epsilon
    assert f"begins with what 1 earlier run ({known.run}) released. A record that was in it too" in data.claim.sentence
    assert together(sources_of(folder))[0] == pytest.approx(total)
    for page in ("report.md", "report.html", "adapter/README.md"):
        assert "begins with what 1 earlier run" in (folder / page).read_text(encoding="utf-8")
    # Whoever goes on from here counts both.
    merge_run(folder, folder / "merged")
    config = json.loads((folder / "merged" / "config.json").read_text(encoding="utf-8"))
    assert {one.run for one in sources_in(config)} == {known.run, data.run}


@pytest.mark.rough_prices
@pytest.mark.parametrize("loss", ["dpo", "bradley-terry", "text", "reward"])
def test_pairs_and_rewards_are_scored_on_a_set_as_in_the_run_without_a_drift(
    loss: str, prompts: dict[str, Any], model_folder: Folder, tmp_path: Path
) -> None:
    model = model_folder("bert" if loss == "bradley-terry" else "llama")
    settings = prompts if loss == "reward" else {**pair_run(model, loss, tmp_path), "rounds": 1}
    folder = run_in_process(settings, 2)
    (change,) = evaluate_on(folder, [settings["data.name"]])[0].changes
    own = read_lines(RoundLine, folder)[-1]
    assert change.after is not None
    assert (change.after.value, change.loss_after) == (pytest.approx(own.accuracy), pytest.approx(own.loss, rel=1e-3))
    assert change.drift is None
    assert ", drift –, loss" in list(change.lines())[1]


def test_a_judge_is_refused_that_is_another_one_or_none(
    judge: tuple[Path, Path], model_folder: Folder, tmp_path: Path
) -> None:
    with pytest.raises(ModelNotLoaded, match="other files"):
        Judge(str(judge[1]), "0" * 64)
    other = Path(model_folder("bert"))
    with pytest.raises(DataError, match="cannot be read"):
        Judge(str(other), files_digest(other))
    for place, planted in (("0_Transformer/adapter_config.json", "{}"), ("modules.json", '[{"path": "../head"}]')):
        copy = tmp_path / place.replace("/", "-")
        shutil.copytree(judge[1], copy)
        (copy / place).write_text(planted, encoding="utf-8")
        with pytest.raises(ModelNotLoaded, match=r"no hash covers|is no judge"):
            Judge(str(copy), files_digest(copy))
    endless = tmp_path / "endless"
    shutil.copytree(judge[1], endless)
    known = json.loads((endless / "0_Transformer" / "config.json").read_text(encoding="utf-8"))
    known["fedveil_sources"][0]["epsilon"] = "inf"
    (endless / "0_Transformer" / "config.json").write_text(json.dumps(known), encoding="utf-8")
    with pytest.raises(ConfigError, match="has no claim"):
        Judge(str(endless), files_digest(endless))
    config = json.loads((judge[1] / "0_Transformer" / "config.json").read_text(encoding="utf-8"))
    assert [source.epsilon is not None for source in sources_in(config)] == [True]
    with pytest.raises(DataError, match="fedveil_sources"):
        sources_in({"fedveil_sources": [{"run": "1"}]})


def test_the_audit_of_judges_finds_its_faults(tmp_path: Path) -> None:
    assert all(finding.passed for finding in audit_judges(tmp_path))


@pytest.mark.rough_prices
def test_a_model_of_a_run_without_a_claim_is_no_reference_also_without_its_card(
    model_folder: Folder, tmp_path: Path
) -> None:
    settings = {**pair_run(model_folder("llama"), "dpo", tmp_path), "rounds": 1}
    for mode in ("none", "dp-sgd"):
        merge_run(run_in_process({**settings, "privacy.mode": mode}, 2), tmp_path / mode)
    (tmp_path / "none" / "README.md").unlink()
    configure({**settings, "model.name": str(tmp_path)})  # nobody reads files before a policy has allowed the model
    with pytest.raises(ConfigError, match=r"was trained on records by run .*, which has no claim"):
        run_in_process({**settings, "model.name": str(tmp_path / "none")}, 2)
    second = run_in_process({**settings, "model.name": str(tmp_path / "dp-sgd")}, 2)
    assert "begins with what 1 earlier run" in report_of(second).claim.sentence
    assert len(sources_of(second)) == 2
    base = load_base_model(str(tmp_path / "none"), "causal-lm")
    (bare,) = sources_in(base.module.config.to_dict())
    assert bare.epsilon is None


@pytest.mark.rough_prices
def test_a_run_from_a_library_says_what_its_adapters_cost(library_world: dict[str, Any]) -> None:  # noqa: F811
    folder = run_in_process({**library_world, "rounds": 1, "start.noise-multiplier": 4.0}, 2)
    sentence, sources = report_of(folder).claim.sentence, read_file(EarlierFile, folder).sources
    assert len(sources) == len({source.run for source in sources}) > 0
    assert f"begins with what {len(sources)} earlier run" in sentence
    assert ("has no ε for all" in sentence) == (together(sources)[0] is None)

"""A run's model beside the one that it began with, on other sets: equal to stock libraries, counted by a slow loop."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel
from scipy.stats import binomtest
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from audits.tiny_models import write_questions, write_reviews
from fedveil.cli.main import app
from fedveil.common.data.sources import train_and_test
from fedveil.common.errors import ConfigError, DataError
from fedveil.common.model.score import Score
from fedveil.common.model.scoring import RIGHT_OPTION
from fedveil.common.run_lines import BaselineFile, Figure, RoundLine, read_file, read_lines
from fedveil.common.tasks.base import Scored
from fedveil.common.tasks.causal_lm import CausalLM
from fedveil.common.tensor_file import read_tensors
from fedveil.experiments import evaluate_on as module
from fedveil.experiments.evaluate_on import drift_of, evaluate_on
from fedveil.experiments.in_process import run_in_process
from fedveil.reports.evaluated import Answer, EvaluatedFile, Evaluation, Pair, change_of, mcnemar
from fedveil.strategies.job import configure

pytestmark = pytest.mark.rough_prices
OPEN = {"privacy.mode": "none", "rounds": 1, "training.learning-rate": 0.3, "server.optimizer": "none"}


def with_ward(path: Path, target: Path) -> Path:
    """Write a copy of a table with a column ``ward``."""
    rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    with target.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "ward"])
        writer.writeheader()
        writer.writerows({**row, "ward": "ab"[i % 3 == 0]} for i, row in enumerate(rows))
    return target


class Stock(NamedTuple):
    """What stock libraries say of a record."""

    right: bool
    loss: float
    log_shares: torch.Tensor


@torch.no_grad()
def stock_labels(folder: Path, settings: dict[str, Any], rows: list[dict[str, str]], *, tuned: bool) -> list[Stock]:
    """Return the labels of stock transformers and PEFT with the head's tensors, each record by itself."""
    name = settings["model.name"]
    tokenizer, encoder = AutoTokenizer.from_pretrained(name), AutoModel.from_pretrained(name, add_pooling_layer=False)
    head = read_tensors(folder / "adapter" / "head.safetensors")
    if tuned:
        encoder = PeftModel.from_pretrained(encoder, str(folder / "adapter"))
    encoder.eval()
    found = []
    for row in rows:
        given = tokenizer(row["text"], truncation=True, max_length=settings["model.max-length"], return_tensors="pt")
        pooled = encoder(**given).last_hidden_state[0].mean(0)
        scale = settings_of(folder)["model.feature-scale"]
        pooled = torch.nn.functional.normalize(pooled, dim=-1) * scale if scale else pooled
        shares = (head["weight"] @ pooled + head["bias"]).log_softmax(-1)
        label = ["bad", "good"].index(row["label"])
        found.append(Stock(int(shares.argmax()) == label, -float(shares[label]), shares))
    return found


def settings_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text(encoding="utf-8"))["settings"])


def check(found: Evaluation, name: str, before: list[Stock], after: list[Stock]) -> None:
    """An AssertionError unless a slice has what stock libraries' answers give in a slow loop."""
    change, gained, forgotten, drift = next(c for c in found.changes if c.slice == name), 0, 0, 0.0
    for one, other in zip(before, after, strict=True):
        gained += other.right and not one.right
        forgotten += one.right and not other.right
        for p, q in zip(one.log_shares.tolist(), other.log_shares.tolist(), strict=True):
            drift += math.exp(p) * (p - q)
    n = len(before)
    assert (change.records, change.gained, change.forgotten) == (n, gained, forgotten)
    assert change.before is not None
    assert change.after is not None
    assert change.before.value == sum(one.right for one in before) / n
    assert change.after.value == sum(one.right for one in after) / n
    assert change.loss_before == pytest.approx(sum(one.loss for one in before) / n, rel=1e-5)
    assert change.loss_after == pytest.approx(sum(one.loss for one in after) / n, rel=1e-5)
    assert change.drift == pytest.approx(drift / n, rel=1e-3)
    assert sum(map(sum, change.confusion_before)) == sum(map(sum, change.confusion_after)) == n
    assert sum(change.confusion_after[i][i] for i in range(2)) == sum(one.right for one in after)


def test_scores_are_those_of_stock_libraries_and_a_swapped_before_is_found(
    toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = {**toy_settings, **OPEN, "strategy": "ffa-lora", "head.policy": "frozen"}
    folder = run_in_process(toy, 2)
    other = with_ward(write_reviews(tmp_path / "others.csv", 90, seed=5), tmp_path / "wards.csv")
    rows = list(csv.DictReader(other.read_text(encoding="utf-8").splitlines()))
    before, after = (stock_labels(folder, toy, rows, tuned=tuned) for tuned in (False, True))
    (found,) = evaluate_on(folder, [str(other)], "ward")
    assert [change.slice for change in found.changes] == ["all", "a", "b"]
    assert found.changes[0].gained, "nothing was learnt: nothing is proved"
    check(found, "all", before, after)
    for ward in "ab":
        own = [i for i, row in enumerate(rows) if row["ward"] == ward]
        check(found, ward, [before[i] for i in own], [after[i] for i in own])
    monkeypatch.setattr(module, "Pair", lambda before, after, *more: Pair(after, before, *more))
    (wrong,) = evaluate_on(folder, [str(other)], "ward")
    with pytest.raises(AssertionError):
        check(wrong, "all", before, after)


def test_on_the_runs_own_test_part_both_scores_are_the_runs_own(toy_settings: dict[str, Any]) -> None:
    folder = run_in_process({**toy_settings, **OPEN}, 2)
    (found,) = evaluate_on(folder, [toy_settings["data.name"]])
    first, last, change = read_file(BaselineFile, folder), read_lines(RoundLine, folder)[-1], found.changes[0]
    assert found.set == "reviews.csv, the test part"
    assert change.before is not None
    assert change.after is not None
    assert (change.before.value, change.after.value) == (first.accuracy, last.accuracy)
    assert (change.loss_before, change.loss_after) == pytest.approx((first.loss, last.loss), rel=1e-6)


def test_what_sites_trained_on_is_left_out_and_said(
    toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run_in_process({**toy_settings, **OPEN}, 2)
    own = Path(toy_settings["data.name"])
    seen, _ = train_and_test(configure(toy_settings).config.data, "classification")
    spaced = [e.text.upper().replace(" ", "  , ") for e in seen.examples[:7]]  # type: ignore[attr-defined]
    rows = write_reviews(tmp_path / "others.csv", 20, seed=5).read_text(encoding="utf-8")
    other = tmp_path / "with-some.csv"
    other.write_text(rows + "".join(f'"{text}",bad,a\n' for text in spaced), encoding="utf-8")
    (whole,) = evaluate_on(folder, [str(other)])
    assert (whole.left_out, whole.changes[0].records) == (0, 27), "records of sites were read, of no named data set"
    monkeypatch.setattr(module, "DATASETS", {str(own): None})
    (found,) = evaluate_on(folder, [str(other)])
    assert (found.left_out, found.changes[0].records) == (7, 20)
    assert next(found.lines()) == "with-some.csv: 7 records left out that sites trained on"
    other.write_text("\n".join(["text,label,author", *(f'"{text}",bad,a' for text in spaced)]), encoding="utf-8")
    with pytest.raises(DataError, match="trained on all records of with-some"):
        evaluate_on(folder, [str(other)])


def test_a_language_model_is_scored_by_token_and_a_record_by_its_whole_answer(
    toy_generation: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run_in_process({**toy_generation, **OPEN}, 2)
    other = write_questions(tmp_path / "others.csv", 20, seed=3)
    (found,) = evaluate_on(folder, [str(other)])
    name, loss, drift, tokens = toy_generation["model.name"], [0.0, 0.0], 0.0, 0
    tokenizer = AutoTokenizer.from_pretrained(name)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(name), str(folder / "adapter")).eval()
    models = AutoModelForCausalLM.from_pretrained(name).eval(), tuned
    for row in csv.DictReader(other.read_text(encoding="utf-8").splitlines()):
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        answer = (answer + [tokenizer.eos_token_id] * (tokenizer.eos_token_id is not None))[:23]
        given = torch.tensor([prompt[-(24 - len(answer)) :] + answer])
        with torch.no_grad():
            p, q = (model(given).logits[0, -len(answer) - 1 : -1].double().log_softmax(-1) for model in models)
        drift += float((p.exp() * (p - q)).sum())
        tokens += len(answer)
        for i, shares in enumerate((p, q)):
            loss[i] -= float(shares[range(len(answer)), answer].sum())
    change = found.changes[0]
    assert (change.loss_before, change.loss_after) == pytest.approx((loss[0] / tokens, loss[1] / tokens), rel=1e-5)
    assert change.drift == pytest.approx(drift / tokens, rel=1e-3)
    assert (change.records, change.confusion_after) == (20, [])
    assert found.figures == []
    monkeypatch.setattr(CausalLM, "scored", Scored(options=lambda _, record: [record, record]))
    (found,) = evaluate_on(folder, [str(other)])
    (figure,) = (figure for figure in found.figures if figure.name == RIGHT_OPTION)
    assert (figure.before and figure.before.value, figure.after and figure.after.value) == (0.0, 0.0), (
        "neither is ahead"
    )


def test_each_rank_of_a_nested_adapter_is_scored(toy_settings: dict[str, Any], tmp_path: Path) -> None:
    folder = run_in_process({**toy_settings, **OPEN, "strategy": "dylora", "head.policy": "frozen"}, 2)
    other = write_reviews(tmp_path / "others.csv", 40, seed=5)
    found = evaluate_on(folder, [str(other)])
    assert [one.model for one in found] == ["final", "rank 1", "rank 2"]
    rows = list(csv.DictReader(other.read_text(encoding="utf-8").splitlines()))
    (folder / "adapter" / "adapter_config.json").rename(tmp_path / "whole.json")
    before = stock_labels(folder, toy_settings, rows, tuned=False)
    for one in found[1:]:
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            cut = folder / "ranks" / one.model.removeprefix("rank ") / file
            (folder / "adapter" / file).write_bytes(cut.read_bytes())
        check(one, "all", before, stock_labels(folder, toy_settings, rows, tuned=True))


def test_the_command_names_what_the_task_is_judged_by(
    toy_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run_in_process({**toy_settings, **OPEN}, 2)
    figures = Figure("micro F1", 0.5), Figure("macro F1", 0.25)
    score = Score(0.5, 1.0, name="micro F1", figures=figures)
    monkeypatch.setattr("fedveil.experiments.evaluate.evaluate_run", lambda _: score)
    outcome = CliRunner().invoke(app, ["evaluate", str(folder)])
    assert outcome.output.endswith("micro F1 50.0 %  macro F1 25.0 %  loss 1.0000\n")
    with pytest.raises(ConfigError, match="sst2-dev is a named set"):
        evaluate_on(folder, ["sst2-dev"], "ward")


def test_the_command_prints_the_table_keeps_every_set_and_says_what_weakens_the_claim(
    toy_settings: dict[str, Any], tmp_path: Path
) -> None:
    folder = run_in_process({**toy_settings, "rounds": 1, "privacy.noise-multiplier": 1.0}, 2)
    one, two = (write_reviews(tmp_path / f"{name}.csv", 30, seed=i) for i, name in enumerate(("one", "two"), 5))
    for sources in (f"{one},{two}", str(two)):
        outcome = CliRunner().invoke(app, ["evaluate", str(folder), "--on", sources])
        assert outcome.exit_code == 0, outcome.output
    assert "two.csv, final (30 records)" in outcome.output
    assert "gained" in outcome.output
    assert [e.set for e in read_file(EvaluatedFile, folder).evaluations] == ["one.csv", "two.csv"]
    lines = (folder / "privacy.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "privacy.jsonl").write_text("\n".join(lines[1:]) + "\n", encoding="utf-8")
    outcome = CliRunner().invoke(app, ["evaluate", str(folder), "--on", str(two)])
    assert "WARNING: round 1: no line in privacy.jsonl" in outcome.output, outcome.output


@pytest.mark.parametrize(
    ("source", "words"),
    [("reuters", "other records than this run"), ("asdiv", "other records than this run"), ("labels.csv", "'fine'")],
)
def test_a_set_with_other_labels_is_refused_in_one_sentence(
    toy_settings: dict[str, Any], tmp_path: Path, source: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run_in_process({**toy_settings, **OPEN}, 2)
    table = write_reviews(tmp_path / "labels.csv", 20, seed=5)
    table.write_text(table.read_text(encoding="utf-8").replace(",good,", ",fine,"), encoding="utf-8")
    monkeypatch.setattr(module, "load_result", lambda _: pytest.fail("a model is loaded for a set that is refused"))
    with pytest.raises(DataError, match=words) as caught:
        evaluate_on(folder, [str(table) if source.endswith("csv") else source])
    assert "\n" not in str(caught.value)


def test_the_intervals_of_pairs_and_the_test_of_the_change() -> None:
    assert mcnemar(9, 1) == pytest.approx(binomtest(1, 10).pvalue)
    right, wrong = Answer(1.0, 0.1, 1.0, 0), Answer(0.0, 2.0, 1.0, 1)
    answers = [(wrong, right)] * 9 + [(right, wrong)] + [(right, right)] * 80 + [(wrong, wrong)] * 10
    change = change_of("all", [Pair(*both, 0.0, 0) for both in answers], counts=True, classes=2).change
    b, c, n = 9.5, 1.5, 102.0
    half = 1.959963984540054 * math.sqrt(b + c - (b - c) ** 2 / n) / n
    assert change.value == pytest.approx(0.08)
    assert (change.low, change.high) == pytest.approx(((b - c) / n - half, (b - c) / n + half))
    most, every = Answer(2.0, 0.1, 3.0, None), Answer(3.0, 0.1, 3.0, None)
    several = change_of("all", [Pair(most, every, 0.0, None)] * 4, counts=True, classes=2)
    assert (several.before and several.before.value, several.after and several.after.value) == (0.0, 1.0)
    assert (several.gained, several.confusion_after) == (4, [])
    same = change_of("all", [Pair(right, right, 0.0, 0)] * 5, counts=True, classes=2)
    assert same.change.low < 0 < same.change.high
    assert (same.p, same.kept.value if same.kept else 0, same.confusion_after) == (1.0, 1.0, [[5, 0], [0, 0]])


def test_the_drift_of_several_labels_is_that_of_a_yes_or_no_for_each() -> None:
    before, after = torch.tensor([[0.3, -1.0, 2.0]]), torch.tensor([[1.3, -1.0, 0.5]])
    p, q = before.sigmoid().double(), after.sigmoid().double()
    wanted = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum()
    assert drift_of(before, after, torch.tensor([[1, 0, 1]]), ahead=False) == pytest.approx([float(wanted)], rel=1e-5)

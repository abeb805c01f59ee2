"""Synthetic tables: what a run learns within a template, what its model writes, and what the card claims."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from merged_runs import fedveil

from audits.tiny_models import write_reviews
from fedveil.client.pins import check_pins, unpinned_columns
from fedveil.client.policy import Policy
from fedveil.client.site import own_settings
from fedveil.common.config.flat import Columns
from fedveil.common.data.sources import load_dataset
from fedveil.common.errors import ConfigError, PolicyRefusal
from fedveil.common.model.base import load_base_model
from fedveil.common.tasks import TASKS
from fedveil.common.tasks.template import template_of
from fedveil.experiments.in_process import run_in_process
from fedveil.experiments.serving.generate import _counts, shares_of
from fedveil.experiments.sweep.fitted_head import fitted
from fedveil.strategies.job import configure

pytestmark = pytest.mark.rough_prices

TEMPLATE = "question {prompt} answer {completion}"
ROWS = 40


@pytest.fixture
def toy_table(toy_generation: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Return settings of a run that teaches a tiny Llama whole reviews with their label."""
    columns = {"data.prompt": "label", "data.completion": "text", "data.template": TEMPLATE, "data.labels": "bad,good"}
    return {**toy_generation, "data.name": str(write_reviews(tmp_path / "reviews.csv", 160)), **columns}


@pytest.fixture
def run(toy_table: dict[str, Any]) -> Path:
    return run_in_process({**toy_table, "rounds": 1, "training.learning-rate": 0.05}, 2)


def test_every_token_of_a_record_is_learnt_within_a_template(toy_table: dict[str, Any]) -> None:
    config = configure(toy_table).config
    base, task = load_base_model(config.model.name, "causal-lm"), TASKS["causal-lm"]
    first, *_ = load_dataset(config.data, "causal-lm").examples
    (record,) = task.prepare(base, [first], 24)
    words = base.processor.convert_ids_to_tokens([token for token in record["labels"] if token >= 0])
    assert words[:3] == ["question", "bad", "answer"] or words[:3] == ["question", "[UNK]", "answer"]
    assert words[-1] == "[SEP]"
    assert len(words) == 4 + len(first.text.split()) + len(str(getattr(first, "completion", "")).split()) - 1
    plain = configure({**toy_table, "data.template": ""}).config
    bare, *_ = load_dataset(plain.data, "causal-lm").examples
    same = [(one, one.canonical(None), one.texts()) for one in (first, bare)]
    assert same[0] == same[1], "a ledger would not know the record again"
    assert first.likeness() == getattr(first, "completion", "").casefold()


def test_a_table_is_written_in_the_runs_columns_and_no_record_is_read(run: Path, tmp_path: Path) -> None:
    (tmp_path / "reviews.csv").unlink()
    tables = []
    for name in ("one.jsonl", "two.jsonl", "other.csv"):
        code, said = fedveil("generate", run, "--rows", ROWS, "--out", tmp_path / name, "--seed", 3)
        assert code == 0, said
        assert f"texts of at most {4 * ROWS}" in said
        assert "No private row was read" in said
        tables.append((tmp_path / name).read_text())
    assert tables[0] == tables[1]
    rows = [json.loads(line) for line in tables[0].splitlines()]
    labels = [row["label"] for row in rows]
    assert max(labels.count("good"), labels.count("bad")) == ROWS / 2
    assert f"{len(rows)} of {ROWS} rows" in said
    assert all(set(row) == {"label", "text"} and row["text"].strip() for row in rows)
    with (tmp_path / "other.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == rows
    card = (tmp_path / "one.md").read_text()
    promise = yaml.safe_load(card.split("---")[1])["differential_privacy"]
    assert promise["epsilon"] == pytest.approx(8, abs=0.1)
    assert promise["unit"] in card
    assert "No private row was read" in card
    assert "NO PRIVACY CLAIM" not in card
    code, said = fedveil("generate", run, "--rows", ROWS, "--out", tmp_path / "one.jsonl")
    assert "exists already" in said


def test_shares_are_given_and_a_run_without_a_claim_says_so(toy_table: dict[str, Any], tmp_path: Path) -> None:
    run = run_in_process({**toy_table, "rounds": 1, "privacy.mode": "none"}, 2)
    code, said = fedveil(
        "generate", run, "--rows", 12, "--seed", 2, "--shares", "good=3, bad=1", "--out", tmp_path / "t.jsonl"
    )
    assert code == 0, said
    assert "NO PRIVACY CLAIM" in said
    assert "**THIS TABLE HAS NO PRIVACY CLAIM.**" in (tmp_path / "t.md").read_text()
    labels = [json.loads(line)["label"] for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert 3 < labels.count("good") <= 9
    assert 0 < labels.count("bad") <= 3
    assert labels != sorted(labels)
    code, said = fedveil("generate", run, "--rows", 12, "--new-tokens", 1, "--out", tmp_path / "none.jsonl")
    assert (code, "of 48 texts was a record" in said) == (1, True)
    assert not (tmp_path / "none.jsonl").exists()


def test_a_site_reads_its_own_records_within_the_template_that_its_policy_pins(toy_table: dict[str, Any]) -> None:
    config = configure(toy_table).config
    columns = {role.setting: config.data.columns[role.setting] for role in TASKS["causal-lm"].roles}
    pinned = Policy(task="causal-lm", columns=Columns({**unpinned_columns(), **columns}), max_length=24)
    check_pins(pinned, config, TASKS["causal-lm"], private=True)
    own, *_ = load_dataset(own_settings(config, pinned), "causal-lm", config.data.name).examples
    assert own.template == TEMPLATE
    other = configure({**toy_table, "data.template": "{prompt}: {completion}"}).config
    with pytest.raises(PolicyRefusal, match=r"the run asks for data\.template = '\{prompt\}: \{completion\}'"):
        check_pins(pinned, other, TASKS["causal-lm"], private=True)


def test_a_run_that_learnt_no_whole_record_is_refused(toy_generation: dict[str, Any], tmp_path: Path) -> None:
    run = run_in_process({**toy_generation, "rounds": 1}, 2)
    code, said = fedveil("generate", run, "--rows", 2, "--out", tmp_path / "t.csv")
    assert (code, "has not learnt whole records" in said, "data.template" in said) == (1, True, True)
    with pytest.raises(ConfigError, match="not 'chat': leave it empty"):
        configure({**toy_generation, "model.task": "chat", "data.template": TEMPLATE})
    with pytest.raises(ConfigError, match="which reads no prompt"):
        configure({**toy_generation, "data.template": "{completion}"})


@pytest.mark.parametrize("text", ["{prompt}", "{completion}{prompt}", "{completion} {completion}", "a" * 2000])
def test_a_template_has_one_place_for_the_completion(text: str) -> None:
    with pytest.raises(ConfigError, match="at most one"):
        template_of(text)


def test_texts_are_parsed_back_into_columns() -> None:
    template = template_of("Label: {prompt}. Text: {completion} <end>")
    assert template.filled("{completion}", "fine") == "Label: {completion}. Text: fine <end>"
    assert template.opening("good") == "Label: good. Text:"
    assert template.completion_in(" warm, and joyful <end> ") == "warm, and joyful"
    lost = (" warm", " <end>", " warm Label: bad. Text: cold <end>", " warm. Text: cold <end>")
    assert [template.completion_in(text) for text in lost] == [None] * 4
    assert template_of("{completion}").completion_in(" warm ") == "warm"


def test_shares_add_up_and_are_never_counted(toy_table: dict[str, Any]) -> None:
    data = configure(toy_table).config.data
    assert shares_of("", data) == {"bad": 0.5, "good": 0.5}
    assert shares_of('"a, b=3", c=1', data) == {"a, b": 0.75, "c": 0.25}
    assert _counts(10, {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}) in ({"a": 4, "b": 3, "c": 3}, {"a": 3, "b": 4, "c": 3})
    for wrong in ("a=0,b=1", "a=x,b=1", "a,a", "a=nan"):
        with pytest.raises(ConfigError, match="--shares has"):
            shares_of(wrong, data)
    unnamed = configure({**toy_table, "data.labels": ""}).config.data
    with pytest.raises(ConfigError, match="not counted from records"):
        shares_of("", unnamed)


def test_a_head_is_fitted_to_synthetic_rows_and_scored_on_public_ones(
    run: Path, toy_settings: dict[str, Any], model_folder: Callable[[str], str], tmp_path: Path
) -> None:
    public = str(write_reviews(tmp_path / "public.csv", 60, seed=5))
    code, said = fedveil("generate", run, "--rows", ROWS, "--out", tmp_path / "made.csv", "--seed", 1)
    assert code == 0, said
    head = {**toy_settings, "adapter.name": "none", "strategy": "fedavg-lora", "data.test": public}
    head |= {"data.labels": "bad,good", "model.name": model_folder("bert")}
    head.pop("data.test-size")
    made = fitted(configure({**head, "data.name": str(tmp_path / "made.csv")}))
    real = fitted(configure({**head, "data.name": str(tmp_path / "reviews.csv")}))
    assert made.test_records == real.test_records == 60
    assert real.after.accuracy > 0.7
    assert 0 <= made.after.accuracy <= 1

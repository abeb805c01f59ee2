"""The stock head: what a run trains is what transformers and PEFT compute, and any other head is refused in a line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from merged_runs import CLOSE, TEXTS, fedveil, logits_of
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from audits.tiny_models import VOCABULARY, save_tiny_model, tiny_tokenizer
from fedveil.common.errors import ConfigError, ModelError
from fedveil.common.model.base import load_base_model
from fedveil.common.run_lines import RoundLine, read_lines
from fedveil.common.tasks import stock
from fedveil.common.tasks.stock_classification import STOCK
from fedveil.experiments.evaluate import evaluate_run
from fedveil.experiments.in_process import run_in_process
from fedveil.experiments.serving.ask import ask_run
from fedveil.experiments.serving.merge import load_finished, merge_run
from fedveil.strategies.job import configure

pytestmark = pytest.mark.rough_prices

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "embedding_size": 8,
    "input_embedding_size": 8,
    "output_embedding_size": 8,
}


@pytest.fixture(scope="session")
def pooled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Return a function from a kind of model to a folder with a tiny random one, its pooler in it."""

    def make(kind: str) -> str:
        folder = tmp_path_factory.mktemp(f"pooled-{kind}")
        with torch.random.fork_rng():
            torch.manual_seed(7)
            own = AutoConfig.for_model(kind).to_dict()
            sizes = {key: size for key, size in SIZES.items() if key in own}
            AutoModel.from_config(AutoConfig.for_model(kind, vocab_size=len(VOCABULARY), **sizes)).save_pretrained(
                folder
            )
        tiny_tokenizer().save_pretrained(folder)
        return str(folder)

    return make


@pytest.fixture
def toy_stock(toy_settings: dict[str, Any], pooled: Callable[[str], str]) -> dict[str, Any]:
    """Return settings of a run of a second with a stock head."""
    own = {"model.name": pooled("bert"), "head.pool": "stock", "model.feature-scale": 0.0, "rounds": 1}
    return {**toy_settings, **own, "adapter.targets": "query,value", "training.learning-rate": 0.1}


def stock_logits(model: Any, folder: Path) -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        rows = [tokenizer(text, truncation=True, max_length=24, return_tensors="pt") for text in TEXTS]
        return torch.cat([model.eval()(**row).logits for row in rows])


@pytest.mark.parametrize("kind", STOCK)
def test_a_merged_stock_head_is_the_stock_classifier(
    toy_stock: dict[str, Any], pooled: Callable[[str], str], tmp_path: Path, kind: str
) -> None:
    run = run_in_process({**toy_stock, "model.name": pooled(kind)}, 2)
    assert read_lines(RoundLine, run)[-1].participants == ["site-0", "site-1"]
    assert evaluate_run(run).accuracy == read_lines(RoundLine, run)[-1].accuracy
    wanted = logits_of(run, TEXTS)
    merged = tmp_path / 'it\'s "merged"\nraise SystemExit #'
    named: dict[str, Any] = {}
    exec(merge_run(run, merged), named)
    classifier = named["classify"].model
    assert (stock_logits(classifier, merged) - wanted).abs().max() < CLOSE
    assert classifier.config.id2label == {0: "bad", 1: "good"}
    merge_run(run, tmp_path / "adapter", "seq-cls")
    peft = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=2)
    assert (stock_logits(peft, tmp_path / "adapter") - wanted).abs().max() < CLOSE
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["modules_to_save"] == ["classifier"]
    shares = {answer.text: answer.probability for answer in ask_run(run, TEXTS[:1])}
    assert [shares["bad"], shares["good"]] == pytest.approx(wanted[0].softmax(-1).tolist(), abs=1e-6)


def test_a_stock_head_without_an_adapter_is_merged_and_has_no_other_form(
    toy_stock: dict[str, Any], tmp_path: Path
) -> None:
    alone = {"strategy": "fedavg-lora", "adapter.name": "none", "adapter.start": "public-metric"}
    run = run_in_process({**toy_stock, **alone, "head.metric": "public", "start.text": "made-up"}, 2)
    merge_run(run, tmp_path / "merged")
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert (stock_logits(classifier, tmp_path / "merged") - logits_of(run, TEXTS)).abs().max() < CLOSE
    code, said = fedveil("merge", run, tmp_path / "adapter", "--form", "seq-cls")
    assert (code, "trained the head alone" in said) == (1, True)


def test_a_head_that_no_stock_class_computes_is_refused_in_one_line(
    toy_settings: dict[str, Any], toy_generation: dict[str, Any], tmp_path: Path
) -> None:
    run = run_in_process({**toy_settings, "rounds": 1}, 2)
    code, said = fedveil("merge", run, tmp_path / "adapter", "--form", "seq-cls")
    assert (code, "no stock class computes what this run's head reads" in said) == (1, True)
    assert not (tmp_path / "adapter").exists()
    assert "choose one of merged, seq-cls" in fedveil("merge", run, tmp_path / "adapter", "--form", "gguf")[1]
    with pytest.raises(ConfigError, match=r"set model\.feature-scale to 0"):
        configure({**toy_settings, "head.pool": "stock"})
    with pytest.raises(ConfigError, match=r"which model\.task 'causal-lm' does not have"):
        configure({**toy_generation, "head.pool": "stock"})


def test_models_without_a_stock_head_or_a_pooler_are_refused_before_anybody_trains(
    toy_stock: dict[str, Any], tmp_path: Path
) -> None:
    bare = save_tiny_model("bert", tmp_path / "bare")
    with pytest.raises(ConfigError, match="hold no pooler"):
        run_in_process({**toy_stock, "model.name": bare}, 2)
    gpt = save_tiny_model("gpt2", tmp_path / "gpt2")
    with pytest.raises(ConfigError, match="no stock class computes a linear head on"):
        run_in_process({**toy_stock, "model.name": gpt, "adapter.targets": "c_attn"}, 2)


def test_a_pooler_counts_in_the_fingerprint_of_a_run_that_reads_it_alone(
    pooled: Callable[[str], str], tmp_path: Path
) -> None:
    folder = Path(pooled("bert"))
    before = {pool: load_base_model(str(folder), "classification", pool).fingerprint for pool in ("mean", "stock")}
    tensors = load_file(folder / "model.safetensors")
    tensors["pooler.dense.bias"] = tensors["pooler.dense.bias"] + 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    after = {pool: load_base_model(str(folder), "classification", pool).fingerprint for pool in ("mean", "stock")}
    assert before["mean"] == after["mean"]
    assert before["stock"] != after["stock"] != before["mean"]


def test_a_stock_class_that_computes_something_else_is_not_written(
    toy_stock: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers may change a class: what is written is compared first."""
    run, head_of = run_in_process(toy_stock, 2), stock.head_of
    monkeypatch.setattr(stock, "head_of", lambda model: {name: part + 0.01 for name, part in head_of(model).items()})
    for form in ("merged", "seq-cls"):
        with pytest.raises(ModelError, match="has other logits"):
            merge_run(run, tmp_path / form, form)
        assert not (tmp_path / form).exists()
    assert load_finished(run).labels == ("bad", "good")

"""A merged model answers as base model, adapter and head do: through FedVeil, stock libraries and a small reader."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from merged_runs import CLOSE, TEXTS, fedveil, logits_of
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from audits.tiny_models import TARGETS
from fedveil.cli.main import app
from fedveil.common.data.sources import public_test
from fedveil.experiments.evaluate import load_result
from fedveil.experiments.in_process import run_in_process
from fedveil.experiments.serving.ask import ask_run
from fedveil.experiments.serving.merge import merge_run
from fedveil.strategies.job import configure

pytestmark = [pytest.mark.rough_prices, pytest.mark.one_length]


def read_modules(folder: Path, texts: list[str]) -> Tensor:
    """Compute a folder's modules by their files alone, as sentence-transformers documents them."""
    place = folder / "0_Transformer"
    limit = json.loads((place / "sentence_bert_config.json").read_text())["max_seq_length"]
    tokenizer, encoder = AutoTokenizer.from_pretrained(place), AutoModel.from_pretrained(place).eval()
    rows = []
    for text in texts:
        tokens = tokenizer(text, truncation=True, max_length=limit, return_tensors="pt")
        with torch.no_grad():
            hidden = encoder(**tokens).last_hidden_state
        value = torch.empty(0)
        for module in json.loads((folder / "modules.json").read_text()):
            kind, place = module["type"].rpartition(".")[2], folder / module["path"]
            assert module["type"] == f"sentence_transformers.models.{kind}"
            if kind == "Transformer":
                assert place == folder / "0_Transformer"
            elif kind == "Pooling":
                config = json.loads((place / "config.json").read_text())
                assert [key for key, on in config.items() if on is True] == ["pooling_mode_mean_tokens"]
                assert config["word_embedding_dimension"] == hidden.shape[-1]
                value = hidden.mean(1)
            elif kind == "Normalize":
                value = value / value.norm(dim=-1, keepdim=True)
            else:
                config = json.loads((place / "config.json").read_text())
                dense = load_file(place / "model.safetensors")
                assert (kind, config["activation_function"]) == ("Dense", "torch.nn.modules.linear.Identity")
                assert dense["linear.weight"].shape == (config["out_features"], config["in_features"])
                value = value @ dense["linear.weight"].T + dense["linear.bias"]
        rows.append(value)
    return torch.cat(rows)


HEAD_ALONE = {"strategy": "fedavg-lora", "adapter.name": "none"}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"strategy": "fedavg-lora"},
    "dora": {"strategy": "fedavg-lora", "adapter.name": "dora"},
    "lora-sb": {"strategy": "fed-sb"},
    "unscaled": {"model.feature-scale": 0.0},
    "scaled": {"model.feature-scale": 3.0},
    "head-alone": HEAD_ALONE,
    "whitened": {
        **HEAD_ALONE,
        "adapter.start": "public-metric",
        "head.metric": "public",
        "start.text": "made-up",
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_classifier_is_computed_by_stock_sentence_transformers(
    toy_settings: dict[str, Any], tmp_path: Path, kind: str
) -> None:
    from sentence_transformers import SentenceTransformer

    run = run_in_process({**toy_settings, "rounds": 1, "training.learning-rate": 0.3, **KINDS[kind]}, 2)
    wanted = logits_of(run, TEXTS)
    merge_run(run, tmp_path / "merged")
    # Whitened logits reach 30, where float32's own step is 2e-6.
    close = CLOSE * max(1.0, float(wanted.abs().max()))
    assert (read_modules(tmp_path / "merged", TEXTS) - wanted).abs().max() < close
    stock = SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    assert (stock.encode(TEXTS, convert_to_tensor=True) - wanted).abs().max() < close
    assert json.loads((tmp_path / "merged" / "labels.json").read_text()) == ["bad", "good"]
    assert "id2label" not in (tmp_path / "merged" / "0_Transformer" / "config.json").read_text()
    base, merged = AutoModel.from_pretrained(toy_settings["model.name"]).state_dict(), stock[0].auto_model.state_dict()
    own = [name for name in merged if not name.startswith("pooler")]
    moved = [name for name in own if not merged[name].equal(base[name])]
    assert bool(moved) == (kind not in ("head-alone", "whitened")), (
        "merged weights do not hold the adapter, or hold one"
    )


def test_a_fault_in_the_dense_layer_is_found(toy_settings: dict[str, Any], tmp_path: Path) -> None:
    """The same comparison sees a head whose feature scale was forgotten."""
    run = run_in_process({**toy_settings, "rounds": 1, "model.feature-scale": 3.0}, 2)
    merge_run(run, tmp_path / "merged")
    module = load_result(run / "adapter").module
    from safetensors.torch import save_file

    forgotten = {"linear.weight": module.head.weight.detach(), "linear.bias": module.head.bias.detach()}
    save_file(forgotten, tmp_path / "merged" / "3_Dense" / "model.safetensors")
    assert (read_modules(tmp_path / "merged", TEXTS) - logits_of(run, TEXTS)).abs().max() > 10 * CLOSE


def test_pairs_of_texts_are_pairs_to_sentence_transformers(toy_settings: dict[str, Any], tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    run = run_in_process({**toy_settings, "rounds": 1, "data.text-pair": "author"}, 2)
    merge_run(run, tmp_path / "merged")
    pairs = [["a warm film", "the actor"], ["the story is dull", "one two"]]
    stock = SentenceTransformer(str(tmp_path / "merged"), device="cpu").encode(pairs, convert_to_tensor=True)
    assert (stock - logits_of(run, pairs)).abs().max() < CLOSE
    assert sum(answer.probability or 0 for answer in ask_run(run, pairs[0])) == pytest.approx(1)
    code, said = fedveil("ask", run, "a warm film")
    assert code == 1
    assert "text and text-pair: give 2, not 1" in said
    best = [max(answer.probability or 0 for answer in ask_run(run, pair)) for pair in pairs]
    (tmp_path / "texts").write_text("".join(f"{one}\t{other}\n" for one, other in pairs), encoding="utf-8")
    code, said = fedveil("ask", run, "--file", tmp_path / "texts")
    assert [line.partition("%")[0].strip() for line in said.splitlines()] == [f"{100 * value:.1f}" for value in best]
    assert [line.partition("\t")[2] for line in said.splitlines()] == [" ".join(pair) for pair in pairs]
    typed = "a warm film\nthe story is dull\tone two\n\nnever read"
    done = CliRunner().invoke(app, ["ask", str(run), "--interactive"], input=typed)
    assert "text and text-pair: give 2, not 1" in done.output, "one wrong line ends it"
    assert f"{100 * best[1]:.1f} %" in done.output
    assert fedveil("ask", run, "a", "b", "--interactive")[1].endswith("--file FILE or --interactive")
    (tmp_path / "texts").write_text("a\tb\n\n", encoding="utf-8")
    assert "texts, line 2 is empty" in fedveil("ask", run, "--file", tmp_path / "texts")[1]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_merged_language_model_has_the_same_logits_and_completes(
    toy_generation: dict[str, Any], model_folder: Callable[[str], str], tmp_path: Path, family: str
) -> None:
    own = {"model.name": model_folder(family), "adapter.targets": TARGETS[family]}
    run = run_in_process({**toy_generation, "rounds": 1, "training.learning-rate": 0.05, **own}, 2)
    result = load_result(run / "adapter")
    code, said = fedveil("merge", run, tmp_path / "merged")
    assert code == 0, said
    model, tokenizer = (kind.from_pretrained(tmp_path / "merged") for kind in (AutoModelForCausalLM, AutoTokenizer))
    tokens = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    mask = torch.ones_like(tokens)
    with torch.no_grad():
        wanted = result.module.eval()({"input_ids": tokens, "attention_mask": mask})
        assert (model(input_ids=tokens, attention_mask=mask).logits - wanted).abs().max() < CLOSE
    base = result.base.module
    assert type(model) is type(base)
    assert f"import AutoTokenizer, {type(base).__name__}" in said
    prompt = "question the film is answer"
    with torch.no_grad():
        out = model.generate(
            **tokenizer(prompt, return_tensors="pt"), max_new_tokens=12, do_sample=False, pad_token_id=0
        )
    begun = len(tokenizer(prompt)["input_ids"])
    (answer,) = ask_run(run, [prompt])
    assert answer.text == tokenizer.decode(out[0, begun:], skip_special_tokens=True).strip()
    assert answer.probability is None


def test_ask_gives_every_label_its_probability(toy_settings: dict[str, Any]) -> None:
    run = run_in_process({**toy_settings, "rounds": 1}, 2)
    shares = logits_of(run, TEXTS[:1])[0].softmax(-1)
    answers = ask_run(run, TEXTS[:1])
    assert {answer.text: answer.probability for answer in answers} == pytest.approx(
        {"bad": float(shares[0]), "good": float(shares[1])}, abs=1e-6
    )
    assert (answers[0].probability or 0) >= 0.5
    code, said = fedveil("ask", run, TEXTS[0])
    assert code == 0
    assert said.split("\n")[0].split()[-1] == answers[0].text


def test_whoever_may_read_a_model_may_read_its_tensors(toy_settings: dict[str, Any], tmp_path: Path) -> None:
    usual = os.umask(0o022)
    try:
        nested = run_in_process({**toy_settings, "strategy": "dylora", "rounds": 1}, 2)
        merge_run(nested, tmp_path / "model")
    finally:
        os.umask(usual)
    for folder in (nested / "adapter", nested / "ranks", tmp_path / "model"):
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert any(path.suffix == ".safetensors" for path in files)
        assert {path.name: oct(path.stat().st_mode & 0o777) for path in files} == {path.name: "0o644" for path in files}
        assert not list(folder.glob(".*"))


def test_a_merge_is_whole_or_not_at_all(
    toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_in_process({**toy_settings, "rounds": 1}, 2)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for words, wanted in (
        ((run, tmp_path / "full"), "exists already, and nothing is written over: name a new folder"),
        ((tmp_path, tmp_path / "new"), "holds no adapter, which is written at a run's end"),
    ):
        code, said = fedveil("merge", *words)
        assert code == 1
        assert wanted in said

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedveil.common.tasks.classification.write_modules", full_disk)
    code, said = fedveil("merge", run, tmp_path / "merged")
    assert (code, "No space left on device" in said) == (1, True)
    assert not list(tmp_path.glob("*merged*"))
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "head.safetensors"])
def test_a_run_that_lacks_a_file_is_one_line_and_no_hub_is_asked(toy_settings: dict[str, Any], name: str) -> None:
    run = run_in_process({**toy_settings, "rounds": 1}, 2)
    (run / "adapter" / name).unlink()
    code, said = fedveil("evaluate", run)
    assert (code, "Traceback" in said) == (1, False)
    assert f"{name} is not there: take the whole folder of the run, or put that file back" in " ".join(said.split())


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "head.safetensors", "adapter_config.json"])
def test_a_damaged_file_of_a_run_is_one_line(toy_settings: dict[str, Any], name: str) -> None:
    run = run_in_process({**toy_settings, "rounds": 1}, 2)
    file = run / "adapter" / name
    whole = file.read_bytes()
    others = {"half": whole[: len(whole) // 2], "none": b"", "text": b"no tensor is in this line"}
    if name == "adapter_config.json":
        others["of another rank"] = json.dumps({**json.loads(whole), "r": json.loads(whole)["r"] + 1}).encode()
        others["without its kind"] = json.dumps({"r": 2}).encode()
    else:
        others["of other tensors"] = save({"weight": torch.zeros(3, 5)})
    for content in others.values():
        file.write_bytes(content)
        code, said = fedveil("evaluate", run)
        assert code == 1, f"what has {content[:20]!r} is scored"
        assert str(file) in said or "is not of this run's model" in said, said


def test_the_merged_default_job_scores_as_the_run_did(toy_settings: dict[str, Any], tmp_path: Path) -> None:
    """Over the whole public test part, the labels of merged and apart are the same."""
    run = run_in_process({**toy_settings, "rounds": 1}, 2)
    merge_run(run, tmp_path / "merged")
    test = public_test(configure(toy_settings).config.data, "classification")
    texts = [str(getattr(example, "text", "")) for example in test.examples]
    assert read_modules(tmp_path / "merged", texts).argmax(-1).equal(logits_of(run, texts).argmax(-1))

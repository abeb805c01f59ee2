"""A finished classifier is right in stock code, or is refused by it: it never gets a head at random there."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from digits import digits, encoded, save_vit
from forked_python import Run
from image_worlds import toy_digits
from stock_jobs import stock_job

from audits.tiny_models import toy_run
from fedveil.common.model.base import load_base_model
from fedveil.common.run_lines import ConfigFile, read_file
from fedveil.experiments.in_process import run_in_process
from fedveil.experiments.serving.ask import ask_run
from fedveil.experiments.serving.merge import merge_run
from fedveil.reports import report_of

pytestmark = pytest.mark.rough_prices

HEAD_ALONE = {"strategy": "fedavg-lora", "adapter.name": "none"}
PAIRS = {"data.text-pair": "author"}
WORDS = {"text": ["a text"], "pairs": ["a text", "its pair"], "images": ["image.png"]}
TASK = {"images": "image-classification"}
STOCK = ("stock", "stock-head-alone", "stock-pairs", "stock-images")
KINDS = ("lora", "head-alone", "pairs", "images", "images-of-vit", *STOCK)
SERVE = """
import ast, contextlib, io, json, os, sys
sys.modules.update(common=None)
from transformers import pipeline
told = {}
for kind, (place, folder, code, task, words) in json.load(sys.stdin).items():
    os.chdir(place)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(code, {})
    try:
        found = pipeline(task, model=folder)(words, top_k=None)
    except (OSError, ValueError) as error:
        found = f"{type(error).__name__}: {error}"
    told[kind] = said.getvalue(), found
json.dump(told, sys.__stdout__)
"""


class Served(NamedTuple):
    """One merged model, and what other code makes of it."""

    run: Path
    folder: Path
    wanted: Mapping[str, float]
    """What ``fedveil ask`` answers: the probability of each label."""
    printed: str
    """What the code prints that ``fedveil merge`` prints."""
    piped: Any
    """What ``pipeline(task, model=folder)`` answers, or the error that it raises."""


def form_of(kind: str) -> str:
    return next((form for form in WORDS if form in kind), "text")


def run_of(kind: str, place: Path, model: str) -> Path:
    """Run a tiny job of a kind in a folder of its own."""
    if form_of(kind) == "images":
        name = "vit" if "vit" in kind else "dinov2"
        own = {"model.feature-scale": 0.0 if kind in STOCK else 2.0, "adapter.targets": "auto", "rounds": 1}
        return run_in_process({**toy_digits(lambda _: save_vit(place / name, name), place), **own}, 2, "1")
    toy = {**toy_run(model, place), "rounds": 1, "training.learning-rate": 0.3}
    settings = stock_job(toy, place / "model") if kind in STOCK else {**toy, "strategy": "fedavg-lora"}
    alone = HEAD_ALONE if "head-alone" in kind else {}
    return run_in_process({**settings, **alone, **(PAIRS if "pairs" in kind else {})}, 2, "1")


@pytest.fixture(scope="module")
def served(
    model_folder: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory, fresh_python: Run
) -> dict[str, Served]:
    """Return every kind of classifier, asked in another process, which has no FedVeil."""
    folders, asked, jobs = dict[str, tuple[Path, Path]](), dict[str, dict[str, float]](), dict[str, Any]()
    for kind in KINDS:
        place, form = tmp_path_factory.mktemp(kind), form_of(kind)
        run, merged = run_of(kind, place, model_folder("bert")), place / "merged"
        folders[kind] = run, merged
        (place / "image.png").write_bytes(encoded(digits(count=1)[0][0]))
        code = merge_run(run, merged)
        words = [str(place / word) if form == "images" else word for word in WORDS[form]]
        asked[kind] = {answer.text: answer.probability or 0.0 for answer in ask_run(run, words)}
        piped = {"text": words[0], "text_pair": words[1]} if form == "pairs" else words[0]
        jobs[kind] = (str(place), str(merged), code, TASK.get(form, "text-classification"), piped)
    done = fresh_python(SERVE, given=json.dumps(jobs))
    told = json.loads(done.stdout.splitlines()[-1])
    return {kind: Served(*folders[kind], asked[kind], *told[kind]) for kind in KINDS}


def shares(found: Any) -> dict[str, float]:
    """Return the probabilities in an answer of a pipeline."""
    rows = found[0] if isinstance(found[0], list) else found
    return {row["label"]: row["score"] for row in rows}


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipeline_is_right_where_a_stock_class_computes_the_head_and_refuses_elsewhere(
    served: dict[str, Served], kind: str
) -> None:
    found = served[kind]
    if kind in STOCK:
        assert shares(found.piped) == pytest.approx(found.wanted, abs=1e-5)
    else:
        assert isinstance(found.piped, str), f"a head at random answers {found.piped}"
        assert "Unrecognized model" in found.piped
    assert len(set(found.wanted.values())) == 2, "a head that says the same of all is right in any class"


@pytest.mark.parametrize("kind", KINDS)
def test_the_code_that_merge_prints_answers_as_the_run_does(served: dict[str, Served], kind: str) -> None:
    told = ast.literal_eval(served[kind].printed)
    assert (told if isinstance(told, dict) else shares(told)) == pytest.approx(served[kind].wanted, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_card_names_a_pipeline_and_a_configuration_labels_only_where_the_folder_serves_them(
    served: dict[str, Served], kind: str
) -> None:
    folder = served[kind].folder
    meta = yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert meta.get("pipeline_tag") == (TASK.get(form_of(kind), "text-classification") if kind in STOCK else None)
    (config,) = (
        folder.rglob("config.json") if kind in STOCK or "images" in kind else [folder / "0_Transformer/config.json"]
    )
    assert ("id2label" in json.loads(config.read_text(encoding="utf-8"))) == (kind in STOCK)
    assert (folder / "labels.json").exists() != (kind in STOCK)


def code_of(card: Path) -> str:
    """Return the code that a card prints."""
    return card.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]


def ran(run: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return what the code of a run's card prints where its base model is found by the name in the card."""
    base = Path(str(read_file(ConfigFile, run).settings["model.name"]))
    (run / base.name).symlink_to(base)
    monkeypatch.chdir(run)
    with redirect_stdout(StringIO()) as said:
        exec(code_of(run / "adapter" / "README.md"), {})
    return said.getvalue()


# The toy's targets fit a pooler too, which stock code makes though the run has none and no feature is read from it.
@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_the_code_of_a_card_runs_as_printed_and_answers_as_the_run_does(
    served: dict[str, Served], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = ran(served[kind].run, monkeypatch)
    if form_of(kind) == "images":
        assert said == "", "the head of images has a code of its own, that of the merged model"
    else:
        assert ast.literal_eval(said) == pytest.approx(served[kind].wanted, abs=1e-5)


def test_the_code_of_a_language_models_card_completes_a_prompt(
    toy_generation: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_in_process({**toy_generation, "rounds": 1}, 2)
    assert ran(run, monkeypatch)
    meta = yaml.safe_load((run / "adapter" / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert (meta["library_name"], meta["pipeline_tag"]) == ("peft", "text-generation")


@pytest.mark.parametrize("kind", ["lora", "head-alone", "stock-head-alone"])
def test_folder_and_card_name_what_was_trained(served: dict[str, Served], kind: str) -> None:
    alone, found = "head-alone" in kind, served[kind]
    method = "head-only" if alone else "fedavg-lora"
    assert found.run.name == f"{method}-1"
    for card, relation in ((found.run / "adapter" / "README.md", "adapter"), (found.folder / "README.md", "finetune")):
        text = card.read_text(encoding="utf-8")
        meta = yaml.safe_load(text.split("---")[1])
        assert meta["tags"] == ["federated-learning", "differential-privacy", method, "fedveil"]
        assert ("with a trained classification head\n" if alone else f"fine-tuned by {method}\n") in text
        assert ("lora" in text.replace("fedavg-lora", "")) != alone
        assert (meta["library_name"] == "peft") == (relation == "adapter" and not alone)
        assert "base_model_relation" not in meta, "a folder of the coordinator's is no model of the hub"
    assert (report_of(found.run).strategy, report_of(found.run).method) == ("fedavg-lora", method)


def test_a_base_model_of_another_kind_of_problem_makes_no_other_probabilities(
    model_folder: Callable[[str], str], tmp_path: Path
) -> None:
    """A pipeline takes the sigmoid of each logit where the configuration names several labels a record."""
    from transformers import pipeline

    toy = {**toy_run(model_folder("bert"), tmp_path), "rounds": 1, "training.learning-rate": 0.3}
    settings = stock_job(toy, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "problem_type": "multi_label_classification"}))
    assert load_base_model(str(file.parent), "classification").module.config.problem_type  # type: ignore[union-attr]
    run = run_in_process(settings, 2)
    merge_run(run, tmp_path / "merged")
    found = shares(pipeline("text-classification", model=str(tmp_path / "merged"))("a text", top_k=None))
    assert found == pytest.approx({answer.text: answer.probability for answer in ask_run(run, ["a text"])}, abs=1e-5)


def test_images_have_the_size_that_they_were_trained_at(served: dict[str, Served]) -> None:
    """The stock class takes images of any size, so the processor alone says which one is right."""
    made = json.loads((served["stock-images"].folder / "preprocessor_config.json").read_text())
    assert made["size"] == {"height": 8, "width": 8}

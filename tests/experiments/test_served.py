"""Finished runs answer the same where FedVeil is not installed: in a bare environment, a process of its own."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from merged_runs import CLOSE, TEXTS, logits_of
from safetensors.torch import load_file, save_file
from stock_jobs import stock_job
from torch import Tensor
from transformers import AutoTokenizer

from audits.tiny_models import TARGETS, toy_run, write_questions
from fedveil.common.run_lines import ConfigFile, read_file
from fedveil.experiments.evaluate import load_result
from fedveil.experiments.in_process import run_in_process
from fedveil.experiments.serving.merge import merge_run
from fedveil.strategies.recipes import FEWEST_ROUNDS

pytestmark = pytest.mark.rough_prices

ROOT = Path(__file__).resolve().parents[2]
OURS = sorted(package.parent.name for package in ROOT.glob("*/__init__.py"))
"""Every package of this project, as it lies at the top of the repository."""

GUARD = """\
import importlib.util, json, sys
found = [name for name in json.loads(sys.argv[1]) if importlib.util.find_spec(name) is not None]
assert not found, f"FedVeil can be imported here: {found}"
"""
SERVE = f"""\
{GUARD}
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from sentence_transformers import SentenceTransformer
from peft import AutoPeftModelForSequenceClassification

folders, texts, answers = json.loads(sys.argv[2]), json.loads(sys.argv[3]), {{}}
with torch.no_grad():
    for kind in ("default", "faulty"):
        model = SentenceTransformer(folders[kind], device="cpu")
        answers[kind] = model.encode(texts, convert_to_tensor=True).tolist()
    for kind, loader, own in (
        ("seq-cls", AutoPeftModelForSequenceClassification, {{"num_labels": 2}}),
        ("causal", AutoModelForCausalLM, {{}}),
    ):
        model, tokenizer = loader.from_pretrained(folders[kind], **own), AutoTokenizer.from_pretrained(folders[kind])
        rows = [tokenizer(text, truncation=True, max_length=24, return_tensors="pt") for text in texts]
        answers[kind] = [model.eval()(**row).logits[0].tolist() for row in rows]
json.dump(answers, open(sys.argv[4], "w"))
for code in json.loads(sys.argv[5]):
    exec(code, {{}})
"""


QUOTED = '\'"\nraise SystemExit("a folder\'s name ran") #'
"""What the name of a folder may hold, and what the printed code has to take for nothing but a name."""


class Served(NamedTuple):
    """What this process computes of each kind of result, and what the other one has answered."""

    here: dict[str, list[Tensor]]
    there: dict[str, list[Tensor]]
    printed: str
    """By the code that ``fedveil merge`` prints, run there."""


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the Python of an environment that has the libraries of this one, but not what is installed for editing.

    A folder that a ``.pth`` file names is searched; the ``.pth`` files in it, by which FedVeil is found, are not read.
    """
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "environment.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


def in_bare(python: Path, *words: str) -> subprocess.CompletedProcess[str]:
    # -I: neither PYTHONPATH nor the present folder.
    return subprocess.run([python, "-I", "-c", *words], capture_output=True, text=True, check=False)


FEWEST = FEWEST_ROUNDS["metric"]


def default_job(toy: dict[str, Any]) -> dict[str, Any]:
    """Return what is asked for, where a run's method is the recipe's alone; little of everything."""
    kept = ("model.name", "model.max-length", "data.name", "data.test-size", "data.partition", "privacy.delta")
    small = {"rounds": FEWEST, "evaluate-every": FEWEST, "start.text": "made-up", "start.records": 20}
    # Much noise is priced soonest, and moves weights as well.
    noise = {"privacy.epsilon": 50.0, "privacy.noise-multiplier": 6.0}
    return {**{key: toy[key] for key in (*kept, "output")}, **small, **noise, "recipe": "metric"}


def causal_job(toy: dict[str, Any], folder: Path, model: str) -> dict[str, Any]:
    own = {"model.name": model, "model.task": "causal-lm", "adapter.targets": TARGETS["llama"], "head.policy": "frozen"}
    # Ledgers of its own: the names of the sites are those of the run before.
    place = {"data.name": str(write_questions(folder / "questions.csv", 160)), "output": str(folder / "causal")}
    return {**toy, **own, **place, "rounds": 1}


def causal_logits(run: Path) -> list[Tensor]:
    result = load_result(run / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(result.base.module.config.name_or_path)
    rows = [tokenizer(text, truncation=True, max_length=24, return_tensors="pt") for text in TEXTS]
    with torch.no_grad():
        return [result.module.eval()({key: row[key] for key in ("input_ids", "attention_mask")})[0] for row in rows]


@pytest.fixture(scope="module")
def served(bare: Path, model_folder: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Run three tiny jobs, write each in a form for others, and ask all of them in the bare environment."""
    place = tmp_path_factory.mktemp("served")
    toy = toy_run(model_folder("bert"), place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "fedveil.common.starts.public_metric.MADE", 48
        )  # a map of 16 features needs no more made-up texts
        default = run_in_process(default_job(toy), 2)
    settings = read_file(ConfigFile, default).settings
    made = ("adapter.name", "head.metric", "phases")
    assert [settings[key] for key in made] == [
        "lora-metric",
        "public",
        "3 head on features, 6 adapter on jacobians, 1 head on features",
    ]
    assert FEWEST == 3 + 6 + 1
    stock = run_in_process(stock_job(toy, place / "stock"), 2)
    causal = run_in_process(causal_job(toy, place, model_folder("llama")), 2)
    folders = {kind: place / f"out-{kind}{QUOTED}" for kind in ("default", "faulty", "seq-cls", "causal")}
    codes = [
        merge_run(default, folders["default"]),
        merge_run(stock, folders["seq-cls"], "seq-cls"),
        merge_run(causal, folders["causal"]),
    ]
    shutil.copytree(folders["default"], folders["faulty"])
    _a_thousandth_off(folders["faulty"])
    told = {kind: str(folder) for kind, folder in folders.items()}
    words = (json.dumps(OURS), json.dumps(told), json.dumps(TEXTS), str(place / "there.json"), json.dumps(codes))
    done = in_bare(bare, SERVE, *words)
    assert done.returncode == 0, done.stderr
    answers = json.loads((place / "there.json").read_text())
    here = {
        "default": list(logits_of(default, TEXTS)),
        "seq-cls": list(logits_of(stock, TEXTS)),
        "causal": causal_logits(causal),
    }
    here["faulty"] = here["default"]
    return Served(here, {kind: [torch.tensor(row) for row in rows] for kind, rows in answers.items()}, done.stdout)


def _a_thousandth_off(folder: Path) -> None:
    """Plant a fault: a dense layer whose weights are a thousandth off."""
    file = folder / "3_Dense" / "model.safetensors"
    save_file({name: 1.001 * tensor for name, tensor in load_file(file).items()}, file)


def farthest(served: Served, kind: str) -> float:
    """Return the largest difference of two logits, relative to the largest logit where that is above 1."""
    pairs = list(zip(served.here[kind], served.there[kind], strict=True))
    assert all(here.shape == there.shape for here, there in pairs)
    largest = max(1.0, *(float(here.abs().max()) for here, _ in pairs))
    return max(float((here - there).abs().max()) for here, there in pairs) / largest


@pytest.mark.parametrize("kind", ["default", "seq-cls", "causal"])
def test_a_result_answers_the_same_where_fedveil_is_not(served: Served, kind: str) -> None:
    """What the default recipe makes through sentence-transformers, a stock head through PEFT, and a language model."""
    assert farthest(served, kind) < CLOSE


def test_the_code_that_merge_prints_runs_where_fedveil_is_not(served: Served) -> None:
    for line in served.printed.splitlines()[:2]:
        shares = ast.literal_eval(line)
        assert list(shares) == ["bad", "good"]
        assert sum(shares.values()) == pytest.approx(1)


def test_a_dense_layer_that_is_a_thousandth_off_is_found(served: Served) -> None:
    assert farthest(served, "faulty") > 10 * CLOSE


def test_the_bare_environment_has_the_libraries_and_a_copy_of_fedveil_would_be_found(bare: Path) -> None:
    """Else the other process could import what it is said to do without."""
    assert {"client", "common", "privacy", "reports", "server", "strategies"} <= set(OURS)
    assert in_bare(bare, GUARD, json.dumps(OURS)).returncode == 0
    assert in_bare(bare, GUARD, json.dumps(["transformers"])).returncode == 1, "the libraries are not there"
    with_ours = f"import sys; sys.path.append({str(ROOT)!r})\n{GUARD}"
    assert "FedVeil can be imported here" in in_bare(bare, with_ours, json.dumps(OURS)).stderr
    assert sys.executable != str(bare)

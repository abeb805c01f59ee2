"""The lm-evaluation-harness loads a run's adapter and finds its log-likelihoods: ``make test-harness``."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from audits.tiny_models import FILLER
from fedveil.experiments.evaluate import load_result
from fedveil.experiments.in_process import run_in_process

pytestmark = pytest.mark.harness
COUNT = 12
TASK = """\
task: fedveil-tiny
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{prompt}}}}"
doc_to_target: " {{{{completion}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def questions(file: Path) -> list[tuple[str, str]]:
    draw = random.Random(3)
    rows = [(" ".join(draw.choices(FILLER, k=5)), " ".join(draw.choices(FILLER, k=3))) for _ in range(COUNT)]
    lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in rows]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return rows


def test_the_harness_finds_the_log_likelihoods_of_the_runs_model(
    toy_generation: dict[str, Any], tmp_path: Path
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    run = run_in_process({**toy_generation, "rounds": 1, "privacy.mode": "none", "training.learning-rate": 0.3}, 2)
    adapter = run / "adapter"
    rows = questions(tmp_path / "questions.jsonl")
    (tmp_path / "tiny.yaml").write_text(TASK.format(file=tmp_path / "questions.jsonl"), encoding="utf-8")
    found = []
    # The tiny tokenizer puts marks around every text, which the harness would take for its own.
    plain = "dtype=float32,add_bos_token=False"
    for peft in (f",peft={adapter}", ""):
        results = simple_evaluate(
            model="hf",
            model_args=f"pretrained={toy_generation['model.name']}{peft},{plain}",
            tasks=["fedveil-tiny"],
            task_manager=TaskManager(include_path=str(tmp_path)),
            device="cpu",
            batch_size=1,
            log_samples=True,
            bootstrap_iters=0,
        )
        samples = sorted(results["samples"]["fedveil-tiny"], key=lambda sample: sample["doc_id"])
        found.append([float(sample["resps"][0][0][0]) for sample in samples])
    result = load_result(adapter)
    tokenizer, wanted = result.base.processor, []
    for prompt, completion in rows:
        before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        whole = tokenizer(f"{prompt} {completion}", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = result.module.encoder.eval()(input_ids=torch.tensor([whole[:-1]])).logits[0].log_softmax(-1)
        wanted.append(sum(float(logits[i - 1, whole[i]]) for i in range(len(before), len(whole))))
    assert found[0] == pytest.approx(wanted, abs=1e-3)
    assert found[1] != pytest.approx(wanted, abs=1e-3), "the adapter changes nothing here"

"""Judges: none is scored on pairs that it was trained on, and none without a claim decides what a policy learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

from audits.faults import SOUND, Fault
from audits.finding import judged as finding
from audits.tiny_models import FILLER, save_tiny_model
from fedveil.common.config.sections import DataConfig
from fedveil.common.data.sources import load_dataset
from fedveil.common.errors import ConfigError
from fedveil.common.findings import Finding
from fedveil.common.model.files import files_digest
from fedveil.common.tasks.examples import Dataset
from fedveil.contrib.tasks import judging
from fedveil.contrib.tasks.judge import judged
from fedveil.contrib.tasks.judging import Judge
from fedveil.experiments import evaluate_on
from fedveil.experiments.in_process import run_in_process
from fedveil.experiments.serving.merge import merge_run

PAIRS, HELD_OUT = 120, 30


def _all_of_it(data: DataConfig, task: str) -> Dataset:
    return load_dataset(data, task)


TRAINED_ON = Fault(
    "a judge trained on the pairs it is scored on", lambda: patch.object(evaluate_on, "public_test", _all_of_it)
)
UNCLAIMED = Fault(
    "a judge without a claim as the reward", lambda: patch.object(judging, "claimed_in_folder", lambda *given: [])
)


def write_pairs(path: Path, count: int, begin: int = 0) -> Path:
    """Write pairs whose better answer has a warm word, and the other a cold one."""
    words = (("warm", "lovely"), ("cold", "awful"))
    rows = [
        {
            "prompt": " ".join(FILLER[(i + j) % len(FILLER)] for j in range(2 + i % 4)) + f" {i}",
            "chosen": f"the {words[0][i % 2]} film",
            "rejected": f"the {words[1][i % 2]} film",
        }
        for i in range(begin, begin + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pair_run(model: str, loss: str, folder: Path) -> dict[str, Any]:
    """Return the settings of a private run on pairs, whose model is a tiny encoder for a scalar judge, else a decoder.

    Args:
        model: its folder.
        loss: as ``preference.loss``.
        folder: for the pairs and the run.
    """
    scalar = loss == "bradley-terry"
    head = {"head.policy": "trained", "head.start": "random"} if scalar else {"head.policy": "frozen"}
    return {
        "model.name": model,
        "model.task": "preference",
        "preference.loss": loss,
        "model.max-length": 39,
        "strategy": "ffa-lora",
        **head,
        "rounds": 3,
        "data.name": str(write_pairs(folder / "pairs.jsonl", PAIRS)),
        "data.test-size": HELD_OUT,
        "data.partition": "iid",
        "adapter.targets": "query,value" if scalar else "q_proj,v_proj",
        "training.sample-rate": 0.5,
        "privacy.delta": 1e-3,
        "privacy.noise-multiplier": 0.3,
        "privacy.epsilon": 1e4,
        "device": "cpu",
        "precision": "float32",
        "output": str(folder / "runs"),
    }


def audit_judges(folder: Path) -> list[Finding]:
    """Train a judge with a claim and one without: the first is scored on held-out pairs, the second is no reward."""
    settings = {**pair_run(save_tiny_model("bert", folder / "model"), "bradley-terry", folder), "rounds": 1}
    runs = {mode: run_in_process({**settings, "privacy.mode": mode}, 2) for mode in ("dp-sgd", "none")}
    for mode, run in runs.items():
        merge_run(run, folder / mode)
    found = []
    for fault in (SOUND, TRAINED_ON):
        with fault.plant():
            _, scored, _, _ = judged(runs["dp-sgd"], str(settings["data.name"]))
        figures: dict[str, int | float | str] = {"pairs": scored, "of them trained on": scored - HELD_OUT}
        found.append(finding("pairs of a judge's score", fault.name, scored > HELD_OUT, figures))
    for fault in (SOUND, UNCLAIMED):
        with fault.plant():
            taken = {mode: _is_taken(folder / mode) for mode in runs}
        said = {f"a judge of privacy.mode {mode}": "taken" if was else "refused" for mode, was in taken.items()}
        alarm = taken != {"dp-sgd": True, "none": False}
        found.append(finding("judges that are rewards", fault.name, alarm, {**said}))
    return found


def _is_taken(judge: Path) -> bool:
    try:
        Judge(str(judge), files_digest(judge))
    except ConfigError:
        return False
    return True

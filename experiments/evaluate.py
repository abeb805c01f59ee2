"""Score a run's result the way its users would: stock base model, stock PEFT, the saved head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors.torch import load_file

from common.adapters.base import pefts_old_names
from common.data.sources import public_test
from common.errors import DataError, ModelError
from common.model.base import load_base_model
from common.model.device import choose_attention, choose_device
from common.model.federated import Score, score_records
from common.run_lines import read_json
from common.tasks import TASKS
from common.tasks.module import TaskModule
from strategies.job import configure


def load_result(adapter: Path) -> tuple[TaskModule, dict[str, Any]]:
    """Return the model of a saved adapter, built with ``PeftModel.from_pretrained``, and its description.

    Raises:
        DataError: the folder holds no saved adapter.
        ModelError: the base model on this machine has other weights than the run's.
    """
    if not (adapter / "fedveil.json").is_file():
        raise DataError(f"{adapter} holds no adapter: give the folder of a finished run")
    about = read_json(adapter / "fedveil.json")
    pool = str(about["settings"].get("head.pool", "mean"))
    bits = str(about["settings"].get("model.quantise", "none"))
    base = load_base_model(about["base_model"], about["task"], pool, bits)
    if base.fingerprint != about["base_fingerprint"]:
        raise ModelError(f"the base model {base.name!r} here has other weights than the run's")
    # A run of the head alone has no adapter.
    tuned = (adapter / "adapter_config.json").is_file()
    with pefts_old_names():
        peft_model = PeftModel.from_pretrained(base.module, str(adapter)) if tuned else base.module
    task, classes = TASKS[about["task"]].pooled(pool), len(about["label_names"])
    model = task.module(peft_model, base, classes if task.labelled else 0, about["feature_scale"])
    if model.head is not None:
        model.head.load_state_dict(load_file(str(adapter / "head.safetensors")))
    return model, {**about, "base": base, "kind": task}


def evaluate_run(folder: Path) -> Score:
    """Return the score of a run's final adapter on the run's public test data."""
    import torch

    module, about = load_result(folder / "adapter")
    job = configure(about["settings"])
    test = public_test(job.config.data, about["task"])
    task, base = about["kind"], about["base"]
    device = choose_device(job.config.device)
    choose_attention(base.module, device)
    records = task.prepare(base, test.examples, task.limit(base, about["max_length"]))
    return score_records(module.to(device), task, base, records, device, getattr(torch, about["precision"]))

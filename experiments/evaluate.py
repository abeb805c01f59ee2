"""Score a run's result the way its users would: stock base model, stock PEFT, the saved head."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors.torch import load_file

from common.adapters.base import pefts_old_names
from common.data.sources import public_test
from common.errors import DataError, ModelError
from common.model.base import BaseModel, load_base_model
from common.model.device import choose_attention, choose_device
from common.model.federated import Score, score_records
from common.run_lines import read_json
from common.tasks import TASKS
from common.tasks.module import TaskModule
from experiments.pruning.files import RECOVERED
from strategies.job import configure


def load_result(adapter: Path) -> tuple[TaskModule, dict[str, Any]]:
    """Return the model of a saved adapter, built with ``PeftModel.from_pretrained``, and its description.

    Raises:
        DataError: the folder holds no saved adapter.
        ModelError: the base model on this machine has other weights than the run's.
    """
    about = _about(adapter)
    base = _base(about, about["base_model"])
    if base.fingerprint != about["base_fingerprint"]:
        raise ModelError(f"the base model {base.name!r} here has other weights than the run's")
    # A run of the head alone has no adapter.
    tuned = (adapter / "adapter_config.json").is_file()
    return _result(about, base, adapter, adapter if tuned else None)


def evaluate_run(folder: Path) -> Score:
    """Return the score of a run's final adapter on the run's public test data."""
    return _score(*load_result(folder / "adapter"))


def evaluate_recovered(folder: Path, recovered: Path) -> tuple[Score, Score]:
    """Return two scores of a large model on a run's public test data: as it is, and with the recovered adapter.

    Both have the run's head, where its task has one.

    Args:
        folder: a run on a pruned model.
        recovered: what ``recover_run`` made of that run.

    Raises:
        DataError: a folder holds nothing of the kind.
        ModelError: the adapter is of a run on another model, or the large model has other weights.
    """
    adapter = folder / "adapter"
    about = _about(adapter)
    if not (recovered / RECOVERED).is_file():
        raise DataError(f"{recovered} holds no recovered adapter: give the folder that `fedveil recover` made")
    told = read_json(recovered / RECOVERED)
    if told["trained_on"] != about["base_fingerprint"]:
        raise ModelError(
            f"{recovered} is of a run on a model of fingerprint {told['trained_on'][:12]}, and {folder} trained on "
            f"{about['base_fingerprint'][:12]}: name the run that it was recovered from"
        )

    def scored(tuned: Path | None) -> Score:
        base = _base(about, told["large"])  # anew: PEFT changes the module that it is given
        if base.fingerprint != told["recovered_onto"]:
            raise ModelError(f"{base.name!r} here has other weights than the model that the adapter was recovered onto")
        return _score(*_result(about, base, adapter, tuned))

    return scored(None), scored(recovered)


def _about(adapter: Path) -> dict[str, Any]:
    if not (adapter / "fedveil.json").is_file():
        raise DataError(f"{adapter} holds no adapter: give the folder of a finished run")
    return read_json(adapter / "fedveil.json")


def _base(about: Mapping[str, Any], name: str) -> BaseModel:
    settings = about["settings"]
    pool, bits = str(settings.get("head.pool", "mean")), str(settings.get("model.quantise", "none"))
    return load_base_model(name, about["task"], pool, bits)


def _result(
    about: Mapping[str, Any], base: BaseModel, adapter: Path, tuned: Path | None
) -> tuple[TaskModule, dict[str, Any]]:
    """Return a base model with the adapter of ``tuned``, if any, and the head of ``adapter``, and what it is."""
    with pefts_old_names():
        peft_model = PeftModel.from_pretrained(base.module, str(tuned)) if tuned else base.module
    pool, classes = str(about["settings"].get("head.pool", "mean")), len(about["label_names"])
    task = TASKS[about["task"]].pooled(pool)
    model = task.module(peft_model, base, classes if task.labelled else 0, about["feature_scale"])
    if model.head is not None:
        model.head.load_state_dict(load_file(str(adapter / "head.safetensors")))
    return model, {**about, "base": base, "kind": task}


def _score(module: TaskModule, about: Mapping[str, Any]) -> Score:
    import torch

    job = configure(about["settings"])
    test = public_test(job.config.data, about["task"])
    task, base = about["kind"], about["base"]
    device = choose_device(job.config.device)
    choose_attention(base.module, device)
    records = task.prepare(base, test.examples, task.limit(base, about["max_length"]))
    return score_records(module.to(device), task, base, records, device, getattr(torch, about["precision"]))

"""Score a run's result the way its users would: stock base model, stock PEFT, the saved head."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file

from common.adapters.base import pefts_old_names
from common.data.sources import public_test
from common.errors import DataError, ModelError
from common.model.base import BaseModel, load_base_model
from common.model.device import choose_attention, choose_device
from common.model.federated import Score, score_records
from common.run_lines import AdapterFile, read_file
from common.tasks import TASKS, Task
from common.tasks.module import TaskModule
from experiments.pruning.files import RecoveredFile
from strategies.job import configure

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Result:
    """The model of a saved adapter, and what it is."""

    module: TaskModule
    about: AdapterFile
    base: BaseModel
    task: Task
    """With the run's pooling."""


def load_result(adapter: Path) -> Result:
    """Return the model of a saved adapter, built with ``PeftModel.from_pretrained``.

    Raises:
        DataError: the folder holds no saved adapter, or a file of it is missing.
        ModelError: the base model on this machine has other weights than the run's.
    """
    about = _about(adapter)
    base = _base(about, about.base_model)
    if base.fingerprint != about.base_fingerprint:
        raise ModelError(f"the base model {base.name!r} here has other weights than the run's")
    # A run of the head alone has no adapter.
    tuned = (adapter / "adapter_config.json").is_file()
    return _result(about, base, adapter, adapter if tuned else None)


def evaluate_run(folder: Path) -> Score:
    """Return the score of a run's final adapter on the run's public test data."""
    return _score(load_result(folder / "adapter"))


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
    if not (recovered / RecoveredFile.NAME).is_file():
        raise DataError(f"{recovered} holds no recovered adapter: give the folder that `fedveil recover` made")
    told = read_file(RecoveredFile, recovered)
    if told.trained_on != about.base_fingerprint:
        raise ModelError(
            f"{recovered} is of a run on a model of fingerprint {told.trained_on[:12]}, and {folder} trained on "
            f"{about.base_fingerprint[:12]}: name the run that it was recovered from"
        )

    def scored(tuned: Path | None) -> Score:
        base = _base(about, told.large)  # anew: PEFT changes the module that it is given
        if base.fingerprint != told.recovered_onto:
            raise ModelError(f"{base.name!r} here has other weights than the model that the adapter was recovered onto")
        return _score(_result(about, base, adapter, tuned))

    return scored(None), scored(recovered)


def _about(adapter: Path) -> AdapterFile:
    if not (adapter / AdapterFile.NAME).is_file():
        raise DataError(f"{adapter} holds no adapter: give the folder of a finished run")
    about = read_file(AdapterFile, adapter)
    if about.task not in TASKS or about.precision not in PRECISIONS:
        raise DataError(f"{adapter / AdapterFile.NAME} names a task or a precision that this FedVeil does not know")
    return about


def _base(about: AdapterFile, name: str) -> BaseModel:
    pool, bits = (str(about.settings.get(*usual)) for usual in (("head.pool", "mean"), ("model.quantise", "none")))
    return load_base_model(name, about.task, pool, bits)


def _result(about: AdapterFile, base: BaseModel, adapter: Path, tuned: Path | None) -> Result:
    """Return a base model with the adapter of ``tuned``, if any, and the head of ``adapter``."""
    if tuned:
        _there(tuned / "adapter_model.safetensors")  # PEFT would look on the hub for it
    with pefts_old_names():
        peft_model = PeftModel.from_pretrained(base.module, str(tuned)) if tuned else base.module
    task = TASKS[about.task].pooled(str(about.settings.get("head.pool", "mean")))
    model = task.module(peft_model, base, len(about.label_names) if task.labelled else 0, about.feature_scale)
    if model.head is not None:
        model.head.load_state_dict(load_file(_there(adapter / "head.safetensors")))
    return Result(model, about, base, task)


def _there(path: Path) -> str:
    if not path.is_file():
        raise DataError(f"{path} is not there: take the whole folder of the run, or put that file back")
    return str(path)


def _score(result: Result) -> Score:
    about, task, base = result.about, result.task, result.base
    job = configure(about.settings)
    test = public_test(job.config.data, about.task)
    device = choose_device(job.config.device)
    choose_attention(base.module, device)
    records = task.prepare(base, test.examples, task.limit(base, about.max_length))
    return score_records(result.module.to(device), task, base, records, device, PRECISIONS[about.precision])

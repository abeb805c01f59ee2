"""Score a run's result the way its users would: stock base model, stock PEFT, the saved head."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict

from common.adapters.base import pefts_old_names
from common.data.sources import public_test
from common.errors import DataError, ModelError
from common.model.base import BaseModel, load_base_model
from common.model.device import choose_attention, choose_device
from common.model.federated import Score, score_records
from common.model.files import check_files
from common.paths import check_adapter
from common.run_lines import AdapterFile, read_file, read_json
from common.tasks import TASKS, Task
from common.tasks.module import TaskModule
from common.tensor_file import read_tensors
from common.words import visible
from experiments.pruning.files import RecoveredFile
from strategies.job import configure

PATTERNS = ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern")
"""What PEFT takes for regular expressions in an adapter's configuration."""
LAYER_NAME = re.compile(r"(?:[\w.-]|\\[.-])+")
"""A layer's name, in which a dot or a hyphen may be escaped, as a run writes the keys of its ranks."""
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
        DataError: the folder holds no saved adapter, or a file of it is missing, damaged or of another model.
        ModelError: the base model on this machine has other weights than the run's.
    """
    about = _about(adapter)
    base = base_of(about, about.base_model, about.base_files)
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
        base = base_of(about, told.large, told.files)  # anew: PEFT changes the module that it is given
        if base.fingerprint != told.recovered_onto:
            raise ModelError(f"{base.name!r} here has other weights than the model that the adapter was recovered onto")
        return _score(_result(about, base, adapter, tuned))

    return scored(None), scored(recovered)


def _about(adapter: Path) -> AdapterFile:
    check_adapter(adapter)
    about = read_file(AdapterFile, adapter)
    if about.task not in TASKS or about.precision not in PRECISIONS:
        raise DataError(f"{adapter / AdapterFile.NAME} names a task or a precision that this FedVeil does not know")
    return about


def base_of(about: AdapterFile, name: str, files: str) -> BaseModel:
    """Return a base model as a run read it, loaded from these files alone.

    A run's folder may be anybody's. So it makes nobody fetch a model: that must be on this machine already.

    Raises:
        ModelNotLoaded: it is not, or has other files, none of which was opened.
    """
    check_files(name, files, fetch=False)
    pool, bits = (str(about.settings.get(*usual)) for usual in (("head.pool", "mean"), ("model.quantise", "none")))
    return load_base_model(name, about.task, pool, bits, files)


def _result(about: AdapterFile, base: BaseModel, adapter: Path, tuned: Path | None) -> Result:
    """Return a base model with the adapter of ``tuned``, if any, and the head of ``adapter``."""
    peft_model = _with_adapter(base, tuned) if tuned else base.module
    task = TASKS[about.task].pooled(str(about.settings.get("head.pool", "mean")))
    model = task.module(peft_model, base, len(about.label_names) if task.labelled else 0, about.feature_scale)
    if model.head is not None:
        head = adapter / "head.safetensors"
        with _fitting(head):
            model.head.load_state_dict(read_tensors(head))
    return Result(model, about, base, task)


def _with_adapter(base: BaseModel, folder: Path) -> PeftModel:
    # Both are read here first: PEFT would look on the hub for what is missing, and ends in its own errors.
    read_peft_config(folder / "adapter_config.json")
    tensors = read_tensors(folder / "adapter_model.safetensors")
    with pefts_old_names(), _fitting(folder), warnings.catch_warnings():
        # PEFT leaves a missing tensor as it is made, and warns; a score without it would be another model's.
        warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)
        model = PeftModel.from_pretrained(base.module, str(folder))
        held = get_peft_model_state_dict(model, save_embedding_layers=False)
        if missing := held.keys() - tensors.keys():
            raise KeyError(f"it has no {min(missing)}")
        return model


def read_peft_config(file: Path) -> dict[str, Any]:
    """Return the configuration of an adapter, which may be anybody's.

    Raises:
        DataError: it cannot be read, or has a regular expression where a run's has names of layers: PEFT would search
            with it, and some take for ever.
    """
    config = read_json(file)
    for field in PATTERNS:
        value = config.get(field) or ()
        for name in (value,) if isinstance(value, str) else value:
            if not LAYER_NAME.fullmatch(str(name)):
                told = visible(str(name))[:80]
                raise DataError(f"{file}: {field} has {told!r}, which is no layer's name: take the run's folder anew")
    return config


@contextmanager
def _fitting(path: Path) -> Iterator[None]:
    """Say in one line which file does not fit the run's model."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        # torch's errors about a state have a heading, and then a line for each tensor.
        first, _, rest = str(error).partition("\n")
        reason = " ".join((rest.partition("\n")[0] or first).split())
        raise DataError(f"{path} is not of this run's model ({reason}): take the run's folder anew") from error


def _score(result: Result) -> Score:
    about, task, base = result.about, result.task, result.base
    job = configure(about.settings)
    test = public_test(job.config.data, about.task)
    device = choose_device(job.config.device)
    choose_attention(base.module, device)
    records = task.prepare(base, test.examples, task.limit(base, about.max_length))
    return score_records(result.module.to(device), task, base, records, device, PRECISIONS[about.precision])

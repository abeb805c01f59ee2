"""Score a run's result the way its users would: stock base model, stock PEFT, the saved head."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict

from fedveil.common.adapters.attach import pefts_old_names
from fedveil.common.config.flat import Scalar, from_section, task_of
from fedveil.common.config.run import RunConfig
from fedveil.common.config.sections import DataConfig
from fedveil.common.data.sources import public_test
from fedveil.common.derived import DerivedFile
from fedveil.common.errors import DataError, ModelError
from fedveil.common.foreign_words import PEFT_MISSING_KEYS
from fedveil.common.model.base import BaseModel, load_base_model
from fedveil.common.model.device import choose_attention, choose_device
from fedveil.common.model.files import check_files
from fedveil.common.model.score import Score
from fedveil.common.model.scoring import score_records
from fedveil.common.paths import PATHS, check_adapter, local_name
from fedveil.common.run_lines import AdapterFile, ConfigFile, read_file, read_if_there, read_json
from fedveil.common.tasks import TASKS, Task
from fedveil.common.tasks.module import TaskModule
from fedveil.common.tensor_file import read_tensors
from fedveil.common.words import visible

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
    about = about_of(adapter)
    base = base_of(about, about.base_model, about.base_files)
    if base.fingerprint != about.base_fingerprint:
        raise ModelError(f"the base model {base.name!r} here has other weights than the run's")
    # A run of the head alone has no adapter.
    tuned = (adapter / "adapter_config.json").is_file()
    return result_of(about, base, adapter, adapter if tuned else None)


def evaluate_run(folder: Path) -> Score:
    """Return the score of a run's final adapter on the run's public test data."""
    return score_of(load_result(folder / "adapter"))


def about_of(adapter: Path) -> AdapterFile:
    """Return what an adapter's folder says of its run.

    Raises:
        DataError: it holds none, or one of a task or a precision that is not known here.
    """
    check_adapter(adapter)
    about = read_file(AdapterFile, adapter)
    # An adapter that is given away names no path of the machine that made it. There, its run's folder still does.
    with suppress(DataError):  # a file of that name may be another's
        if known := _known_beside(adapter.parent):
            paths = {key: known[key] for key in PATHS if key in about.settings and key in known}
            base = str(known.get("model.name", ""))
            base = base if local_name(base) == about.base_model else about.base_model
            about = replace(about, settings={**about.settings, **paths}, base_model=base)
    if about.task not in TASKS or about.precision not in PRECISIONS:
        raise DataError(f"{adapter / AdapterFile.NAME} names a task or a precision that this FedVeil does not know")
    return about


def _known_beside(folder: Path) -> Mapping[str, Scalar]:
    """Return what the folder of a run, or of a model derived from runs, knows of this machine's paths."""
    made, config = read_if_there(DerivedFile, folder), read_if_there(ConfigFile, folder)
    return config.settings if config else made.local if made else {}


def data_of(about: AdapterFile) -> DataConfig:
    """Return how the run's records are read, whatever its strategy: one that was registered may be unknown here."""
    own = {key: value for key, value in about.settings.items() if key.startswith("data.")}
    return from_section(DataConfig, own, "data.")


def base_of(about: AdapterFile, name: str, files: str) -> BaseModel:
    """Return a run's base model, from these files on this machine alone: a run's folder cannot cause a download.

    Raises:
        ModelNotLoaded: it is missing, or has other files, none of which was opened.
    """
    check_files(name, files)
    pool, bits = (str(about.settings.get(*usual)) for usual in (("head.pool", "mean"), ("model.quantise", "none")))
    return load_base_model(name, task_of(about.settings | {"model.task": about.task}), pool, bits, files)


def result_of(about: AdapterFile, base: BaseModel, adapter: Path, tuned: Path | None) -> Result:
    """Return a base model with the adapter of ``tuned``, if any, and the head of ``adapter``."""
    peft_model = _with_adapter(base, tuned) if tuned else base.module
    task = task_of(about.settings | {"model.task": about.task}).with_pool(str(about.settings.get("head.pool", "mean")))
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
        warnings.filterwarnings("ignore", PEFT_MISSING_KEYS, UserWarning)
        model = PeftModel.from_pretrained(base.module, str(folder))
        present = get_peft_model_state_dict(model, save_embedding_layers=False)
        if missing := present.keys() - tensors.keys():
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
                raise DataError(f"{file}: {field} has {told!r}, which is no layer's name: copy the run's folder again")
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
        raise DataError(f"{path} is not of this run's model ({reason}): copy the run's folder again") from error


def score_of(result: Result) -> Score:
    """Return a model's score on the public test data of its run."""
    about, task, base = result.about, result.task, result.base
    test = public_test(data_of(about), about.task)
    device = choose_device(str(about.settings.get("device", RunConfig().device)))
    choose_attention(base.module, device)
    records = task.prepare(base, test.examples, task.limit(base, about.max_length))
    return score_records(result.module.to(device), task, base, records, device, PRECISIONS[about.precision])

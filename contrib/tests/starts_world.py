"""Tiny models and shapes for tests of starts."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from audits.tiny_models import FILLER, GOOD, TARGETS
from fedveil.common.adapters import ADAPTERS
from fedveil.common.config.sections import HeadConfig
from fedveil.common.messages.state import AdapterState
from fedveil.common.model.base import BaseModel, load_base_model
from fedveil.common.model.federated import FederatedModel
from fedveil.common.starts import Start
from fedveil.common.tasks import TASKS, wording_of
from fedveil.contrib.starts.eva import input_moments

RANK = 3


Folder = Callable[[str], str]


each_family = pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])


def off_identity(rows: Tensor) -> float:
    return float((rows.double() @ rows.double().T - torch.eye(len(rows), dtype=torch.float64)).abs().max())


@functools.cache
def _read(folder: str, task: str) -> BaseModel:
    return load_base_model(folder, task)


def base_of(folder: str, task: str) -> BaseModel:
    """Return the folder's base model; a copy of one that is read from disk once."""
    read = _read(folder, task)
    return dataclasses.replace(read, module=copy.deepcopy(read.module))


def tiny(folder: str, family: str, start: Start, adapter: str = "lora-frozen-a", alpha: float = 3.0) -> FederatedModel:
    task = "classification" if family == "bert" else "causal-lm"
    return FederatedModel(
        base_of(folder, task),
        ADAPTERS[adapter](RANK, alpha, tuple(TARGETS[family].split(",")), start),
        TASKS[task],
        HeadConfig(policy="trained" if family == "bert" else "frozen", start="random"),
        seed=1,
        label_names=("bad", "good"),
        max_length=24,
        device="cpu",
        precision="float32",
    )


# --- EVA --------------------------------------------------------------------------------------------------------------
TEXTS = ["the film was bright", " ".join(FILLER[:7]), " ".join(GOOD), "dull", "a cold story and an awful actor"]


def moments(model: FederatedModel, texts: list[str]) -> AdapterState:
    return input_moments(model, model.prepare([wording_of(model.task).phrase(text) for text in texts]))

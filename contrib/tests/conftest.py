"""Random factors, and tiny models with a frozen A."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from paid_worlds import RANK, Make
from rule_states import INTO, OUT, draw
from rule_states import RANK as RULE_RANK
from torch import Tensor

from audits.tiny_models import TARGETS
from fedveil.common.adapters import ADAPTERS
from fedveil.common.config.sections import HeadConfig
from fedveil.common.model.base import load_base_model
from fedveil.common.model.federated import FederatedModel
from fedveil.common.starts import Start
from fedveil.common.tasks import TASKS


@pytest.fixture
def factors() -> tuple[Tensor, Tensor, Tensor]:
    return draw(OUT, INTO, seed=1), draw(RULE_RANK, INTO, seed=2), draw(OUT, RULE_RANK, seed=3)


@pytest.fixture
def tiny(model_folder: Callable[[str], str]) -> Make:
    def make(family: str, start: Start) -> FederatedModel:
        task = "classification" if family == "bert" else "causal-lm"
        return FederatedModel(
            load_base_model(model_folder(family), task),
            ADAPTERS["lora-frozen-a"](RANK, 3.0, tuple(TARGETS[family].split(",")), start),
            TASKS[task],
            HeadConfig(policy="trained" if family == "bert" else "frozen", start="random"),
            seed=1,
            label_names=("bad", "good"),
            max_length=24,
            device="cpu",
            precision="float32",
        )

    return make

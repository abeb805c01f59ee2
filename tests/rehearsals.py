"""Models and sites for tests of rehearsals."""

from __future__ import annotations

from audits.tiny_models import VOCABULARY
from fedveil.common.adapters import ADAPTERS
from fedveil.common.config.sections import HeadConfig
from fedveil.common.model.base import load_base_model
from fedveil.common.model.federated import FederatedModel
from fedveil.common.starts import Start
from fedveil.common.starts.kaiming import Kaiming
from fedveil.common.starts.orthonormal import Orthonormal
from fedveil.common.tasks import TASKS

SIZE = len(VOCABULARY)


def federated(
    folder: str, task: str, targets: str, precision: str = "float32", adapter: str = "lora", start: Start | None = None
) -> FederatedModel:
    own = Orthonormal() if "B" in ADAPTERS[adapter].directions else Kaiming()
    return FederatedModel(
        *(load_base_model(folder, task), ADAPTERS[adapter](4, 4.0, tuple(targets.split(",")), start or own)),
        *(TASKS[task], HeadConfig("trained" if task == "classification" else "frozen", "random")),
        seed=1,
        label_names=("bad", "good"),
        max_length=39,
        device="cpu",
        precision=precision,
    )

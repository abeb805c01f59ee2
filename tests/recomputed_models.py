"""Tiny models whose layers may be computed again."""

from __future__ import annotations

from collections.abc import Callable

from alone import away_from_zero
from digits import TOKENS

from audits.tiny_models import TARGETS
from fedveil.common.adapters import ADAPTERS
from fedveil.common.config.sections import HeadConfig
from fedveil.common.model.base import load_base_model
from fedveil.common.model.federated import FederatedModel
from fedveil.common.model.shapes import FixedBatch
from fedveil.common.starts import STARTS
from fedveil.common.tasks import TASKS, Record

Folder = Callable[[str], str]

TASK = {"bert": "classification", "vit": "image-classification"}


def tiny(
    folder: str,
    family: str,
    adapter: str = "lora",
    precision: str = "float32",
    again: bool = True,
    targets: str = "",
    device: str = "cpu",
) -> FederatedModel:
    """Return a model whose factors are away from zero."""
    task = TASK.get(family, "causal-lm")
    start = STARTS["orthonormal" if "B" in ADAPTERS[adapter].directions else "kaiming"]()
    named = targets or TARGETS.get(family, "auto")
    model = FederatedModel(
        load_base_model(folder, task),
        ADAPTERS[adapter](2, 4.0, tuple(named.split(",")), start),
        TASKS[task],
        HeadConfig(start="random"),
        seed=1,
        label_names=("bad", "good"),
        max_length=TOKENS if family == "vit" else 24,
        device=device,
        precision=precision,
        checkpointing=again,
    )
    return away_from_zero(model)


def batch_of(model: FederatedModel, records: list[Record], rows: int = 3) -> FixedBatch:
    return model.fixed_batch(records, model.shapes.lengths[0], rows)

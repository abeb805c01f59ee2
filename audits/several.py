"""Answers of several labels: one record moves class means by one clip, and the count of whole answers by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import torch

from audits.faults import SOUND, Fault, zero_noise
from audits.finding import judged
from audits.tiny_models import FILLER, TARGETS
from audits.worlds import World
from fedveil.client import evaluation
from fedveil.common.adapters import ADAPTERS
from fedveil.common.config.sections import HeadConfig
from fedveil.common.findings import Finding
from fedveil.common.model.base import load_base_model
from fedveil.common.model.federated import FederatedModel
from fedveil.common.starts import STARTS
from fedveil.common.tasks import TASKS, Record
from fedveil.common.tasks.multi_label import SeveralLabels
from fedveil.privacy import dpsgd

LABELS = ("warm", "dull", "tired")
FLIPPED: tuple[tuple[int, ...], ...] = ((), (), (0,), (1, 2), (0, 1, 2), (2,))
"""Of each record, the labels that the model does not answer as they are."""


def several_world(folder: str) -> World:
    """Return a world of texts with several labels, some of which the model answers wholly right; ``folder``: a BERT."""
    model = FederatedModel(
        load_base_model(folder, "multi-label"),
        ADAPTERS["lora"](2, 4.0, tuple(TARGETS["bert"].split(",")), STARTS["kaiming"]()),
        TASKS["multi-label"],
        HeadConfig(start="random"),
        seed=1,
        label_names=LABELS,
        feature_scale=4.0,
        max_length=24,
        device="cpu",
        precision="float32",
    )
    with torch.no_grad():
        model.module.head.bias.zero_()  # type: ignore[union-attr]
    texts = [" ".join(FILLER[i : i + 4]) for i in range(len(FLIPPED))]
    records = model.prepare([SeveralLabels(text=text, labels=(1, 1, 1)) for text in texts])
    for record, flipped in zip(records, FLIPPED, strict=True):
        record["labels"] = [int(given != (label in flipped)) for label, given in enumerate(given_to(model, record))]
    return World(model, records)


@torch.no_grad()
def given_to(model: FederatedModel, record: Record) -> list[bool]:
    """Return which labels the model gives a record, by its logits."""
    found: list[bool] = (model.module(model.batch([record]))[0] >= 0).tolist()
    return found


def _clip_by_label(own: Any) -> None:
    rows = torch.cat([sample.flatten(2) if sample.dim() > 2 else sample[..., None] for sample in own.grad_samples], 2)
    factors = (own.max_grad_norm / rows.double().norm(dim=2).clamp(min=own.max_grad_norm))[..., None]
    for parameter, sample in zip(own.params, own.grad_samples, strict=True):
        clipped = (sample.double().view(*factors.shape[:2], -1) * factors).sum(0).view(parameter.shape)
        parameter.summed_grad = clipped if parameter.summed_grad is None else parameter.summed_grad + clipped


LABEL_CLIPPED = Fault(
    "each label's sum clipped apart", lambda: patch.object(dpsgd.ClipAndNoise, "clip_and_accumulate", _clip_by_label)
)
"""A record of k labels then moves the sums by √k clips."""


def _right_labels(model: FederatedModel, record: Record) -> float:
    return float(model.task.sums(model.module, model.batch([record])).correct.sum())


LABELS_COUNTED = Fault("right labels counted", lambda: patch.object(evaluation, "_is_correct", _right_labels))
ANY_COUNTED = Fault(
    "a record with one right label counted",
    lambda: patch.object(evaluation, "_is_correct", lambda model, record: min(1.0, _right_labels(model, record))),
)


def audit_count(model: FederatedModel, records: Sequence[Record], fault: Fault = SOUND) -> Finding:
    """Take each record away in turn from the count before its noise, and count whole answers by the logits.

    Args:
        model: of a task whose answers have several labels.
        records: as the model takes them.
        fault: built in while the site counts.
    """
    whole = sum(given_to(model, record) == list(map(bool, record["labels"])) for record in records)
    with patch.object(evaluation, "add_private_noise", zero_noise), fault.plant():
        everyone = evaluation.noised_correct(model, records, 1.0)
        moved = max(
            abs(everyone - evaluation.noised_correct(model, [*records[:i], *records[i + 1 :]], 1.0))
            for i in range(len(records))
        )
    figures = {"records moved by one record, at most": moved, "counted that are not wholly right": everyone - whole}
    name = type(model.base.module).__name__
    return judged("count of whole answers", fault.name, moved > 1 or everyone != whole, {"model": name, **figures})

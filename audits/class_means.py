"""Class means: how far one record can move the noiseless sums and counts together, in clip norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

from audits.faults import SOUND, Fault, zero_noise
from audits.finding import judged
from audits.sensitivity import MOST
from audits.worlds import minus, norm
from fedveil.common.findings import Finding
from fedveil.common.messages.state import HEAD
from fedveil.common.model.federated import FederatedModel
from fedveil.common.starts import class_means
from fedveil.common.starts.class_means import ClassMeans
from fedveil.common.tasks import Record
from fedveil.privacy import dpsgd
from fedveil.privacy.plan import gaussian_plan

MADE = 16
"""Made-up records of the map: the claim holds for any map."""
CLIPS = (0.05, 0.5, 5.0)
"""Clip norms, to each of which the map's length goes: some records are clipped, and with the last most are not."""


def _clip_each(own: Any) -> None:
    for parameter, sample in zip(own.params, own.grad_samples, strict=True):
        flat = sample.flatten(1).double()
        clipped = ((own.max_grad_norm / flat.norm(dim=1).clamp(min=own.max_grad_norm)) @ flat).view(parameter.shape)
        parameter.summed_grad = clipped if parameter.summed_grad is None else parameter.summed_grad + clipped


EACH_CLIPPED = Fault(
    "sums and counts clipped apart", lambda: patch.object(dpsgd.ClipAndNoise, "clip_and_accumulate", _clip_each)
)
"""The counts for nothing: a record then moves both together by more than a clip."""


def clipped(clip: float) -> type[ClassMeans]:
    """Return the start whose sums are clipped to another norm."""

    class Clipped(ClassMeans):
        clip_norm = clip

    return Clipped


def audit_class_means(model: FederatedModel, records: Sequence[Record], fault: Fault = SOUND) -> Finding:
    """Take each record away in turn from what a site releases; a count is in the release as a sum is.

    Args:
        model: with a head.
        records: as the model takes them.
        fault: built in while the site releases.
    """
    worst = 0.0
    with (
        patch.object(class_means, "MADE", MADE),
        patch.object(dpsgd, "add_private_noise", zero_noise),
    ):
        for clip in CLIPS:
            start, plan = clipped(clip)(), gaussian_plan(clip, 1.0, 1.0, 1.0, 1e-5, 50.0)

            def released(chosen: Sequence[Record], start: Any = start, plan: Any = plan) -> list[Any]:
                found = start.privatise(model, chosen, plan)[HEAD]
                return [found["sums"].double(), found["counts"].double()]

            with fault.plant():
                everyone = released(records)
                for i in range(len(records)):
                    worst = max(worst, norm(minus(everyone, released([*records[:i], *records[i + 1 :]]))) / clip)
    return judged(
        "sensitivity of class means",
        fault.name,
        not worst <= MOST,
        {"model": type(model.base.module).__name__, "clips moved by one record, at most": worst},
    )

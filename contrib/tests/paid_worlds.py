"""Tiny models and records for tests of paid starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from audits.tiny_models import FILLER, GOOD
from fedveil.common.model.federated import FederatedModel
from fedveil.common.starts import PaidStart, Start
from fedveil.common.tasks import Record, wording_of
from fedveil.common.tasks.text import TextExample
from fedveil.privacy import dpsgd, grid
from fedveil.privacy.plan import PrivacyPlan, gaussian_plan

RANK = 3


TEXTS = ["the film was bright", " ".join(FILLER[:7]), " ".join(GOOD), "dull", "a cold story and an awful actor"]


each_family = pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])


Make = Callable[[str, Start], FederatedModel]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def records_of(model: FederatedModel, texts: list[str] = TEXTS) -> list[Record]:
    if model.task.labelled:
        return model.prepare([TextExample(text=text, label=i % 2) for i, text in enumerate(texts)])
    return model.prepare([wording_of(model.task).text(text) for text in texts])


def noiseless(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(dpsgd, "add_private_noise", lambda total, std: total.double())
    patch.setattr(grid, "SUM_BITS", 40)  # the grid follows from the noise, and is not to show beside a far longer clip
    patch.setattr(grid, "MOST_BITS", 60)


def plan_of(start: PaidStart, clip: float = 1.0, divisor: float = 1.0) -> PrivacyPlan:
    return gaussian_plan(clip, start.noise_multiplier, 1.0, divisor, 1e-5, 50.0)


def _clip_each(self: Any) -> None:
    for parameter, sample in zip(self.params, self.grad_samples, strict=True):
        flat = sample.flatten(1).double()
        factors = self.max_grad_norm / flat.norm(dim=1).clamp(min=self.max_grad_norm)
        clipped = (factors @ flat).view(parameter.shape)
        parameter.summed_grad = clipped if parameter.summed_grad is None else parameter.summed_grad + clipped

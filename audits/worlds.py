"""Tiny models whose factors are all away from zero, with records of very different lengths, and one step on them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from audits.tiny_models import FILLER, TARGETS
from fedveil.common.adapters import ADAPTERS
from fedveil.common.config.sections import HeadConfig
from fedveil.common.model.base import load_base_model
from fedveil.common.model.federated import FederatedModel
from fedveil.common.starts import STARTS
from fedveil.common.tasks import TASKS, Batch, Record
from fedveil.common.tasks.examples import Example
from fedveil.common.tasks.text import TextExample, tokens_of
from fedveil.common.tasks.token_classification import WordsExample
from fedveil.privacy.dpsgd import PrivateSteps
from fedveil.privacy.plan import PrivacyPlan, gaussian_plan

Gradient = list[Tensor]
Losses = Callable[[Batch], Tensor]
MARK = "two"
"""A word that only the last record of a world holds, so that a loss can single that record out."""


@dataclass(frozen=True)
class World:
    """A tiny model whose factors are all away from zero, and records of 3 to 24 tokens; the last is marked."""

    model: FederatedModel
    records: list[Record]

    @property
    def trained(self) -> list[nn.Parameter]:
        """The trained parameters, in the module's order."""
        return [p for p in self.model.module.parameters() if p.requires_grad]

    @property
    def mark(self) -> int:
        """Token of ``MARK``."""
        return int(self.model.base.processor.convert_tokens_to_ids(MARK))

    def batch(self, records: Sequence[Record] | None = None) -> Batch:
        """Return ``records``, or all, as one padded batch."""
        return self.model.batch(self.records if records is None else records)

    def marked_times(self, factor: float) -> Losses:
        """Return the model's losses with the marked record's multiplied by ``factor``."""

        def losses(batch: Batch) -> Tensor:
            marked = (tokens_of(batch) == self.mark).any(1)
            return self.model.losses(batch) * torch.where(marked, factor, 1.0)

        return losses


def give_metric(model: FederatedModel) -> None:
    """Give the layers of ``lora-metric`` output directions and what the metric shrinks, as its own start would."""
    draw = torch.Generator().manual_seed(9)
    named = dict(model.module.named_parameters())
    for name in [name for name in named if name.endswith(".V")]:
        V, B = named[name], named[f"{name[:-1]}B"]
        V.copy_(0.9 * torch.linalg.qr(torch.randn(V.shape[1], len(V), generator=draw))[0].T)
        B.copy_(torch.linalg.qr(torch.randn(B.shape, generator=draw))[0])


def example_of(task: str, text: str, completion: str, label: int) -> Example:
    """Return an example of a task: of words that have the labels by turns, from ``label`` on."""
    if TASKS[task].by_token:
        words = tuple(text.split())
        return WordsExample(text=words, marks=tuple((label + i) % 2 for i in range(len(words))))
    return TextExample(text=text, label=label, completion=completion)


def fresh_world(folder: str, family: str, adapter: str, head: str, precision: str = "float32", task: str = "") -> World:
    """Return a world of its own; ``folder`` holds a tiny model of the ``family``, of its usual task or another."""
    task = task or ("classification" if family == "bert" else "causal-lm")
    start = STARTS["orthonormal" if adapter == "lora-sb" else "kaiming"]
    model = FederatedModel(
        load_base_model(folder, task),
        ADAPTERS[adapter](8, 24.0, tuple(TARGETS[family].split(",")), start()),
        TASKS[task],
        HeadConfig(policy=head, start="random"),
        seed=1,
        label_names=("bad", "good"),
        feature_scale=4.0,
        max_length=24,
        device="cpu",
        precision=precision,
    )
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.module.parameters():
            if parameter.requires_grad:
                # B starts at zero, where A has no gradient and its part of the clip could not be seen.
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))
        give_metric(model)
    words = random.Random(4)
    examples = [
        example_of(
            task, " ".join(words.choices(FILLER, k=length)), " ".join(words.choices(FILLER, k=1 + 3 * (i % 3))), i % 2
        )
        for i, length in enumerate((1, 18, 3, 9, 5, 12))
    ]
    marked = example_of(task, f"the {MARK} film", f"{MARK} scene was warm", 1)
    return World(model, model.prepare([*examples, marked]))


class Recorder(Optimizer):
    """An optimiser that keeps what it was given and moves nothing."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, {})
        self.given: list[Gradient] = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Keep a copy of every gradient."""
        self.given.append([p.grad.double().clone() for group in self.param_groups for p in group["params"]])


def plan(clip: float = 1.0, noise: float = 1e-12, divisor: float = 1.0) -> PrivacyPlan:
    """Return a plan; without ``noise`` there is so little that it does not show."""
    return gaussian_plan(clip, noise, sample_rate=0.5, expected_batch_size=divisor, delta=1e-3, max_epsilon=100.0)


def released(
    world: World, parts: Sequence[Sequence[Record]], figures: PrivacyPlan | None = None, losses: Losses | None = None
) -> Gradient:
    """Return what one private step on ``parts`` hands to the optimiser, in float64; noise is 1e-12 unless asked for."""
    optimizer = Recorder(world.trained)
    with PrivateSteps(world.model.module, optimizer, figures or plan()) as steps:
        steps.step([world.batch(part) for part in parts], losses or world.model.losses)
    return optimizer.given[0]


def alone(world: World, record: Record, losses: Losses | None = None) -> Gradient:
    """Return one record's gradient the slow and obvious way: a forward pass of its own, no padding, no hooks."""
    loss = (losses or world.model.losses)(world.batch([record])).sum()
    return [g.double() for g in torch.autograd.grad(loss, world.trained)]


def norm(gradient: Gradient) -> float:
    """Return the L2 norm over all tensors together."""
    return float(torch.cat([g.double().flatten() for g in gradient]).norm())


def minus(left: Gradient, right: Gradient) -> Gradient:
    """Return the difference, in float64."""
    return [a.double() - b.double() for a, b in zip(left, right, strict=True)]


def flat(gradient: Gradient) -> Tensor:
    """Return all tensors of a gradient as one row of numbers."""
    return torch.cat([g.flatten() for g in gradient])

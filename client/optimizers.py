"""The optimisers a site may use, made afresh every round.

Moments must not cross a round: the server may have changed the basis they are expressed in
(FedSVD), and another site's contribution has moved the point. Under privacy all of them run on
noised gradients, which is post-processing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.optim import Optimizer

from common.config import TrainingConfig
from common.types import HEAD


def build_optimizer(
    trained: Mapping[str, Mapping[str, nn.Parameter]], config: TrainingConfig, rate: float
) -> Optimizer:
    """Return a new optimiser over the trained tensors, by layer and factor, at the learning rate ``rate``.

    The head is a group of its own at ``head-rate`` times the rate; every group's ``share`` says its multiple.
    """
    decay = config.weight_decay
    parameters = [
        {"params": list(factors.values()), "share": config.head_rate if layer == HEAD else 1.0}
        for layer, factors in trained.items()
    ]
    betas = (config.momentum, config.beta2)
    table: dict[str, Callable[[], Optimizer]] = {
        "sgd": lambda: torch.optim.SGD(parameters, rate, weight_decay=decay),
        "momentum": lambda: torch.optim.SGD(parameters, rate, momentum=config.momentum, weight_decay=decay),
        "adam": lambda: torch.optim.Adam(parameters, rate, betas, weight_decay=decay),
        "adamw": lambda: torch.optim.AdamW(parameters, rate, betas, weight_decay=decay),
    }
    optimizer = table[config.optimizer]()
    set_learning_rate(optimizer, rate)
    return optimizer


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Set the learning rate of every group to its share of ``rate``."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["share"]


def learning_rate(schedule: str, peak: float, step: int, total_steps: int) -> float:
    """Return the learning rate of step ``step`` (0-based) of ``total_steps`` over the whole run, from ``peak`` down."""
    progress = step / max(1, total_steps)
    factor = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[schedule]
    return peak * factor

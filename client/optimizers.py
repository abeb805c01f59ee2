"""The optimisers a site may use, made afresh every round.

Moments must not cross a round: the server may have changed the basis they are expressed in
(FedSVD), and another site's contribution has moved the point. Under privacy all of them run on
noised gradients, which is post-processing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.optim import Optimizer

from common.config import TrainingConfig


def build_optimizer(parameters: Iterable[nn.Parameter], config: TrainingConfig) -> Optimizer:
    """Return a new optimiser over ``parameters`` at the run's peak learning rate."""
    rate, decay = config.learning_rate, config.weight_decay
    betas = (config.momentum, config.beta2)
    table: dict[str, Callable[[], Optimizer]] = {
        "sgd": lambda: torch.optim.SGD(parameters, rate, weight_decay=decay),
        "momentum": lambda: torch.optim.SGD(parameters, rate, momentum=config.momentum, weight_decay=decay),
        "adam": lambda: torch.optim.Adam(parameters, rate, betas, weight_decay=decay),
        "adamw": lambda: torch.optim.AdamW(parameters, rate, betas, weight_decay=decay),
    }
    return table[config.optimizer]()


def learning_rate(config: TrainingConfig, step: int, total_steps: int) -> float:
    """Return the learning rate of step ``step`` (0-based) of ``total_steps`` over the whole run."""
    progress = step / max(1, total_steps)
    factor = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[config.schedule]
    return config.learning_rate * factor

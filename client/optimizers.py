"""The optimisers a site may use, made afresh every round.

Moments must not cross a round: the server may have changed the coordinates they are expressed in
(FedSVD), and another site's contribution has moved the point. Under privacy all of them run on
noised gradients, which is post-processing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.optim import Optimizer

from fedveil.common.config.sections import TrainingConfig
from fedveil.common.messages.state import HEAD


def build_optimizer(
    trained: Mapping[str, Mapping[str, nn.Parameter]], config: TrainingConfig, head_rate: float = 1.0
) -> Optimizer:
    """Return a new optimiser over the trained tensors, by layer and factor, at the configured learning rate.

    The head is a group of its own at ``head_rate`` times the rate; every group's ``share`` says its multiple.
    """
    rate, decay = config.learning_rate, config.weight_decay
    parameters = [
        {"params": list(factors.values()), "share": head_rate if layer == HEAD else 1.0}
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

"""What ``auto`` and 0 stand for in the training settings.

How many steps a round has, on how large batches, and where Adam is, follows from what a step costs:
the mechanism says it (``Recipe``).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from common.config.sections import ServerConfig, TrainingConfig
    from common.privacy.mechanism import Recipe

LEARNING_RATES = {"sgd": 1.0, "momentum": 1.0, "adam": 0.01, "adamw": 0.01}


def fill(training: TrainingConfig, server: ServerConfig, recipe: Recipe) -> tuple[TrainingConfig, ServerConfig]:
    """Return both sections with every ``auto`` and 0 that waits for the privacy mode filled in."""
    if server.optimizer == "auto":
        server = replace(server, optimizer=recipe.server_optimizer)
    optimizer = training.optimizer
    if optimizer == "auto":
        optimizer = "adam" if server.optimizer == "none" else "sgd"
    filled = replace(
        training,
        optimizer=optimizer,
        local_steps=training.local_steps or recipe.local_steps,
        sample_rate=training.sample_rate or recipe.sample_rate,
        learning_rate=training.learning_rate or LEARNING_RATES[optimizer],
        head_rate=training.head_rate or recipe.head_rate,
    )
    return filled, server

"""What ``auto`` and 0 stand for in the training settings.

A private step pays for its noise, so a private round is one step on one large batch, and the one
Adam of the run is the server's: it sees noise that the sites' average has already lowered. A step
without privacy is free, so the same records make several small steps with Adam at the sites, and
the average is the new model.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from common.config.sections import ServerConfig, TrainingConfig

LEARNING_RATES = {"sgd": 1.0, "momentum": 1.0, "adam": 0.01, "adamw": 0.01}


def fill(training: TrainingConfig, server: ServerConfig, *, private: bool) -> tuple[TrainingConfig, ServerConfig]:
    """Return both sections with every ``auto`` and 0 that waits for the privacy mode filled in."""
    if server.optimizer == "auto":
        server = replace(server, optimizer="adam" if private else "none")
    optimizer = training.optimizer
    if optimizer == "auto":
        optimizer = "adam" if server.optimizer == "none" else "sgd"
    filled = replace(
        training,
        optimizer=optimizer,
        local_steps=training.local_steps or (1 if private else 16),
        sample_rate=training.sample_rate or (0.33 if private else 0.018),
        learning_rate=training.learning_rate or LEARNING_RATES[optimizer],
        head_rate=training.head_rate or (4.0 if private else 5.0),
    )
    return filled, server

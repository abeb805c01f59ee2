"""Tiny vision transformers and digits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from digits import TOKENS, digits, encoded, write_folder

from fedveil.common.model.base import load_base_model
from fedveil.common.tasks.image_classification import ImageExample
from fedveil.common.tasks.images import read_image

NAME = "image-classification"


def example(pixels: np.ndarray, label: int = 0) -> ImageExample:
    return ImageExample(image=read_image(encoded(pixels)), label=label)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def targets_of(folder: str) -> tuple[str, ...]:
    """Return the names of the attention's projections of queries and values, as this kind of model calls them."""
    names = {name.rpartition(".")[2] for name, _ in load_base_model(folder, NAME).module.named_modules()}
    return ("q_proj", "v_proj") if "q_proj" in names else ("query", "value")


def toy_digits(vit: Callable[..., str], folder: Path) -> dict[str, Any]:
    return {
        "strategy": "ffa-lora",
        "model.name": vit("dinov2"),
        "model.task": NAME,
        "model.max-length": TOKENS,
        "model.feature-scale": 8.0,
        "data.name": str(write_folder(folder / "digits", digits(count=240))),
        "data.labels": "0,1",
        "data.test-size": 40,
        "data.partition": "iid",
        "adapter.rank": 3,
        "adapter.targets": "q_proj,v_proj,fc1",
        "head.start": "zeros",
        "rounds": 3,
        "server.optimizer": "none",
        "training.optimizer": "adam",
        "training.learning-rate": 0.03,
        "training.local-steps": 8,
        "training.sample-rate": 0.5,
        "privacy.delta": 1e-3,
        "privacy.noise-multiplier": 0.2,
        "privacy.epsilon": 1000.0,
        "precision": "float32",
        "device": "cpu",
        "output": str(folder / "runs"),
    }

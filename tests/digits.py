"""Scikit-learn's digits as PNG files, and tiny vision models: what tests of images play with."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

from audits.tiny_models import with_biases

SIDE, PATCH = 8, 2
TOKENS = (SIDE // PATCH) ** 2 + 1
"""Of a digit at its own size: its patches and a class token."""
PROCESSOR = {
    "do_resize": True,
    "size": {"height": SIDE, "width": SIDE},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def digits(labels: Sequence[int] = (0, 1), start: int = 0, count: int = 200) -> list[tuple[np.ndarray, int]]:
    """Return ``count`` digits of the named kinds: shape (8, 8), uint8, and what they show."""
    held = load_digits()
    chosen = [(held.images[i] * 15, int(held.target[i])) for i in range(len(held.target)) if held.target[i] in labels]
    return [(pixels.astype(np.uint8), label) for pixels, label in chosen[start : start + count]]


def encoded(pixels: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    """Return an image file's bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def write_folder(folder: Path, images: Sequence[tuple[np.ndarray, int]]) -> Path:
    """Write PNG files into one sub-folder a label."""
    for i, (pixels, label) in enumerate(images):
        place = folder / str(label)
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i:04}.png").write_bytes(encoded(pixels))
    return folder


def tiny_vit(kind: str = "dinov2", **options: Any) -> Any:
    """Return a random vision model of a kind: dinov2, vit, clip (both halves), or mae."""
    from transformers import (
        CLIPConfig,
        CLIPModel,
        Dinov2Config,
        Dinov2Model,
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersModel,
        ViTConfig,
        ViTMAEConfig,
        ViTMAEModel,
        ViTModel,
    )

    shape = {"image_size": SIDE, "patch_size": PATCH, "num_hidden_layers": 2, "num_attention_heads": 4}
    # Weights far enough from zero that images look unlike to the model.
    small: dict[str, Any] = {"hidden_size": 16, "initializer_range": 0.3, **shape, **options}
    if kind == "vit":
        return ViTModel(ViTConfig(intermediate_size=24, **small))
    if kind == "registers":
        return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(num_register_tokens=3, **small))
    if kind == "mae":
        return ViTMAEModel(ViTMAEConfig(intermediate_size=24, **small))
    if kind == "clip":
        text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        return CLIPModel(CLIPConfig(text_config=text, vision_config={"intermediate_size": 24, **small}))
    return Dinov2Model(Dinov2Config(mlp_ratio=2, **small))


def save_vit(folder: Path, kind: str = "dinov2", processor: dict[str, Any] | None = None, **options: Any) -> str:
    """Write a model, the same numbers every time, and its processor's settings; return the folder."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        with_biases(tiny_vit(kind, **options)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor or PROCESSOR), encoding="utf-8")
    return str(folder)

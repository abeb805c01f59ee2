"""Tiny vision transformers, and settings of a run on digits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from digits import save_vit
from image_worlds import toy_digits


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    made: dict[str, str] = {}

    def make(kind: str = "dinov2") -> str:
        if kind not in made:
            made[kind] = save_vit(tmp_path_factory.mktemp(f"tiny-{kind}"), kind)
        return made[kind]

    return make


@pytest.fixture
def toy_images(vit: Callable[[str], str], tmp_path: Path) -> dict[str, Any]:
    """Return settings of a private run on 240 digits, noughts and ones."""
    return toy_digits(vit, tmp_path)

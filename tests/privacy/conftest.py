"""Worlds of DP-SGD, and its noise taken away."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from dpsgd_worlds import WorldOf

from audits.faults import zero_noise
from audits.worlds import World, fresh_world
from fedveil.privacy import dpsgd


@pytest.fixture(scope="module")
def world_of(model_folder: Callable[[str], str]) -> WorldOf:
    """Return a function from (family, adapter, head policy, precision) to its world; tests must leave it unchanged."""
    made: dict[tuple[str, ...], World] = {}

    def make(family: str, adapter: str = "lora", head: str = "trained", precision: str = "float32") -> World:
        key = (family, adapter, head, precision)
        if key not in made:
            made[key] = fresh_world(model_folder(family), *key)
        return made[key]

    return make


@pytest.fixture
def silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the noise away altogether, so that zero can be told from nearly zero."""
    monkeypatch.setattr(dpsgd, "add_private_noise", zero_noise)

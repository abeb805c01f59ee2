"""A tiny BERT, and a site whose steward protects authors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from persons_world import BY_PERSON, Folder

from audits.tiny_site import OneSite, clinic
from audits.worlds import World, fresh_world


@pytest.fixture(scope="module")
def world(model_folder: Folder) -> World:
    return fresh_world(model_folder("bert"), "bert", "lora", "trained")


@pytest.fixture
def site(toy_settings: dict[str, Any], tmp_path: Path) -> OneSite:
    """Return a site whose steward protects authors, of whom there are seven."""
    made = clinic({**toy_settings, **BY_PERSON}, tmp_path)
    made.rule(unit="person", person="author")
    return made

"""A cohort of eight made-up sites of a trusted server, and a real site."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from site_runs import CLIP, COHORT_SIZE, SITE, World

from audits.tiny_site import OneSite, clinic
from fedveil.server.model import ServerModel
from fedveil.strategies.job import configure


@pytest.fixture
def settings(toy_settings: dict[str, Any]) -> dict[str, Any]:
    own = {"privacy.cohort": COHORT_SIZE, "privacy.clip-norm": CLIP, "privacy.epsilon": 60.0}
    return {**toy_settings, **SITE, **own, "training.sample-rate": "auto"}


@pytest.fixture
def world(settings: dict[str, Any], tmp_path: Path) -> World:
    job = configure(settings)
    model = ServerModel(job)
    return World(job, model, job.start(model.start), tmp_path)


# --- the site ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def site(settings: dict[str, Any], tmp_path: Path) -> OneSite:
    made = clinic(settings, tmp_path)
    made.rule(mechanisms=["client-level"])
    return made

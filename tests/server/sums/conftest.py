"""Settings of a run of two rounds whose sites share the noise of a sum, and one deployed site."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from summed_runs import SUMMED

from audits.sum_site import SumSite
from audits.tiny_site import clinic


@pytest.fixture
def summed(toy_settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings of a run of two rounds whose sites share the noise of a sum."""
    return {**toy_settings, **SUMMED}


# --- one deployed site ------------------------------------------------------------------------------------------------
@pytest.fixture
def clinics(summed: dict[str, Any], tmp_path: Path) -> SumSite:
    return SumSite(clinic({**summed, "privacy.delta": 1e-3}, tmp_path))

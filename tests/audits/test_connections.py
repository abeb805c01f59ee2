"""What a simulation connects to: this machine alone, and a call to a hub that a library swallows is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from audits.connections import IN_LIBRARY, SIMULATED, audit_connections
from audits.faults import SOUND

pytestmark = pytest.mark.slow


def test_a_simulation_connects_to_nothing_outside(tmp_path: Path) -> None:
    found = audit_connections(tmp_path, SOUND, SIMULATED)
    assert found.passed, found.figures
    assert int(found.figures["processes under the guard"]) > 10, "Flower's and Ray's processes had no guard"


def test_a_call_that_a_library_makes_late_and_swallows_is_found(tmp_path: Path) -> None:
    found = audit_connections(tmp_path, IN_LIBRARY, SIMULATED[1:])
    assert found.passed, found.figures
    assert int(found.figures["connections to others"]) > 0
    assert found.figures["commands that failed"] == "none", "what is swallowed ends no command"

"""Commands and what they start wait for threads without spinning; an import of FedVeil sets nothing."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SHOW = "import os, sys; print('torch' in sys.modules, os.environ.get('OMP_WAIT_POLICY'))"


@pytest.mark.parametrize(
    ("module", "given", "shown"),
    [
        ("fedveil.cli.main", None, "False PASSIVE"),
        ("fedveil.cli.main", "ACTIVE", "False ACTIVE"),
        ("fedveil", None, "False None"),
    ],
)
def test_wait_policy_is_set_before_torch_is_imported_and_by_commands_alone(
    module: str, given: str | None, shown: str
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    if given:
        environment["OMP_WAIT_POLICY"] = given
    command = [sys.executable, "-c", f"import {module}; {SHOW}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == shown

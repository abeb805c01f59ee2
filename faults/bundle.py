"""The app that the suite submits: this project, with the faulty ServerApp and ClientApp in place of its own."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from fedveil.common.bundle import OWN_SETTINGS, SETTINGS

PROJECT = Path(__file__).resolve().parent.parent
PACKAGES = ("fedveil", "common", "privacy", "strategies", "client", "reports", "server", "contrib", "demo")
APPS = ("__init__", "fault_plan", "faulty_site", "faulty_server")


def make_bundle(folder: Path) -> Path:
    """Copy what a Flower app of the suite consists of into ``folder`` and return it."""
    for package in PACKAGES:
        shutil.copytree(PROJECT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "faults").mkdir()
    for module in APPS:
        shutil.copy(PROJECT / "faults" / f"{module}.py", folder / "faults")
    shutil.copy(PROJECT / "README.md", folder)
    text = (PROJECT / "pyproject.toml").read_text(encoding="utf-8")
    for role, app in (("serverapp", "faults.faulty_server:app"), ("clientapp", "faults.faulty_site:app")):
        text, found = re.subn(rf'^{role} = ".*"$', f'{role} = "{app}"', text, flags=re.M)
        if found != 1:
            raise ValueError(f"pyproject.toml names {found} apps as {role}, not one")
    text = text.replace("fab-include = [", 'fab-include = ["faults/*.py", ')
    for place in (SETTINGS, OWN_SETTINGS):
        (folder / place).write_text(text, encoding="utf-8")
    return folder

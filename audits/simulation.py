"""Canaries through Flower: a whole run with SuperLink and Ray, attacked by its final adapter and its report alone.

    .venv/bin/python -m audits.simulation

The bundle that is submitted is this project with another door: ``audits.simulated_site`` teaches the site's
app the canaries, and builds in a fault where one is wanted. What the run claims is read from its privacy lines.
"""

from __future__ import annotations

import csv
import re
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from audits.canary import DELTA, NOISE, ROUNDS, STEPS, compared
from audits.faults import HALVED, RESET, SOUND, Fault
from audits.shell import run_alone, with_each
from audits.simulated_site import text_of
from audits.tiny_models import save_tiny_model, write_reviews
from audits.tiny_site import tiny_run
from fedveil.common.bundle import OWN_SETTINGS
from fedveil.common.data.partition import public_size_of_part
from fedveil.common.errors import ConfigError
from fedveil.common.findings import Finding
from fedveil.common.run_lines import PrivacyLine, read_lines
from fedveil.deploy import app
from fedveil.experiments.evaluate import load_result
from fedveil.experiments.simulate import simulate

CANARIES = 4000
RANK = 8
FAULTS = (HALVED, RESET)
PACKAGES = (
    "audits",
    "client",
    "common",
    "contrib",
    "demo",
    "deploy",
    "experiments",
    "fedveil",
    "privacy",
    "reports",
    "server",
    "strategies",
)


def bundle(folder: Path, fault: Fault) -> Path:
    """Make the project anew in ``folder``, its site's app the one with canaries and ``fault``; return the folder."""
    for name in PACKAGES:
        shutil.copytree(app.PROJECT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    text = (app.PROJECT / "pyproject.toml").read_text(encoding="utf-8")
    text = re.sub(
        r"^fab-include = .*$", 'fab-include = ["**/*.py", "**/*.toml"]', text, flags=re.MULTILINE
    )  # the audits go along
    text, doors = re.subn(r"^clientapp = .*$", 'clientapp = "with_canaries:app"', text, flags=re.MULTILINE)
    if doors != 1:
        raise ConfigError(f"pyproject.toml names {doors} apps as clientapp: name one")
    for place in ("pyproject.toml", OWN_SETTINGS):
        (folder / place).write_text(text, encoding="utf-8")
    shutil.copy(app.PROJECT / "README.md", folder)
    (folder / "with_canaries.py").write_text(
        f"from audits.simulated_site import app_with\n\napp = app_with({fault.name!r})\n", encoding="utf-8"
    )
    return folder


def settings_of(folder: Path, axes: list[int]) -> dict[str, Any]:
    """Return the settings of a run whose only site has the canaries of these axes; files go to ``folder``."""
    model, records = folder / "model", folder / "canaries.csv"
    model.mkdir()
    save_tiny_model("bert", model, hidden=64)
    with records.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([text_of(axis), ("bad", "good")[number % 2]] for number, axis in enumerate(axes))
    return {
        **tiny_run(folder),
        "data.name": str(records),
        "data.test": str(write_reviews(folder / "test.csv", 40)),
        "adapter.rank": RANK,
        "head.policy": "frozen",
        "rounds": ROUNDS,
        "training.optimizer": "sgd",
        "training.learning-rate": 1.0,
        "schedule": "constant",
        "training.local-steps": STEPS,
        "training.sample-rate": 1.0,
        "privacy.clip-norm": 1.0,
        "privacy.delta": DELTA,
        "privacy.epsilon": 100.0,
        "privacy.noise-multiplier": NOISE,
    }


def probe_run(folder: Path, fault: Fault = SOUND, canaries: int = CANARIES) -> Finding:
    """Run a federation of one site on canaries with ``fault`` built in, through Flower and Ray.

    Args:
        folder: for the bundle, the data and the run; empty.
        fault: what to break.
        canaries: how many; at most as many as the model trains numbers.
    """
    present = torch.rand(canaries) < 0.5
    axes = torch.arange(canaries)
    settings = settings_of(folder, axes[present].tolist())
    with patch.object(app, "PROJECT", bundle(folder / "bundle", fault)):
        run = simulate(settings, 1, lambda _: None)
    module = load_result(run / "adapter").module
    # The strategy trains the B factors alone; they start at zero and stand in the module's order.
    after = torch.cat([p.detach().double().flatten() for name, p in module.named_parameters() if "lora_B" in name])
    divisor = public_size_of_part(int(present.sum()))
    scores = after[:canaries] * divisor / (ROUNDS * STEPS)
    spent = read_lines(PrivacyLine, run)[-1].spent
    claimed = spent.epsilon_total if spent else 0.0  # without a claim nothing may be given away
    return compared("canaries through Flower", fault, scores.numpy(), present.numpy(), claimed)


def probe_runs(folder: Path, canaries: int = CANARIES) -> list[Finding]:
    """Probe a run of the code as it is, then one with each fault; ``folder`` must be empty."""
    return with_each(FAULTS, folder, lambda own, fault: probe_run(own, fault, canaries))


if __name__ == "__main__":
    run_alone(__doc__, "canaries", CANARIES, probe_runs)

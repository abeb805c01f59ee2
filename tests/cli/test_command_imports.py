"""What each command imports of the libraries that take time: a table, in which is nothing that it does not use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedveil.common.config.text import to_toml
from fedveil.experiments.in_process import run_in_process

HEAVY = (
    *("torch", "transformers", "flwr", "opacus", "peft", "ray", "pandas", "matplotlib", "scipy", "datasets"),
    *("sklearn", "flwr_datasets"),
)
MODEL = "torch transformers peft scipy"  # transformers imports SciPy for a loss, wherever it is
TABLE = {
    "--help": "",
    "settings": "",
    "runs": "",
    "report {run}": "scipy",  # the figures of a claim
    "plan -c {settings} --sites 2 --no-calibration": f"{MODEL} flwr",  # messages are encoded, to be measured
    "ask {run} hello": MODEL,
}
PROGRAM = f"""
import sys
from fedveil.cli.main import app
try: app(sys.argv[1:])
finally: print('imported:', *({set(HEAVY)!r} & sys.modules.keys()))
"""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return where a finished run and its settings are, once made."""
    return {"folder": tmp_path_factory.mktemp("imports")}


@pytest.mark.parametrize("command", TABLE)
def test_a_command_imports_what_it_uses(command: str, toy_settings: dict[str, Any], places: dict[str, Any]) -> None:
    folder: Path = places["folder"]
    if "run" not in places:
        (folder / "settings.toml").write_text(to_toml(toy_settings), encoding="utf-8")
        places.update(run=run_in_process({**toy_settings, "rounds": 1}, 2), settings=folder / "settings.toml")
    words = command.format(**places).split()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], cwd=folder, capture_output=True, text=True, check=False
    )
    said = done.stdout.splitlines()
    assert said, done.stderr
    assert set(said[-1].removeprefix("imported:").split()) == set(TABLE[command].split()), done.stderr

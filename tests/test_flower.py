"""The real thing: ``fedveil run`` starts Flower's SuperLink and Ray, trains, reports, and leaves nothing running."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from flwr.cli.build import build_fab_from_files

from common.privacy.ledger import Ledger
from experiments.settings import to_toml
from server.records import read_json
from server.report import read_lines

ROOT = Path(__file__).resolve().parent.parent
FEDVEIL = Path(sys.executable).parent / "fedveil"


def fedveil(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "200", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [str(FEDVEIL), *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture
def settings_file(toy_settings: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "settings.toml"
    path.write_text(to_toml(toy_settings), encoding="utf-8")
    return path


@pytest.mark.slow
def test_a_federation_runs_through_flower_and_ray(settings_file: Path, tmp_path: Path) -> None:
    done = fedveil("run", "-c", str(settings_file), "-c", 'strategy="fed-svd"', "--sites", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    rounds, privacy = read_lines(folder / "rounds.jsonl"), read_lines(folder / "privacy.jsonl")
    assert [line["participants"] for line in rounds] == [["site-0", "site-1", "site-2"]] * 2
    assert len(privacy) == 6
    for words in ("round 1/2", "round 2/2", "privacy spent, by site", "site-2", "(ε, δ) =", "before", "after 2 rounds"):
        assert words in done.stdout, f"the terminal does not say {words!r}:\n{done.stdout}"
    for site in range(3):
        with Ledger(folder / "ledgers" / f"site-{site}.sqlite") as ledger:
            own = [line for line in privacy if line["site"] == f"site-{site}"]
            assert ledger.epsilon(f"site-{site}", 1e-3) == pytest.approx(own[-1]["epsilon_total"], abs=1e-9)
    scored = fedveil("evaluate", str(folder), cwd=tmp_path)
    assert f"accuracy {100 * rounds[-1]['accuracy']:.1f} %" in scored.stdout
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=False).stdout
    assert not [line for line in left.splitlines() if "flower-superlink" in line and str(tmp_path) in line]


@pytest.mark.slow
def test_a_run_in_which_every_site_fails_names_the_reasons(settings_file: Path, tmp_path: Path) -> None:
    done = fedveil("run", "-c", str(settings_file), "-c", "privacy.delta=0.2", "--sites", "2", cwd=tmp_path)
    assert done.returncode == 1
    assert "round 1: 0 sites succeeded" in done.stderr
    assert "site-0 (failed): privacy.delta is 0.2" in done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert read_json(folder / "result.json")["status"] == "failed"


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("adapter.rnk=4", "unknown setting 'adapter.rnk' (did you mean 'adapter.rank'?)"),
        ('adapter.rank="four"', "adapter.rank must be a whole number, not 'four'"),
        ('strategy="fedsb"', "strategy is 'fedsb'; choose one of"),
        ('adapter.name="ffa-lora"', "works on the adapter lora, not 'ffa-lora'"),
        ("rounds=", "cannot read"),
        ("missing.toml", "cannot read the settings file missing.toml"),
    ],
)
def test_a_wrong_setting_stops_before_anything_is_started(setting: str, words: str, tmp_path: Path) -> None:
    done = fedveil("run", "-c", setting, cwd=tmp_path)
    assert done.returncode == 1
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, f"not one line: {done.stderr}"
    assert not (tmp_path / "runs").exists()


def test_a_bundle_holds_what_server_and_sites_execute_and_no_more() -> None:
    files = {path.relative_to(ROOT).as_posix(): path for path in ROOT.glob("[a-z]*/**/*.py")}
    content, _ = build_fab_from_files({"pyproject.toml": ROOT / "pyproject.toml", **files})
    packages = ("common", "strategies", "client", "server")
    found = zipfile.ZipFile(BytesIO(content)).namelist()
    wanted = {name for name in files if name.startswith(tuple(f"{package}/" for package in packages))}
    assert set(found) == wanted | {"pyproject.toml", ".info/CONTENT"}
    assert {"server/app.py", "client/app.py"} <= wanted

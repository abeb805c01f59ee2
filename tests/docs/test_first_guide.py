"""The newcomer's guide: its ten commands, in order, end in a model that stock libraries load and a signed report."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from report_forms import fedveil

from audits.tiny_models import write_reviews
from fedveil.common.config.text import to_toml
from fedveil.experiments.api import front
from fedveil.experiments.in_process import run_in_process

pytestmark = pytest.mark.rough_prices

PAGE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "first.md"
MOST = 10
PATIENCE = 3600.0
"""Seconds for one command: what a failure costs on a busy machine. The first one installs everything."""


def test_ten_commands_lead_from_a_table_to_a_served_model_and_a_signed_report(
    toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each as it stands, laid over settings that make it a second's; the run is in one process instead of Flower's."""
    monkeypatch.chdir(tmp_path)
    write_reviews(tmp_path / "questions.csv", 320, 5)
    asked = {key: value for key, value in toy_settings.items() if not key.startswith("data.")}
    (tmp_path / "toy.toml").write_text(to_toml({**asked, "output": "runs"}), encoding="utf-8")

    def in_process(settings: Any, sites: int, *_: Any, ended: Any, **__: Any) -> Path:
        ended(folder := run_in_process(settings, sites))
        return folder

    monkeypatch.setattr("fedveil.experiments.simulate.simulate", in_process)
    usual = front.given_settings
    own = {key: value for key, value in asked.items() if key != "output"}
    monkeypatch.setattr(front, "given_settings", lambda *given: {"output": "python", **own, **usual(*given)})
    text, commands, folder = PAGE.read_text(encoding="utf-8"), [], ""
    for language, block in re.findall(r"```(sh|python)\n(.*?)```", text, flags=re.S):
        if language == "python":
            exec(block, {})
            continue
        for line in block.splitlines():
            words = shlex.split(line.replace("RUN_FOLDER", folder))
            commands.append(words[1])
            if words[0] == "python3":
                continue
            toy = ["-c", "toy.toml"] if words[1] in ("plan", "run") else []
            code, said = fedveil(words[1], *toy, *words[2:])
            assert code == 0, f"{line}\n{said}"
            if words[1] == "run":
                (made,) = (tmp_path / "runs").iterdir()
                folder = str(made)
            if words[1] == "verify":
                assert said.startswith("valid: run"), said
    assert len(commands) <= MOST, f"{len(commands)} commands are more than the page says"
    assert {"run", "merge", "verify"} <= set(commands)
    assert re.search(r"^\[\[.*\d.*\]\]$", capsys.readouterr().out, flags=re.M), "the served model gave no logits"


@pytest.mark.deployment
def test_the_ten_commands_as_they_stand_in_a_clean_clone(tmp_path: Path) -> None:
    """Nothing in anybody's place: a new environment, the default job, Flower's simulation; it asks a package index."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(PAGE.parents[2]), str(clone)], check=True)
    write_reviews(clone / "questions.csv", 1000, 5)
    # What this process was told, such as where to import from, is not told to a newcomer.
    known = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "FEDVEIL", "PYTEST"))}
    said, folder = "", ""
    for language, block in re.findall(r"```(sh|python)\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S):
        lines = block.splitlines() if language == "sh" else [shlex.join([".venv/bin/python", "-c", block])]
        for line in lines:
            words = shlex.split(line.replace("RUN_FOLDER", folder))
            done = subprocess.run(
                ["bash", "-c", line.replace("RUN_FOLDER", folder)],
                cwd=clone,
                env=known,
                capture_output=True,
                text=True,
                check=False,
                timeout=PATIENCE,
            )
            said = done.stdout
            assert done.returncode == 0, f"{line}\n{said}\n{done.stderr}"
            if words[1] == "run":
                (made,) = (clone / "runs").iterdir()
                folder = str(made.relative_to(clone))
                assert folder in said, "the run does not print its folder"
            if language == "python" and "SentenceTransformer" in block:
                assert re.search(r"^\[\[.*\d.*\]\]$", said, flags=re.M), "the served model gave no logits"
    assert said.startswith("valid: run"), said
    signed = [file.parent for file in (clone / "runs").glob("*/report.signed.json")]
    assert len(signed) == 1, "the latest run, which is the one from Python"
    assert signed != [clone / folder]

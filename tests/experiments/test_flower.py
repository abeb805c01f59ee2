"""The real thing: ``fedveil run`` starts Flower's SuperLink and Ray, trains, reports, and leaves nothing running."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import click
import pytest
from flwr.cli.build import build_fab_from_disk, build_fab_from_files
from made_run import spent
from typer.testing import CliRunner

from fedveil.cli.main import app
from fedveil.client.ledger.ledger import Ledger
from fedveil.common.config.text import to_toml
from fedveil.common.run_lines import PrivacyLine, ResultFile, RoundLine, read_file, read_lines
from fedveil.common.server_file import ENGINES
from fedveil.deploy.app import app_folder
from fedveil.experiments.in_process import simulate_in_process
from fedveil.experiments.simulate import simulate
from fedveil.server.submission import OVERRIDES, refuse_wrong_settings

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
FEDVEIL = Path(sys.executable).parent / "fedveil"


def fedveil(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "200", "HF_HUB_OFFLINE": "1"}
    del environment["OMP_NUM_THREADS"], environment["FEDVEIL_CORES"]  # of the tests: as many workers as there are cores
    return subprocess.run(
        [str(FEDVEIL), *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture
def settings_file(toy_settings: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "settings.toml"
    path.write_text(to_toml(toy_settings), encoding="utf-8")
    return path


@pytest.mark.deployment
def test_a_secure_sum_runs_through_flower_and_ray(settings_file: Path, tmp_path: Path) -> None:
    summed = 'privacy.mode="secure-sum" privacy.honest-sites=2 training.optimizer="sgd" training.learning-rate=0.5'
    own = f"{summed} training.local-steps=1 privacy.noise-multiplier=2.0"
    done = fedveil("run", "-c", str(settings_file), "-c", own, "--sites", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert [(line.attempts, len(line.participants)) for line in read_lines(RoundLine, folder)] == [(1, 3)] * 2
    for site in range(3):
        with Ledger(folder / "ledgers" / f"site-{site}.sqlite") as ledger:
            assert {entry.event.kind for entry in ledger.entries()} == {"summed-gaussian"}
            assert ledger.epsilon_alone(f"site-{site}", 1e-3) > 1.3 * ledger.epsilon(f"site-{site}", 1e-3) > 0


@pytest.mark.deployment
def test_sites_of_ranks_2_4_8_and_16_run_through_flower_and_ray(settings_file: Path, tmp_path: Path) -> None:
    """``test_columns`` holds what they send against the mean of their weights."""
    ranks = 'strategy="heterogeneous-ranks" adapter.rank=16 adapter.site-ranks="2,4,8,16"'
    done = fedveil("run", "-c", str(settings_file), "-c", ranks, "--sites", "4", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    rounds, privacy = read_lines(RoundLine, folder), read_lines(PrivacyLine, folder)
    assert [len(line.participants) for line in rounds] == [4] * 2
    assert all(0 < spent(line).epsilon_total <= 8 for line in privacy)
    whole = fedveil(
        "run", "-c", str(settings_file), "-c", 'strategy="ffa-lora" adapter.rank=16', "--sites", "4", cwd=tmp_path
    )
    assert whole.returncode == 0, whole.stdout + whole.stderr
    (other,) = (found for found in (tmp_path / "runs").iterdir() if found != folder)
    columns, head = read_lines(RoundLine, other)[-1].bytes_up / 4, 4 * (2 * 16 + 2)
    assert rounds[-1].bytes_up == sum(rank / 16 * (columns - head) + head for rank in (2, 4, 8, 16))
    scored = CliRunner().invoke(app, ["evaluate", str(folder)])
    assert f"accuracy {100 * rounds[-1].accuracy:.1f} %" in scored.stdout


@pytest.mark.slow
def test_a_federation_runs_through_flower_and_ray(settings_file: Path, tmp_path: Path) -> None:
    done = fedveil("run", "-c", str(settings_file), "-c", 'strategy="fed-svd"', "--sites", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    rounds, privacy = read_lines(RoundLine, folder), read_lines(PrivacyLine, folder)
    assert [line.participants for line in rounds] == [["site-0", "site-1", "site-2"]] * 2
    assert len(privacy) == 6
    said = ("round 1/2", "round 2/2", "privacy: ε =", "before training", "in 2 of 2 rounds", f"folder: {folder}")
    for words in (*said, "next: fedveil ask"):
        assert words in done.stdout, f"the terminal does not say {words!r}:\n{done.stdout}"
    for site in range(3):
        with Ledger(folder / "ledgers" / f"site-{site}.sqlite") as ledger:
            own = [line for line in privacy if line.site == f"site-{site}"]
            assert ledger.epsilon(f"site-{site}", 1e-3) == pytest.approx(spent(own[-1]).epsilon_total, abs=1e-9)
    scored = CliRunner().invoke(app, ["evaluate", str(folder)])
    assert f"accuracy {100 * rounds[-1].accuracy:.1f} %" in scored.stdout
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=False).stdout
    assert not [line for line in left.splitlines() if "flower-superlink" in line and str(tmp_path) in line]


@pytest.mark.deployment
def test_both_engines_give_the_same_bits(
    toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without privacy and with as many threads: the adapter, the head, every score and every byte that travelled."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = {**toy_settings, "privacy.mode": "none", "strategy": "fed-svd"}
    flower = simulate({**settings, "output": str(tmp_path / "flower")}, 3, lambda _: None, workers=1)
    here = simulate_in_process({**settings, "output": str(tmp_path / "here")}, 3, lambda _: None)
    for name in ("adapter_model.safetensors", "head.safetensors"):
        assert (flower / "adapter" / name).read_bytes() == (here / "adapter" / name).read_bytes()
    one, other = ([replace(line, seconds=None) for line in read_lines(RoundLine, folder)] for folder in (flower, here))
    assert one == other
    engines = [read_file(ResultFile, folder).engine for folder in (flower, here)]
    assert engines == [ENGINES["simulation"], ENGINES["one process"]]
    assert all(
        f"engine: {engine}" in (f / "run.log").read_text() for f, engine in zip((flower, here), engines, strict=True)
    )


@pytest.mark.deployment
def test_a_run_in_which_every_site_fails_names_the_reasons(settings_file: Path, tmp_path: Path) -> None:
    done = fedveil("run", "-c", str(settings_file), "-c", "privacy.delta=0.2", "--sites", "2", cwd=tmp_path)
    assert done.returncode == 1
    assert "round 1: 0 sites succeeded" in done.stderr
    assert "site-0, site-1 (failed): privacy.delta is 0.2" in done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert read_file(ResultFile, folder).status == "failed"


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("adapter.rnk=4", "unknown setting 'adapter.rnk' (did you mean 'adapter.rank'?)"),
        ('adapter.rank="four"', "adapter.rank must be a whole number, not 'four'"),
        ('strategy="fedsb"', "strategy is 'fedsb'; choose one of"),
        ('strategy="fed-sb" adapter.name="lora"', "an adapter that trains R and freezes A and B, not on 'lora'"),
        ("rounds=", "cannot read"),
        ("missing.toml", "cannot read the settings file missing.toml"),
    ],
)
def test_a_wrong_setting_stops_before_anything_is_started(
    setting: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fedveil.experiments.simulate.simulate", lambda *_, **__: pytest.fail("a run is started"))
    done = CliRunner().invoke(app, ["run", "-c", setting])
    assert done.exit_code == 1
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, f"not one line: {done.stderr}"
    assert not (tmp_path / "runs").exists()


def test_the_installed_command_says_a_wrong_setting_in_a_line_of_its_own(tmp_path: Path) -> None:
    done = fedveil("run", "-c", "adapter.rnk=4", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "fedveil: unknown setting 'adapter.rnk' (did you mean 'adapter.rank'?)\n"
    assert not (tmp_path / "runs").exists()


def test_flwr_run_names_a_wrong_setting_before_it_sends_the_job(tmp_path: Path) -> None:
    """By Flower's own command, and a SuperLink that is not there: where it looks for that, the job would be sent."""
    command = [str(FEDVEIL.with_name("flwr")), "run", str(ROOT), "nowhere", "-c", "rounds=2", "-c", "adapter.rnk=4"]
    environment = {**os.environ, "COLUMNS": "200", "FLWR_HOME": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    said = " ".join((done.stdout + done.stderr).replace("│", " ").split())  # Flower breaks lines inside a box
    assert "unknown setting 'adapter.rnk' (did you mean 'adapter.rank'?)" in said
    assert "'nowhere'" not in said, "the job would have been sent"


@pytest.mark.parametrize(
    ("own", "overrides", "words"),
    [
        ("", ['adapter.rank="four"'], "adapter.rank must be a whole number, not 'four'"),
        ("", ['strategy="fed-svd"', "fed-svd.peiod=2"], "(did you mean 'fed-svd.period'?)"),
        ("", ['strategy="fed-sb"', 'adapter.name="ffa-lora"'], "not on 'lora-frozen-a', which trains B and freezes A"),
        ('strategy = "fed-svd"', ['adapter.name="ffa-lora"'], ""),
        ("rouds = 2", [], "unknown setting 'rouds' (did you mean 'rounds'?)"),
        ("", [], ""),
    ],
)
def test_settings_are_checked_over_those_of_the_app_when_it_is_sent(
    own: str, overrides: list[str], words: str, tmp_path: Path
) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "app"\nversion = "1"\nlicense = "x"\n[tool.flwr.app]\npublisher = "us"\n'
        '[tool.flwr.app.components]\nserverapp = "fedveil.server.app:app"\nclientapp = "fedveil.client.app:app"\n'
        f"[tool.flwr.app.config]\n{own}\n"
    )
    with click.Context(click.Command("run")) as context:
        context.params = {"app": str(tmp_path), OVERRIDES: overrides}
        if not words:
            refuse_wrong_settings()
            return
        with pytest.raises(click.ClickException) as refused:
            refuse_wrong_settings()
    assert words in refused.value.message
    assert "\n" not in refused.value.message


def test_settings_are_not_checked_in_other_commands() -> None:
    with click.Context(click.Command("run")) as context:
        context.params = {"app": "nowhere"}
        refuse_wrong_settings()


def test_a_bundle_holds_what_server_and_sites_execute_and_no_more() -> None:
    files = {path.relative_to(ROOT).as_posix(): path for path in ROOT.glob("[a-z]*/**/*.py")}
    recipes = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("strategies/recipes/*.toml")}
    more = {name: ROOT / name for name in ("pyproject.toml", "demo/prose.md", *recipes)}
    content, _ = build_fab_from_files({**more, **files})
    with app_folder() as folder:
        assert build_fab_from_disk(folder) == content, "what we hand to Flower is not what it would bundle itself"
    assert not folder.exists()
    packages = ("fedveil", "common", "privacy", "demo", "strategies", "client", "reports", "server", "contrib")
    found = zipfile.ZipFile(BytesIO(content)).namelist()
    wanted = {name for name in files if name.startswith(tuple(f"{package}/" for package in packages))}
    apart = ("contrib/tests/", "contrib/experiments/", "contrib/transfer/")
    wanted -= {name for name in wanted if name.startswith(apart)}
    assert set(found) == wanted | recipes | {"pyproject.toml", "demo/prose.md", ".info/CONTENT"}
    assert {"server/app.py", "client/app.py"} <= wanted


def test_settings_are_checked_without_the_libraries_that_only_training_needs() -> None:
    code = """
import sys, fedveil.server.resume
from fedveil.strategies.job import configure
configure({'recipe': 'plain'})
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {"peft", "transformers", "opacus", "dp_accounting", "scipy"} & set(done.stdout.split())
    assert not loaded, f"a wrong setting is named only after {', '.join(sorted(loaded))} are imported: seconds"

"""The list of runs, and the names by which commands find one."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
from made_run import MadeRun
from report_forms import fedveil

from fedveil.common.errors import ConfigError
from fedveil.common.paths import given_run, named_run, short_name
from fedveil.experiments.runs import ListedRun, listed_runs
from fedveil.server.lock import only_writer


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of three runs: one completed, one cut off after a round, one that failed before its first."""
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "runs"
    MadeRun(output / "ffa-lora-7", {"rounds": 2}).start().round(1, 0.6).round(2, 0.7).end()
    MadeRun(output / "ffa-lora-8", {"rounds": 4}).start().round(1, 0.65)
    MadeRun(output / "head-only-7", {"rounds": 4}).start().end("failed", "nobody came")
    for when, name in enumerate(("ffa-lora-7", "ffa-lora-8", "head-only-7"), start=1):
        os.utime(output / name / "config.json", (when, when))
    (output / "no-run").mkdir()
    (output / "torn").mkdir()
    (output / "torn" / "config.json").write_text("{")
    os.utime(output / "torn" / "config.json", (0, 0))
    return output


def figures(run: ListedRun) -> tuple[str, str, int, int, float | None]:
    return run.folder.name, run.state, run.rounds, run.planned, run.accuracy


def test_the_list_says_what_each_run_has_come_to(runs: Path) -> None:
    done, cut, failed = listed_runs(runs)
    assert figures(done) == ("ffa-lora-7", "completed", 2, 2, 0.7)
    assert figures(cut) == ("ffa-lora-8", "cut off", 1, 4, 0.65)
    assert (failed.folder.name, failed.state, failed.rounds) == ("head-only-7", "failed", 0)
    assert done.epsilon
    assert cut.epsilon
    with only_writer(runs / "ffa-lora-8"):
        assert [one.state for one in listed_runs(runs)] == ["completed", "under way", "failed"]


def test_a_run_that_is_being_started_is_listed_and_can_be_named(runs: Path) -> None:
    started = runs / "head-only-9" / "process.json"
    started.parent.mkdir()
    with started.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert figures(listed_runs(runs)[-1]) == ("head-only-9", "starting", 0, 0, None)
        assert named_run("latest") == named_run("9") == started.parent
    assert listed_runs(runs)[-1].state == "cut off"


def test_the_command_lists_them_and_says_where_there_are_none(runs: Path, tmp_path: Path) -> None:
    code, said = fedveil("runs")
    assert (code, [word in said for word in ("ffa-lora-7", "cut off", "1/4", "70.0 %")]) == (0, [True] * 4), said
    assert max(map(len, said.splitlines()[:-1])) <= 80
    assert "no run in" in fedveil("runs", tmp_path / "no-run")[1]


def test_a_list_imports_nothing_that_takes_seconds(runs: Path) -> None:
    program = (
        "import sys; from fedveil.cli.main import app\n"
        "app(['runs'], standalone_mode=False)\n"
        "print('imported:', *{'torch', 'transformers'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=runs.parent, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "imported:"


def test_a_run_is_named_by_path_id_or_latest(runs: Path) -> None:
    assert named_run(str(runs / "ffa-lora-8")) == named_run("8") == named_run("ffa-lora-8") == runs / "ffa-lora-8"
    assert given_run(Path("latest")) == runs / "head-only-7"
    assert given_run(Path("runs/no-run")) == Path("runs/no-run"), "a folder that is there is the command's to judge"
    (runs / "ffa-lora-7" / "checkpoint.safetensors").touch()
    assert named_run("latest", holding="checkpoint.safetensors") == runs / "ffa-lora-7"
    for name, wanted in (("7", "more than one run"), ("9", "no run in"), ("latest", "no run in")):
        with pytest.raises(ConfigError, match=wanted):
            named_run(name, "" if name != "latest" else str(runs / "no-run"))


def test_first_digits_name_one_run_and_no_run_that_others_begin_like(runs: Path) -> None:
    long, other = "ffa-lora-15531509587381829735", "fed-sb-15531600000000000000"
    for name in (long, other):
        MadeRun(runs / name, {"rounds": 2}).start().end()
    for name in ("155315", "ffa-lora-1553", str(runs / "155315"), long):
        assert named_run(name) == runs / long
    assert given_run(Path("runs/155316")) == runs / other
    assert short_name(long, [long, other]) == "155315"
    assert short_name("head-only-7", [long]) == "head-only-7"
    with pytest.raises(ConfigError, match="'1553' names more than one run: ") as caught:
        named_run("1553")
    assert (long in str(caught.value), other in str(caught.value)) == (True, True)
    for name in ("155", "5315", "lora-1553"):  # too few digits, and no beginning
        with pytest.raises(ConfigError, match="no run in"):
            named_run(name)
    assert "`fedveil report 15531" in fedveil("runs")[1]

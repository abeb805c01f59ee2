"""``import fedveil``: run, plan, load and what they return."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
from typer.testing import CliRunner

import fedveil
from fedveil.cli.main import app
from fedveil.common.config.text import to_toml
from fedveil.common.data.in_memory import MARK, in_memory
from fedveil.common.data.sources import load_protected
from fedveil.common.ends import ends_wait
from fedveil.common.errors import ConfigError, DataError, RunFailed
from fedveil.common.files import PROCESS
from fedveil.common.run_lines import ConfigFile, PrivacyLine, ResultFile, read_file, read_lines
from fedveil.common.server_file import ENGINES
from fedveil.common.tasks.tables import Table
from fedveil.experiments import in_process
from fedveil.experiments.api import front
from fedveil.experiments.api.keywords import KEYWORDS, given_settings
from fedveil.experiments.in_process import InProcessTransport
from fedveil.experiments.simulate import simulate
from fedveil.strategies.job import configure
from fedveil.strategies.options import known_settings

pytestmark = [pytest.mark.rough_prices, pytest.mark.one_length]

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["Accuracy", "Plan", "Run", "load", "plan", "register", "run"]
"""What ``import fedveil`` offers: a change here is one that users see."""


@pytest.fixture
def frame(toy_settings: dict[str, Any]) -> pd.DataFrame:
    return pd.read_csv(toy_settings["data.name"])


@pytest.fixture
def given(toy_settings: dict[str, Any]) -> dict[str, Any]:
    """Return keywords of a tiny run whose records and test part are not set."""
    left_out = ("data.name", "data.test-size", "data.partition", "output")
    settings = {key: value for key, value in toy_settings.items() if key not in left_out}
    return {"settings": settings, "output": toy_settings["output"], "quiet": True}


def test_the_names_are_these_and_importing_them_costs_nothing() -> None:
    assert fedveil.__all__ == NAMES
    assert {*NAMES} <= {*dir(fedveil)}
    assert all(getattr(fedveil, name).__doc__ for name in NAMES)
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        fedveil.train  # noqa: B018
    code = "import sys, fedveil; dir(fedveil); print({'torch', 'pandas', 'fedveil.common'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_frame_is_trained_on_and_no_copy_of_it_is_left(
    frame: pd.DataFrame, given: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frame["text"] += " canary" + frame.index.astype(str)
    run = fedveil.run(frame, sites=2, test=40, **given)
    assert capsys.readouterr() == ("", "")
    files = [path for path in run.folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not [path for path in files if b"canary1" in path.read_bytes()]
    assert [*run.history.index] == [0, 1, 2]
    assert run.history["epsilon"].iloc[1:].is_monotonic_increasing
    assert {*run.privacy["site"]} == {"site-0", "site-1"}
    assert (run.privacy["left"] == run.privacy["budget"] - run.privacy["epsilon"]).all()
    accuracy = run.accuracy
    assert accuracy is not None
    assert float(accuracy) == run.history["accuracy"].iloc[-1]
    assert accuracy.records == 40
    predicted = run.predict(["a warm and joyful film", "a dull film"])
    assert predicted[["bad", "good"]].sum(axis=1).round(6).tolist() == [1.0, 1.0]
    assert predicted["probability"].tolist() == predicted[["bad", "good"]].max(axis=1).tolist()
    assert "of this run alone" in repr(run)
    assert str(run.folder) in run._repr_html_()
    assert (run.adapter / "adapter_config.json").is_file()
    assert run.report.is_file()
    assert (run.merge(tmp_path / "model") / "modules.json").is_file()
    with pytest.raises(DataError, match="in the memory of a run that has ended"):
        in_process.run_in_process({**run.settings, "output": str(tmp_path)}, 2)


def test_a_cell_that_is_run_twice_is_two_runs(toy_settings: dict[str, Any], given: dict[str, Any]) -> None:
    first, second = (fedveil.run(toy_settings["data.name"], sites=2, test=40, **given) for _ in range(2))
    assert first.folder != second.folder
    assert first.epsilon == second.epsilon
    assert repr(fedveil.load(str(first.folder))) == repr(first)


def test_runs_that_share_ledgers_share_one_budget(given: dict[str, Any], frame: pd.DataFrame, tmp_path: Path) -> None:
    ledger = tmp_path / "ledgers"
    tables = {"leeds": frame[:120], "york": datasets.Dataset.from_pandas(frame[120:])}
    first = fedveil.run(tables, test=40, ledger=ledger, **given)
    assert {*first.privacy["site"]} == {"leeds", "york"}
    assert "of this run alone" not in repr(first)
    with pytest.raises(RunFailed, match=r"earlier runs have spent ε 7\.9\d+ of 8 at (leeds|york), and too little"):
        fedveil.run(tables, test=40, ledger=ledger, **given)
    settings = given["settings"]
    planned = fedveil.plan(tables, test=40, ledger=ledger, epsilon=20, timed=False, settings=settings)
    assert planned.as_dict()["epsilon_of_earlier_runs"] == pytest.approx(first.epsilon, abs=1e-3)
    with pytest.raises(RunFailed, match="too little is left"):
        fedveil.plan(tables, test=40, ledger=ledger, timed=False, settings=settings)
    more = fedveil.run(tables, test=40, ledger=ledger, epsilon=20, **given)
    assert (more.epsilon or 0) > (first.epsilon or 0)
    with pytest.raises(ConfigError, match="had other records than now"):
        fedveil.run(tables, test=50, ledger=ledger, epsilon=30, **given)


def test_what_a_person_types_wrong_is_said(given: dict[str, Any], frame: pd.DataFrame, tmp_path: Path) -> None:
    run = fedveil.run(frame, sites=2, test=40, **given)
    for texts in (frame[["text"]], {"a": 1}, None, 3, ["fine", None], [1.5]):
        with pytest.raises(ConfigError, match="texts must be a text, or a list of texts"):
            run.predict(texts)
    with pytest.raises(ConfigError, match="names no run"):
        fedveil.load(tmp_path / "none")
    frame["hospital"] = ["Süd", "St. Mary"] * 120
    with pytest.raises(ConfigError, match="leave sites out"):
        fedveil.plan(frame, site="hospital", sites=1, settings=given["settings"])
    planned = fedveil.plan(frame, site="hospital", test=40, timed=False, settings=given["settings"])
    assert "site-0 is 'St. Mary', site-1 is 'Süd': a site's name has letters" in repr(planned)


def test_a_column_names_the_site_of_each_row(given: dict[str, Any], frame: pd.DataFrame) -> None:
    frame["hospital"] = ["north", "south", "west"] * 80
    run = fedveil.run(frame, site="hospital", test=0.2, **given)
    assert {*run.privacy["site"]} == {"north", "south", "west"}
    last = run.history.iloc[-1]
    parts = [last[f"accuracy_of_{name}"] for name in ("north", "south", "west")]
    assert min(parts) <= last["accuracy"] <= max(parts)
    assert "Accuracy by the site" in run.report.read_text(encoding="utf-8")
    assert run.settings["data.test-size"] == 48
    planned = fedveil.plan(
        frame, site="hospital", test=0.2, timed=False, **{k: v for k, v in given.items() if k == "settings"}
    )
    assert {site["site"] for site in planned.as_dict()["sites"]} == {"north", "south", "west"}
    assert "north" in repr(planned)
    assert planned.epsilon == pytest.approx(run.epsilon, rel=0.02)
    assert planned.seconds is None


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"epsilno": 3}, "unknown keyword 'epsilno'.*did you mean 'epsilon'"),
        ({"privacy_epsilon": 3}, r"write settings=\{'privacy.epsilon'"),
        ({"epsilon": 3, "settings": {"privacy.epsilon": 3}}, "epsilon and settings.* are the same setting"),
        ({"settings": {"privacy.epsilno": 3}}, "unknown setting 'privacy.epsilno'"),
        ({"text": "x"}, r"no column 'x' \(text=\)"),
        ({"settings": {"data.text": "x"}}, r"no column 'x' \(data\.text\)"),
        ({"test": 5000}, r"test= is 5000, but .* has only 240 records: .* or name a file as test="),
        ({"settings": {"data.name": "other.csv"}}, "data.name is given as a setting"),
        ({"sites": 0}, "at least 1"),
        ({"test": True}, "not a truth value"),
        ({"test": 0.001}, "holds 0 of 240"),
        ({"data": {"a": 7}}, "the table of a is a int"),
        ({"data": {"a b": "x.csv"}}, "is no name of a site"),
        ({"data": []}, "data is empty"),
        ({"data": ["sst2", "sst2"]}, "give it alone"),
        ({"data": datasets.DatasetDict(train=datasets.Dataset.from_dict({"a": [1]}))}, "has the splits train"),
        ({"data": pd.DataFrame({"text": []})}, "is empty"),
        ({"data": {"a": "x.csv"}, "site": "hospital"}, "leave it out"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(
    wrong: dict[str, Any], said: str, frame: pd.DataFrame, tmp_path: Path
) -> None:
    data = wrong.pop("data", frame)
    with pytest.raises((ConfigError, DataError), match=said):
        fedveil.run(data, output=tmp_path / "runs", quiet=True, **wrong)
    assert not (tmp_path / "runs").exists()


def test_keywords_are_settings_and_win_over_a_file(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text('rounds = 3\n[privacy]\nepsilon = 1.0\n[data]\nlabels = ["a", "b"]\n')
    flat = given_settings({"epsilon": 3, "labels": ("c, d", "e")}, {"adapter": {"rank": 4}}, tmp_path / "job.toml")
    assert flat == {"rounds": 3, "privacy.epsilon": 3, "data.labels": '"c, d",e', "adapter.rank": 4}
    assert {*KEYWORDS.values()} <= {*known_settings()}


def test_no_protected_site_reads_what_is_in_memory(toy_settings: dict[str, Any]) -> None:
    config = configure({**toy_settings, "data.labels": "bad,good"}).config
    with in_memory({f"{MARK}x": [Table("x", {"text": ["warm"], "label": ["good"]})]}):
        with pytest.raises(DataError, match="there is no data set"):
            load_protected(config.data, config.model.task, f"{MARK}x")
        with pytest.raises(ConfigError, match="is under way"), in_memory({f"{MARK}x": []}):
            pass


@pytest.fixture
def at_a_terminal() -> Iterator[None]:
    """Hear Ctrl-C, which a program that a shell has started in the background ignores."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("at_a_terminal")
def test_an_interrupted_run_goes_on_and_pays_no_site_twice(
    given: dict[str, Any], frame: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in round 2, while the first site is at work: it finishes, and is not asked to pay again."""
    run = in_process.run_in_process

    class Interrupted(InProcessTransport):
        def deliver(self, node: int, task: Any, content: Any) -> Any:
            if task.round_number == 2 and node == 0:
                os.kill(os.getpid(), signal.SIGINT)
            return super().deliver(node, task, content)

    def interrupted(settings: Any, nodes: Any, **named: Any) -> Path:
        return run(settings, nodes, "7", Interrupted, **named)

    data = {"leeds": frame[:120], "york": frame[120:]}
    with monkeypatch.context() as patch:
        patch.setattr(in_process, "run_in_process", interrupted)
        with pytest.raises(KeyboardInterrupt) as ended:
            fedveil.run(data, test=40, **given)
    folder = next(Path(given["output"]).glob("*-7"))
    assert ended.value.__notes__ == [f"folder: {folder}", f"go on: fedveil.run(..., resume={str(folder)!r})"]
    cut_off = fedveil.load(folder)
    assert cut_off.status == "unfinished"
    assert len(cut_off.predict(["a warm film", "a dull one"])) == 2, "of the rounds that are complete"
    with pytest.raises(ConfigError, match=r"go on with fedveil\.run"):
        simulate({**read_file(ConfigFile, folder).settings, "resume": str(folder)}, 2, lambda _: None)
    with pytest.raises(ConfigError, match=r"resume: data is"):
        fedveil.run(str(folder / "rounds.jsonl"), resume=folder, quiet=True)
    with pytest.raises(ConfigError, match="resume: the run began with other records"):
        fedveil.run({**data, "york": frame[121:]}, test=40, resume=folder, **given)
    whole = fedveil.run(data, test=40, resume=folder, **given)
    assert whole.folder == folder
    assert whole.status == "completed"
    assert len([line for line in read_lines(PrivacyLine, folder) if line.site == "leeds"]) == 2
    straight = fedveil.run(data, test=40, **given)
    assert whole.epsilon == straight.epsilon


@pytest.mark.usefixtures("at_a_terminal")
def test_an_end_waits_for_the_block_and_a_second_one_does_not() -> None:
    reached = []

    def ended(times: int) -> None:
        with ends_wait():
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
            reached.append(times)

    for times in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            ended(times)
    assert reached == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    apart = threading.Thread(target=lambda: reached.append(3) if ends_wait().__enter__() is None else None)
    apart.start()
    apart.join()
    assert reached == [1, 3]


def test_lines_come_once_and_say_a_round_each(
    toy_settings: dict[str, Any], given: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = fedveil.run(toy_settings["data.name"], sites=2, test=40, **{**given, "quiet": False})
    out, err = capsys.readouterr()
    assert err == ""
    assert [line for line in out.splitlines() if line.startswith("round ")] == [
        line for line in (run.folder / "run.log").read_text().splitlines() if line.startswith("round ")
    ]
    assert out.count("round 1/2") == 1


def test_the_command_runs_in_process_where_that_is_wanted(toy_settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(to_toml(toy_settings), encoding="utf-8")
    done = CliRunner().invoke(app, ["run", "-c", str(tmp_path / "job.toml"), "--sites", "2", "--in-process"])
    assert done.exit_code == 0, done.output
    assert done.stdout.count("round 2/2") == 1
    (folder,) = Path(toy_settings["output"]).iterdir()
    assert read_file(ResultFile, folder).engine == ENGINES["one process"]
    assert not (folder / PROCESS).exists()


def test_the_command_takes_records_as_python_does(
    toy_settings: dict[str, Any], frame: pd.DataFrame, tmp_path: Path
) -> None:
    frame["hospital"] = ["north", "south"] * 120
    frame.to_csv(tmp_path / "own.csv", index=False)
    others = {key: value for key, value in toy_settings.items() if not key.startswith("data.")}
    (tmp_path / "job.toml").write_text(to_toml(others), encoding="utf-8")
    words = ["run", f"{tmp_path / 'own.csv'}", "--site", "hospital", "--test", "0.2", "--ledger", f"{tmp_path / 'led'}"]
    words += ["-c", str(tmp_path / "job.toml"), "--rounds", "1"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert done.stdout.count("round 1/1") == 1
    (folder,) = Path(toy_settings["output"]).iterdir()
    run = fedveil.load(folder)
    assert {*run.privacy["site"]} == {"north", "south"}
    assert run.settings["data.test-size"] == 48
    assert sorted(path.name for path in (tmp_path / "led").glob("*.sqlite")) == ["north.sqlite", "south.sqlite"]
    assert "of this run alone" not in repr(run)
    for again in (words, ["plan", *words[1:], "--no-calibration"]):
        refused = CliRunner().invoke(app, again)
        assert refused.exit_code == 1
        assert "too little is left" in refused.output.splitlines()[-1]
    wrong = CliRunner().invoke(app, ["run", words[1], "--text", "x"])
    assert "no column 'x' (--text)" in wrong.output
    assert "data.text" in CliRunner().invoke(app, ["run", words[1], "-c", 'data.text="x"']).output


def test_the_readmes_lines_run_on_a_table_of_ones_own(
    toy_settings: dict[str, Any], frame: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    frame.rename(columns={"text": "question", "label": "kind"}).to_csv("reviews.csv", index=False)
    own = {key: value for key, value in toy_settings.items() if not key.startswith("data.")}
    monkeypatch.setattr(front, "given_settings", lambda *given: {**own, **given_settings(*given)})
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)
    namespace: dict[str, Any] = {}
    exec(block, namespace)
    assert namespace["run"].settings["data.test-size"] == 80
    assert (tmp_path / "model" / "modules.json").is_file()

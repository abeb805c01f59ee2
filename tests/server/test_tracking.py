"""Trackers: they get what the run's folder holds, a step a round, and no run ends by one."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from made_run import MadeRun

from fedveil.common.errors import ConfigError
from fedveil.common.messages.round import Spending
from fedveil.common.run_lines import RoundLine, read_lines
from fedveil.common.trackers import TRACKERS, Tracker, check_installed
from fedveil.experiments.in_process import run_in_process
from fedveil.privacy.accountant import Accountant
from fedveil.privacy.figures import epsilon_text
from fedveil.reports import report_of
from fedveil.reports.course import epsilon_by, epsilon_course
from fedveil.reports.folder import read_run
from fedveil.server.collect.base import Collected
from fedveil.server.collect.door import shown_of
from fedveil.server.members import Member
from fedveil.server.observers import RoundOutcome
from fedveil.server.terminal import round_line
from fedveil.server.tracking import Tracking, rounds_of
from fedveil.strategies.job import configure

pytestmark = pytest.mark.rough_prices


class Recorder(Tracker):
    """A row that keeps what it is told; it fails in the rounds of ``broken``."""

    name: ClassVar[str] = "tensorboard"
    package: ClassVar[str] = "json"
    where: ClassVar[str] = "nowhere"
    broken: ClassVar[set[int]] = set()
    told: ClassVar[list[Any]] = []

    def __init__(self, folder: Path, run: str, settings: Mapping[str, str | int | float | bool]) -> None:
        self.told.append(("open", run, settings["rounds"]))

    def log(self, round_number: int, figures: Mapping[str, float]) -> None:
        if round_number in self.broken:
            raise OSError("the disk is full")
        self.told.append((round_number, dict(figures)))

    def close(self) -> None:
        self.told.append("close")


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    monkeypatch.setitem(TRACKERS._rows, "tensorboard", Recorder)
    monkeypatch.setattr(Recorder, "told", [])
    monkeypatch.setattr(Recorder, "broken", set())
    return Recorder


def made(folder: Path, **settings: Any) -> MadeRun:
    run = MadeRun(folder / "run", {"rounds": 3, "tracker": "tensorboard", **settings}).start()
    return run.round(1, 0.71).round(2, 0.74)


# --- what is told ---
def test_figures_are_those_of_the_report(tmp_path: Path) -> None:
    run, found = made(tmp_path), rounds_of(tmp_path / "run")
    data = report_of(run.folder)
    assert list(found) == [0, 1, 2]
    assert found[0] == {"accuracy": 0.695, "loss": 0.581}
    for row in data.rounds[1:]:
        told = found[row.round_number]
        assert (told["accuracy"], told["loss"], told["epsilon"]) == (row.accuracy, row.loss, row.epsilon_worst)
        assert (told["bytes_up"], told["seconds"], told["sites"]) == (row.bytes_up, row.seconds, len(row.participants))


def test_a_site_that_tells_too_little_is_told_by_what_its_lines_cost(tmp_path: Path) -> None:
    """A first total of 0 passes the server's checks: no site is bound from below but by its own past."""
    run = made(tmp_path)
    honest = rounds_of(run.folder)
    job, lines = configure(run.settings), [{**line, "epsilon_total": 0.0} for line in run.lines("privacy.jsonl")]
    (run.folder / "privacy.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data, files = report_of(run.folder), read_run(run.folder)
    for row in data.rounds[1:]:
        least = honest[row.round_number]["epsilon"]
        assert least > 0.1
        assert row.epsilon_worst == epsilon_by(files, row.round_number) == pytest.approx(least)
        assert rounds_of(run.folder)[row.round_number]["epsilon"] == row.epsilon_worst
    spent = Spending(**vars(files.privacy[0].spent), accountant=Accountant("pld", "0.6.0"))
    outcome = RoundOutcome(2, Collected(), None, 1.0)
    words = round_line(shown_of(job), outcome, {1: Member("north", 2000, spent)}, epsilon_by(files, 2))
    assert f"ε {epsilon_text(honest[2]['epsilon'])} of 8" in words
    assert "by the lines in privacy.jsonl: who counts told 0.000" in words


def test_a_long_course_is_priced_at_some_rounds_which_stand_for_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedveil.reports.course.MOST_PRICED", 2)
    run = made(tmp_path).round(3, 0.75).round(4, 0.76)
    lines = [{**line, "epsilon_total": 0.0} for line in run.lines("privacy.jsonl")]
    (run.folder / "privacy.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = read_run(run.folder)
    course = epsilon_course(files)
    assert course == {1: 0.0, 2: epsilon_by(files, 2), 3: epsilon_by(files, 2), 4: epsilon_by(files, 4)}


def test_epsilon_of_a_sum_says_on_how_many_honest_sites_it_counts(tmp_path: Path) -> None:
    settings = {"privacy.mode": "secure-sum", "training.local-steps": 1, "training.optimizer": "sgd", "rounds": 2}
    own = {"privacy.honest-sites": 2, "privacy.colluders": 1, "privacy.noise-multiplier": 0.7}
    sites = dict.fromkeys(("a", "b", "c"), 2000)
    run = MadeRun(tmp_path / "run", {**settings, **own}, sites, honest=2).start().round(1, 0.7)
    figures = rounds_of(run.folder)[1]
    assert [name for name in figures if name.startswith("epsilon")] == ["epsilon/h-2"]
    assert figures["epsilon/h-2"] == report_of(run.folder).rounds[-1].epsilon_worst


def test_a_run_without_privacy_and_one_after_an_exposure_tell_no_epsilon(tmp_path: Path) -> None:
    off = MadeRun(tmp_path / "off", {"privacy.mode": "none", "rounds": 1}).start().round(1, 0.8)
    assert "epsilon" not in rounds_of(off.folder)[1]
    exposed = made(tmp_path)
    lines = [{**line, "epsilon_total": "inf"} for line in exposed.lines("privacy.jsonl")]
    (exposed.folder / "privacy.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "epsilon" not in rounds_of(exposed.folder)[1], "an infinite figure would be drawn as some other"


def test_a_round_that_does_not_count_is_not_told(tmp_path: Path) -> None:
    run = made(tmp_path)
    lines = run.lines("rounds.jsonl")
    lines[1]["complete"] = False
    (run.folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert list(rounds_of(run.folder)) == [0, 1]


# --- when, and what if it fails ---
def test_each_round_is_told_once(recorder: type[Recorder], tmp_path: Path) -> None:
    run = made(tmp_path)
    tracking = Tracking(configure(run.settings), run.folder, "7")
    tracking.update()
    tracking.update()
    run.round(3, 0.76)
    tracking.close()
    assert recorder.told[0] == ("open", "7", 3)
    assert [told[0] for told in recorder.told[1:-1]] == [0, 1, 2, 3]
    assert recorder.told[-1] == "close"


def test_no_run_ends_by_its_tracker(
    recorder: type[Recorder], toy_settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    recorder.broken.add(1)
    with caplog.at_level(logging.WARNING, "fedveil.server"):
        run = run_in_process({**toy_settings, "tracker": "tensorboard"}, 2)
    assert [line.round_number for line in read_lines(RoundLine, run)] == [1, 2], "the run ended with its tracker"
    assert report_of(run).status == "completed"
    assert [told[0] for told in recorder.told] == ["open", 0], "a tracker that failed is asked again"
    assert sum("the run goes on without it" in record.getMessage() for record in caplog.records) == 1
    assert "disk is full" not in (run / "run.log").read_text()


def test_a_tracker_that_is_not_installed_is_said_before_anything_is_made(
    toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, row in TRACKERS.items():
        monkeypatch.setattr(row, "package", "no_such_package")
        with pytest.raises(ConfigError, match=rf"tracker is '{name}'.*pip install 'fedveil\[{name}\]'") as refused:
            check_installed(name)
        assert "\n" not in str(refused.value)
    with pytest.raises(ConfigError, match="not installed"):
        run_in_process({**toy_settings, "tracker": "mlflow"}, 2)
    assert not (tmp_path / "runs").exists()
    check_installed("none")


def test_a_tracker_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"tracker.*tensorboard"):
        configure({"tracker": "tensorbord"})


def test_every_tracker_has_its_extra() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    for name, row in TRACKERS.items():
        assert f'\n{name} = ["{row.package}>=' in project

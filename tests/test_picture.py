"""A run's picture: its figures are the report's, it stands by itself, and it is drawn again from its figures."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from made_run import MadeRun
from typer.testing import CliRunner

from cli.main import app
from common.privacy.accounting import gaussian_release
from common.run_lines import BaselineFile
from reports import report_of
from reports.picture import Picture, PicturedRound, picture_of, read_picture, to_svg


def texts(svg: str) -> list[str]:
    """Return every text of a picture, which must be well-formed and load nothing."""
    root = ElementTree.fromstring(svg)
    kinds = {element.tag.rpartition("}")[2] for element in root.iter()}
    assert kinds <= {"svg", "style", "rect", "text", "title", "desc", "line", "g", "polyline", "circle", "polygon"}
    return [text for element in root.iter() if (text := element.text) and element.tag.endswith("}text")]


@pytest.fixture
def run(tmp_path: Path) -> MadeRun:
    made = MadeRun(tmp_path / "run").start()
    return made.round(1, 0.7).round(2, 0.75).end()


def test_a_picture_has_the_figures_of_the_report(run: MadeRun) -> None:
    report = report_of(run.folder)
    picture = picture_of(report)
    assert [line.accuracy for line in picture.rounds] == [0.695, 0.7, 0.75]
    assert [line.epsilon for line in picture.rounds] == [0.0, *(line.epsilon_worst for line in report.rounds[1:])]
    shown = texts(to_svg(picture))
    assert "69.5 %" in shown
    assert "75.0 %" in shown
    assert any(text.startswith("budget ") for text in shown)
    assert any("accuracy 69.5 % before, 75.0 % after; ε " in text for text in shown)


def test_the_accuracy_before_is_marked_where_round_0_has_another(run: MadeRun) -> None:
    picture = picture_of(report_of(run.folder))
    assert not any(text.startswith("before ") for text in texts(to_svg(picture)))
    moved = replace(picture, before=0.5, rounds=[replace(picture.rounds[0], epsilon=None), *picture.rounds[1:]])
    assert "before 50.0 %" in texts(to_svg(moved))
    charged = [replace(picture.rounds[0], epsilon=1.0), *picture.rounds[1:]]
    assert not any(text.startswith("before ") for text in texts(to_svg(replace(picture, rounds=charged))))


def test_what_a_ledger_held_before_the_run_is_shown(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "run", earlier={"north": [gaussian_release(1.0, 0.05, 20)]}).start().round(1, 0.7).end()
    before, after = (line.epsilon for line in picture_of(report_of(made.folder)).rounds)
    assert before is not None
    assert after is not None
    assert 0 < before < after


def test_the_command_writes_a_picture_and_the_figures_that_it_is_drawn_from_again(run: MadeRun, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["report", str(run.folder), "--picture", str(tmp_path / "run.svg")])
    assert done.exit_code == 0, done.output
    assert to_svg(read_picture(tmp_path / "run.json")) == (tmp_path / "run.svg").read_text(encoding="utf-8")
    assert not (run.folder / "report.html").exists(), "a report was written as well"
    run.write(BaselineFile(accuracy=0.5, loss=math.nan))
    done = CliRunner().invoke(app, ["report", str(run.folder), "--picture", str(tmp_path / "run.svg")])
    assert done.exit_code == 0, done.output
    assert '"loss": "nan"' in (tmp_path / "run.json").read_text(encoding="utf-8"), "what is no JSON was written"


@pytest.mark.parametrize(
    ("name", "more", "said"), [("run.png", [], ".svg"), ("run.svg", ["--sign", "key.pem"], "--sign")]
)
def test_a_picture_that_cannot_be_is_refused(name: str, more: list[str], said: str, run: MadeRun) -> None:
    done = CliRunner().invoke(app, ["report", str(run.folder), "--picture", str(run.folder / name), *more])
    assert done.exit_code == 1
    assert said in done.output
    assert not (run.folder / name).exists()


def test_a_picture_takes_no_other_files_place(run: MadeRun, tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text('["mine"]')
    before = {path: path.read_bytes() for path in [*run.folder.glob("*.json"), tmp_path / "list.json"]}
    for name in (run.folder / "result", run.folder / "config", run.folder / "report", tmp_path / "list"):
        done = CliRunner().invoke(app, ["report", str(run.folder), "--picture", f"{name}.svg"])
        assert (done.exit_code, "name another --picture" in done.output) == (1, True), done.output
        assert not name.with_suffix(".svg").exists()
    assert {path: path.read_bytes() for path in before} == before
    assert not (run.folder / "report.json").exists()
    for _ in range(2):
        done = CliRunner().invoke(app, ["report", str(run.folder), "--picture", str(run.folder / "own.svg")])
        assert done.exit_code == 0, done.output


def test_a_run_without_a_claim_shows_no_epsilon_and_foreign_names_are_text() -> None:
    picture = Picture("<script>&", 2, None, None, [PicturedRound(0, 0.5, 1.0, None, 0, None)])
    shown = texts(to_svg(picture))
    assert "<script>&" in shown
    assert any(text.endswith("no privacy claim") for text in shown)
    assert not [text for text in shown if "ε" in text]

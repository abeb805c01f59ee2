"""The files of a run's folder: what the server writes is what every reader reads, and nothing else is."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from made_run import MadeRun, adapter_told
from report_forms import fedveil

from fedveil.common.errors import DataError
from fedveil.common.files import append_lines, finite, whole_lines
from fedveil.common.messages.round import SpendingFigures
from fedveil.common.run_lines import (
    Absence,
    AdapterFile,
    BaselineFile,
    ConfigFile,
    PrivacyLine,
    ProgressFile,
    ResultFile,
    RoundLine,
    RunFile,
    read_file,
    read_if_there,
    read_lines,
)
from fedveil.common.strict_json import to_json
from fedveil.experiments.in_process import run_in_process
from fedveil.experiments.site_count import recorded_sites
from fedveil.reports import report_of, write_reports
from fedveil.reports.audits import audit_reports
from fedveil.reports.folder import read_run

pytestmark = pytest.mark.rough_prices

FILES: tuple[type[RunFile], ...] = (ConfigFile, BaselineFile, ProgressFile, ResultFile)
LINES: tuple[type[RunFile], ...] = (RoundLine, PrivacyLine)


@pytest.mark.parametrize("mode", ["dp-sgd", "none"])
def test_what_a_run_leaves_is_what_its_classes_hold_to_the_last_key(toy_settings: dict[str, Any], mode: str) -> None:
    folder = run_in_process({**toy_settings, "privacy.mode": mode}, 2)
    for kind in FILES:
        raw = json.loads((folder / kind.NAME).read_text(encoding="utf-8"))
        assert finite(to_json(read_file(kind, folder))) == raw, f"{kind.NAME} is read otherwise than it is written"
    for kind in LINES:
        raw = [json.loads(line) for line in (folder / kind.NAME).read_text(encoding="utf-8").splitlines()]
        assert [finite(to_json(line)) for line in read_lines(kind, folder)] == raw
    (first, *_), names = read_lines(PrivacyLine, folder), {field.name for field in fields(SpendingFigures)}
    assert (first.spent is None) == (mode == "none")
    assert names <= set(to_json(first)), "a figure of the ledger is not in the file"


def test_what_is_not_there_is_an_error_or_none(tmp_path: Path) -> None:
    assert read_if_there(ResultFile, tmp_path) is None
    assert read_lines(RoundLine, tmp_path) == []
    with pytest.raises(DataError, match=r"result\.json is missing"):
        read_file(ResultFile, tmp_path)
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(DataError, match=r"result\.json is not JSON"):
        read_file(ResultFile, tmp_path)
    (tmp_path / "rounds.jsonl").write_text("{\n")
    with pytest.raises(DataError, match=r"line 1 of .*rounds\.jsonl is not JSON"):
        read_lines(RoundLine, tmp_path)


HUGE = b"1" * 5000
DAMAGED = [b"\xff", b"[" * 100_000, HUGE, b"[]", b"null", b'{"status": "\xff"}', b'{"round": %s}' % HUGE]
"""Contents of files that no line or file of a run has."""


@pytest.mark.parametrize("content", DAMAGED, ids=lambda content: content[:12].decode("latin-1"))
def test_a_damaged_file_is_one_line_to_every_reader(content: bytes, tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "run", {"rounds": 1}).start().round(1, 0.7).end()
    (made.folder / "adapter").mkdir()
    damaged = ("result.json", "rounds.jsonl", "audit.json", "beside.json", "adapter/fedveil.json", "simulated.json")
    for name in damaged:
        (made.folder / name).write_bytes(content)
    for read in (
        lambda: read_file(ResultFile, made.folder),
        lambda: read_lines(RoundLine, made.folder),
        lambda: read_file(AdapterFile, made.folder / "adapter"),
        lambda: recorded_sites(made.folder),
    ):
        with pytest.raises((DataError, ValueError)) as caught:
            read()
        assert "\n" not in str(caught.value)
    problems = report_of(made.folder).problems
    assert len(problems) == len(damaged) - 1, problems
    for command in ("evaluate", "ask", "intruders", "prune"):
        words = {"ask": ["text"], "prune": ["--by", str(made.folder), str(tmp_path / "out")]}.get(command, [])
        code, said = fedveil(command, *([] if command == "prune" else [made.folder]), *words)
        assert code in (1, 2), said
        assert "Traceback" not in said


@pytest.mark.parametrize("content", [{}, {"task": "classification"}, {"task": "dreams"}, {"precision": "float0"}])
def test_an_adapter_that_does_not_say_what_it_is_is_one_line(content: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    whole = content if len(content) != 1 or "classification" in content.values() else adapter_told(**content)
    (tmp_path / "run" / "adapter" / "fedveil.json").write_text(json.dumps(whole))
    code, said = fedveil("evaluate", tmp_path / "run")
    assert (code, said.count("\n"), "fedveil.json" in said) == (1, 1, True), said


@pytest.mark.parametrize("kind", LINES, ids=lambda kind: kind.NAME)
def test_a_line_with_another_key_is_an_error_and_the_report_says_that_it_is_left_out(
    tmp_path: Path, kind: type[RunFile]
) -> None:
    made = MadeRun(tmp_path / "run", {"rounds": 1}).start().round(1, 0.7).end()
    assert report_of(made.folder).problems == []
    made.append(kind.NAME, {**made.lines(kind.NAME)[-1], "message": "of another version"})
    with pytest.raises(DataError, match=r"line \d of .* has the unknown field 'message'$"):
        read_lines(kind, made.folder)
    (problem,) = report_of(made.folder).problems
    assert "has the unknown field 'message', and is left out" in problem


@pytest.mark.parametrize("kind", [BaselineFile, ResultFile], ids=lambda kind: kind.NAME)
def test_a_file_with_another_key_is_left_out_of_the_report_which_says_so(tmp_path: Path, kind: type[RunFile]) -> None:
    made = MadeRun(tmp_path / "run", {"rounds": 1}).start().round(1, 0.7).end()
    raw = json.loads((made.folder / kind.NAME).read_text(encoding="utf-8"))
    (made.folder / kind.NAME).write_text(json.dumps({**raw, "loss of the site": 0.1}), encoding="utf-8")
    files = read_run(made.folder)
    assert (files.baseline is None, files.result is None) == (kind is BaselineFile, kind is ResultFile)
    assert files.problems == [f"{kind.NAME} has the unknown field 'loss of the site', and is left out"]


def test_a_round_of_a_model_that_diverged_is_read_as_it_is_written_and_said(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "run", {"rounds": 3}).start().round(1, 0.7)
    made.write(BaselineFile(accuracy=0.5, loss=math.inf))
    for number, loss in ((2, math.nan), (3, math.inf)):
        made.round(number, 0.1)
        told = [*read_lines(RoundLine, made.folder)]
        (made.folder / RoundLine.NAME).unlink()
        told[-1] = replace(told[-1], loss=loss)
        append_lines(made.folder / RoundLine.NAME, [to_json(line) for line in told])
    made.end()
    assert [str(line.loss) for line in read_lines(RoundLine, made.folder)] == ["0.57", "nan", "inf"]
    assert read_file(BaselineFile, made.folder).loss == math.inf
    report = report_of(made.folder)
    assert (report.problems, [row.round_number for row in report.rounds]) == ([], [0, 1, 2, 3])
    write_reports(made.folder)
    for form in ("report.md", "report.html"):
        assert (made.folder / form).read_text(encoding="utf-8").count("not finite") >= 3, form
    assert json.loads((made.folder / "report.json").read_bytes())["rounds"][2]["loss"] == "nan"


def test_who_did_not_take_part_is_one_shape_from_the_attempt_to_the_report(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "run", {"rounds": 1}).start().round(1, 0.7, refusals={"south": ("late", "no answer")})
    absence = Absence(1, 1, "south", "late", "no answer")
    (line,) = read_lines(RoundLine, made.folder)
    assert line.refusals == line.failures == report_of(made.folder).refusals == [absence]
    assert made.lines("rounds.jsonl")[0]["failures"] == [
        {"round": 1, "attempt": 1, "site": "south", "kind": "late", "reason": "no answer"}
    ]


def test_whether_a_fault_was_built_in_is_a_field_and_no_words_of_the_case(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "run", {"rounds": 1}).start().round(1, 0.7).end()
    case = {"audit": "kills", "case": "fault built in: late", "passed": False, "figures": {}}
    content = {"passed": True, "date": "2026-11-25", "versions": {}, "findings": [{**case, "built_in": False}]}
    (made.folder / "audit.json").write_text(json.dumps(content))
    problems: list[str] = []
    (report,) = audit_reports(read_run(made.folder).findings, problems)
    assert (report.checks_failed, report.faults, problems) == (1, 0, [])
    # Without the field nobody can tell a missed fault from code that failed: nothing is said to be audited.
    (made.folder / "audit.json").write_text(json.dumps({**content, "findings": [case]}))
    assert report_of(made.folder).audit_results == []
    assert "audit.json lacks the field 'built_in': it does not say" in report_of(made.folder).problems[0]


def test_a_line_that_is_being_written_is_not_read_yet(tmp_path: Path) -> None:
    """A follower that read half of an ε ended in an error, and one that read half a line never showed the rest."""
    path, text = tmp_path / "run.log", "round 1/2  ε 1.0\nround 2/2  ε 2.0\n".encode()
    assert whole_lines(path) == []
    for end in range(len(text) + 1):
        path.write_bytes(text[:end])
        assert whole_lines(path) == ["round 1/2  ε 1.0", "round 2/2  ε 2.0"][: text[:end].count(b"\n")]

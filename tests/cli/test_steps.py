"""Progress of commands: a named step in one line on a terminal, and nothing of it elsewhere."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedveil.cli.main import app
from fedveil.cli.steps import CLEARED, Steps
from fedveil.common.errors import DataError
from fedveil.deploy.check_results import CheckResult, examine


class Terminal(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_has_one_line_with_the_step_that_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Terminal()
    with Steps(shown) as steps:
        steps("one")
        steps("two")
        steps.say("a result")
    assert shown.getvalue() == f"{CLEARED}one ...{CLEARED}two ...{CLEARED}{CLEARED}"
    assert capsys.readouterr().out == "a result\n"


def test_a_pipe_gets_lines_and_no_step(tmp_path: Path) -> None:
    piped = io.StringIO()
    with Steps(piped) as steps:
        steps("one")
    assert piped.getvalue() == ""
    done = CliRunner().invoke(app, ["site", "check", str(tmp_path)])
    assert done.exit_code == 1
    assert "\x1b" not in done.output


def test_the_doctor_names_each_check_before_it_is_made() -> None:
    heard: list[Any] = []

    def fails() -> list[CheckResult]:
        heard.append("fails now")
        raise DataError("no")

    found = examine([("first", lambda: [CheckResult(True, "first", "fine")]), ("second", fails)], heard.append)
    assert [(one.what, one.ok) for one in found] == [("first", True), ("second", False)]
    assert heard == ["first", "second", "fails now"]

"""A run in the terminal: its progress with the time that is left, and its end in six lines."""

from __future__ import annotations

import io
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from made_run import MadeRun
from rich.console import Console

from fedveil.cli.errors import for_people
from fedveil.cli.summary import print_summary
from fedveil.common.errors import RunFailed
from fedveil.common.run_lines import ProgressFile
from fedveil.experiments.progress import RunProgress
from fedveil.reports import read_report, report_of, write_reports


def shown(*states: ProgressFile, clock: Any = None) -> list[tuple[str, str]]:
    """Return words and time left after each state, a second apart."""
    progress, said = RunProgress(Console(file=io.StringIO()), "reading 9 texts once"), []
    for second, state in enumerate(states):
        said.append((progress.words(state), progress.left(state, float(second))))
    return said


def round_(number: int, answered: int, rounds: int = 10) -> ProgressFile:
    names = [f"site-{i}" for i in range(answered)]
    return ProgressFile("training", round_number=number, rounds=rounds, answered=names, asked=3)


def test_time_is_left_once_a_round_after_the_first_is_done() -> None:
    said = shown(ProgressFile("loading model and data"), round_(1, 0), round_(1, 2), round_(1, 3), round_(2, 1))
    assert [left for _, left in said] == [""] * 5
    assert shown(round_(1, 0), round_(2, 0), round_(3, 0))[-1][1] == "about 8 s left"
    assert shown(round_(5, 0), round_(6, 0), round_(8, 0))[-1][1] == "about 2 s left", "of a run that was resumed"


def test_phases_have_names_and_the_first_round_its_reason() -> None:
    waits = ProgressFile("waiting for sites", online=1, wanted=3)
    said = [words for words, _ in shown(waits, round_(1, 0), round_(1, 3), round_(2, 1), ProgressFile("writing"))]
    assert said[0] == "waiting for sites: 1 of 3 are online"
    assert "round 1 of 10: reading 9 texts once" in said[1]
    assert said[2] == "round 1 of 10: averaging and scoring"
    assert said[3] == "round 2 of 10: 1 of 3 sites have answered"
    assert said[4] == "writing"


def test_nothing_but_lines_goes_to_what_is_no_terminal() -> None:
    out = io.StringIO()
    with RunProgress(Console(file=out), "") as progress:
        progress.show(cast(Any, SimpleNamespace(lines=["round 1/2"], state=round_(1, 0))))
    assert out.getvalue() == "round 1/2\n"


@pytest.mark.parametrize("status", ["completed", "stopped"])
def test_an_end_is_a_few_lines_of_which_the_last_two_say_where_and_how_to_go_on(
    status: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = MadeRun(tmp_path / "ffa-lora-7", {"rounds": 1}).start().round(1, 0.7).end(status, "the budget is spent")
    print_summary(run.folder, seconds=61.2)
    *before, folder, following = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in before[-3:]] == ["accuracy", "privacy", "trained"]
    assert len([line for line in before if not line.startswith("WARNING")]) == 3 + (status == "stopped")
    assert folder.startswith(f"folder: {run.folder}")
    assert f"fedveil report {run.folder}" in following
    assert "in 61 s" in before[-1]


def test_the_last_line_of_a_bad_end_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        error = RunFailed("nobody answered")
        error.add_note("folder: here\nresume with: this")
        raise error

    with pytest.raises(Exception, match="1"):
        for_people(fails)()
    assert capsys.readouterr().err.splitlines() == ["fedveil: nobody answered", "folder: here", "resume with: this"]


def test_the_servers_report_is_read_and_not_made_again_unless_it_is_older_than_the_end(tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "ffa-lora-7", {"rounds": 1}).start().round(1, 0.7).end()
    assert read_report(run.folder) is None
    write_reports(run.folder)
    assert read_report(run.folder) == report_of(run.folder)
    os.utime(run.folder / "report.json", (1, 1))
    assert read_report(run.folder) is None

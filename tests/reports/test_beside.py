"""Other runs beside a run's own: those of a sweep on the same base model and data, in every form of the report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from made_run import MadeRun
from report_forms import fedveil, forms
from swept_rows import OPEN, SEEDS, SITES

from fedveil.experiments.sweep.rows import write_rows
from fedveil.reports import report_of

pytestmark = pytest.mark.rough_prices


@pytest.fixture
def made(tmp_path: Path) -> MadeRun:
    return MadeRun(tmp_path / "run", {"rounds": 1}).start().round(1, 0.76).end()


def test_a_sweeps_arms_stand_beside_the_run_and_stay_there(made: MadeRun, tmp_path: Path) -> None:
    foreign = replace(OPEN[0], variant="of-others", settings={**OPEN[0].settings, "data.name": "snli"})
    write_rows(tmp_path / "table.jsonl", [*SEEDS, *SITES, *OPEN, foreign])
    code, said = fedveil("report", made.folder, "--beside", tmp_path / "table.jsonl")
    assert code == 0, said
    rows = report_of(made.folder).beside
    assert [(row.arm, row.epsilon_asked, row.runs) for row in rows] == [
        ("federated", 8.0, 3),
        ("local-only", 8.0, 2),
        ("federated", None, 1),
    ]
    assert rows[0].accuracy == pytest.approx(0.76)
    for form in ("md", "html"):
        text = forms(made.folder)[form]
        assert "76.0 % ± 6.6" in text, f"report.{form} lacks the federation's mean"
        assert "no privacy" in text
        assert "of-others" not in text, "a run on other data stands beside"


def test_a_table_without_such_runs_and_none_at_all_are_said(made: MadeRun, tmp_path: Path) -> None:
    foreign = [replace(row, settings={**row.settings, "model.name": "another"}) for row in SEEDS]
    write_rows(tmp_path / "table.jsonl", foreign)
    for table, words in ((tmp_path / "table.jsonl", "no finished run with this run's"), (tmp_path / "no", "no table")):
        code, said = fedveil("report", made.folder, "--beside", table)
        assert (code, words in said) == (1, True), said
    assert not (made.folder / "beside.json").exists()
    assert report_of(made.folder).beside == []

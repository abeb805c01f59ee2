"""Accuracy by label with its interval: counted right, equal to a second method, and shown in every form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from made_run import MadeRun
from scipy.stats import binomtest

from fedveil.cli.summary import print_summary
from fedveil.common.run_lines import BaselineFile, LabelScore, RoundLine, read_file, read_lines
from fedveil.common.strict_json import to_json
from fedveil.experiments.evaluate import evaluate_run
from fedveil.experiments.in_process import run_in_process
from fedveil.reports import markdown_report, report_of
from fedveil.reports.page import to_html
from fedveil.reports.scores import label_reports, wilson

pytestmark = pytest.mark.rough_prices


@pytest.mark.parametrize(("right", "records"), [(0, 1), (0, 40), (1, 7), (40, 40), (731, 1000), (764, 1000)])
def test_the_interval_is_wilsons(right: int, records: int) -> None:
    share, second = wilson(right, records), binomtest(right, records).proportion_ci(0.95, method="wilson")
    assert share is not None
    assert (share.low, share.high) == pytest.approx((second.low, second.high), abs=1e-12)
    assert share.low <= share.value == right / records <= share.high
    assert wilson(0, 0) is None


def test_a_run_counts_right_answers_by_label_and_what_it_trained(toy_settings: dict[str, Any]) -> None:
    folder = run_in_process({**toy_settings, "rounds": 1, "training.learning-rate": 0.3}, 2)
    before, line, score = read_file(BaselineFile, folder), read_lines(RoundLine, folder)[-1], evaluate_run(folder)
    assert [row.label for row in before.labels] == ["bad", "good"] == [row.label for row in line.labels]
    for rows, accuracy in ((before.labels, before.accuracy), (line.labels, line.accuracy)):
        assert sum(row.records for row in rows) == 40
        assert sum(row.right for row in rows) / 40 == pytest.approx(accuracy, abs=1e-6)
        assert all(0 <= row.right <= row.records for row in rows)
    assert [row.right for row in line.labels] == list(score.right)
    assert len({row.right / row.records for row in (*before.labels, *line.labels)}) > 1, "both labels look alike"


def test_a_run_without_labels_has_no_intervals(toy_generation: dict[str, Any]) -> None:
    folder = run_in_process({**toy_generation, "rounds": 1}, 2)
    assert read_file(BaselineFile, folder).labels == []
    assert report_of(folder).accuracy == []
    assert "95 % interval" not in markdown_report(folder)


def test_every_form_shows_the_interval_of_every_label(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = MadeRun(tmp_path / "run", {"rounds": 1}).start().round(1, 0.76).end()
    run.write(BaselineFile(0.6, 0.5, [LabelScore("bad", 30, 60), LabelScore("good", 30, 40)]))
    (line,) = run.lines("rounds.jsonl")
    line["labels"] = [to_json(LabelScore("bad", 54, 60)), to_json(LabelScore("good", 22, 40))]
    (run.folder / "rounds.jsonl").write_text(json.dumps(line) + "\n")
    whole, bad, good = report_of(run.folder).accuracy
    assert (whole.label, whole.records, bad.records, good.records) == ("all", 100, 60, 40)
    assert whole.after is not None
    assert whole.after.value == 0.76
    print_summary(run.folder)
    assert (
        "76.0 % (66.8 to 83.3), from 60.0 % (50.2 to 69.1) before training (the most frequent label alone: 60.0 %)"
        in capsys.readouterr().out
    )
    for text in (markdown_report(run.folder), to_html(report_of(run.folder))):
        assert "90.0 % (79.9 to 95.3)" in text, "the label that got better is hidden"
        assert "55.0 % (39.8 to 69.3)" in text, "the label that got worse is hidden"


def test_without_a_score_after_training_there_is_none() -> None:
    (whole, label) = label_reports([LabelScore("bad", 1, 2)], [])
    assert (whole.after, label.after) == (None, None)
    assert label_reports([], []) == []


def test_without_a_score_before_training_none_stands_there() -> None:
    whole, bad, good = label_reports([], [LabelScore("bad", 1, 2), LabelScore("good", 3, 4)])
    assert [row.before for row in (whole, bad, good)] == [None, None, None], "what was scored after stands before"
    assert [row.records for row in (whole, bad, good)] == [6, 2, 4]
    assert (whole.after, bad.after, good.after) == (wilson(4, 6), wilson(1, 2), wilson(3, 4))

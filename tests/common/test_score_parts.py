"""Scores in parts: named figures beside the headline, F1 by kind of part, and counts of whole answers alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import numpy as np
import pytest
import torch
from made_run import MadeRun
from report_forms import forms

from fedveil.cli.summary import print_summary
from fedveil.client.evaluation import noised_correct
from fedveil.common.model.base import BaseModel
from fedveil.common.model.score import Score, half_of_ratio
from fedveil.common.model.scoring import score_records
from fedveil.common.run_lines import BaselineFile, Figure, LabelScore, RoundLine
from fedveil.common.strict_json import from_json, to_json
from fedveil.common.tasks import Classification, Scored, Sums
from fedveil.experiments.api.result import Run
from fedveil.experiments.runs import listed_runs
from fedveil.server.terminal import score_words
from fedveil.server.tracking import rounds_of

pytestmark = pytest.mark.rough_prices
TRUE = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 0]])
GIVEN = torch.tensor([[1, 0, 1], [0, 0, 1], [0, 1, 0], [1, 0, 0]])
FIGURES = [Figure("micro F1", 0.76, 0.02), Figure("macro F1", 0.5), Figure("exact match", 0.4, 0.03)]
PARTS = [LabelScore("joy", 80, 100, 80), LabelScore("grief", 1, 4, 2)]


class Several(Classification):
    """Answers of three parts, which records hold as they are there and as they are given."""

    scored: ClassVar[Scored] = Scored("micro F1")

    def size(self, record: Any) -> int:
        return 1

    def collate(self, base: Any, records: Any, size: int = 0) -> Any:
        return {key: torch.stack([record[key] for record in records]) for key in ("there", "given")}

    def sums(self, module: Any, batch: Any) -> Sums:
        there, given = batch["there"], batch["given"]
        right = (there == given).sum(1).float()
        sums = Sums(
            torch.zeros(len(there)),
            right,
            torch.full((len(there),), 3.0),
            parts=lambda: torch.stack([there & given, there, given], 1),
        )
        return replace(sums, beside={"exact match": sums.whole.float()})


RECORDS = [{"there": there, "given": given} for there, given in zip(TRUE, GIVEN, strict=True)]


def test_a_score_has_named_figures_counts_by_kind_and_the_tasks_headline() -> None:
    module, base = torch.nn.Identity(), cast(BaseModel, None)
    score = score_records(
        module, Several(), base, RECORDS, torch.device("cpu"), torch.float32, batch_tokens=2, slices=[0, 0, 1, 1]
    )
    assert score.parts == ((2, 2, 2), (1, 2, 1), (1, 1, 2))
    assert (score.name, score.accuracy) == ("micro F1", pytest.approx(8 / 10))
    named = {figure.name: figure for figure in score.figures}
    assert [*named] == ["micro F1", "macro F1", "exact match"]
    assert named["macro F1"] == Figure("macro F1", pytest.approx((1 + 2 / 3 + 2 / 3) / 3))
    assert named["exact match"].value == 0.5
    assert (score.slice_right, score.slice_records) == ((1, 1), (2, 2)), "single labels were counted"
    assert Score(**json.loads(json.dumps(asdict(score)))) == score, "a checkpoint loses it"
    assert score_words(score).startswith("micro F1 80.0 %  macro F1 77.8 %  exact match 50.0 %  loss ")
    assert score_words(Score(0.5, 0.25)) == "accuracy 50.0 %  loss 0.250  "


def test_the_interval_of_a_ratio_is_that_of_drawing_records_again() -> None:
    draw = np.random.default_rng(3)
    units = draw.integers(1, 6, 400)
    right = draw.binomial(units, 0.6)
    drawn = draw.integers(0, 400, (4000, 400))
    spread = (right[drawn].sum(1) / units[drawn].sum(1)).std()
    assert half_of_ratio(right.tolist(), units.tolist()) == pytest.approx(1.96 * spread, rel=0.05)
    assert half_of_ratio([1.0], [2.0]) == half_of_ratio([], []) == 1.0


def labels_count(_: Any, record: Any) -> float:
    return float(Several().sums(None, Several().collate(None, [record])).correct.sum())


def any_label_counts(_: Any, record: Any) -> float:
    return float(Several().sums(None, Several().collate(None, [record])).correct.sum().clamp(0, 1))


@pytest.mark.parametrize("fault", [None, labels_count, any_label_counts])
def test_a_noised_count_is_of_whole_answers(
    fault: Callable[..., float] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedveil.client.evaluation.add_private_noise", lambda total, std: total)
    if fault:
        monkeypatch.setattr("fedveil.client.evaluation._is_correct", fault)
    several = Several()
    model: Any = SimpleNamespace(
        module=torch.nn.Identity(), task=several, device=torch.device("cpu"), precision=torch.float32
    )
    model.batch = lambda records: several.collate(None, records)
    counts = [noised_correct(model, [*RECORDS[:i], *RECORDS[i + 1 :]], 3.0) for i in range(4)]
    right = noised_correct(model, RECORDS, 3.0) == 2 and counts == [1, 2, 1, 2]
    assert right == (fault is None), "a planted count of single labels is not seen"


def test_lines_without_parts_are_as_they_were() -> None:
    line = BaselineFile(0.5, 0.25)
    assert {"figures", "parts"}.isdisjoint(to_json(line))
    named = replace(line, figures=FIGURES, parts=PARTS)
    assert from_json(BaselineFile, to_json(named), "it") == named


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a finished run's folder, of a task that is judged by micro F1."""
    monkeypatch.setattr(Classification, "scored", Scored("micro F1"))
    run = MadeRun(tmp_path / "runs" / "run", {"rounds": 1}).start().round(1, 0.76).end()
    before = [Figure("micro F1", 0.25, 0.02), Figure("macro F1", 0.125), Figure("exact match", 0.1, 0.01)]
    run.write(BaselineFile(0.25, 0.5, figures=before, parts=[LabelScore("joy", 0, 100, 0), *PARTS[1:]]))
    (line,) = run.lines(RoundLine.NAME)
    line |= {"figures": list(map(asdict, FIGURES)), "parts": list(map(to_json, PARTS))}
    (run.folder / RoundLine.NAME).write_text(json.dumps(line) + "\n")
    return run.folder


def test_every_form_names_the_headline_and_has_every_label(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_summary(folder)
    said = "micro F1: 76.0 % (74.0 to 78.0), from 25.0 % (23.0 to 27.0) before training, on public data, with 95 %"
    assert said in capsys.readouterr().out
    for name, text in forms(folder).items():
        if name == "json":
            continue
        assert "Micro F1 on public test data" in text
        assert "accuracy" not in re.sub("its accuracy, the choice|#accuracy|id=.?accuracy", "", text), name
        for words in ("74.0 to 78.0 %", "12.5 % → 50.0 %", "88.9 % (83.1 to 92.9)", "grief (rare)", "Fewer than 50"):
            assert words in text.replace("\\", ""), (name, words)
    found = json.loads((folder / "report.json").read_bytes())
    assert [figure["name"] for figure in found["figures"]] == ["micro F1", "macro F1", "exact match"]
    assert [part["records"] for part in found["parts"]] == [100, 4]


def test_a_run_and_its_trackers_have_the_figures_by_their_names(folder: Path) -> None:
    run = Run(folder)
    assert repr(run.accuracy) == "micro F1 76.0 % (74.0 to 78.0, 95 % interval; 25.0 % before training)"
    assert {"micro_f1", "macro_f1", "exact_match"} < {*run.history.columns}
    assert "accuracy" not in run.history
    assert run.history["micro_f1"].tolist() == [0.25, 0.76]
    assert rounds_of(folder)[1] | {"micro F1": 0.76, "F1/joy": pytest.approx(8 / 9)} == rounds_of(folder)[1]
    (listed,) = listed_runs(folder.parent)
    assert (listed.accuracy, listed.judged_by) == (0.76, "micro F1")

"""The page: result and promise first, accuracy by label, tables that fit a phone, no path of the machine."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from made_run import MadeRun
from report_forms import forms
from rich_run import LABELS, rich

from fedveil.common.model.score import MOST_CONFUSED
from fedveil.common.run_lines import BaselineFile, LabelScore, RoundLine, read_file, read_lines
from fedveil.experiments.evaluate import about_of, evaluate_run
from fedveil.experiments.in_process import run_in_process
from fedveil.reports import report_of
from fedveil.reports.document import Table
from fedveil.reports.page_style import STYLE
from fedveil.reports.scores import confusion_of, macro_f1


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return forms(rich(tmp_path_factory.mktemp("page") / "run").folder)


def places(text: str, *words: str) -> list[int]:
    return [text.index(word) for word in words]


def test_the_result_and_the_promise_come_first_and_what_is_looked_up_comes_last(texts: dict[str, str]) -> None:
    page, markdown = texts["html"], texts["md"]
    wanted = (
        "Accuracy on public test data",
        "Privacy spent, ε",
        "differentially private for",
        "Warning:",
        'id="accuracy"',
    )
    wanted += ('id="promise"', 'id="sites"', 'id="rounds"', 'id="server"', 'id="settings"', 'id="versions"')
    assert places(page, *wanted) == sorted(places(page, *wanted))
    titles = re.findall(r"^## (.*)$", markdown, re.MULTILINE)
    assert titles[0] == "Accuracy on public data"
    assert titles[-4:] == ["The server and its connections", "Settings", "Versions", "Files and their hashes"]


def test_labels_have_a_matrix_and_a_macro_f1_by_what_the_model_says(texts: dict[str, str]) -> None:
    data = json.loads(texts["json"])
    records = data["confusion"]["records"]
    assert data["confusion"]["labels"] == LABELS
    assert [sum(row) for row in records] == [50] * len(LABELS)
    right = [row[at] for at, row in enumerate(records)]
    given = [sum(row[at] for row in records) for at in range(len(LABELS))]
    by_hand = sum(2 * r / (50 + g) for r, g in zip(right, given, strict=True)) / len(LABELS)
    assert data["headline"]["macro_f1_after"] == pytest.approx(by_hand)
    for form in ("md", "html"):
        assert "macro-F1" in texts[form]
        assert "Macro-F1 (mean of the labels" in texts[form]
    assert f"| {len(LABELS)} {LABELS[-1]} |" in texts["md"]


def test_what_was_not_counted_has_no_matrix(tmp_path: Path) -> None:
    data = report_of(MadeRun(tmp_path / "run", {"rounds": 1}).start().round(1, 0.7).end().folder)
    assert (data.confusion, data.headline.macro_f1_after) == (None, None)
    scores = [LabelScore("bad", 3, 4, 3), LabelScore("never", 0, 0, 0), LabelScore("good", 6, 6, 7)]
    assert macro_f1(scores) == pytest.approx((6 / 7 + 12 / 13) / 2), "a label of no record counts"
    assert confusion_of(scores) is None


def test_a_run_counts_what_its_model_says_of_public_records(toy_settings: dict[str, Any]) -> None:
    run = run_in_process({**toy_settings, "rounds": 1}, 2)
    for line in (read_file(BaselineFile, run), *read_lines(RoundLine, run)):
        matrix = [score.confused for score in line.labels]
        assert [row[at] for at, row in enumerate(matrix)] == [score.right for score in line.labels]
        assert [sum(row) for row in matrix] == [score.records for score in line.labels]
        assert [sum(column) for column in zip(*matrix, strict=True)] == [score.predicted for score in line.labels]
    score = evaluate_run(run)
    assert len(score.confusion) == len(score.predicted) == 2 <= MOST_CONFUSED
    # The base model and the data of this test are files of this machine.
    signed = [run / "adapter" / name for name in ("fedveil.json", "adapter_config.json", "README.md")]
    for path in [*signed, *(run / f"report.{form}" for form in ("md", "html", "json"))]:
        assert not path.exists() or str(run.parent) not in path.read_text(), f"{path.name} names a path of the machine"
        assert not path.exists() or toy_settings["model.name"] not in path.read_text(), path.name
    assert about_of(run / "adapter").base_model == toy_settings["model.name"], "at home the model is not found"


@pytest.mark.parametrize(
    ("columns", "cell", "layout"), [(2, "0.5", "wraps"), (5, "0.5", "cards"), (2, 41 * "x", "cards")]
)
def test_a_table_fits_a_phone_by_its_kind(columns: int, cell: str, layout: str) -> None:
    names = [str(number) for number in range(columns)]
    assert Table("", names, [[cell] * columns]).layout == layout
    assert Table("", names, [[cell] * columns], matrix=True).layout == "matrix"


def test_on_a_phone_rows_stack_with_their_columns_names_and_what_scrolls_says_so(texts: dict[str, str]) -> None:
    phone = STYLE[STYLE.index("@media (max-width: 40rem)") : STYLE.index("@media print")]
    assert re.search(r"\.cards[^{]*tr[^{]*\{ display: block", phone)
    assert "content: attr(data-name)" in phone
    assert re.search(r"th\.n, td\.n \{ white-space: normal", phone), "figures keep a table wide"
    assert ".hint { display: block; }" in phone
    page = texts["html"]
    assert page.count('class="hint"') == page.count('class="matrix"') == 1
    cells, named = page.count("<td"), page.count("data-name=")
    assert named >= cells > 0, "a cell of a stacked row has no name"
    # A row that is a block is a row no more to a screen reader, unless it says so.
    assert page.count("<tr") == page.count('role="row"')


def test_settings_that_the_task_does_not_read_are_left_out_and_defaults_are_folded(texts: dict[str, str]) -> None:
    settings = texts["html"][texts["html"].index('id="settings"') :]
    own, others = settings.split("<details>")
    assert "data.slice" in own
    assert "data.text" in others
    for unread in ("data.image", "data.messages", "data.prompt"):
        assert unread not in settings
        assert unread in texts["json"], "the data of a report has every setting"

"""Rows that cannot be used are counted and may be left out; repeated texts and words for nothing are said."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from fedveil.common.config.flat import Columns
from fedveil.common.config.sections import DataConfig
from fedveil.common.data.notes import notes_on, notes_on_texts
from fedveil.common.data.sources import load_dataset, load_protected, train_and_test
from fedveil.common.errors import ConfigError, DataError
from fedveil.common.labels import labels_text
from fedveil.experiments.api.records import records_of


def table(folder: Path, rows: list[tuple[str, str]]) -> str:
    path = folder / "table.csv"
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows), encoding="utf-8")
    return str(path)


def plain(number: int) -> list[tuple[str, str]]:
    return [(f"text {n}", ("bad", "good")[n % 2]) for n in range(number)]


def test_all_rows_without_a_label_are_counted_and_can_be_left_out(tmp_path: Path) -> None:
    name = table(tmp_path, [("first", ""), *plain(20), ("last", ""), ("odd", "")])
    with pytest.raises(
        DataError,
        match=r"line 2 has no value in column 'label'.*3 rows in all cannot be used: line 2, 23, 24\).*invalid-rows",
    ) as caught:
        load_dataset(DataConfig(name=name), "classification")
    assert "\n" not in str(caught.value)
    skipping = DataConfig(name=name, invalid_rows="skip", test_size=5)
    assert len(load_dataset(skipping, "classification").examples) == 20
    train, test = train_and_test(skipping, "classification")
    assert (len(train.examples), len(test.examples)) == (15, 5)
    (note,) = notes_on(skipping, "classification")
    assert note.startswith("3 rows cannot be used and are left out: ")
    with pytest.raises(ConfigError, match=r"data\.invalid-rows"):
        DataConfig(invalid_rows="drop")


def test_a_row_is_found_by_its_line_in_a_file_and_by_its_index_in_a_frame(tmp_path: Path) -> None:
    lines = b'text,label\n"first\nof two",bad\n\nsecond,good\nthird,\n"fourth\nof two",\n'
    (tmp_path / "own.csv").write_bytes(lines)
    own = str(tmp_path / "own.csv")
    with pytest.raises(DataError, match=r"own\.csv line 6 has no value .*: line 6, 7\)"):
        load_dataset(DataConfig(name=own), "classification")
    frame = pd.DataFrame({"text": ["a", "b", "c"], "label": ["good", None, "bad"]}, index=[10, 14, 7])
    records = records_of(frame)
    with records.opened(), pytest.raises(DataError, match="data index 14 has no value in column 'label'"):
        load_dataset(DataConfig(name=str(records.settings["data.name"])), "classification")
    (tmp_path / "own.csv").write_bytes(b'text,label\n\nthe film,good\na "quote,bad\nthe end,fair\n')
    by_line = load_protected(DataConfig(name=own, labels="bad,good"), "classification")
    assert [(row.unit, row.row) for row in by_line.unfit] == [("line", 5)]


def test_a_file_of_which_nothing_is_left_is_refused(tmp_path: Path) -> None:
    name = table(tmp_path, [("first", ""), ("second", "")])
    with pytest.raises(DataError, match="2 rows in all cannot be used"):
        load_dataset(DataConfig(name=name, labels="bad,good", invalid_rows="skip"), "classification")


def test_rows_that_cannot_be_read_are_counted_and_left_out_as_well(tmp_path: Path) -> None:
    for name, content in (
        ("a.csv", "text,label\none, two,bad\nfirst,bad\nsecond,good\nthree,\n"),
        ("a.jsonl", 'no\n{"text": "first", "label": "bad"}\n{"text": "second", "label": "good"}\n[]\n'),
    ):
        (tmp_path / name).write_text(content, encoding="utf-8")
        with pytest.raises(DataError, match="2 rows in all cannot be used"):
            load_dataset(DataConfig(name=str(tmp_path / name)), "classification")
        skipping = DataConfig(name=str(tmp_path / name), invalid_rows="skip")
        assert [e.texts() for e in load_dataset(skipping, "classification").examples] == [["first"], ["second"]]


def test_a_sites_own_rows_are_left_out_whatever_the_setting(tmp_path: Path) -> None:
    """Whether a round is refused must not depend on a record."""
    name = table(tmp_path, [("first", ""), *plain(4)])
    reading = load_protected(DataConfig(name=name, labels="bad,good"), "classification")
    assert (len(reading.dataset.examples), len(reading.unfit)) == (4, 1)


def test_texts_that_occur_often_are_counted_with_what_epsilon_then_means(tmp_path: Path) -> None:
    name = table(tmp_path, [*plain(30), *[("The  same", "bad"), ("the same", "good")] * 4])
    (note,) = notes_on(DataConfig(name=name), "classification")
    assert "8 of 38 rows share their text with another row, one text with 8 rows" in note
    assert "ε protects one row" in note
    assert notes_on(DataConfig(name=table(tmp_path, [*plain(100), ("text 1", "bad")])), "classification") == []
    assert notes_on(DataConfig(name="rotten-tomatoes"), "classification") == []


def test_texts_at_several_sites_and_test_texts_that_are_trained_on_are_said(tmp_path: Path) -> None:
    path = tmp_path / "sites.csv"
    path.write_text(
        "text,label,site\n" + "".join(f"text {n // 2},bad,{'ab'[n % 2]}\n" for n in range(3)) + "x,good,a\n"
    )
    by_site = DataConfig(name=str(path), partition="natural", key="site", test_size=1)
    assert any("1 text is at more than one site" in note for note in notes_on(by_site, "classification"))
    (tmp_path / "own").mkdir()
    test = table(tmp_path / "own", [("Text 1", "bad"), ("new", "good")])
    (note,) = notes_on(DataConfig(name=table(tmp_path, plain(20)), test=test), "classification")
    assert "1 of 2 rows of the test set is in the training table, too" in note


def test_texts_that_say_nothing_are_counted(tmp_path: Path) -> None:
    name = table(tmp_path, [*plain(100), ("N/A", "bad"), ("n/a", "good"), ("None", "bad")])
    (note,) = notes_on(DataConfig(name=name), "classification")
    assert "3 rows have 'n/a', 'none' as their text" in note


CASES: list[tuple[list[str], str, dict[str, str], str]] = [
    (["HUM", "hum", "LOC", "loc", "NUM"], "classification", {}, "has 5 labels, and 3 but for case: 'HUM', 'hum' are"),
    (["3", "14", "3,14"], "classification", {}, "separated by ',', .* model.task = 'multi-label' with data.label-sep"),
    (["3", "14", "3;14"], "multi-label", {"label-separator": ""}, "as they are: data.label-separator = ';' reads them"),
    ([f"{n / 10}" for n in range(20)], "classification", {}, "the 20 labels in 'label' are numbers, such as 0.0"),
    (["good", "bad", "N/A"], "classification", {}, "the label 'N/A' of 7 rows is a class like others"),
]


def labelled(folder: Path, labels: list[str]) -> str:
    return table(folder, [(f"text {n}", f'"{labels[n % len(labels)]}"') for n in range(7 * len(labels))])


@pytest.mark.parametrize(("labels", "task", "columns", "said"), CASES)
def test_labels_that_mean_others_are_said(
    labels: list[str], task: str, columns: dict[str, str], said: str, tmp_path: Path
) -> None:
    name = labelled(tmp_path, labels)
    columns = {"label": "label", **columns}
    config = DataConfig(name=name, columns=Columns({**DataConfig().columns, **columns}))
    (note,) = notes_on(config, task)
    assert re.search(said, note)
    assert notes_on(replace(config, labels=labels_text(labels)), task) == [], "they were named"
    assert [*notes_on_texts(load_dataset(config, task))] == [], "a site's steward hears of texts alone"


@pytest.mark.parametrize("labels", [["good", "bad"], ["1.0", "1.5", "2.0"], ["Bath, UK", "Rome, Italy", "Oslo"]])
def test_labels_that_are_meant_so_are_not_said(labels: list[str], tmp_path: Path) -> None:
    assert notes_on(DataConfig(name=labelled(tmp_path, labels)), "classification") == []


def test_the_command_that_writes_labels_alike_does_so_and_changes_nothing_else(tmp_path: Path) -> None:
    name = table(tmp_path, [("NA and 007", "Good"), ("x", "bad"), ("1.50", "good")])
    (note,) = notes_on(DataConfig(name=name), "classification")
    command = shlex.split(note[note.index("python -c") :])
    subprocess.run([sys.executable, *command[1:]], check=True)
    written = (tmp_path / "table-lower.csv").read_text(encoding="utf-8")
    assert written == Path(name).read_text(encoding="utf-8").replace("Good", "good")

"""Accuracy by slice of the public test data: counted by the server, never read of what a site protects, reported."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from audits.tiny_models import write_reviews
from fedveil.common.config.sections import DataConfig
from fedveil.common.data.sources import MOST_SLICES, load_dataset, load_protected, slices_of
from fedveil.common.errors import ConfigError, DataError
from fedveil.common.model.score import Score
from fedveil.common.run_lines import BaselineFile, RoundLine, read_file, read_lines
from fedveil.common.tasks.examples import Dataset
from fedveil.common.tasks.text import TextExample
from fedveil.experiments.in_process import run_in_process
from fedveil.reports import markdown_report, report_of
from fedveil.reports.page import to_html
from fedveil.server.model import ServerModel
from fedveil.strategies.job import configure

pytestmark = pytest.mark.rough_prices


def with_regions(folder: Path, regions: tuple[str, ...] = ("north", "south", "<b>east")) -> Path:
    """Write a test file with a column of regions beside text and label."""
    with write_reviews(folder / "plain.csv", 30, seed=5).open(encoding="utf-8") as plain:
        rows = list(csv.DictReader(plain))
    path = folder / "test.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text", "label", "region"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows({**row, "region": regions[i % len(regions)]} for i, row in enumerate(rows))
    return path


def test_the_scores_of_slices_add_up_to_the_whole_and_stand_in_every_form(
    toy_settings: dict[str, Any], tmp_path: Path
) -> None:
    sliced = {"data.test": str(with_regions(tmp_path)), "data.slice": "region", "rounds": 1}
    run = run_in_process({**toy_settings, **sliced}, 2)
    for line in (read_file(BaselineFile, run), *read_lines(RoundLine, run)):
        assert [score.label for score in line.slices] == ["<b>east", "north", "south"]
        for count in ("right", "records"):
            total = sum(getattr(score, count) for score in line.labels)
            assert sum(getattr(score, count) for score in line.slices) == total
    data = report_of(run)
    assert [(row.label, row.records) for row in data.slices] == [("<b>east", 10), ("north", 10), ("south", 10)]
    assert "| region | records |" in markdown_report(run)
    page = to_html(data)
    assert "Accuracy by region, a column of the public test file" in page
    assert "<b>east" not in page


def test_each_record_counts_for_its_own_slice(toy_settings: dict[str, Any], tmp_path: Path) -> None:
    """Batches are filled by length, so the order of records in them is another than in the file."""
    sliced = {"data.test": str(with_regions(tmp_path)), "data.slice": "region"}
    job = configure({**toy_settings, **sliced})
    server = ServerModel(job)
    score = server.score(server.start)
    alone = [server.model.score([record]).right for record in server.records]
    for number in range(3):
        own = [sum(right) for right, place in zip(alone, server._slices, strict=True) if place == number]
        assert (score.slice_right[number], score.slice_records[number]) == (sum(own), len(own))
    assert Score(**json.loads(json.dumps(asdict(score)))) == score, "a checkpoint gives back another score"


def test_what_a_site_protects_is_never_sliced(tmp_path: Path) -> None:
    path = with_regions(tmp_path)
    config = DataConfig(name=str(path), test=str(path), slice="region", labels="bad,good")
    assert {example.slice for example in load_protected(config, "classification").dataset.examples} == {""}
    assert {example.slice for example in load_dataset(config, "classification", config.test).examples} > {"north"}


def test_slices_that_cannot_be_are_refused_in_a_line(tmp_path: Path) -> None:
    path = str(with_regions(tmp_path))
    for settings, words in (
        ({"data.slice": "region"}, "a column of data.test, which is empty: name a file"),
        (
            {"data.slice": "a", "data.test": path, "model.task": "causal-lm", "head.policy": "frozen"},
            "no record as a whole is right or wrong",
        ),
    ):
        with pytest.raises(ConfigError, match=words):
            configure(settings)
    named = DataConfig(name="rotten-tomatoes", test="rotten-tomatoes", slice="region")
    with pytest.raises(ConfigError, match="no columns to choose from"):
        load_dataset(named, "classification", named.test)
    with pytest.raises(DataError, match="no column 'regin'"):
        load_dataset(DataConfig(name=path, test=path, slice="regin"), "classification", path)
    many = tuple(TextExample(text="x", slice=f"r{i}") for i in range(MOST_SLICES + 1))
    assert len(slices_of(Dataset("many", many[1:], ()), "region")) == MOST_SLICES
    with pytest.raises(DataError, match=r"51 values in the column that data\.slice names"):
        slices_of(Dataset("many", many, ()), "region")

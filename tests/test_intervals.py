"""Interval charts: what is drawn, read back from its coordinates, is the data, and nothing is drawn of no data."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from made_run import MadeRun
from rich_run import LABELS, REGIONS, rich

from common.privacy.figures import epsilon_text
from common.run_lines import BesideRow, LabelScore
from reports import ReportData, report_of
from reports.charts import Axis, Chart
from reports.intervals import MOST, Dot, Row, interval_chart, shortened
from reports.page import to_html
from reports.page_charts import (
    Figure,
    attack_figure,
    beside_figure,
    label_figure,
    several_figure,
    slice_figure,
)
from reports.scores import LabelReport, label_reports

Read = tuple[str, str, list[tuple[float, float | None, float | None]]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ReportData:
    return report_of(rich(tmp_path_factory.mktemp("rich") / "run").folder)


def read_back(chart: Chart | None) -> list[Read]:
    """Return each row's name, words and dots with their whiskers, by the axis that is drawn."""
    assert chart is not None
    tree = ElementTree.fromstring(str(chart.svg))
    places = [float(line.get("x1", "")) for line in tree.iter("line") if line.get("class") == "grid"]
    told = [text.text or "" for text in tree.iter("text") if text.get("class") == "tick"]
    figures = [float(text.removesuffix(" %")) / (100 if text.endswith(" %") else 1) for text in told]
    assert len(places) == len(figures) >= 2

    def figure(x: float) -> float:
        return figures[0] + (x - places[0]) * (figures[-1] - figures[0]) / (places[-1] - places[0])

    rows: list[Read] = []
    for row in (g for g in tree.iter("g") if g.get("class") == "row"):
        name, words = (text.text or "" for text in row.findall("text"))
        dots = []
        for dot in row.findall("g"):
            circle, polygon, path = dot.find("circle"), dot.find("polygon"), dot.find("path")
            if circle is not None:
                at = float(circle.get("cx", ""))
            else:
                assert polygon is not None
                xs = [float(pair.split(",")[0]) for pair in polygon.get("points", "").split()]
                at = (min(xs) + max(xs)) / 2
            ends = re.findall(r"M([\d.]+) ", path.get("d", "")) if path is not None else []
            assert len(ends) in (0, 3)
            low, high = (figure(float(ends[0])), figure(float(ends[2]))) if ends else (None, None)
            dots.append((figure(at), low, high))
        rows.append((name, words, dots))
    return rows


def check(read: list[Read], wanted: list[tuple[str, list[Dot]]], near: float) -> None:
    """Compare; ``near`` is a tenth of a pixel on each side."""
    assert [name for name, _, _ in read] == [shortened(name) for name, _ in wanted]
    for (name, _, dots), (_, wished) in zip(read, wanted, strict=True):
        assert len(dots) == len(wished), name
        for found, dot in zip(dots, wished, strict=True):
            assert found == pytest.approx((dot.value, dot.low, dot.high), abs=near), name


def of_scores(rows: list[LabelReport]) -> list[tuple[str, list[Dot]]]:
    shares = [(row.label, [share for share in (row.before, row.after) if share]) for row in rows]
    return [
        (name.replace("all", "all records", name == "all"), [Dot(s.value, s.low, s.high) for s in of])
        for name, of in shares
    ]


def chart_of(figure: Figure | None) -> Chart:
    assert figure is not None
    return figure.chart


def test_labels_and_slices_are_drawn_as_they_were_counted(data: ReportData) -> None:
    ranked = sorted(data.accuracy[1:], key=lambda row: row.after.value if row.after else 0)
    check(read_back(chart_of(label_figure(data))), of_scores([data.accuracy[0], *ranked[:5], *ranked[-6:]]), 5e-4)
    check(read_back(chart_of(slice_figure(data))), of_scores([data.accuracy[0], *data.slices]), 5e-4)
    assert [row.label for row in data.slices] == REGIONS
    few = label_figure(replace(data, accuracy=data.accuracy[:4]))
    check(read_back(chart_of(few)), of_scores(data.accuracy[:4]), 5e-4)


def test_a_chart_that_is_drawn_wrong_is_found_out(data: ReportData, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if dots stood where their interval ends."""
    monkeypatch.setattr("reports.page_charts.Dot", lambda value, low=None, high=None: Dot(high or value, low, high))
    with pytest.raises(AssertionError):
        test_labels_and_slices_are_drawn_as_they_were_counted(data)


def test_attacks_stand_beside_guessing_and_people_by_their_records(data: ReportData) -> None:
    meaning = data.meaning
    assert meaning is not None
    wanted = [
        (f"at {rate} % false alarms", [Dot(attack.false_positives), Dot(attack.true_positives)])
        for rate, attack in zip(("0.1", "1"), meaning.bounds.attacks, strict=True)
    ]
    check(read_back(chart_of(attack_figure(meaning))), wanted, 5e-5)
    people = [("1 record", [Dot(meaning.epsilon)])]
    people += [(f"{several.units} records", [Dot(several.epsilon)]) for several in meaning.bounds.several]
    assert [name for name, _ in people] == ["1 record", "2 records", "4 records", "8 records"]
    check(read_back(chart_of(several_figure(meaning))), people, 0.02)


def test_this_run_stands_first_beside_all_arms(data: ReportData) -> None:
    figure = beside_figure(data)
    assert figure is not None
    read, head = read_back(chart_of(figure)), data.headline
    assert head.accuracy_before is not None
    assert head.accuracy_after is not None
    wanted = [(read[0][0], [Dot(head.accuracy_before), Dot(head.accuracy_after)])]
    for row in data.beside:
        of = "no privacy" if row.epsilon_asked is None else "ε 8"
        ends = (row.accuracy - row.half, row.accuracy + row.half) if row.half else (None, None)
        wanted.append((f"{row.variant}, {row.arm}, {of}", [Dot(row.accuracy_before), Dot(row.accuracy, *ends)]))
    check(read, wanted, 5e-4)
    assert read[0][0] == "this run"
    assert f"This run: fedavg-lora, ε {epsilon_text(head.epsilon)}. " in figure.text
    assert [name for name, _, _ in read[1:]][1:3] == ["default, local-only, ε 8", "default, federated, no privacy"]


def test_of_many_others_the_lowest_and_the_highest_are_drawn(data: ReportData) -> None:
    many = [BesideRow(f"v{i}", "federated", 8.0, 0.5, 0.5 + i / 100, None, 1) for i in range(40)]
    figure = beside_figure(replace(data, beside=many))
    names = [name.split(",")[0] for name, _, _ in read_back(chart_of(figure))][1:]
    assert names == [f"v{i}" for i in (*range(5), *range(34, 40))]
    assert figure is not None
    assert "Of 40 others the 5 lowest and the 6 highest" in figure.text


def test_a_page_has_the_charts_and_a_reader_for_the_blind_has_their_figures(data: ReportData) -> None:
    page = to_html(data)
    assert page.count('role="img"') == 7
    for name in ("attacks", "several", "labels", "slices", "beside", "epsilon", "accuracy"):
        assert page.count(f'id="{name}-title"') == page.count(f'id="{name}-text"') == 1, name
    described = re.findall(r'<desc id="labels-text">(.*?)</desc>', page)[0]
    assert "topic 00 of the clinic" in described
    assert "all records: 67.8 % → 83.8 %" in described
    for label in LABELS:
        assert label.replace("'", "&#39;") in page, "a label that is in no chart is in no table either"


def test_what_there_is_no_figure_of_is_not_drawn(tmp_path: Path) -> None:
    data = report_of(MadeRun(tmp_path / "run", {"privacy.mode": "none"}).start().round(1, 0.7).end().folder)
    charts = (label_figure(data), slice_figure(data), beside_figure(data), attack_figure(None), several_figure(None))
    assert charts == (None,) * 5
    assert to_html(data).count('role="img"') == 1, "only the accuracy over rounds is known"
    axis = Axis("x")
    assert interval_chart("x", "x", axis, ("a",), []) is None
    assert interval_chart("x", "x", axis, ("a",), [Row("n", [Dot(float("inf"))], "∞")]) is None
    for rows, series in (([Row("n", [None], "")] * (MOST + 1), ("a",)), ([Row("n", [None], "")], ("a", "b"))):
        with pytest.raises(ValueError, match="a chart has at most"):
            interval_chart("x", "x", axis, series, rows)


def test_a_figure_without_a_number_has_its_words_and_no_dot() -> None:
    rows = [Row("one", [Dot(1.0)], "ε 1"), Row("endless", [Dot(float("inf"))], "ε ∞"), Row("none", [None], "–")]
    read = read_back(interval_chart("x", "x", Axis("ε", from_zero=True), ("ε",), rows))
    assert [(name, words, len(dots)) for name, words, dots in read] == [
        ("one", "ε 1", 1),
        ("endless", "ε ∞", 0),
        ("none", "–", 0),
    ]


def test_labels_without_a_score_afterwards_are_drawn_with_what_there_is(data: ReportData) -> None:
    rows = label_reports([LabelScore("bad", 1, 2), LabelScore("good", 2, 2)], [])
    (_, _, dots), *_ = read_back(chart_of(label_figure(replace(data, accuracy=rows))))
    assert len(dots) == 1


def test_hostile_and_long_names_are_shown_and_not_obeyed() -> None:
    names = ["<script>\u202e", "字" * 60, "e" * 60]
    chart = interval_chart("x", "x", Axis("x"), ("a",), [Row(name, [Dot(i)], "") for i, name in enumerate(names)])
    assert chart is not None
    assert "<script" not in chart.svg
    assert "\u202e" not in chart.svg
    assert [name for name, _, _ in read_back(chart)][1:] == ["字" * 11 + " … " + "字" * 5, "e" * 22 + " … " + "e" * 11]

"""The fact sheet: a page for people, whose figures are the report's and whose rates are never rounded down."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from made_run import MadeRun

from common.privacy.figures import epsilon_text
from common.run_lines import BaselineFile, LabelScore
from common.strict_json import to_json
from reports import markdown_report, report_of, write_reports
from reports.fact_sheet import facts_of, in_thousand


def sheet(run: MadeRun) -> str:
    write_reports(run.folder)
    return (run.folder / "facts.html").read_text(encoding="utf-8")


def words_of(page: str) -> str:
    return html.unescape(re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.S))


@pytest.fixture
def made(tmp_path: Path) -> MadeRun:
    """A finished run of two sites."""
    return MadeRun(tmp_path / "run", {"rounds": 1}, noise={"north": 0.8}).start().round(1, 0.76).end()


def test_the_sheet_says_the_reports_figures_in_words_for_everyone(made: MadeRun) -> None:
    text, data = words_of(sheet(made)), report_of(made.folder)
    assert data.meaning is not None
    for part in (
        epsilon_text(data.headline.epsilon),
        *(in_thousand(attack.true_positives) for attack in data.meaning.bounds.attacks),
        *(epsilon_text(several.epsilon) for several in data.meaning.bounds.several),
        *("3,500 in all", "69.5 %", "76.0 %", "What is not promised?", "A person with several records"),
    ):
        assert part in text, f"the fact sheet does not say {part!r}"
    assert len(text.split()) < 600, "it is no page"
    for page in (text, markdown_report(made.folder), words_of((made.folder / "report.html").read_text("utf-8"))):
        for several in data.meaning.bounds.several:
            assert epsilon_text(several.epsilon) in page
            assert not re.search(rf"(?<![\d.]){re.escape(epsilon_text(several.epsilon, decimals=1))}(?!\d)", page)


def test_each_figure_of_the_sheet_stands_in_its_own_sentence(made: MadeRun) -> None:
    data = report_of(made.folder)
    assert data.meaning is not None
    said = " ".join(answer for fact in facts_of(data) for answer in fact.answers)
    spent = epsilon_text(data.headline.epsilon)
    for words in (
        f"The limit is a number, ε (epsilon): {spent}; the site with the largest may come to 8.",
        "Chances below δ = 1e-05 are left out of it.",
        "right in 69.5 % before and 76.0 % after training",
        "numbers computed from its records, with chance numbers (noise) added.",
        "The model was tested on other records, which are public.",
        "trained further by 2 sites together, in 1 round of 1 planned.",
        *(
            f"wrongly names {in_thousand(one.false_positives)} that were not used, it finds at most "
            f"{in_thousand(one.true_positives)} that were"
            for one in data.meaning.bounds.attacks
        ),
    ):
        assert words in said
    off = replace(data, claim=replace(data.claim, made=False))
    assert "computed from its records, as they are." in facts_of(off)[1].answers[0], "noise is claimed that none added"


def test_a_rate_in_a_thousand_is_never_rounded_down() -> None:
    for share in (0.0011, 0.0404, 0.1393, 0.38221):
        number = int(in_thousand(share).split()[0].replace(",", ""))
        assert share <= number / 1000 < share + 0.001


def test_a_run_without_privacy_promises_nothing_there_either(tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "run", {"privacy.mode": "none", "rounds": 1}).start().round(1, 0.8).end()
    text = words_of(sheet(run))
    assert "Privacy was OFF" in text
    assert "Everything: nothing is promised." in text
    assert "There is a limit" not in text
    assert not [fact for fact in facts_of(report_of(run.folder)) if fact.question.startswith("What could somebody")]


def test_a_run_that_goes_on_has_a_sheet_without_a_promise(tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "run").start()
    text = words_of(sheet(run))
    assert "so there is no figure" in text
    assert "There is a limit" not in text


def test_the_sheet_loads_and_runs_nothing_and_obeys_no_name(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>\x1b"
    run = MadeRun(tmp_path / "run", {"rounds": 1}, sites={"north": 10}).start().round(1, 0.7).end("stopped", hostile)
    page = sheet(run)
    for pattern in (r"https?://", r"<script", r"<link", r"<img", r"@import", r"url\(", r"\son\w+=", "\x1b"):
        assert not re.search(pattern, page), f"the page holds {pattern}"


def test_many_labels_and_many_sites_stay_on_the_page(tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "run", {"rounds": 1}).start().round(1, 0.5).end()
    labels = [LabelScore(f"label {i}", i, 100) for i in range(1, 60)]
    run.write(BaselineFile(0.1, 0.5, labels))
    (line,) = run.lines("rounds.jsonl")
    line |= {"labels": [to_json(label) for label in labels], "participants": [f"site-{i}" for i in range(1000)]}
    (run.folder / "rounds.jsonl").write_text(json.dumps(line) + "\n")
    text = words_of(sheet(run))
    assert "label 1: 1.0 %" in text
    assert "label 59: 59.0 %" in text
    assert "label 30" not in text
    line["participants"] = [f"site-{i}" for i in range(10)]  # so few that each has a sentence of its own
    (run.folder / "rounds.jsonl").write_text(json.dumps(line) + "\n")
    lines = run.lines("privacy.jsonl")
    for told in lines:
        told["epsilon_total"] = 0.1
    more = [{**told, "site": f"site-{i}"} for i in range(10) for told in lines[:1]]
    (run.folder / "privacy.jsonl").write_text("".join(json.dumps(told) + "\n" for told in [*lines, *more]))
    facts = {fact.question: fact.answers for fact in facts_of(report_of(run.folder))}
    assert len(facts["What is not promised?"]) == 5
    assert "more such sentences stand in the report" in facts["What is not promised?"][-1]

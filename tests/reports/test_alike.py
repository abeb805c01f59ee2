"""A federation of a thousand sites: those that did alike are one row, odd ones are named, nothing is lost."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from typing import Any

import pytest
from made_run import MadeRun
from report_forms import fedveil

from fedveil.common.words import EACH, names_text, natural
from fedveil.reports import ReportData, report_of
from fedveil.reports.alike import alike_sites, participants_text
from fedveil.reports.markdown import to_markdown
from fedveil.reports.page import to_html

pytestmark = pytest.mark.rough_prices

MANY = 1000


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> MadeRun:
    """A run of a thousand sites, written for two and copied: one differs in noise, one was refused."""
    folder = tmp_path_factory.mktemp("thousand") / "run"
    run = MadeRun(folder, {"rounds": 1}, sites={"site-0": 700, "site-7": 700}, noise={"site-7": 0.8}).start()
    run.round(1, 0.76).end()
    (line,) = run.lines("rounds.jsonl")
    names = [f"site-{i}" for i in range(MANY) if i != 500]
    refused = {"round": 1, "attempt": 1, "site": "site-500", "kind": "budget", "reason": "nothing is left"}
    line |= {"participants": names, "refusals": [refused], "failures": [refused]}
    (folder / "rounds.jsonl").write_text(json.dumps(line) + "\n")
    paid = {told["site"]: told for told in run.lines("privacy.jsonl")}
    rows = [
        {**paid.get(name, paid["site-0"]), "site": name, "public_size": 700 + int(name.removeprefix("site-"))}
        for name in names
    ]
    (folder / "privacy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


@pytest.fixture(scope="module")
def data(thousand: MadeRun) -> ReportData:
    return report_of(thousand.folder)


def check_that_no_site_is_lost(data: ReportData) -> None:
    rows = alike_sites(data.sites)
    assert sum(row.count for row in rows) == len(data.sites) == MANY, "a site is in no row"
    assert [(row.names, row.sizes) for row in rows] == [
        (f"site-0 … site-{MANY - 1} (998 sites)", "700 to 1,699"),
        ("site-7", "707"),
        ("site-500", "–"),
    ]


def test_sites_that_did_alike_are_one_row_and_odd_ones_are_named(data: ReportData) -> None:
    check_that_no_site_is_lost(data)
    worst = max(data.sites, key=lambda site: site.epsilon_total or 0)
    assert worst.site == data.headline.worst_site == "site-7"


def test_rows_that_hide_an_odd_site_are_found_out(data: ReportData, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if only refusals made a site another one."""
    monkeypatch.setattr("fedveil.reports.alike.replace", lambda row, **_: row.rounds_refused)
    with pytest.raises(AssertionError):
        check_that_no_site_is_lost(data)


@pytest.mark.parametrize("form", [to_markdown, to_html])
def test_page_and_markdown_stay_short_and_name_the_odd_ones(data: ReportData, form: Any) -> None:
    text = html.unescape(re.sub(r"<[^>]+>", " ", form(data)))
    assert len(set(re.findall(r"site-\d+", text))) <= 5, "every site is named"
    for part in ("site-0 … site-999 (998 sites)", "all but site-500 (999 sites)", "700 to 1,699", "nothing is left"):
        assert part in text, part
    assert len(form(data)) < 60_000


def test_the_terminal_is_short_however_many_sites_there_are(thousand: MadeRun) -> None:
    code, said = fedveil("report", thousand.folder)
    assert code == 0
    assert len(said.splitlines()) < 20


def test_every_site_stays_in_the_json(thousand: MadeRun) -> None:
    fedveil("report", thousand.folder)
    held = json.loads((thousand.folder / "report.json").read_text())
    assert [site["site"] for site in held["sites"]] == [f"site-{i}" for i in range(MANY)]


def test_a_small_federation_has_a_row_for_each(data: ReportData) -> None:
    few = [replace(site, note="agrees") for site in data.sites[:EACH]]
    assert [row.names for row in alike_sites(few)] == [site.site for site in few]
    assert participants_text(["north", "south"], few) == "north, south"
    assert participants_text([site.site for site in data.sites], data.sites) == "all 1,000 sites"
    half = [site.site for site in data.sites[::2]]
    assert participants_text(half, data.sites) == "site-0 … site-998 (500 sites)"


def test_numbers_in_names_count_as_numbers() -> None:
    names = ["site-10", "site-9", "site-09", "a10b2", "a2b10", "North", "", "٣"]
    assert sorted(names, key=natural) == ["", "North", "a2b10", "a10b2", "site-9", "site-09", "site-10", "٣"]
    assert names_text([str(i) for i in range(EACH)]) == ", ".join(str(i) for i in range(EACH))

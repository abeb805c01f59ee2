"""The report says what the files say, in all three forms, whatever state the run is in and whoever named the sites."""

from __future__ import annotations

import html
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_run import DELTA, MadeRun
from report_forms import audit_file, fedveil, forms, found

from fedveil.common.errors import DataError
from fedveil.common.findings import Finding
from fedveil.common.run_lines import Reached
from fedveil.common.words import names_text
from fedveil.privacy.accounting import gaussian_release
from fedveil.privacy.privacy_filter import promised
from fedveil.reports import federation_epsilon, markdown_report, report_of, to_json, write_reports
from fedveil.reports.audits import WHOSE
from fedveil.reports.claim import claim_of
from fedveil.reports.folder import read_run
from fedveil.reports.page import to_html
from fedveil.reports.sites import Recomputed, _compare, site_reports

pytestmark = pytest.mark.rough_prices

HOSTILE = "<script>alert(1)</script>\x1b[2K\u202e|`*"


@pytest.fixture
def made(tmp_path: Path) -> MadeRun:
    """A finished run of three rounds in which one site was refused once."""
    run = MadeRun(tmp_path / "run", {"rounds": 3}, noise={"north": 0.8}).start()
    run.round(1, 0.71).round(2, 0.74)
    return run.round(3, 0.76, refusals={"south": ("budget", "nothing is left")}).end()


def test_figures_are_those_of_the_files(made: MadeRun) -> None:
    data, lines = report_of(made.folder), made.lines("privacy.jsonl")
    last = {line["site"]: line for line in lines}
    head = data.headline
    assert (head.accuracy_before, head.accuracy_after, head.rounds_done, head.rounds_planned) == (0.695, 0.76, 3, 3)
    assert head.epsilon == max(line["epsilon_total"] for line in lines)
    assert (head.worst_site, head.delta, head.epsilon_budget) == ("north", DELTA, 8.0)
    rounds = made.lines("rounds.jsonl")
    assert head.bytes_down == sum(line["bytes_down"] for line in rounds)
    for site in data.sites:
        assert site.epsilon_total == last[site.site]["epsilon_total"]
        assert site.epsilon_remaining == last[site.site]["epsilon_remaining"]
        assert site.public_size == made.sites[site.site]
    assert [(s.rounds_joined, s.rounds_refused, s.steps) for s in data.sites] == [(3, 0, 15), (2, 1, 10)]
    for form, text in forms(made.folder).items():
        assert f"{head.epsilon:.3f}"[:4] in text, f"report.{form} does not show ε"
        for words in ("one training record", "add or remove one record", "sees every upload", "nothing is left", "PLD"):
            assert words in text, f"report.{form} does not say {words!r}"


def test_a_rounds_epsilon_is_the_worst_sites_by_then(made: MadeRun) -> None:
    lines = made.lines("privacy.jsonl")
    for row in report_of(made.folder).rounds:
        by_then = {line["site"]: line["epsilon_total"] for line in lines if line["round"] <= row.round_number}
        assert row.epsilon_worst == max(by_then.values(), default=None)
    assert by_then["north"] > by_then["south"], "any site's would do"


def test_epsilon_is_computed_again_by_pld_and_rdp(made: MadeRun) -> None:
    north, south = report_of(made.folder).sites
    releases = [gaussian_release(0.8, 0.05, 15)]
    assert north.epsilon_recomputed == pytest.approx(promised(releases, DELTA)[0], abs=1e-9)
    assert north.epsilon_rdp == pytest.approx(promised(releases, DELTA, method="rdp")[0], abs=1e-9)
    assert (north.agreement, south.agreement) == ("agrees", "agrees")


@pytest.mark.parametrize(
    ("total", "agreement", "words"),
    [
        (2.0, "agrees", "agrees"),
        (2.0009, "agrees", "agrees"),
        (2.002, "larger", "0.002 more: its ledger also has earlier runs"),
        (1.898, "agrees", "by the accountant of departures"),
        (1.7995, "agrees", "by the accountant of departures"),
        (1.798, "smaller", "DISAGREES"),
        (math.inf, "exposed", "no ε holds"),
        (None, "none", "released nothing"),
    ],
)
def test_a_sites_total_is_compared_with_each_price_that_a_ledger_may_have_taken(
    total: float | None, agreement: str, words: str
) -> None:
    again = Recomputed(2.0, "PLD", 3.0, departed=1.8)
    found, note = _compare(total, again, "")
    assert (found, words in note) == (agreement, True), note
    assert _compare(2.0, None, "of another version") == ("unknown", "cannot be recomputed: of another version")


@pytest.mark.parametrize("agreement", ["smaller", "unknown", "exposed", "agrees", "larger"])
def test_each_site_whose_figure_cannot_be_believed_is_a_gap(agreement: str, made: MadeRun) -> None:
    files = read_run(made.folder)
    north, south = site_reports(files)
    claim = claim_of(files, [replace(north, agreement=agreement, note="WHY"), south])
    assert claim.gaps == ([] if agreement in ("agrees", "larger") else ["north: WHY"])


def test_each_gap_of_a_claim_has_its_own_reason(made: MadeRun) -> None:
    files = read_run(made.folder)
    sites = site_reports(files)
    unpaid = replace(files, privacy=[replace(line, spent=None) for line in files.privacy if line.site == "south"])
    unpaid = replace(unpaid, privacy=[*unpaid.privacy, *(line for line in files.privacy if line.site == "north")])
    assert claim_of(unpaid, sites).gaps == ["no claim for south: an update came without a charge"]
    (gap,) = claim_of(replace(files, result=None), sites).gaps
    assert gap.startswith("the run failed or is not finished")
    endless = [replace(sites[0], epsilon_total=math.inf, agreement="exposed", note="WHY"), *sites[1:]]
    assert claim_of(files, endless).gaps == ["north: WHY"], "what has no end is not shared with other names"
    many = [replace(sites[0], site=f"site-{i}", agreement="unknown", note=f"WHY {i % 2}") for i in range(13)]
    assert claim_of(files, many).gaps == [
        f"{names_text([f'site-{i}' for i in range(13) if i % 2 == kind])}: WHY {kind}" for kind in (0, 1)
    ]


def test_an_earlier_run_makes_the_sites_total_larger_and_is_named(tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "run", earlier={"north": [gaussian_release(1.0, 0.05, 20)]}).start().round(1, 0.7).end()
    north = report_of(run.folder).sites[0]
    assert north.agreement == "larger"
    assert "earlier runs" in north.note
    assert report_of(run.folder).headline.epsilon == north.epsilon_total


def test_a_site_that_reports_less_than_its_lines_cost_does_not_lower_the_figure(made: MadeRun) -> None:
    lines = made.lines("privacy.jsonl")
    true = max(line["epsilon_total"] for line in lines)
    for line in lines:
        line["epsilon_total"] = 0.1
        line["steps_total"] += line["round"]
    (made.folder / "privacy.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert federation_epsilon(made.folder) == pytest.approx(true, abs=1e-3)
    for form, text in forms(made.folder).items():
        assert "DISAGREES" in text, f"report.{form} hides that a site reports too little"


def test_the_claim_holds_for_every_site_where_policies_ask_for_other_deltas(tmp_path: Path) -> None:
    noise, strict = {"north": 0.8, "south": 0.85}, 1e-8
    run = MadeRun(tmp_path / "run", {"rounds": 1}, noise=noise, delta={"south": strict}).start().round(1, 0.7).end()
    data = report_of(run.folder)
    assert data.headline.worst_site == "south"
    claimed, delta = re.findall(r"\(ε, δ\) = \(([0-9.]+), ([0-9.e-]+)\)", data.claim.sentence)[0]
    assert (float(delta), data.headline.delta) == (DELTA, DELTA)
    for site, own in noise.items():
        assert promised([gaussian_release(own, 0.05, 5)], float(delta))[0] <= float(claimed), (
            f"the claim does not hold for {site}"
        )
    assert promised([gaussian_release(0.8, 0.05, 5)], strict)[0] > float(claimed), "the stricter delta would do as well"
    made = forms(run.folder)
    for form in ("md", "html"):
        assert f"at δ {DELTA:g}, worst site: south" in made[form]
    for form in ("md", "html"):
        assert "1e-08" in made[form], f"report.{form} does not say at which δ south has spent its ε"


def test_other_releases_are_paid_and_have_lines_of_their_own(tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "run", {"recipe": "plain"}, sites={"north": 2000}).start()
    run.release(0, "north", gaussian_release(5.0, 0.1, 1, "initialisation")).round(1, 0.7).end()
    lines = run.lines("rounds.jsonl")
    lines[0]["noised_correct"] = [{"site": "north", "value": 1404.0, "noise_std": 30.0}]
    (run.folder / "rounds.jsonl").write_text(json.dumps(lines[0]) + "\n")
    data = report_of(run.folder)
    assert [(r.purpose, r.value) for r in data.other_releases] == [("initialisation", None), ("evaluation", 1404.0)]
    everything = [gaussian_release(5.0, 0.1, 1), gaussian_release(1.2, 0.05, 5), gaussian_release(30.0, 1.0, 1)]
    assert data.sites[0].epsilon_recomputed == pytest.approx(promised(everything, DELTA)[0], abs=1e-9)
    assert data.sites[0].steps == 5
    for form, text in forms(run.folder).items():
        assert "initialisation" in text, f"report.{form} leaves the initialisation out"
        assert "evaluation" in text, f"report.{form} leaves the noised evaluation out"


def test_a_round_told_twice_is_paid_once(made: MadeRun) -> None:
    before = report_of(made.folder).sites
    made.append("privacy.jsonl", made.lines("privacy.jsonl")[-1])
    assert report_of(made.folder).sites == before


def test_privacy_off_is_said_in_every_form(tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "run", {"privacy.mode": "none"}).start().round(1, 0.7).end()
    for form, text in forms(run.folder).items():
        assert "Privacy was OFF. This run promises nothing about any record" in text, f"report.{form} is silent"
        assert "differentially private in" not in text, f"report.{form} makes a claim"
    assert federation_epsilon(run.folder) is None


def test_the_page_loads_nothing_and_runs_nothing(made: MadeRun) -> None:
    page = forms(made.folder)["html"]
    for pattern in (r"https?://", r"<script", r"<link", r"<img", r"@import", r"url\(", r"\son\w+="):
        assert not re.search(pattern, page), f"the page holds {pattern}"
    assert page.count("<table ") == page.count("<caption>")


def test_names_and_reasons_from_elsewhere_are_shown_and_not_obeyed(tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "run", sites={HOSTILE: 10, "south": 10}).start()
    run.round(1, 0.7, refusals={"south": ("failed", HOSTILE)}).end("stopped", HOSTILE)
    texts = forms(run.folder)
    for form in ("md", "html"):
        assert "<script" not in texts[form], f"report.{form} carries a script"
        assert "\x1b" not in texts[form], f"report.{form} carries an escape code"
        assert "\u202e" not in texts[form], f"report.{form} changes the writing direction"
        assert "&lt;script&gt;" in texts[form], f"report.{form} hides the name"
    assert r"\|\`\*" in texts["md"]
    assert json.loads(texts["json"])["refusals"][0]["reason"] == HOSTILE
    assert texts["json"].isascii()


def test_settings_that_differ_from_the_default_are_marked(made: MadeRun) -> None:
    changed = {setting.key: setting.value for setting in report_of(made.folder).settings if setting.changed}
    assert changed == {"rounds": 3}, "a default, or what a run fills in by itself, is marked as changed"


def test_a_setting_that_a_run_would_have_filled_in_otherwise_is_marked(tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "run", {"rounds": 1, "training.local-steps": 2}).start().round(1, 0.7).end()
    assert "training.local-steps" in {setting.key for setting in report_of(run.folder).settings if setting.changed}


def test_a_run_that_goes_on_is_reported_as_far_as_it_is(tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "run").start()
    assert report_of(run.folder).headline.epsilon is None
    assert "no figure" in markdown_report(run.folder)
    run.round(1, 0.7)
    with (run.folder / "privacy.jsonl").open("a") as file:
        file.write('{"round": 2, "site": "nor')
    data = report_of(run.folder)
    assert data.status == "unfinished"
    assert data.headline.rounds_done == 1
    assert any("line 3 of privacy.jsonl is not whole" in problem for problem in data.problems)
    assert "not whole" in forms(run.folder)["html"]


@pytest.mark.parametrize("name", ["rounds.jsonl", "privacy.jsonl"])
@pytest.mark.parametrize("left", [None, 0, 1])
def test_a_file_that_lacks_the_last_rounds_is_named(made: MadeRun, name: str, left: int | None) -> None:
    made.end(reached=Reached(0.6, 0.76, 1.0, rounds=3))
    assert not report_of(made.folder).problems
    path = made.folder / name
    if left is None:
        path.unlink()
    else:
        path.write_text("".join(line + "\n" for line in path.read_text().splitlines()[:left]))
    (told,) = report_of(made.folder).problems
    assert told.startswith(f"{name} does not reach round 3")
    for form, text in forms(made.folder).items():
        assert "does not reach round 3" in text, f"report.{form} does not say what is missing"


def test_a_run_that_ended_before_its_first_round_lacks_nothing(tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "run").start().end("stopped", "too few sites", Reached(0.6, 0.6, None, rounds=0))
    assert not report_of(run.folder).problems


def test_a_failed_run_says_why_and_that_sites_may_have_paid_more(tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "run").start().round(1, 0.7).end("failed", "round 2: too few sites")
    for form, text in forms(run.folder).items():
        assert "round 2: too few sites" in text, f"report.{form} does not say why the run failed"
        assert "may have charged a round" in text, f"report.{form} does not say that sites may have paid more"


def test_a_round_that_does_not_count_is_no_progress(made: MadeRun) -> None:
    line = {**made.lines("rounds.jsonl")[-1], "round": 4, "complete": False, "participants": [], "accuracy": 0.1}
    line["failures"] = [{"round": 4, "attempt": 2, "site": "south", "kind": "late", "reason": "no answer"}]
    made.append("rounds.jsonl", line)
    data = report_of(made.folder)
    assert (data.headline.rounds_done, data.headline.accuracy_after) == (3, 0.76)
    assert (data.refusals[-1].attempt, data.refusals[-1].reason) == (2, "no answer")
    assert "did not count" in to_html(data)


def test_a_total_above_the_budget_is_said_to_be_of_shared_records(made: MadeRun) -> None:
    lines = made.lines("privacy.jsonl")
    lines[-1] |= {"epsilon_total": 9.5, "epsilon_remaining": 0.0}
    (made.folder / "privacy.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = report_of(made.folder)
    assert data.headline.epsilon == 9.5
    (gap,) = (gap for gap in data.claim.gaps if "above its budget of 8" in gap)
    assert gap.startswith(f"{lines[-1]['site']}: ε 9.5")
    assert "shares records with other names" in gap


def test_participants_without_a_privacy_line_weaken_the_claim(made: MadeRun) -> None:
    lines = made.lines("privacy.jsonl")[:-1]
    (made.folder / "privacy.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert any("no line in privacy.jsonl for north" in gap for gap in report_of(made.folder).claim.gaps)


def test_a_test_part_of_ones_own_file_is_called_unprotected_in_every_form(tmp_path: Path) -> None:
    for i, (settings, told) in enumerate(
        [
            ({}, False),
            ({"data.name": "own.csv"}, True),
            ({"data.name": "hub:clinic/notes"}, True),
            ({"data.name": "own.csv", "data.test": "public.csv"}, False),
        ]
    ):
        run = MadeRun(tmp_path / str(i), {"rounds": 1, **settings}).start().round(1, 0.7).end()
        assert {"are held out as the test set" in text for text in forms(run.folder).values()} == {told}, settings


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_a_folder_that_is_no_runs_is_refused_in_one_line(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(DataError, match=r"is not the folder of a run") as caught:
        write_reports(tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("report.*"))


def test_the_json_is_canonical_and_repeatable(made: MadeRun) -> None:
    data = report_of(made.folder)
    text = to_json(data)
    assert text == to_json(report_of(made.folder)), "two reports of the same files differ"
    value = json.loads(text)
    assert text == json.dumps(value, sort_keys=True, separators=(",", ":")).encode() + b"\n"
    assert value["schema"] == "fedveil-report/3"
    endless = replace(data, headline=replace(data.headline, epsilon=float("inf")))
    assert json.loads(to_json(endless))["headline"]["epsilon"] == "inf"


def all_forms(made: MadeRun) -> tuple[str, str, dict[str, Any], str]:
    """Return the report as Markdown, page and JSON, and what the terminal says."""
    code, words = fedveil("report", made.folder)
    assert code == 0
    markdown, page = ((made.folder / f"report.{kind}").read_text() for kind in ("md", "html"))
    return markdown, page, json.loads((made.folder / "report.json").read_text()), words


def test_no_form_of_a_report_names_a_folder_of_the_machine(tmp_path: Path) -> None:
    place = "/srv/of our/own"
    settings = {"rounds": 2, "output": f"{place}/runs", "data.name": f"{place}/trec.csv", "model.name": f"{place}/tiny"}
    reason = "the ledger /srv/own/ledger.sqlite is damaged"
    run = MadeRun(tmp_path / "run", settings, noise={"north": 0.8}).start()
    run.round(1, 0.71, refusals={"south": ("failed", reason)}).end()
    result = run.folder / "result.json"
    said = {**json.loads(result.read_text()), "status": "failed", "reason": "OSError: no space in '/srv/own/runs'"}
    result.write_text(json.dumps(said))
    assert fedveil("report", run.folder)[0] == 0
    forms = [path for path in run.folder.iterdir() if path.suffix in (".md", ".html") or "report" in path.name]
    assert {"report.md", "report.html", "report.json"} <= {path.name for path in forms}
    for path in forms:
        text = html.unescape(path.read_text())
        assert "/srv" not in text, path.name
        assert "our/own" not in text, path.name
    text = json.loads((run.folder / "report.json").read_text())
    assert {one["key"]: one["value"] for one in text["settings"] if one["key"] in ("output", "data.name")} == {
        "data.name": "trec.csv",
        "output": "runs",
    }
    assert [one["reason"] for one in text["refusals"]] == ["the ledger <path> is damaged"]
    assert text["reason"] == "OSError: no space in '<path>'"


def test_a_run_that_nobody_audited_says_so(made: MadeRun) -> None:
    markdown, page, value, _ = all_forms(made)
    assert "No audit was run" in markdown
    assert "No audit was run" in page
    assert value["audit_results"] == value["alarms"] == []
    for text in (markdown, page):
        assert not re.search(r"\bmake \w+", text), "whoever installed a package has no Makefile"


def test_a_passed_audit_says_when_and_with_which_versions(made: MadeRun) -> None:
    made.audited("audit.json", audit_file(found("kills"), found("kills", "late")))
    markdown, page, value, words = all_forms(made)
    for text in (markdown, page):
        for wanted in ("kills", "passed", "1 of 1 found", "2026-11-25T08:00:00", "torch 2.13.0", "audit.json"):
            assert wanted in text
        assert "No audit was run" not in text
        assert "AUDIT FAILED" not in text
    assert value["alarms"] == []
    assert [(r["audit"], r["passed"], r["checks"], r["faults"]) for r in value["audit_results"]] == [
        ("kills", True, 1, 1)
    ]
    assert "AUDIT FAILED" not in words


@pytest.mark.parametrize(
    "failed", [found("canaries", "", False), found("canaries", "noise halved", False)], ids=lambda f: f.case
)
def test_a_failed_audit_is_loud_in_every_form(made: MadeRun, failed: Finding) -> None:
    made.audited("audit.json", audit_file(found("kills"), found("canaries"), failed))
    markdown, page, value, words = all_forms(made)
    assert markdown.index("AUDIT FAILED") < markdown.index("## What is promised")
    assert page.index("AUDIT FAILED") < page.index("Privacy spent")
    assert len(value["alarms"]) == 1
    assert "canaries" in value["alarms"][0]
    assert [r["passed"] for r in value["audit_results"]] == [True, False]
    assert "AUDIT FAILED: canaries" in words


def test_an_audit_of_other_versions_or_without_findings_is_not_taken_for_one_of_the_run(made: MadeRun) -> None:
    made.audited("audit.json", audit_file(found("kills"), torch="2.12.0"))
    made.audited("audit-2.json", audit_file())
    (made.folder / "audit-3.json").write_text('{"passed": true}')
    markdown, page, value, words = all_forms(made)
    for text in (markdown, page, words):
        assert "torch 2.12.0 (the run: 2.13.0)" in text
        assert "audit-2.json holds no findings: it does not say that any audit passed" in text
        assert "audit-3.json lacks the field 'date': it does not say that any audit passed" in html.unescape(text)
    assert [r["file"] for r in value["audit_results"]] == ["audit.json"]


@pytest.mark.parametrize(
    "address", ["https://d.example/x", "ftp://d.example", "www.d.example", "mailto:a@d.example", "WWW.d.example"]
)
def test_an_address_in_a_name_makes_no_link(tmp_path: Path, address: str) -> None:
    run = MadeRun(tmp_path / "run", sites={address: 10, "south": 10}).start()
    run.round(1, 0.7, refusals={"south": ("failed", f"see {address}")}).end("stopped", address)
    text = forms(run.folder)["md"]
    assert address not in text, "a reader of Markdown makes a link of a bare address"
    assert html.unescape(text).count(address) >= 3, "the address is no longer shown as it is"
    assert not re.search(r"(?i)://|www\.|mailto:|@", text)


def test_the_report_says_that_anyone_may_have_put_the_findings_there(made: MadeRun) -> None:
    assert all(WHOSE not in text for text in forms(made.folder).values())
    made.audited("audit.json", audit_file(found("kills")))
    texts = forms(made.folder)
    assert WHOSE in texts["md"]
    assert WHOSE in html.unescape(texts["html"])


def test_what_is_no_key_is_said_in_one_line(made: MadeRun, tmp_path: Path) -> None:
    bad = tmp_path / "bad.pem"
    bad.write_text("hello")
    for words in (("report", made.folder, "--sign", bad), ("verify", bad, "--key", bad)):
        code, said = fedveil(*words)
        assert code == 1
        assert said.startswith("fedveil: ")
        assert said.count("\n") == 1


@pytest.mark.parametrize("absurd", [1e200, 1e-200])
def test_figures_beyond_arithmetic_make_the_figure_infinite_and_stop_no_report(made: MadeRun, absurd: float) -> None:
    lines = made.lines("privacy.jsonl")
    lines[-1]["event"]["figures"]["noise_multiplier"] = absurd
    (made.folder / "privacy.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert federation_epsilon(made.folder) == math.inf
    for form, text in forms(made.folder).items():
        assert "DISAGREES" in text, f"report.{form} believes it"


def test_a_site_that_only_refused_is_in_the_table(tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "run").start().round(1, 0.7, refusals={"south": ("policy", "not today")}).end()
    south = report_of(run.folder).sites[1]
    assert (south.site, south.rounds_joined, south.rounds_refused, south.epsilon_total) == ("south", 0, 1, None)


@pytest.mark.parametrize("noise", [0.83, 0.9, 1.0, 1.1])
def test_no_figure_that_people_read_is_below_what_was_spent(tmp_path: Path, noise: float) -> None:
    run = MadeRun(tmp_path / "run", {"rounds": 1}, noise={"north": noise}).start().round(1, 0.7).end()
    data = report_of(run.folder)
    spent = data.headline.epsilon
    assert spent is not None
    made = forms(run.folder)
    texts = [data.claim.sentence, made["md"], made["html"], json.loads(made["json"])["claim"]["sentence"]]
    shown = [float(figure) for text in texts for figure in re.findall(r"\(ε, δ\) = \(([0-9.]+)", text)]
    assert len(shown) == 4
    assert all(spent <= figure < spent + 1e-3 for figure in shown), f"{spent} is shown as {shown}"


def test_before_training_no_claim_is_given_up(made: MadeRun) -> None:
    (row,) = re.findall(r"^\| 0 \|.*$", forms(made.folder)["md"], flags=re.MULTILINE)
    assert "no claim" not in row
    (cells,) = re.findall(r">0</th>.*?</tr>", forms(made.folder)["html"].split('<h2 id="rounds">')[-1], flags=re.DOTALL)
    assert "no claim" not in cells

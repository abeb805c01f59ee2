"""Figures of a run whose sites share the noise of a sum: in no form does one stand without its honest sites."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from carded_runs import with_adapter
from made_run import DELTA, MadeRun

from fedveil.cli.report import verify
from fedveil.cli.summary import print_summary
from fedveil.common.findings import AuditFile, Finding
from fedveil.common.other_runs import BesideRow
from fedveil.privacy.accounting import Release, alone, gaussian_release
from fedveil.privacy.figures import bound_text, epsilon_text, remaining_text
from fedveil.privacy.privacy_filter import promised
from fedveil.reports import ReportData, report_of, write_reports
from fedveil.reports.audits import AT_LEAST, CLAIMED, HONEST, audit_reports, bound_note, bound_sentences
from fedveil.reports.card import adapter_form, card_of
from fedveil.reports.claim import claim_of
from fedveil.reports.declared import Declared
from fedveil.reports.folder import read_run
from fedveil.reports.markdown import to_markdown
from fedveil.reports.page import to_html
from fedveil.reports.sharing import sharing_of
from fedveil.reports.signature import make_key
from fedveil.reports.sites import fewest_summed, site_reports

pytestmark = pytest.mark.rough_prices

SITES = {f"clinic-{i}": 2000 for i in range(4)}
Marked = dict[str, set[str]]
"""By a figure as it is printed: what must stand beside it, one of these."""


def summed(folder: Path, honest: int, colluders: int) -> MadeRun:
    """Return a finished run of four sites that share the noise of three sums; one of them was in two."""
    own = {"privacy.honest-sites": honest, "privacy.colluders": colluders, "privacy.noise-multiplier": 0.7}
    settings = {
        "privacy.mode": "secure-sum",
        "training.local-steps": 1,
        "rounds": 3,
        "training.optimizer": "sgd",
        **own,
    }
    run = MadeRun(folder / "run", settings, SITES, dict.fromkeys(SITES, 0.7), honest=honest).start()
    late = {"clinic-3": ("timeout", "no reply")}
    return with_adapter(run.round(1, 0.7117).round(2, 0.7217).round(3, 0.7317, refusals=late).end())


@pytest.fixture(scope="module")
def shared(prices: None, tmp_path_factory: pytest.TempPathFactory) -> ReportData:
    """The report of a run that counts on two of four sites, of which one may collude."""
    del prices
    return report_of(summed(tmp_path_factory.mktemp("shared"), 2, 1).folder)


def figures_of(data: ReportData) -> Marked:
    """Return every figure of a report that rests on honest sites, with its mark."""
    found: Marked = {}

    def add(mark: str, texts: Iterable[str]) -> None:
        for text in texts:
            found.setdefault(text, set()).add(mark)

    assert data.sharing is not None
    assert data.meaning is not None
    own = f"h = {data.sharing.honest_sites}"
    for site in data.sites:
        assert site.epsilon_remaining is not None
        add(own, map(epsilon_text, (site.epsilon_total, site.epsilon_recomputed, site.epsilon_rdp)))
        add(own, [remaining_text(site.epsilon_remaining)])
        add("alone", [epsilon_text(site.epsilon_alone)])
    add(own, [epsilon_text(line.epsilon_worst) for line in data.rounds if line.round_number])
    for more in data.sharing.more_honest:
        add(f"h = {more.honest_sites}", [epsilon_text(more.epsilon)])
    for mark, bounds in ((own, data.meaning.bounds), ("alone", data.meaning.alone)):
        if bounds is not None:
            add(mark, [bound_text(bounds.advantage)])
            for attack in bounds.attacks:
                add(mark, [bound_text(attack.true_positives)])
            for several in bounds.several:
                add(mark, [epsilon_text(several.epsilon, decimals=decimals) for decimals in (1, 3)])
    return found


def unmarked(blocks: Iterable[str], figures: Marked) -> list[tuple[str, str]]:
    """Return each figure that stands in a block without what must be beside it, with the block."""
    return [
        (figure, block)
        for block in blocks
        for figure, marks in figures.items()
        if re.search(rf"(?<![\d.,]){re.escape(figure)}(?![\d.])", block) and not any(mark in block for mark in marks)
    ]


# --- the forms, in the pieces that a reader takes in at once ----------------------------------------------------------


def lines_and_tables(text: str) -> list[str]:
    """Return Markdown's lines, and its tables whole."""
    return [own for part in text.split("\n\n") for own in ([part] if part.startswith("|") else part.splitlines())]


def of_markdown(data: ReportData) -> list[str]:
    return lines_and_tables(to_markdown(data))


def of_card(data: ReportData) -> list[str]:
    _, head, body = card_of(data, Declared(), adapter_form(data), b"").split("---\n", 2)
    private = yaml.safe_dump(yaml.safe_load(head)["differential_privacy"])
    return [*lines_and_tables(body), private.replace("honest_sites: ", "h = ")]


def pieces(page: str) -> list[str]:
    """Return the words of a page's tables, figures, boxes, paragraphs and items, and what is left of it."""
    found = []
    for tag in ("style", "table", "figure", "div", "p", "li"):
        pattern = rf"<{tag}[ >].*?</{tag}>"
        found += re.findall(pattern, page, flags=re.S) if tag != "style" else []
        page = re.sub(pattern, " ", page, flags=re.S)
    return [html.unescape(re.sub(r"<[^>]+>", " ", part)) for part in [*found, page]]


def of_page(data: ReportData) -> list[str]:
    return pieces(to_html(data))


FORMS: dict[str, Callable[[ReportData], list[str]]] = {
    "Markdown": of_markdown,
    "page": of_page,
    "model card": of_card,
}


def forgetful(data: ReportData) -> ReportData:
    """Return a report whose forms cannot know on whom it rests: the planted fault."""
    assert data.meaning is not None
    return replace(data, sharing=None, meaning=replace(data.meaning, honest_sites=0, alone=None))


@pytest.mark.parametrize("form", FORMS)
def test_no_figure_stands_without_its_honest_sites_and_a_form_that_drops_them_is_found(
    form: str, shared: ReportData
) -> None:
    figures, blocks = figures_of(shared), FORMS[form](shared)
    assert unmarked(blocks, figures) == []
    assert unmarked(FORMS[form](forgetful(shared)), figures), "the check is blind"
    text = " ".join(blocks)
    assert shared.sharing is not None
    assert epsilon_text(shared.headline.epsilon) in text
    assert f"{shared.sharing.epsilon_alone:.3f}"[:-1] in text, "the price alone is missing"


def test_the_other_prices_are_the_dearest_sites_by_the_sum_of_fewest_sites(shared: ReportData) -> None:
    sharing, site = shared.sharing, shared.sites[0]
    assert sharing is not None
    assert site.delta is not None
    rounds = [Release(site.events[0], 3)]
    assert len({own.epsilon_alone for own in shared.sites}) == 2, "all sites cost the same: nothing is proved"
    assert (sharing.honest_sites, sharing.summed) == (2, 3)
    assert sharing.epsilon_alone == pytest.approx(promised(alone(rounds), site.delta)[0], abs=1e-9)
    (more,) = sharing.more_honest
    wanted = promised([Release(site.events[0].of_honest(3), 3)], site.delta)[0]
    assert (more.honest_sites, more.epsilon) == (3, pytest.approx(wanted, abs=1e-9))


def test_where_sites_count_on_different_numbers_the_claim_rests_on_the_largest(tmp_path: Path) -> None:
    """With fewer honest ones the claim of the site that counts on more does not hold."""
    run = summed(tmp_path, 2, 1)
    lines = run.lines("privacy.jsonl")
    for line in lines:
        line["event"]["figures"]["honest_sites"] = 3 if line["site"] == "clinic-1" else 2
    (run.folder / "privacy.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = report_of(run.folder)
    assert data.sharing is not None
    assert (data.sharing.honest_sites, data.sharing.more_honest) == (3, [])
    assert "as long as 3 sites of each sum are honest (h = 3)" in data.claim.sentence


def test_the_sum_of_fewest_sites_is_one_that_counted_and_without_honest_ones_there_is_no_price(tmp_path: Path) -> None:
    run = summed(tmp_path, 1, 3)
    files = read_run(run.folder)
    (first, *_) = files.rounds
    told = [replace(first, round_number=0, participants=[]), replace(first, complete=False, participants=["clinic-0"])]
    assert fewest_summed(replace(files, rounds=[*told, *files.rounds])) == fewest_summed(files) == 3
    assert {site.epsilon_without_colluders for site in site_reports(files)} == {None}, "three of three collude"


def test_a_ledger_with_earlier_runs_says_on_what_these_counted(shared: ReportData, tmp_path: Path) -> None:
    files, sites = read_run(summed(tmp_path, 2, 1).folder), shared.sites
    words = "Earlier runs in a site's ledger hold under their own conditions"
    assert words not in claim_of(files, sites).sentence
    assert words in claim_of(files, [replace(sites[0], agreement="larger"), *sites[1:]]).sentence
    assert "all of the noise that its records need" not in claim_of(files, sites).sentence
    own = read_run(summed(tmp_path / "own", 1, 2).folder)
    assert "(h = 1): each site adds all of the noise that its records need" in claim_of(own, site_reports(own)).sentence


def test_before_a_sum_the_claim_rests_on_what_the_run_asks_for(tmp_path: Path) -> None:
    asked = {"privacy.mode": "secure-sum", "privacy.honest-sites": 3, "training.optimizer": "sgd"}
    files = read_run(MadeRun(tmp_path / "run", asked, SITES).start().folder)
    sharing = sharing_of(files, site_reports(files))
    assert sharing is not None
    assert (sharing.honest_sites, sharing.summed) == (3, 0)


@pytest.mark.parametrize("form", FORMS)
def test_what_an_attacker_finds_stands_beside_what_it_finds_alone(form: str, shared: ReportData) -> None:
    text = " ".join(FORMS[form](shared))
    assert shared.meaning is not None
    assert shared.meaning.alone is not None
    for bounds in (shared.meaning.bounds, shared.meaning.alone):
        for attack in bounds.attacks:
            assert bound_text(attack.true_positives) in text
    assert shared.meaning.alone.attacks[1].true_positives > 1.2 * shared.meaning.bounds.attacks[1].true_positives


def test_the_terminals_summary_and_the_verified_line_name_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = summed(tmp_path, 2, 1)
    data = report_of(run.folder)
    figures = figures_of(data)

    print_summary(run.folder)
    blocks = capsys.readouterr().out.splitlines()
    assert unmarked(blocks, figures) == []
    assert data.sharing is not None
    assert data.meaning is not None
    (privacy,) = [line for line in blocks if line.startswith("privacy: ε")]
    assert epsilon_text(data.sharing.epsilon_alone) in privacy
    assert f"at most {bound_text(data.meaning.bounds.attacks[0].true_positives)} of the records" in privacy
    make_key(tmp_path / "key.pem")
    write_reports(run.folder, tmp_path / "key.pem")
    verify(run.folder, tmp_path / "key.pub.pem")
    assert unmarked([line := capsys.readouterr().out], figures) == []
    assert "(h = 2)" in line
    monkeypatch.setattr("fedveil.reports.report_of", lambda _: forgetful(data))
    print_summary(run.folder)
    assert unmarked(capsys.readouterr().out.splitlines(), figures), "the check is blind"


def test_with_all_of_the_noise_at_each_site_both_claims_are_printed(tmp_path: Path) -> None:
    data = report_of(summed(tmp_path, 1, 2).folder)
    assert data.sharing is not None
    # The smallest sum had three sites, so that one is left beside two colluders: the claim itself.
    assert [more.honest_sites for more in data.sharing.more_honest] == [3]
    assert (data.sharing.honest_sites, data.sharing.summed) == (1, 3)
    figures = figures_of(data)
    for name, form in FORMS.items():
        blocks = form(data)
        assert unmarked(blocks, figures) == [], name
        text = " ".join(blocks)
        assert "whatever other sites do (h = 1)" in text
        assert epsilon_text(data.sharing.more_honest[0].epsilon) in text or name == "model card"
        assert "no other site adds" not in text


def test_full_noise_has_the_claim_of_all_but_the_colluders_too(tmp_path: Path) -> None:
    """Four sites in each sum, of which two may collude: so two are honest, with √2 times the noise; and √4 with all."""
    run = summed(tmp_path, 1, 2)
    lines = run.lines("rounds.jsonl")
    for line in lines:
        line["participants"] = list(SITES)
    (run.folder / "rounds.jsonl").write_text("")
    for line in lines:
        run.append("rounds.jsonl", line)
    sharing = report_of(run.folder).sharing
    assert sharing is not None
    wanted = {n: promised([gaussian_release(0.7 * n**0.5, 0.05, 3)], DELTA)[0] for n in (2, 4)}
    assert {more.honest_sites: more.epsilon for more in sharing.more_honest} == pytest.approx(wanted, abs=1e-6)


def test_a_run_without_shared_noise_says_nothing_of_honest_sites(tmp_path: Path) -> None:
    run = with_adapter(MadeRun(tmp_path / "run", {"rounds": 1}).start().round(1, 0.76).end())
    data = report_of(run.folder)
    assert data.sharing is None
    for form in FORMS.values():
        assert "h = " not in " ".join(form(data))


def test_other_runs_and_audits_name_the_honest_sites_of_their_sums(shared: ReportData) -> None:
    claims = {CLAIMED: 15.87, AT_LEAST[0]: 14.28}
    audits = AuditFile(True, "2026-11-25T08:00:00+00:00", {}, [Finding("canaries", "as it is", False, True, claims)])
    summed = replace(audits, findings=[replace(audits.findings[0], figures={**claims, HONEST: 3})])
    row = BesideRow("three-honest", "federated", 3.0, 0.72, 0.778, None, 1, honest=3)
    told = {}
    for name, file, honest in (("with", summed, 3), ("without", audits, 0)):
        results = audit_reports({"audit.json": file}, [])
        data = replace(shared, audit_results=results, beside=[replace(row, honest=honest)])
        told[name] = [to_markdown(data), html.unescape(to_html(data)), *bound_sentences(results), bound_note(results)]
    assert all("15.870 (h = 3)" in text for text in told["with"])
    assert not any("15.870 (h" in text for text in told["without"])
    for text in told["with"][:2]:
        assert "3 (h = 3)" in text
    for text in told["without"][:2]:
        assert "3 (h = 3)" not in text


def test_a_signed_statement_and_the_result_name_them(shared: ReportData, tmp_path: Path) -> None:
    run = summed(tmp_path, 2, 1)
    make_key(tmp_path / "key.pem")
    write_reports(run.folder, tmp_path / "key.pem")
    signed = json.loads((run.folder / "report.signed.json").read_text())
    assert shared.sharing is not None
    assert signed["honest_sites"] == 2
    assert signed["epsilon_alone"] == shared.sharing.epsilon_alone > signed["epsilon"]

"""A thousand sites of which no two have one history: few rows and curves, odd ones named in natural order."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from made_run import MadeRun
from report_forms import fedveil
from rich_run import MANY, ODD_NOISE, REFUSED, unlike

from fedveil.common.run_lines import Absence
from fedveil.common.words import EACH, natural
from fedveil.privacy.figures import epsilon_text
from fedveil.reports import ReportData, report_of
from fedveil.reports.alike import alike_absences, alike_releases, alike_sites, spread
from fedveil.reports.markdown import to_markdown
from fedveil.reports.page import to_html
from fedveil.reports.releases import ReleaseReport
from fedveil.reports.sites import SiteReport

pytestmark = pytest.mark.rough_prices

ROUNDS = 3


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeRun:
    return unlike(tmp_path_factory.mktemp("unlike") / "run", ROUNDS)


@pytest.fixture(scope="module")
def data(made: MadeRun) -> ReportData:
    return report_of(made.folder)


def check_rows(data: ReportData) -> None:
    rows = alike_sites(data.sites)
    assert sum(row.count for row in rows) == len(data.sites) == MANY, "a site is in no row"
    assert len(rows) <= EACH
    assert [row.names for row in rows if row.count <= EACH] == [ODD_NOISE, REFUSED]
    firsts = [row.names.split(" … ")[0] for row in rows]
    assert firsts == sorted(firsts, key=natural)


def test_no_two_sites_have_one_history(data: ReportData) -> None:
    assert len({repr(replace(site, site="", public_size=None)) for site in data.sites}) == MANY


def test_odd_sites_have_rows_of_their_own_and_the_rest_share_few(data: ReportData) -> None:
    check_rows(data)
    usual = next(row for row in alike_sites(data.sites) if row.count > EACH)
    others = [site for site in data.sites if site.site not in (ODD_NOISE, REFUSED)]
    spent = sorted({site.epsilon_total or 0.0 for site in others})
    assert usual.spent == spread(spent, epsilon_text)
    assert (usual.joined, usual.steps, usual.budgets) == ("1 to 3", "5 to 15", "8 to 8.999")
    assert usual.sizes == "700 to 1,699"


@pytest.mark.parametrize("odd_by", [lambda _: 0, lambda site: site.agreement == "agrees"])
def test_rows_that_hide_an_odd_site_are_found_out(
    data: ReportData, monkeypatch: pytest.MonkeyPatch, odd_by: Callable[[SiteReport], object]
) -> None:
    """As if nothing made a site odd, and as if the one that has spent most had no row of its own."""
    monkeypatch.setattr("fedveil.reports.alike.ODDITIES", (odd_by,))
    monkeypatch.setattr("fedveil.reports.alike.worst_site", lambda _: None)
    with pytest.raises(AssertionError):
        check_rows(data)


def test_page_markdown_and_terminal_are_short_and_name_the_odd_in_natural_order(
    made: MadeRun, data: ReportData
) -> None:
    code, said = fedveil("report", made.folder)
    assert code == 0
    assert len(said.splitlines()) < 20
    texts = {"md": to_markdown(data), "html": to_html(data)}
    for form, text in texts.items():
        plain = html.unescape(re.sub(r"<[^>]+>", " ", text))
        assert len(set(re.findall(r"site-\d+", plain))) <= 2 * EACH, f"{form} names every site"
        assert len(text) < 80_000, form
        rows = plain[plain.index("public size") :]
        assert 0 <= rows.find("site-0 …") < rows.find(f"{ODD_NOISE} ") < rows.find(f"{REFUSED} "), form


def test_many_reasons_and_many_prices_are_few_rows_too(data: ReportData) -> None:
    absences = [Absence(1, 1, f"site-{i}", "budget", f"ε {i} is left") for i in range(MANY)]
    ((names, told),) = alike_absences(absences, MANY)
    assert (names, told.reason) == ("site-0 … site-999 (1,000 sites)", "ε 0 is left (and 999 other reasons)")
    few = alike_absences(absences[:EACH], MANY)
    assert [told.reason for _, told in few] == [absence.reason for absence in absences[:EACH]]
    event = data.sites[0].events[0]
    releases = [ReleaseReport(1, f"site-{i}", "evaluation", event, 0.1 + i / 1000, float(i)) for i in range(MANY)]
    (row,) = alike_releases(releases, MANY)
    assert (row.names, row.added, row.value) == ("site-0 … site-999 (1,000 sites)", "0.100 to 1.099", "0 to 999")

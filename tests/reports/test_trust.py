"""Who is trusted with what, what nothing protects, and what attacks found of ε: in every form of the report."""

from __future__ import annotations

import html
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_run import MadeRun
from report_forms import audit_file, fedveil, forms

from fedveil.common.findings import Finding
from fedveil.privacy import MECHANISMS
from fedveil.reports import report_of
from fedveil.reports.audits import bound_note, bound_sentences
from fedveil.reports.trust import SERVER

pytestmark = pytest.mark.rough_prices


def attack(at_least: float, claimed: float = 1.2, *, built_in: bool = False, name: str = "is at least") -> Finding:
    figures: dict[str, Any] = {"epsilon claimed": claimed, name: at_least}
    return Finding("canaries", "too little noise" if built_in else "as it is", built_in, True, figures)


@pytest.fixture
def made(tmp_path: Path) -> MadeRun:
    return MadeRun(tmp_path / "run", {"rounds": 1}).start().round(1, 0.71).end()


def test_every_form_says_who_is_trusted_and_what_is_not_protected(made: MadeRun) -> None:
    data = report_of(made.folder)
    assert [actor.trusted.split(" ")[0] for actor in data.actors] == ["its", "no", "no", "no", "everything:"]
    for form, text in forms(made.folder).items():
        shown = html.unescape(text)
        for words in (
            "central model",
            "local model, sites as parties",
            "3,500 in all",
            "which site took part in which round",
        ):
            assert words in shown, f"report.{form} does not say {words!r}"


def test_every_mechanism_that_promises_says_what_its_server_is_trusted_with() -> None:
    assert {mechanism.noised for mechanism in MECHANISMS.values() if mechanism.claims} <= set(SERVER)


def test_without_a_finite_claim_everyone_is_trusted_with_everything(tmp_path: Path) -> None:
    off = MadeRun(tmp_path / "off", {"privacy.mode": "none", "rounds": 1}).start().round(1, 0.8).end()
    exposed = MadeRun(tmp_path / "exposed", {"rounds": 1}).start().round(1, 0.8).end()
    lines = [{**line, "epsilon_total": "inf"} for line in exposed.lines("privacy.jsonl")]
    (exposed.folder / "privacy.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for run in (off, exposed):
        assert {actor.trusted for actor in report_of(run.folder).actors} == {"everything: no finite ε is promised"}


def test_what_attacks_found_of_epsilon_stands_beside_what_was_claimed(made: MadeRun) -> None:
    """The case that comes nearest to its claim counts, and a fault that was built in never does."""
    nearest = attack(0.7, name="epsilon is at least")
    made.audited("audit.json", audit_file(attack(0.3), nearest, attack(5.0, built_in=True), attack(0.9, 2.0)))
    (audit,) = report_of(made.folder).audit_results
    assert (audit.epsilon_at_least, audit.epsilon_claimed) == (0.7, 1.2)
    (sentence,) = bound_sentences([audit])
    assert "at least 0.700 where 1.200 was claimed" in sentence
    made_forms = forms(made.folder)
    assert sentence in html.unescape(made_forms["html"])
    assert "at least 0.700 where 1.200 was claimed" in made_forms["md"]


def check_that_the_bound_stands_beside_epsilon(run: MadeRun) -> None:
    note = "An audit's attack shows ε to be at least 0.700 where 1.200 was claimed, in a small run made for the audit."
    code, said = fedveil("report", run.folder)
    assert code == 0
    words = " ".join(said.split())
    assert words.index("privacy: ε") < words.index(note) < words.index("trained:")
    page = html.unescape((run.folder / "report.html").read_text(encoding="utf-8"))
    headline = page[page.index("<dt>Privacy spent, ε</dt>") : page.index("<dt>Rounds</dt>")]
    assert note in headline, "it is not in the box of ε"
    assert page.count(note) == 1


def test_what_an_attack_found_is_read_beside_epsilon_on_page_and_terminal(made: MadeRun) -> None:
    made.audited("audit.json", audit_file(attack(0.1), attack(0.7), attack(0.9, 2.0)))
    check_that_the_bound_stands_beside_epsilon(made)


def test_a_bound_that_comes_less_near_is_found_out(made: MadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the first case of an audit counted."""
    made.audited("audit.json", audit_file(attack(0.1), attack(0.7)))
    monkeypatch.setattr("fedveil.reports.audits._bounds", lambda findings: (1.2, findings[0].figures["is at least"]))
    with pytest.raises(ValueError, match="substring not found"):
        check_that_the_bound_stands_beside_epsilon(made)


def test_of_several_audits_the_one_that_came_nearest_is_read(made: MadeRun) -> None:
    other = [replace(attack(0.9, 1.1), audit="needles"), replace(attack(0.1), audit="kills")]
    made.audited("audit.json", audit_file(attack(0.7), *other))
    assert "at least 0.900 where 1.100" in bound_note(report_of(made.folder).audit_results)
    assert bound_note([]) == ""


def test_an_audit_that_bounds_no_epsilon_says_none(made: MadeRun) -> None:
    made.audited("audit.json", audit_file(Finding("kills", "as it is", False, True, {"is at least": 3.0})))
    (audit,) = report_of(made.folder).audit_results
    assert (audit.epsilon_at_least, audit.epsilon_claimed) == (None, None)
    assert bound_sentences([audit]) == []
    assert bound_note([audit]) == ""

"""A person with several records where the unit is a record: their ε, and the ceiling that a steward puts on it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from audits.tiny_site import OneSite, clinic
from fedveil.cli.main import app
from fedveil.client.ledger import ledger as ledgers
from fedveil.client.ledger.ledger import Ledger
from fedveil.client.ledger.rows import Charge
from fedveil.common.errors import ConfigError
from fedveil.deploy import doctor
from fedveil.deploy.site_folder import make_site, node_settings
from fedveil.privacy.accounting import Release, epsilon, gaussian_release
from fedveil.privacy.events import Event, SummedGaussian
from fedveil.privacy.figures import epsilon_text
from fedveil.privacy.meaning import MOST_UNITS, epsilon_of_several
from fedveil.privacy.privacy_filter import commitment_to, price_of_several

DELTA = 1e-3


@pytest.fixture
def site(toy_settings: dict[str, Any], tmp_path: Path) -> OneSite:
    return clinic({**toy_settings, "privacy.epsilon": 500.0, "privacy.delta": DELTA}, tmp_path)


def test_epsilon_of_several_is_that_of_the_closed_form_and_never_below_one_record_s() -> None:
    """``test_meaning`` holds sampled ones against a second method."""
    releases = [gaussian_release(2.0, 0.25, 2)]
    assert epsilon(releases, DELTA) <= epsilon_of_several(releases, 1, DELTA) < epsilon(releases, DELTA) + 0.02
    at_once, threefold = gaussian_release(6.0, 1.0, 1), gaussian_release(2.0, 1.0, 1)
    assert epsilon_of_several([at_once], 3, DELTA) == pytest.approx(epsilon([threefold], DELTA), rel=0.01)
    assert epsilon_of_several([], 3, DELTA) == 0.0
    assert epsilon_of_several([gaussian_release(0.05, 0.5, 3)], 3, DELTA) == float("inf"), "what has no price is free"
    for units in (0, MOST_UNITS + 1):
        with pytest.raises(ConfigError, match="units"):
            epsilon_of_several(releases, units, DELTA)


def of_person(releases: list[Release], units: int, delta: float) -> float:
    """Return what a ledger says of a person in releases that were planned."""
    return price_of_several(releases, commitment_to(releases, []), units, delta)


def test_a_round_that_costs_a_person_too_much_is_refused_before_a_record_is_used(
    site: OneSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = [gaussian_release(2.0, 0.25, 2)], [gaussian_release(2.0, 0.25, 4)]
    once, twice = (of_person(releases, 3, DELTA) for releases in rounds)
    site.rule(records_per_person=3, epsilon_person=(once + twice) / 2)
    site.train(1)
    refused = site.refuse(2)
    assert refused.kind == "budget"
    assert "a person with 3 records would have more than the policy's epsilon-person" in refused.reason
    assert epsilon(rounds[1], DELTA) < once, "the budget of a record would have refused it"
    with Ledger(site.ledger) as ledger:
        assert ledger.epsilon_of_person("clinic", 3, DELTA) == once
    # The planted fault: a person's ε is taken for a record's.
    monkeypatch.setattr(
        ledgers.privacy_filter, "price_of_several", lambda spent, plan, units, delta: epsilon(spent, delta)
    )
    site.train(2)


def test_the_ceiling_is_on_a_charge_to_another_name_too(site: OneSite) -> None:
    """Records that both names hold have the history of both."""
    once = of_person([gaussian_release(2.0, 0.25, 2)], 3, DELTA)
    site.train(1)
    site.node["dataset-id"] = "other"
    site.rule(records_per_person=3, epsilon_person=1.01 * once)
    assert "epsilon-person" in site.refuse(1, "second").reason


def test_the_doctor_and_the_ledger_show_what_a_person_with_the_most_records_has(site: OneSite, tmp_path: Path) -> None:
    site.train(1)
    spent = of_person([gaussian_release(2.0, 0.25, 2)], 3, DELTA)
    shown = CliRunner().invoke(app, ["ledger", "show", str(site.ledger), "--records-per-person", "3"])
    assert shown.exit_code == 0, shown.output
    assert f"; of a person with 3 records: {epsilon_text(spent, decimals=4)}" in shown.output
    assert "of a person" not in CliRunner().invoke(app, ["ledger", "show", str(site.ledger)]).output
    text = (tmp_path / "policy.toml").read_text(encoding="utf-8")
    folder = make_site(tmp_path / "folder", "clinic", "localhost", policy=text, node='data="x.csv" public-size=50')
    (finding,) = doctor._persons(folder)
    assert (finding.ok, "with records-per-person in the policy" in finding.found) == (True, True)
    folder.ledger.parent.mkdir(exist_ok=True)
    folder.ledger.write_bytes(site.ledger.read_bytes())
    for ceiling, holds in ((0.01, False), (400.0, True)):
        rules = f"records-per-person = 3\nepsilon-person = {ceiling}\n"
        Path(str(node_settings(folder)["policy"])).write_text(rules + text, encoding="utf-8")
        (finding,) = doctor._persons(folder)
        assert finding.ok is holds
        assert (
            finding.found
            == f"a person with 3 records in clinic has ε {epsilon_text(spent)} at δ 0.001, of at most {ceiling:g}"
        )
    other = tmp_path / "other.sqlite"
    folder.ledger.rename(other)
    (finding,) = doctor._persons(dataclasses.replace(folder, node=f'{folder.node} ledger="{other}"'))
    assert f"has ε {epsilon_text(spent)} " in finding.found, "another ledger is looked at than rounds are charged to"


def test_the_doctor_says_on_how_many_honest_sites_a_person_s_epsilon_counts(tmp_path: Path) -> None:
    text = f"epsilon = 500\ndelta = {DELTA}\nrecords-per-person = 3\n"
    folder = make_site(tmp_path / "folder", "clinic", "localhost", policy=text, node='data="x.csv" public-size=50')
    figures = {**gaussian_release(2.0, 0.25, 1).event.figures, "honest_sites": 2.0}
    release = Release(Event(SummedGaussian.name, figures), 2)
    folder.ledger.parent.mkdir(exist_ok=True)
    with Ledger(folder.ledger) as ledger:
        ledger.charge(Charge("clinic", "run", 1, (release,), DELTA, 500.0))
    (finding,) = doctor._persons(folder)
    spent = of_person([release], 3, DELTA)
    assert finding.found.startswith(
        f"a person with 3 records in clinic has ε {epsilon_text(spent)} at δ 0.001 (h = 2); epsilon-person"
    )

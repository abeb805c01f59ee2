"""Persons in policy, ledger and reports."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from persons_world import BY_PERSON, example, persons_of

from audits.tiny_site import OneSite
from fedveil.client.budget import evaluation_releases
from fedveil.client.ledger.ledger import Ledger
from fedveil.client.ledger.record_hashes import record_hashes
from fedveil.client.policy import Policy
from fedveil.client.site import Site, own_settings
from fedveil.client.timing import Timing, most_drawn
from fedveil.common.data.sources import train_and_test
from fedveil.common.errors import ConfigError, PolicyRefusal, PrivacyError
from fedveil.common.run_lines import PrivacyLine, read_lines
from fedveil.common.tasks.examples import Dataset
from fedveil.deploy.site_check import check_site
from fedveil.deploy.site_folder import SiteFolder
from fedveil.experiments.in_process import run_in_process
from fedveil.privacy import MECHANISMS
from fedveil.privacy.accounting import Release
from fedveil.privacy.privacy_filter import promised
from fedveil.privacy.units import PERSON
from fedveil.reports import markdown_report
from fedveil.strategies.job import configure


def test_no_noised_count_is_of_persons() -> None:
    """One person moves a count of records by more than the clip that it is priced with."""
    here = Site("ward", Dataset("ward", (), ("bad", "good")), "ward", 100, Path(), Policy(send_noised_metrics=True))
    assert evaluation_releases(configure({}), here, 1)
    assert evaluation_releases(configure(BY_PERSON), here, 1) == []


def test_size_divisor_and_delta_count_persons(site: OneSite) -> None:
    row = MECHANISMS["dp-sgd"].of_unit("person")
    config = configure(site.settings).config
    made = row.plan(config.privacy, config.training, 4, 40)
    assert (made.unit, made.expected_batch_size) == (PERSON, 10.0)
    with pytest.raises(PrivacyError, match="above 1/2000"):
        row.plan(config.privacy, config.training, 4, 2000)


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"unit": None, "person": None}, "unit = 'record'; the run asks for privacy.unit = 'person'"),
        ({"unit": "person", "person": "label"}, "person = 'label'; the run asks for data.person = 'author'"),
        ({"unit": "person", "person": "author", "records_per_person": 7}, "records-per-person = 7; the run asks for"),
    ],
)
def test_a_run_is_held_to_the_stewards_unit_column_and_bound(site: OneSite, rules: dict[str, Any], words: str) -> None:
    site.rule(**rules)
    refused = site.refuse()
    assert refused.kind == "policy"
    assert words in refused.reason


def test_a_run_by_record_is_refused_where_the_steward_protects_persons(site: OneSite) -> None:
    site.settings |= {"privacy.unit": "record", "data.person": ""}
    assert "unit = 'person'; the run asks for privacy.unit = 'record'" in site.refuse().reason


def test_a_steward_who_protects_persons_does_so_in_public_records_too() -> None:
    policy = Policy(unit="person", person="author")
    policy.check_job(configure(BY_PERSON), private=False)
    with pytest.raises(PolicyRefusal, match="unit = 'person'; the run asks for"):
        policy.check_job(configure({}), private=False)


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"unit": "person"}, "person names no column"),
        ({"person": "author"}, "person is for unit 'person'"),
        ({"records_per_person": 1001}, "records-per-person must be above 0 and at most 1000"),
        ({"epsilon_person": 9.0}, "epsilon-person is for unit 'record' and needs records-per-person"),
        ({"records_per_person": 4, "epsilon_person": 0.0}, "epsilon-person must be above 0"),
        (
            {"unit": "person", "person": "a", "records_per_person": 4, "epsilon_person": 9.0},
            "epsilon-person is for unit 'record'",
        ),
        ({"unit": "persons"}, "did you mean 'person'"),
        ({"unit": "person", "person": "a", "records_per_person": 0}, "records-per-person must be above 0"),
    ],
)
def test_a_policy_that_contradicts_itself_is_an_error(rules: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Policy(**rules)


def test_the_ledger_charges_a_person_and_refuses_another_unit_under_any_name(site: OneSite) -> None:
    spending = site.train().spending
    assert spending is not None
    with Ledger(site.ledger) as ledger:
        assert {entry.unit for entry in ledger.entries()} == {"person"}
        (entry,) = ledger.entries()
        assert (
            ledger.epsilon("clinic", 1e-3)
            == promised([Release(entry.event, entry.count)], 1e-3)[0]
            == spending.epsilon_total
        )
    site.rule(dataset_id="other-name")
    site.settings |= {"privacy.unit": "record", "data.person": ""}
    assert "another unit than one record" in site.refuse(run="2").reason


def test_a_data_set_known_by_record_is_found_by_person(site: OneSite) -> None:
    site.rule()
    site.settings |= {"privacy.unit": "record", "data.person": ""}
    site.train()
    site.rule(dataset_id="by-person", unit="person", person="author")
    site.settings |= BY_PERSON
    assert "another unit than one person" in site.refuse(run="2").reason


def test_other_records_of_a_person_are_known_again() -> None:
    first = Dataset("first", (example("one", "x", b"1"), example("two", "y", b"2")), ("a", "b"))
    other = Dataset("other", (example("three", "x", b"3"),), ("a", "b"))
    stranger = Dataset("stranger", (example("three", "z", b"3"),), ("a", "b"))
    key = bytes(32)
    assert record_hashes(first, key) & record_hashes(other, key)
    assert not record_hashes(first, key) & record_hashes(stranger, key)
    assert record_hashes(other, key) & record_hashes(stranger, key), "rows are known by any person"


def test_what_runs_by_record_leave_unknown_of_a_person_is_in_the_claim() -> None:
    by_record = Dataset("first", (example("one", "", b"1"),), ("a", "b"))
    by_person = Dataset("other", (example("three", "x", b"3"),), ("a", "b"))
    assert not record_hashes(by_record, bytes(32)) & record_hashes(by_person, bytes(32))
    said = MECHANISMS["dp-sgd"].of_unit("person").claim.leaves_out
    assert [text for text in said if "runs by record" in text and "remember no persons" in text]


def test_a_site_reads_the_column_of_persons_for_that_unit_or_its_steward_alone(toy_settings: dict[str, Any]) -> None:
    by_record = configure({**toy_settings, "data.person": "author"}).config
    assert own_settings(by_record, Policy()).person == ""
    assert own_settings(configure({**toy_settings, **BY_PERSON}).config, Policy()).person == "author"
    assert own_settings(by_record, Policy(unit="person", person="patient")).person == "patient"


def other_rows(site: OneSite) -> str:
    """Return a file with other rows of the same seven authors."""
    own = Path(str(site.node["data"]))
    with own.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    other = own.with_name("other.csv")
    with other.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows({**row, "text": f"{row['text']} again"} for row in rows)
    return str(other)


def test_persons_that_a_run_without_privacy_released_are_known_by_another_name(site: OneSite) -> None:
    protected = {"unit": "person", "person": "author", "allow_no_privacy": True}
    private = dict(site.settings)
    site.rule(dataset_id="ward", **protected)
    site.settings |= {"privacy.mode": "none", "privacy.unit": "record", "data.person": ""}
    site.train(run="open")
    site.settings, site.node["data"] = private, other_rows(site)
    site.rule(dataset_id="lab", **protected)
    assert "were released without privacy before" in site.refuse(run="2").reason


def test_a_run_without_privacy_gets_no_other_rows_of_persons_that_were_withdrawn(site: OneSite) -> None:
    site.rule(dataset_id="ward", unit="person", person="author")
    site.train()
    with Ledger(site.ledger) as ledger:
        ledger.holds.withdraw("ward", "asked for")
    site.node["data"] = other_rows(site)
    site.rule(dataset_id="lab", unit="person", person="author", allow_no_privacy=True)
    site.settings |= {"privacy.mode": "none", "privacy.unit": "record", "data.person": ""}
    assert "are released no more" in site.refuse(run="open").reason


def folder_of(site: OneSite, folder: Path) -> SiteFolder:
    node = {key: f'"{value}"' if isinstance(value, str) else value for key, value in site.node.items()}
    return SiteFolder(folder, "clinic", "host:1", node=" ".join(f"{key}={value}" for key, value in node.items()))


def test_a_steward_hears_how_many_persons_there_are(site: OneSite, tmp_path: Path) -> None:
    said: list[str] = []
    check_site(folder_of(site, tmp_path), said.append)
    assert "persons: 7, with 6 records in the middle and 6 at most" in said
    assert any("public-size: 50 declared, 7 persons found" in line for line in said)


def test_a_check_counts_persons_against_the_size_that_the_node_declares(site: OneSite, tmp_path: Path) -> None:
    site.rule(unit="person", person="author", reply_after=600.0)
    site.node["public-size"] = 7
    check_site(folder_of(site, tmp_path), print)  # of 40 records
    site.node["public-size"] = 6
    with pytest.raises(ConfigError, match="there are 7 persons and public-size is 6"):
        check_site(folder_of(site, tmp_path), print)


# --- time -------------------------------------------------------------------------------------------------------------
def test_the_worst_round_has_all_records_of_the_most_persons_and_passes_anew_for_so_many() -> None:
    timing = Timing({8: 1.0, 16: 2.0}, {8: 4, 16: 2}, 0.5, 0.0)
    most = most_drawn(3.0)
    by_record = timing.worst(1, 3.0, 0)
    assert timing.worst(1, 3.0, 0, each=5) - by_record == pytest.approx(4 * most * 1.0)
    halved = timing.worst(1, 3.0, 0, each=5, at_once=(most + 1) // 2)
    assert halved - timing.worst(1, 3.0, 0, each=5) == pytest.approx(3.0)


# --- a whole run ------------------------------------------------------------------------------------------------------
def named_authors(path: Path) -> tuple[Path, set[str]]:
    """Return a copy of a table whose authors have names that are nothing else, and these names."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    copy = path.with_name("named.csv")
    with copy.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        for i, row in enumerate(rows):
            writer.writerow({**row, "author": f"Zaphod{i % 21}Q"})
    return copy, {f"Zaphod{i}Q" for i in range(21)}


@pytest.mark.parametrize("mode", ["dp-sgd", "secure-sum"])
def test_a_run_by_person_claims_counts_and_charges_persons_and_names_none(
    toy_settings: dict[str, Any], mode: str
) -> None:
    data, names = named_authors(Path(toy_settings["data.name"]))
    summed_alone = {"training.local-steps": 1, "training.optimizer": "sgd", "privacy.honest-sites": 2}
    settings = {
        **toy_settings,
        **BY_PERSON,
        "data.name": str(data),
        "privacy.mode": mode,
        "privacy.noise-multiplier": 2.0,
        **(summed_alone if mode == "secure-sum" else {}),
    }
    folder = run_in_process(settings, 3)
    lines = read_lines(PrivacyLine, folder)
    sizes = {line.site: line.public_size for line in lines}
    train = train_and_test(configure(settings).config.data, "classification")[0]
    assert sum(sizes.values()) == len(persons_of(train)) < 21
    assert {line.unit for line in lines} == {PERSON.what}
    for ledger in sorted((folder / "ledgers").glob("*.sqlite")):
        with Ledger(ledger) as held:
            assert {entry.unit for entry in held.entries()} == {"person"}
    report = markdown_report(folder)
    assert "differentially private for all training records of one person at one site" in report
    assert ("a person with records at several sites has the sum" in report) == (mode == "dp-sgd")
    assert ("a person with records at k sites of a sum is k persons of that sum" in report) == (mode == "secure-sum")
    assert ("A person at several sites of one sum has a larger ε" in report) == (mode == "secure-sum")
    assert "asks whether one person was trained on" in report
    assert "persons at one site" not in report
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            assert not [name for name in names if name.encode() in content], f"{path.name} names a person"

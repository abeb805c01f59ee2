"""The record for the registry of deployments: valid, as its claim is, and honest about what nobody has declared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator
from made_run import DELTA, MadeRun
from test_card import fedveil, with_adapter

from common.errors import ConfigError
from common.privacy import MECHANISMS
from common.privacy.accounting import gaussian_release
from common.run_lines import AuditFile, Finding
from reports import report_of
from reports.audits import audit_reports
from reports.declared import Declared, declare, read_declared
from reports.registry import BY_SERVER, BY_SITES, NOISED, SCHEMA_COMMIT, UNSTATED, registry_record

UPSTREAM = "057e5d81cf60150dd3307e0cf4504b957802fb3b"
"""Commit of github.com/opendp/deployments-registry-data. Its tests/good_deployments/template.yaml, the record that has
every field, has the SHA-256 eb5eae08588de79851b0379171f91782ddde3eadec6262c19f3e1f59b91c51ec."""
FIELDS_SHA256 = "3afa9bad142b674124a59deca1efd7eab706b6a9ea22b3d0981d9f6bade55dde"
"""Of the paths of that template's fields, sorted, a line each; what is in ``evidence_sources`` is free."""
SCHEMA = yaml.safe_load((Path(__file__).parent / "registry-schema.yaml").read_text(encoding="utf-8"))
ANSWERS = {
    "name": "Reviews, judged",
    "curators": "North Clinic; South Ward",
    "curator-type": "Nonprofit",
    "region": "Norway",
    "sector": "Healthcare",
    "report-url": "https://clinic.example/run-7/report.html",
    "published": "2026-11-26",
    "authors": "A. Author",
    "tuning": "None.",
    "intended-use": "To sort reviews.",
    "description": "A judge of reviews.",
    "justification": "Agreed by all.",
}


def faults(record: Any) -> list[str]:
    """Return what the registry's own check finds."""
    checked = Draft7Validator(SCHEMA, format_checker=Draft7Validator.FORMAT_CHECKER)
    return [error.message for error in checked.iter_errors(record)]


def fields(node: Any, path: str = "") -> Iterator[str]:
    """Yield the path of every field of a schema."""
    yield path
    for name, inner in node.get("properties", {}).items():
        yield from fields(inner, f"{path}/{name}")


def test_the_schema_has_the_fields_of_the_registrys_template() -> None:
    assert hashlib.sha256("\n".join(sorted(fields(SCHEMA))).encode()).hexdigest() == FIELDS_SHA256
    root = Path(__file__).parent
    for place in (root / "registry-schema.yaml", root.parent / "docs" / "serve.md"):
        assert UPSTREAM in place.read_text(encoding="utf-8"), f"{place} does not say what it was read from"
    assert SCHEMA_COMMIT == UPSTREAM


@pytest.fixture
def made(tmp_path: Path) -> MadeRun:
    """A finished run of two sites."""
    return with_adapter(MadeRun(tmp_path / "run", {"rounds": 1}, noise={"north": 0.8}).start().round(1, 0.76).end())


@pytest.mark.parametrize("answers", [{}, ANSWERS], ids=["nothing declared", "all declared"])
def test_a_record_is_valid_and_states_the_runs_claim(made: MadeRun, answers: dict[str, str]) -> None:
    declare(made.folder, answers)
    data = report_of(made.folder)
    record = yaml.safe_load(registry_record(data, read_declared(made.folder)))
    # None of the three kinds of publishers says that nobody has told which.
    assert faults(record) == ([] if answers else ["'data_curator_type' is a required property"])
    told = record["deployment"]
    figures = told["privacy_loss"]["privacy_parameters"]
    assert data.headline.epsilon is not None
    assert data.headline.epsilon <= figures["epsilon"] <= data.headline.epsilon + 1e-3, "ε is rounded down"
    assert figures["delta"] == DELTA
    assert told["privacy_loss"]["privacy_unit"] == "Record-level"
    assert told["deployment_model"]["model_name"] == "Federated"
    assert told["privacy_loss"]["number_of_privacy_units"] == 3500
    assert told["administrative"]["status"] == "Draft"
    source = told["administrative"]["evidence_sources"]["report"]["misc"]
    assert source.get("url", "") == answers.get("report-url", "")
    assert "76.0 % after" in told["implementation"]["utility"]
    assert "noise multiplier 0.8, 1.2" in told["implementation"]["mechanisms"]
    assert "finds at most" in told["privacy_loss"]["privacy_parameters_details"]
    unstated = str(record).count(UNSTATED)
    assert (unstated == 0) == bool(answers), "an answer that nobody gave is made up, or one that was given is left out"


def test_a_record_says_whom_to_trust_which_unit_and_which_site_is_worst(made: MadeRun) -> None:
    data = report_of(made.folder)
    results = audit_reports(
        {"audit.json": AuditFile(False, "", {}, [Finding("canaries", "as it is", False, False, {})])}, []
    )
    told = yaml.safe_load(registry_record(replace(data, audit_results=results), Declared()))["deployment"]
    model, loss = told["deployment_model"], told["privacy_loss"]
    for name, lines in (
        ("trust_assumptions", [f"- {actor.who}: trusted {actor.trusted}" for actor in data.actors]),
        ("actors", [f"- {actor.who} sees {actor.sees}" for actor in data.actors]),
    ):
        assert model[name].splitlines() == lines
    assert (model["model_name_details"], model["release_type_details"]) == (NOISED["at the site"], BY_SITES)
    assert model["release_type"] == "One release"
    own = MECHANISMS["dp-sgd"].claim
    assert loss["privacy_unit_details"] == f"{own.unit}; neighbours: {own.adjacency}."
    assert "over all rounds; site north\n" in loss["privacy_parameters_details"], "south has more noise"
    assert f"sampling: {own.sampler}" in told["implementation"]["mechanisms"]
    assert told["dp_variant"]["unprotected_quantities"].splitlines() == [f"- {item}" for item in data.unprotected]
    assert "canaries: FAILED" in told["administrative"]["evidence_sources"]["report"]["misc"]["note"]
    untold = replace(data, sites=[replace(data.sites[0], public_size=None), *data.sites[1:]])
    loss = yaml.safe_load(registry_record(untold, Declared()))["deployment"]["privacy_loss"]
    assert "number_of_privacy_units" not in loss, "a part of the records is said to be all"


def test_a_field_that_is_missing_misspelt_or_of_another_word_is_found(made: MadeRun) -> None:
    """The schema can fail."""
    text = registry_record(report_of(made.folder), Declared(curator_type="Nonprofit"))
    for change in (
        lambda deployment: deployment["basic"].update(publication_date="1/1/2026"),
        lambda deployment: deployment["basic"]["data_curators"][0].update(data_curator_type="Company"),
        lambda deployment: deployment["administrative"].pop("status"),
        lambda deployment: deployment.update(accounting={"composition": "elsewhere"}),
        lambda deployment: deployment["administrative"]["evidence_sources"]["report"]["misc"].update(link="x"),
        lambda deployment: deployment["basic"].pop("name"),
        lambda deployment: deployment["dp_variant"].update(flavor="Approximate DP"),
        lambda deployment: deployment["deployment_model"].update(model_name="Decentral"),
        lambda deployment: deployment["privacy_loss"]["privacy_parameters"].update(epsilon="8"),
    ):
        record = yaml.safe_load(text)
        change(record["deployment"])
        assert len(faults(record)) == 1


def test_the_command_writes_it_and_asks_what_is_open(made: MadeRun) -> None:
    code, said = fedveil("report", made.folder, "--registry", "--declare", 'curators="North Clinic"')
    assert code == 0, said
    assert "not declared: intended-use: What is the model for?" in said
    assert "not declared: curators" not in said
    assert (
        "not declared: curator-type: What kind of publisher is that? Government, Industry or Nonprofit; the regi"
        in said
    )
    record = yaml.safe_load((made.folder / "deployment.yaml").read_text(encoding="utf-8"))
    assert record["deployment"]["basic"]["data_curators"] == [{"data_curator_name": "North Clinic"}]


def test_a_run_without_a_finite_claim_is_no_deployment_of_that_kind(tmp_path: Path) -> None:
    off = MadeRun(tmp_path / "off", {"privacy.mode": "none", "rounds": 1}).start().round(1, 0.8).end()
    exposed = MadeRun(tmp_path / "exposed", {"rounds": 1}, sites={"north": 10}).start().round(1, 0.8).end()
    lines = exposed.lines("privacy.jsonl")
    lines[0]["epsilon_total"] = "inf"
    (exposed.folder / "privacy.jsonl").write_text(json.dumps(lines[0]) + "\n")
    for run in (off, exposed):
        code, said = fedveil("report", run.folder, "--registry")
        assert (code, "makes no finite privacy claim" in said) == (1, True)
        assert not (run.folder / "deployment.yaml").exists()


def test_a_site_with_earlier_runs_is_one_of_many_releases(tmp_path: Path) -> None:
    earlier = {"north": [gaussian_release(1.0, 0.05, 20)]}
    run = MadeRun(tmp_path / "run", {"rounds": 1}, sites={"north": 2000}, earlier=earlier).start().round(1, 0.7).end()
    record = yaml.safe_load(registry_record(report_of(run.folder), Declared(curator_type="Industry")))
    assert record["deployment"]["deployment_model"]["release_type"] == "Many releases"
    assert faults(record) == []


def test_foreign_names_do_not_become_yaml(tmp_path: Path) -> None:
    hostile = "a: b\n- [c\x1b"
    settings = {"rounds": 1, "data.name": str(tmp_path / "patients.csv")}
    run = MadeRun(tmp_path / "run", settings, sites={hostile: 100}).start().round(1, 0.7).end()
    text = registry_record(report_of(run.folder), Declared(name="x: {y", curator_type="Government"))
    assert faults(yaml.safe_load(text)) == []
    assert "\x1b" not in text
    assert str(tmp_path) not in text, "the record tells where the coordinator's files lie"
    assert "cut from the same source" in text


def test_a_trusted_server_is_the_central_model(made: MadeRun) -> None:
    """Noise is added by somebody who sees what sites send without it, wherever the records lie."""
    data = report_of(made.folder)
    central = replace(data, claim=replace(data.claim, privacy_mode="client-level", per="site"))
    record = yaml.safe_load(registry_record(central, Declared(curator_type="Industry")))
    model = record["deployment"]["deployment_model"]
    assert model["model_name"] == "Central"
    assert (model["model_name_details"], model["release_type_details"]) == (NOISED["at the server"], BY_SERVER)
    details = record["deployment"]["privacy_loss"]["privacy_parameters_details"]
    assert details.startswith("- of every site of the cohort, over all rounds\n"), "a site is named"
    assert faults(record) == []


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"curator-type": "Company"}, "curator-type"),
        ({"report-url": "ftp://x"}, "write an address"),
        ({"report-url": "http://clinic.example/run-7"}, "write an address"),
        ({"report-url": "https://x (y)"}, "write an address"),
        ({"report-url": "https://x> <script>"}, "write an address"),
        ({"published": "20261126"}, "write a date as YYYY-MM-DD"),
        ({"published": "2026-13-01"}, "write a date as YYYY-MM-DD"),
        ({"base-training-flop": "0"}, "write a number above 0"),
    ],
)
def test_an_answer_that_the_registry_cannot_hold_is_refused_in_one_line(
    made: MadeRun, answer: dict[str, str], words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        declare(made.folder, answer)
    assert "\n" not in str(refused.value)

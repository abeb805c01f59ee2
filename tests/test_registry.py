"""The record for the registry of deployments: valid, as its claim is, and honest about what nobody has declared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from made_run import DELTA, MadeRun
from test_card import fedveil, with_adapter

from common.privacy.accounting import gaussian_release
from reports import report_of
from reports.declared import Declared, declare, read_declared
from reports.registry import UNSTATED, registry_record

SCHEMA = yaml.safe_load((Path(__file__).parent / "registry-schema.yaml").read_text(encoding="utf-8"))
ANSWERS = {
    "name": "Reviews, judged",
    "curators": "North Clinic; South Ward",
    "curator-type": "Nonprofit",
    "region": "Norway",
    "sector": "Healthcare",
    "published": "2026-11-26",
    "authors": "A. Author",
    "tuning": "None.",
    "intended-use": "To sort reviews.",
    "description": "A judge of reviews.",
    "justification": "Agreed by all.",
}


def faults(record: Any) -> list[str]:
    return [error.message for error in Draft202012Validator(SCHEMA).iter_errors(record)]


@pytest.fixture
def made(tmp_path: Path) -> MadeRun:
    """A finished run of two sites."""
    return with_adapter(MadeRun(tmp_path / "run", {"rounds": 1}, noise={"north": 0.8}).start().round(1, 0.76).end())


@pytest.mark.parametrize("answers", [{}, ANSWERS], ids=["nothing declared", "all declared"])
def test_a_record_is_valid_and_states_the_runs_claim(made: MadeRun, answers: dict[str, str]) -> None:
    declare(made.folder, answers)
    data = report_of(made.folder)
    record = yaml.safe_load(registry_record(data, read_declared(made.folder)))
    assert faults(record) == []
    told = record["deployment"]
    figures = told["privacy_loss"]["privacy_parameters"]
    assert data.headline.epsilon is not None
    assert data.headline.epsilon <= figures["epsilon"] <= data.headline.epsilon + 1e-3, "ε is rounded down"
    assert figures["delta"] == DELTA
    assert told["privacy_loss"]["privacy_unit"] == "Record-level"
    assert told["deployment_model"]["model_name"] == "Federated"
    assert "noise multiplier 0.8, 1.2" in told["implementation"]["mechanisms"]
    assert "finds at most" in told["privacy_loss"]["privacy_parameters_details"]
    unstated = str(record).count(UNSTATED)
    assert (unstated == 0) == bool(answers), "an answer that nobody gave is made up, or one that was given is left out"


def test_a_field_that_is_missing_misspelt_or_of_another_word_is_found(made: MadeRun) -> None:
    """The schema can fail."""
    text = registry_record(report_of(made.folder), Declared())
    for change in (
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
    record = yaml.safe_load(registry_record(report_of(run.folder), Declared()))
    assert record["deployment"]["deployment_model"]["release_type"] == "Many releases"
    assert faults(record) == []


def test_foreign_names_do_not_become_yaml(tmp_path: Path) -> None:
    hostile = "a: b\n- [c\x1b"
    settings = {"rounds": 1, "data.name": str(tmp_path / "patients.csv")}
    run = MadeRun(tmp_path / "run", settings, sites={hostile: 100}).start().round(1, 0.7).end()
    text = registry_record(report_of(run.folder), Declared(name="x: {y"))
    assert faults(yaml.safe_load(text)) == []
    assert "\x1b" not in text
    assert str(tmp_path) not in text, "the record tells where the coordinator's files lie"
    assert "cut from the same source" in text

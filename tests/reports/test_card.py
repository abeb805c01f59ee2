"""The model card: what the hub reads, the claim in the report's words, hashes, and what nobody has declared."""

from __future__ import annotations

import ast
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from carded_runs import with_adapter
from huggingface_hub import ModelCard
from made_run import MadeRun
from typer.testing import CliRunner

from fedveil.cli.main import app
from fedveil.common.bundle import own_digest
from fedveil.common.errors import ConfigError
from fedveil.common.model.base import load_base_model
from fedveil.common.model.named import NAMED_MODELS
from fedveil.common.other_runs import TuningFile
from fedveil.experiments.in_process import run_in_process
from fedveil.experiments.serving.merge import merge_run
from fedveil.privacy import MECHANISMS
from fedveil.reports import report_of, write_reports
from fedveil.reports.card import Form, adapter_form, card_of
from fedveil.reports.claim import COVERED, NOT_COVERED
from fedveil.reports.data import NO_BOUND
from fedveil.reports.declared import Declared, declare, read_declared
from fedveil.reports.markdown import plain

pytestmark = pytest.mark.rough_prices


def fedveil(*words: Any) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(word) for word in words])
    return done.exit_code, done.output


@pytest.fixture
def made(tmp_path: Path) -> MadeRun:
    """A finished run with an adapter."""
    return with_adapter(MadeRun(tmp_path / "run", {"rounds": 1}).start().round(1, 0.76).end())


def card(run: MadeRun) -> str:
    write_reports(run.folder)
    return (run.folder / "adapter" / "README.md").read_text(encoding="utf-8")


def test_the_card_of_an_adapter_says_what_the_hub_and_people_ask(made: MadeRun) -> None:
    text, data = card(made), report_of(made.folder)
    read = ModelCard(text).data.to_dict()
    assert read["base_model"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert (read["base_model_relation"], read["library_name"], read["license"]) == ("adapter", "peft", "unknown")
    assert "pipeline_tag" not in read, "no pipeline computes what adapter and head do together"
    assert ModelCard(text).data.eval_results[0].metric_value == 0.76
    private = read["differential_privacy"]
    assert data.headline.epsilon is not None
    assert data.headline.epsilon <= private["epsilon"] <= data.headline.epsilon + 1e-3, "ε is rounded down"
    assert (private["delta"], private["unit"]) == (data.headline.delta, data.claim.unit)
    for words in (data.claim.sentence, "finds at most", "A person with several records", "69.5 %", "76.0 %"):
        assert words in text, f"the card does not say {words!r}"
    for words in data.claim.not_covered:
        assert words.split(",", maxsplit=1)[0] in text
    assert "This model: not declared" in text


def test_the_card_states_each_part_of_the_claim_under_its_own_name(made: MadeRun) -> None:
    text, claim, own = card(made), report_of(made.folder).claim, MECHANISMS["dp-sgd"].claim
    assert (claim.unit, claim.neighbours, claim.adversary) == (own.unit, own.adjacency, own.adversary)
    assert (claim.sampler, claim.privacy_mode, claim.covered) == (own.sampler, "dp-sgd", list(COVERED))
    assert claim.not_covered == [*own.leaves_out, *NOT_COVERED]
    assert "PLD" in claim.accountant
    private = ModelCard(text).data.to_dict()["differential_privacy"]
    parts = {"unit": own.unit, "neighbours": own.adjacency, "adversary": own.adversary}
    parts |= {"mechanism": "dp-sgd", "accountant": claim.accountant}
    assert {name: value for name, value in private.items() if name not in ("epsilon", "delta")} == parts
    names = {"Unit": own.unit, "Neighbours": own.adjacency, "Adversary": own.adversary, "Sampling": own.sampler}
    for name, said in names.items():
        assert f"- {name}: {plain(said)}\n" in text
    assert "The sites declare 3,500 in all, from 1,500 to 2,000 per site." in text
    assert 'PeftModel.from_pretrained(model, "adapter")' in text
    assert "The classification head lies beside it" in text
    for name in ("adapter_config.json", "head.safetensors"):
        (made.folder / "adapter" / name).unlink()
    text = card(made)
    assert "PeftModel" not in text
    assert "The classification head lies beside it" not in text


def test_the_price_of_all_trials_stands_in_the_card(made: MadeRun) -> None:
    data = replace(report_of(made.folder), tuning=TuningFile(3, True, 5.2, 1e-6))
    private = ModelCard(card_of(data, Declared(), adapter_form(data), b"")).data.to_dict()["differential_privacy"]
    assert (private["trials"], private["epsilon_all_trials"], private["delta_all_trials"]) == (3, 5.2, 1e-6)


def test_what_stands_against_a_claim_is_in_the_card(made: MadeRun) -> None:
    data = report_of(made.folder)
    against = ("a problem of the files", "a gap of the claim")
    told = replace(data, problems=[against[0]], claim=replace(data.claim, gaps=[against[1]]), meaning=None)
    text = card_of(told, Declared(), adapter_form(told), b"")
    assert [words for words in (*against, NO_BOUND) if words not in text] == []


def test_the_cards_hashes_are_those_of_the_files(made: MadeRun) -> None:
    text = card(made)
    named = {line.split("`")[1]: line.split("`")[-2] for line in text.splitlines() if line.startswith("| `adapter")}
    assert set(named) == {"adapter_config.json", "adapter_model.safetensors"}
    for name, digest in named.items():
        assert hashlib.sha256((made.folder / "adapter" / name).read_bytes()).hexdigest() == digest
    assert hashlib.sha256((made.folder / "report.json").read_bytes()).hexdigest() in text
    assert all(digest in text for digest in ("ab" * 32, "cd" * 32))
    assert write_reports(made.folder)
    assert card(made) == text, "the same folder gives another card"


def test_a_run_without_privacy_and_one_after_an_exposure_claim_nothing(tmp_path: Path) -> None:
    off = with_adapter(MadeRun(tmp_path / "off", {"privacy.mode": "none", "rounds": 1}).start().round(1, 0.8).end())
    text = card(off)
    assert "Privacy was OFF" in text
    assert ModelCard(text).data.to_dict()["differential_privacy"] == {"claim": "none"}
    exposed = with_adapter(
        MadeRun(tmp_path / "exposed", {"rounds": 1}, sites={"north": 10}).start().round(1, 0.8).end()
    )
    lines = exposed.lines("privacy.jsonl")
    lines[0]["epsilon_total"] = "inf"
    (exposed.folder / "privacy.jsonl").write_text(json.dumps(lines[0]) + "\n")
    text = card(exposed)
    assert "ε is ∞" in text
    assert ModelCard(text).data.to_dict()["differential_privacy"]["epsilon"] == float("inf")


def test_a_declaration_is_quoted_kept_and_checked(made: MadeRun) -> None:
    code, said = fedveil("report", made.folder, "--declare", 'license="apache-2.0" base-license="mit"')
    assert code == 0, said
    text = (made.folder / "adapter" / "README.md").read_text(encoding="utf-8")
    assert ModelCard(text).data.to_dict()["license"] == "apache-2.0"
    assert "The base model: mit." in text
    assert fedveil("report", made.folder, "--declare", "intended-use='To judge \"reviews\"; ☃'")[0] == 0
    wanted = Declared(license="apache-2.0", base_license="mit", intended_use='To judge "reviews"; ☃')
    assert read_declared(made.folder) == wanted
    for wrong, words in (
        ('licence="mit"', "did you mean 'license'?"),
        ("license=3", "must be text in quotes"),
        ('report-url="ftp://x"', "write an address"),
        ('report-url="http://clinic.example/run-7"', "write an address"),
        ('report-url="https://x (y)"', "write an address"),
        ('report-url="https://x> <script>"', "write an address"),
    ):
        code, said = fedveil("report", made.folder, "--declare", wrong)
        assert (code, words in said) == (1, True), said
    assert read_declared(made.folder) == wanted


def test_every_answer_comes_back_from_the_file_as_it_was_given(tmp_path: Path) -> None:
    for text in ('say "this" \\ that', "ünï ☃ 🙂", "# no comment", "a; b"):
        assert declare(tmp_path, {"intended-use": text}).intended_use == text
        assert read_declared(tmp_path).intended_use == text
    assert declare(tmp_path, {"intended-use": ""}) == Declared()
    with pytest.raises(ConfigError, match="unknown key 'epsilon'"):
        declare(tmp_path, {"epsilon": "0.1"})


def test_a_tampered_adapter_is_found_by_verify(made: MadeRun, tmp_path: Path) -> None:
    key = tmp_path / "server.pem"
    assert fedveil("keygen", key)[0] == 0
    assert fedveil("report", made.folder, "--sign", key)[0] == 0
    verify = ("verify", made.folder, "--key", tmp_path / "server.pub.pem")
    assert fedveil(*verify)[0] == 0
    for name in ("adapter_model.safetensors", "head.safetensors", "fedveil.json", "README.md"):
        content = (made.folder / "adapter" / name).read_bytes()
        (made.folder / "adapter" / name).write_bytes(content + b" ")
        code, said = fedveil(*verify)
        assert (code, f"{name} was changed after it was signed" in said) == (1, True), said
        (made.folder / "adapter" / name).write_bytes(content)
    assert fedveil(*verify)[0] == 0


@pytest.mark.parametrize("model", ["our-model", "all-MiniLM-L6-v2"])
def test_foreign_names_and_paths_stay_out_of_the_card(model: str, tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>|`*"
    settings = {"rounds": 1, "data.name": str(tmp_path / "patients.csv")}
    run = MadeRun(tmp_path / "run", settings, sites={hostile: 10, "south": 10}).start()
    run = with_adapter(run.round(1, 0.7).end("stopped", hostile), base=str(tmp_path / model))
    text = card(run)
    assert "<script>" not in text
    assert str(tmp_path) not in text, "the card tells where the coordinator's files lie"
    assert model in text
    assert NAMED_MODELS["all-MiniLM-L6-v2"].published.hub not in text, (
        "a folder is taken for the model that it is called like"
    )
    assert "base_model" not in ModelCard(text).data.to_dict()


def test_the_code_of_a_card_takes_a_bases_name_for_a_name(tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "run", {"rounds": 1}).start().round(1, 0.7).end()
    text = card(with_adapter(run, base='/models/it\'s "ours")\nraise SystemExit #'))
    code = text.partition("```python\n")[2].partition("```")[0]
    literals = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert literals.count('it\'s "ours") raise SystemExit #') == 2


def test_a_model_of_a_package_is_named_with_its_owner_and_its_licence(tmp_path: Path) -> None:
    for name, model in NAMED_MODELS.items():
        known = model.published
        run = with_adapter(MadeRun(tmp_path / name, {"rounds": 1}).start().round(1, 0.7).end(), base=name)
        text = card(run)
        assert ModelCard(text).data.to_dict()["base_model"] == known.hub
        assert f"from_pretrained('{known.hub}')" in text
        assert f"The base model: {known.license}, as the hub has it for {known.hub}." in text
        assert ("rounded to 4 bits" in text) == (name == "SmolLM2-135M-Instruct")
        declare(run.folder, {"base-license": "mit"})
        assert "The base model: mit." in card(run)


def test_a_folder_here_is_no_repository_of_the_hub_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = with_adapter(MadeRun(tmp_path / "run", {"rounds": 1}).start().round(1, 0.7).end(), base="models/bert")
    assert ModelCard(card(run)).data.to_dict()["base_model"] == "models/bert"
    (tmp_path / "models" / "bert").mkdir(parents=True)
    assert "base_model" not in ModelCard(card(run)).data.to_dict()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({}, ["the test set of rotten-tomatoes", "`prose` of FedVeil (SHA-256 `"]),
        ({"data.name": "FILE"}, ["held out from the same source"]),
        ({"data.name": "FILE", "data.test": "hub:stanfordnlp/sst2"}, ["the test set, hub:stanfordnlp/sst2"]),
        ({"data.name": "FILE", "data.test": "FILE"}, ["the test set, a file of the coordinator's"]),
        ({"recipe": "metric"}, ["the text that the initialisation was made from, `prose` of FedVeil (SHA-256 `"]),
        (
            {"recipe": "metric", "data.name": "FILE", "start.text": "OTHER", "start.text-sha256": "ef" * 32},
            [f"made from, a file of the coordinator's (SHA-256 `{'ef' * 32}`)"],
        ),
        (
            {"recipe": "plain", "adapter.start": "public-gradient", "start.data": "imdb-endings"},
            ["the records that the initialisation was made from, imdb-endings"],
        ),
    ],
)
def test_a_card_names_what_was_taken_for_public_and_no_path(
    tmp_path: Path, settings: dict[str, Any], named: list[str]
) -> None:
    files = {"FILE": str(tmp_path / "reviews.csv"), "OTHER": str(tmp_path / "texts.txt")}
    told = {key: files.get(value, value) for key, value in settings.items()}
    made = with_adapter(MadeRun(tmp_path / "run", {"rounds": 25, **told}).start().round(1, 0.76).end())
    (said,) = [line for line in card(made).splitlines() if line.startswith("Taken as public")]
    assert [words for words in named if words not in said] == []
    assert ("initialisation was made from" in said) == (settings.get("data.name") != "FILE" or "recipe" in settings)
    assert ("the records that" in said) == ("start.data" in settings)
    assert str(tmp_path) not in said


def test_the_card_of_a_merged_model_says_where_the_signed_report_lies(made: MadeRun) -> None:
    data = report_of(made.folder)
    merged = Form("finetune", "sentence-transformers", "", {})
    assert "Ask its publisher for the run's signed report" in card_of(data, Declared(), merged, b"")
    address = "https://clinic.example/run-7/report.html"
    text = card_of(data, Declared(report_url=address), merged, b"")
    assert f"signed report lies at <{address}>" in text
    assert "Ask its publisher" not in text


def test_a_real_run_leaves_a_card_and_so_does_its_merged_model(toy_settings: dict[str, Any], tmp_path: Path) -> None:
    run = run_in_process({**toy_settings, "rounds": 1}, 2)
    text, data = (run / "adapter" / "README.md").read_text(encoding="utf-8"), report_of(run)
    assert data.origin is not None
    assert data.origin.base == load_base_model(toy_settings["model.name"], "classification").fingerprint
    assert data.origin.bundle == own_digest()
    assert data.origin.base in text
    assert text == card_of(data, Declared(), adapter_form(data), (run / "report.json").read_bytes())
    merge_run(run, tmp_path / "merged")
    merged = (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    meta = yaml.safe_load(merged.split("---")[1])
    assert (meta["library_name"], "pipeline_tag" in meta) == ("sentence-transformers", False)
    weights = tmp_path / "merged" / "0_Transformer" / "model.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() in merged
    assert data.claim.sentence in merged
    assert str(tmp_path) not in merged

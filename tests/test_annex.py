"""The annex: facts of this run beside the law's questions, nothing that it cannot know, and the stewards' own words."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from made_run import MadeRun
from test_card import fedveil, with_adapter

from audits.tiny_site import clinic, pins
from common.config.text import to_toml
from common.errors import ConfigError
from common.privacy.figures import epsilon_text
from deploy.site_folder import make_site
from deploy.statement import statement_of
from reports import report_of, write_reports
from reports.annex import NAME, OPEN, annex_of
from reports.declared import Declared
from reports.signature import NotGenuine, make_key, verified
from reports.statements import QUESTIONS, keep, read_statement, statement_text, statements_of

ANSWERS = {"source": "Letters of 2019.", "legal-basis": "Consent.", "retention": "Ten years."}


@pytest.fixture
def made(tmp_path: Path) -> MadeRun:
    """A finished run of two sites with an adapter."""
    run = MadeRun(tmp_path / "run", {"recipe": "plain", "rounds": 1}, noise={"north": 0.8}).start().round(1, 0.76).end()
    return with_adapter(run)


def annex(run: MadeRun) -> str:
    write_reports(run.folder, annex=True)
    return (run.folder / NAME).read_text(encoding="utf-8")


def row(text: str, where: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(f"| {where}"))


def test_the_annex_has_the_reports_figures_and_the_reports_hash(made: MadeRun) -> None:
    text, data = annex(made), report_of(made.folder)
    assert data.meaning is not None
    opinion = row(text, "Opinion 28/2024, on anonymity")
    assert epsilon_text(data.headline.epsilon) in opinion
    assert "finds at most" in opinion
    assert "case by case" in opinion
    assert "3,500, as the sites declare" in row(text, "Art. 5(1)(c)")
    assert epsilon_text(data.headline.epsilon) in row(text, "164.514(b)(1)")
    assert hashlib.sha256((made.folder / "report.json").read_bytes()).hexdigest() in text


def test_what_no_file_can_know_is_said_to_be_unknown(made: MadeRun) -> None:
    text = annex(made)
    for where in (
        "Art. 5(1)(a)",
        "Art. 26",
        "Art. 35",
        "Art. 6 ",
        "164.514(b)(2)",
        "164.502(e)",
        "Opinion 28/2024, on dep",
    ):
        assert f"**{OPEN}**" in row(text, where), where
    for claimed in ("is anonymous", "complies", "compliant", "is de-identified", "no personal data"):
        assert claimed not in text, "the annex judges"


def test_a_run_without_privacy_has_no_bound_there_either(tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "run", {"privacy.mode": "none", "rounds": 1}).start().round(1, 0.8).end()
    text = annex(run)
    opinion = row(text, "Opinion 28/2024, on anonymity")
    assert "Privacy was OFF" in opinion
    assert "No bound" in opinion
    assert "The bound holds" not in text
    assert "without noise" in row(text, "Art. 5(1)(c)")


def test_statements_are_quoted_with_their_hash_and_silent_sites_are_named(made: MadeRun, tmp_path: Path) -> None:
    hostile = {**ANSWERS, "source": "a | b\n# Title <script>", "retention": ""}
    file = tmp_path / "north.toml"
    file.write_text(statement_text("north", "ward", hostile), encoding="utf-8")
    code, said = fedveil("report", made.folder, "--statement", file)
    assert code == 0, said
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert digest in said.replace("\n", "")
    text = (made.folder / NAME).read_text(encoding="utf-8")
    assert digest in text
    assert "Consent." in text
    assert "left it open" in text
    assert "<script>" not in text
    assert "\n# Title" not in text
    assert "No steward's statement of south lies beside" in row(text, "Art. 5(1)(a)")
    assert [statement.site for statement in statements_of(made.folder)] == ["north"]


def test_the_annex_and_the_statements_are_under_the_signature(made: MadeRun, tmp_path: Path) -> None:
    file = tmp_path / "north.toml"
    file.write_text(statement_text("north", "ward", ANSWERS), encoding="utf-8")
    keep(made.folder, file)
    public = make_key(tmp_path / "server.pem")
    write_reports(made.folder, tmp_path / "server.pem", annex=True)
    assert {NAME, "statements/north.toml"} <= set(verified(made.folder, public)["files"])
    held = made.folder / "statements" / "north.toml"
    held.write_text(held.read_text().replace("Consent", "Contract"))
    with pytest.raises(NotGenuine, match="changed after it was signed"):
        verified(made.folder, public)
    held.write_text(file.read_text())
    (made.folder / "statements" / "south.toml").write_text(statement_text("south", "ward", ANSWERS))
    with pytest.raises(NotGenuine, match=r"statements/south.toml .* came after"):
        verified(made.folder, public)


def test_an_annex_that_is_there_is_made_anew_with_the_report(made: MadeRun) -> None:
    annex(made)
    (made.folder / NAME).write_text("old")
    write_reports(made.folder)
    assert "Opinion 28/2024" in (made.folder / NAME).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff", "cannot be read"),
        (b'site = "north"', "lacks dataset-id"),
        (statement_text("north", "ward", ANSWERS).encode() + b'sorce = "x"', "'source'"),
        (statement_text("../north", "ward", ANSWERS).encode(), "no name of one"),
    ],
)
def test_a_statement_that_is_none_is_refused(content: bytes, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        read_statement(content, "north.toml")
    assert "\n" not in str(caught.value)


def test_a_steward_states_by_the_policy_and_no_server_gets_it(toy_settings: dict[str, Any], tmp_path: Path) -> None:
    site = clinic(toy_settings, tmp_path)
    policy = {"dataset-id": "ward", "epsilon": 8.0, "delta": 1e-3, "public-size": 50, **pins(site.settings)}
    node = f'data="{site.node["data"]}"'
    silent = make_site(tmp_path / "silent", "clinic", "127.0.0.1:1", policy=to_toml(policy), node=node)
    with pytest.raises(ConfigError, match="states nothing about its records"):
        statement_of(silent)
    folder = make_site(tmp_path / "site", "clinic", "127.0.0.1:1", policy=to_toml({**policy, **ANSWERS}), node=node)
    out = tmp_path / "clinic.toml"
    code, said = fedveil("site", "statement", folder.path, "-o", out)
    assert code == 0, said
    read = read_statement(out.read_bytes(), "clinic.toml")
    assert (read.site, read.dataset, read.answers) == ("clinic", "ward", ANSWERS)
    assert read.sha256 in said
    assert read_statement(b"\xef\xbb\xbf" + out.read_bytes(), "clinic.toml").answers == ANSWERS
    held = (folder.path / "policy.toml").read_bytes()
    for own in (folder.path / "policy.toml", folder.path / "node.key", site.node["data"]):
        code, said = fedveil("site", "statement", folder.path, "-o", own)
        assert (code, "is not overwritten: name another file" in said) == (1, True), said
    assert (folder.path / "policy.toml").read_bytes() == held
    site.rule(**{key.replace("-", "_"): f"SECRET {text}" for key, text in ANSWERS.items()})
    reply = site.train(1)
    assert "SECRET" not in repr(reply)
    assert set(QUESTIONS) == set(ANSWERS)


def test_what_the_coordinator_declares_is_quoted_as_declared(made: MadeRun) -> None:
    data = report_of(made.folder)
    text = annex_of(data, Declared(intended_use="To sort | reviews", base_license="apache-2.0"), [], "ab")
    assert "To sort \\| reviews" in row(text, "Art. 5(1)(b)")
    assert "as declared: apache-2.0" in text.replace("&#46;", ".")


def test_the_runs_operations_are_counted_and_a_share_is_given_where_the_bases_are_declared(made: MadeRun) -> None:
    path = made.folder / "adapter" / "fedveil.json"
    told = json.loads(path.read_text())
    assert report_of(made.folder).compute is None, "an earlier FedVeil did not record the weights"
    path.write_text(json.dumps({**told, "base_parameters": 1000}))
    data = report_of(made.folder)
    # Five steps at each site, on a third of 2,000 and of 1,500 records on average, each of 128 tokens.
    wanted = 6 * 1000 * 5 * 3500 * 0.33 * 128
    assert data.compute is not None
    assert data.compute.operations == pytest.approx(wanted)
    plain = row(annex_of(data, Declared(), [], "ab"), "Art. 53")
    assert f"{wanted:.2g} floating-point operations: 6 N D" in plain.replace("&#46;", ".")
    assert "base model's training compute" in plain
    assert "%" not in plain
    shared = row(annex_of(data, Declared(base_training_flop=f"{4 * wanted}"), [], "ab"), "Art. 53")
    assert "25 % of the" in shared
    for wrong in ("many", "-1", "inf", "nan"):
        with pytest.raises(ConfigError, match=r"^base-training-flop is .*write a number above 0"):
            Declared(base_training_flop=wrong)

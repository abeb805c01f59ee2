"""A steward's check of records, policy and keys before a site goes online."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from deployed import PART, examine_site_quickly, site_for, site_with_records
from flwr.common.config import parse_config_args
from typer.testing import CliRunner

from fedveil.cli.main import app
from fedveil.client.ledger.ledger import Ledger
from fedveil.client.policy import Policy
from fedveil.client.site import own_settings
from fedveil.common.config.flat import Columns, Scalar, options_of
from fedveil.common.errors import ConfigError, DataError, UnreadableFile
from fedveil.common.ports import free_ports
from fedveil.common.tasks import TASKS
from fedveil.common.tasks.roles import TEMPLATE
from fedveil.deploy import site_check
from fedveil.deploy.commands import node_config
from fedveil.deploy.own_rows import pinned_settings
from fedveil.deploy.server_folder import make_server
from fedveil.deploy.site_check import check_site
from fedveil.deploy.site_folder import node_settings, open_site_folder
from fedveil.deploy.start import start_site
from fedveil.deploy.withdraw import withdraw_site
from fedveil.strategies.job import configure

pytestmark = pytest.mark.usefixtures("programs_may_start")


PINNED_ALONE = """task = "classification"
text = "text"
label = "label"
labels = ["bad", "good"]
max-length = 64
"""
"""Settings of a node that plays all of a job's data."""


BUDGETED = f"epsilon = 4.0\ndelta = 1e-3\n{PINNED_ALONE}"


@pytest.mark.parametrize("name", [r"back\table", 'the "old" one', "a'b\\\"c\\", "two\nlines\t", "ä b = 'c'", "$a\x7f"])
def test_a_path_of_records_is_the_path_that_was_named_whatever_is_in_it(name: str, tmp_path: Path) -> None:
    """A backslash and a t were a tab, and so another path; after a quote the rest was no setting."""
    (tmp_path / name).touch()
    words = ["--server", "fl.example.org", "--data", str(tmp_path / name), "--public-size", "2000"]
    done = CliRunner().invoke(app, ["site", "init", str(tmp_path / "site"), *words, "--labels", "bad,good"])
    assert done.exit_code == 0, done.output
    settings = node_settings(open_site_folder(tmp_path / "site"))
    assert settings["data"] == str(tmp_path / name)
    assert parse_config_args([node_config(settings)]) == settings, "Flower reads the node's settings otherwise"


@pytest.mark.parametrize(
    ("policy", "node", "reason"),
    [
        ("epsilom = 4.0\n", PART, "did you mean 'epsilon'"),
        ("epsilon = 4.0\ndelta = 1e-3\n", f"{PART} public-size=2000", "above 1/2000"),
        ("", 'data="records.csv"', "'public-size' is needed beside 'data'"),
        ('task = "causal-lm"\n', PART, "completion, max-length is not"),
        ("", "", "this site has no records"),
        (PINNED_ALONE, 'data="records.csv" public-size=50', "the site's policy has no budget for its records"),
        (BUDGETED, 'data="records.csv" public-size=true', "'public-size' is True: give a whole number"),
        ("", "partition-id=4 num-partitions=4", "partition-id is 4 and its num-partitions 4: give a whole number"),
        (BUDGETED, 'data="records.csv" public-size=50 rank=0', "node setting 'rank' is 0"),
        (BUDGETED, 'data="records.csv" public-size=50 rank="all"', "node setting 'rank' is 'all'"),
    ],
)
def test_a_policy_that_every_round_would_refuse_stops_the_site_and_fails_the_doctor(
    policy: str, node: str, reason: str, tmp_path: Path
) -> None:
    server = make_server(tmp_path / "server", ["127.0.0.1"])
    site = site_for(tmp_path, free_ports(1)[0], server.path)
    (site.path / "policy.toml").write_text(policy, encoding="utf-8")
    site = dataclasses.replace(site, node=node)
    found = {finding.what: finding for finding in examine_site_quickly(site)}
    assert not found["policy"].ok
    assert reason in found["policy"].found
    with pytest.raises(ConfigError, match=re.escape(reason)):
        start_site(site, pytest.fail)


def test_a_steward_reads_which_rows_are_no_records_and_why_but_not_what_is_in_them(tmp_path: Path) -> None:
    rows = ["the film,good", "a secret,fair", ",good", *["a secret,fine"] * 25, "a secret,good,more"]
    site = site_with_records(tmp_path, "own.csv", "\n".join(["text,label", *rows]).encode())
    done = CliRunner().invoke(app, ["site", "check", str(site.path)])
    assert done.exit_code == 0, done.output
    own = tmp_path / "own.csv"
    assert done.output.splitlines() == [
        "records: 1 of 29 rows fit; the others count as none",
        "labels: good 1",
        "  no row has the label 'bad': compare how it is written in the rows and in the policy",
        "public-size: 50 declared, 1 record found: a step is divided by what is declared, so that these weigh less "
        "than they could",
        f"  {own}: line 3, {', '.join(map(str, range(5, 24)))} and 6 more has a label that is not among data.labels",
        f"  {own}: line 4 has no value in column 'text' (data.text)",
        f"  {own}: line 30 has another number of fields than the header",
    ]
    assert "secret" not in done.output
    said: list[str] = []
    check_site(site, said.append, rows=False)
    assert said == done.output.splitlines()[:1], "a start lists rows"


def test_check_and_start_refuse_records_that_reply_after_has_no_time_for(tmp_path: Path) -> None:
    rows = ["text,label", *[f"film {i},good" for i in range(51)]]
    site = site_with_records(tmp_path, "own.csv", "\n".join(rows).encode())
    rules = (site.path / "policy.toml").read_text(encoding="utf-8")

    def rule(reply_after: float, public_size: int) -> None:
        text = rules.replace("public-size = 50", f"public-size = {public_size}")
        (site.path / "policy.toml").write_text(f"reply-after = {reply_after}\n{text}", encoding="utf-8")

    check_site(site, print)  # without it answers leave when they are there
    rule(600.0, 50)
    for begin in (check_site, start_site):
        with pytest.raises(ConfigError, match=r"51 records and public-size is 50, for which alone reply-after = 600"):
            begin(site, print)
    rule(1e-6, 51)
    for begin in (check_site, start_site):
        with pytest.raises(ConfigError, match=r"took \d+\.\d seconds to read, and reply-after = 1e-06 leaves 0\.0"):
            begin(site, print)
    rule(600.0, 51)
    check_site(site, print)


def test_check_and_withdrawal_let_cells_hold_line_breaks_by_the_policy_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = site_with_records(tmp_path, "notes.csv", b'text,label\n"a film\nof two, or more",good\nthe scene,bad\n')
    with pytest.raises(UnreadableFile, match="line 2 is no row by itself"):
        check_site(site, print)
    policy = site.path / "policy.toml"
    policy.write_text(f"line-breaks = true\n{policy.read_text(encoding='utf-8')}", encoding="utf-8")
    lines, withdrawn = list[str](), list[int]()
    check_site(site, lines.append)
    assert lines == ["records: 2 of 2 rows fit", "labels: bad 1, good 1", *lines[2:]]
    assert not any("withdrawn" in line for line in lines)
    monkeypatch.setattr(Ledger, "remember", lambda _, __, records: withdrawn.append(len(records)))
    withdraw_site(site, "asked for", lines.append)
    assert withdrawn == [2 * 3], (
        "a record, of three hashes each, that goes over lines would be taken again under another name"
    )
    lines.clear()
    check_site(site, lines.append, rows=False)
    assert lines == [
        "records: 2 of 2 rows fit",
        "withdrawn: clinic is, so every round is refused but one that was charged before",
    ]
    other: list[str] = []
    check_site(site, other.append, 'dataset-id="another"', rows=False)
    assert other == lines[:1], "another data set of this ledger is not withdrawn"


UNREADABLE = [
    (
        "quote.csv",
        b'text,label\n"never closed,good\n',
        "quote.csv cannot be read as CSV: line 2 is no row by itself (unexpected end of data): double the quotes",
    ),
    (
        "latin.csv",
        "text,label\n\u00e9,good\n".encode("latin-1"),
        "latin.csv cannot be read as CSV: line 2 is not UTF-8: save the file as UTF-8",
    ),
    (
        "line.csv",
        b'text,label\nthe film,good\n"never closed,good\n',
        "line 3 is no row by itself (unexpected end of data)",
    ),
    ("half.parquet", b"PAR1half", "half.parquet cannot be read as PARQUET"),
    ("twice.csv", b"text,label,text\na,good,b\n", "two columns are called 'text'"),
    ("none.csv", b"text,label\n", "none.csv is empty: it has no records"),
    ("column.csv", b"text,stars\na,5\n", "has no column 'label' (data.label); it has text, stars"),
    ("odd.csv", b"text,label\n,good\n", "no row is a record (line 2 has no value in column 'text' (data.text)): mend"),
]


@pytest.mark.parametrize(("name", "content", "reason"), UNREADABLE, ids=[name for name, _, _ in UNREADABLE])
def test_data_that_every_round_would_answer_with_noise_alone_stop_check_and_start(
    name: str, content: bytes, reason: str, tmp_path: Path
) -> None:
    site = site_with_records(tmp_path, name, content)
    done = CliRunner().invoke(app, ["site", "check", str(site.path)])
    assert (done.exit_code, done.output.count("\n")) == (1, 1), done.output
    assert reason in done.output
    with pytest.raises(DataError, match=re.escape(reason)):
        start_site(site, pytest.fail)


def test_the_doctor_fails_on_open_keys_and_a_damaged_ledger(tmp_path: Path) -> None:
    server = make_server(tmp_path / "server", ["127.0.0.1"])
    site = site_for(tmp_path, free_ports(1)[0], server.path)
    (site.path / "node.key").chmod(0o644)
    site.ledger.parent.mkdir()
    site.ledger.write_bytes(b"")
    found = {finding.what: finding for finding in examine_site_quickly(site)}
    for what, words in (
        ("site's key", "others can read it: chmod 600"),
        ("ledger", "not a FedVeil ledger"),
        ("server", "does not answer"),
        ("base model", "cannot load the base model"),
    ):
        assert not found[what].ok, f"{what} passes"
        assert words in found[what].found
    for what in ("key pair", "authority", "policy"):
        assert found[what].ok


def test_the_doctor_s_exit_code_says_that_something_failed(tmp_path: Path) -> None:
    server = make_server(tmp_path / "server", ["127.0.0.1"])
    site = site_for(tmp_path, free_ports(1)[0], server.path)
    done = CliRunner().invoke(app, ["doctor", str(site.path)])
    assert done.exit_code == 1
    assert "failed  server: " in done.stdout


def test_a_check_reads_what_every_job_that_the_policy_allows_reads() -> None:
    """In another way it would say that all is well, and each round would answer otherwise."""
    for task in TASKS.values():
        columns = Columns({role.setting: f"our {role.setting}" for role in task.roles})
        if TEMPLATE in task.roles:
            columns = Columns({**columns, TEMPLATE.setting: "our {prompt} {completion}"})
        options = options_of(task)
        named = next((role.labels.example for role in task.roles if role.labels), "")
        labels = {"labels": named} if named else {}
        pinned = Columns({**columns, **{key: str(value) for key, value in options.items()}})
        policy = Policy(unit="person", person="patient", task=task.name, columns=pinned, max_length=64, **labels)
        asked: dict[str, Scalar] = {
            **{f"data.{key}": value for key, value in columns.items()},
            **options,
            "privacy.unit": "person",
            "data.person": "patient",
            "model.task": task.name,
            "data.name": "x.csv",
            **({"data.labels": named.replace(",", ", ")} if named else {}),
        }
        ours = own_settings(configure(asked).config, policy)
        assert dataclasses.replace(pinned_settings(policy), name="") == ours, task.name


def test_a_check_is_of_what_the_start_is_told_and_names_each_file(tmp_path: Path) -> None:
    site = site_with_records(tmp_path, "own.csv", b"text,label\na,good\n")
    parts = tmp_path / "parts"
    parts.mkdir()
    for name in ("one", "two"):
        (parts / f"{name}.csv").write_text("text,label\na,good\nb,fair\n", encoding="utf-8")
    said: list[str] = []
    check_site(site, said.append, f'data="{parts}"')
    assert said[0] == "records: 2 of 4 rows fit; the others count as none"
    assert any("public-size: 50 declared, 2 records found" in line for line in said)
    assert [line for line in said if "fair" in line or "line 3" in line] == [
        f"  {parts / name}.csv: line 3 has a label that is not among data.labels" for name in ("one", "two")
    ]


def test_no_more_is_declared_or_taken_than_answers_have_time_for() -> None:
    def hold(declared: int, units: int, seconds: float) -> None:
        site_check._check_time(80.0, declared, units, seconds, "person")

    hold(5, 5, 10.0)
    with pytest.raises(ConfigError, match="there are 6 persons and public-size is 5, for which alone reply-after = 80"):
        hold(5, 6, 1.0)
    with pytest.raises(ConfigError, match=r"took 10\.1 seconds .* leaves 10\.0, .*: set it to 162 or more"):
        hold(5, 5, 10.1)
    assert not list(site_check._size(50, 25, "record"))
    assert len(list(site_check._size(51, 25, "record"))) == 1


def test_a_site_check_tells_of_a_label_that_no_row_has(tmp_path: Path) -> None:
    site = site_with_records(tmp_path, "own.csv", b"text,label\nthe film,good\n" + b"a film,bad\n" * 40)
    said: list[str] = []
    check_site(site, said.append)
    assert said[:-1] == ["records: 41 of 41 rows fit", "labels: bad 40, good 1"]
    assert said[-1].startswith("40 of 41 rows share their text with another row")

"""Folders of server and site: made once or not at all, with private keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import pytest
from deployed import PART, examine_site_quickly, site_for, site_with_records
from typer.testing import CliRunner

from fedveil.cli.main import app
from fedveil.client.ledger.ledger import Ledger
from fedveil.client.policy_file import load_policy
from fedveil.common.errors import ConfigError, LedgerError
from fedveil.common.ports import free_ports
from fedveil.common.threads import CORES
from fedveil.deploy import certificates, container, doctor, start
from fedveil.deploy.node_keys import is_pair, new_node_key
from fedveil.deploy.policy_file import policy_text
from fedveil.deploy.server_folder import authority_beside, make_server, open_server, renew_server
from fedveil.deploy.site_folder import node_settings, open_site_folder
from fedveil.deploy.start import start_site

pytestmark = pytest.mark.usefixtures("programs_may_start")


OWN = ["--data", ".", "--public-size", "2000"]
"""Of 'fedveil site init': a site with records of its own."""


def test_a_folder_is_made_once_and_keys_are_private(tmp_path: Path) -> None:
    server = make_server(tmp_path / "server", ["fl.example.org", "10.0.0.7"])
    site = site_for(tmp_path, 9092, server.path)
    for path in (server.path / "server.key", authority_beside(server.path) / "ca.key", site.path / "node.key"):
        assert path.stat().st_mode & 0o777 == 0o600, f"{path} can be read by others"
    pem = certificates.read_certificate((server.path / "server.pem").read_bytes(), "the server")
    assert {"fl.example.org", "10.0.0.7", "localhost", "127.0.0.1"} == set(certificates.names_of(pem))
    assert is_pair((site.path / "node.key").read_bytes(), (site.path / "node.pub").read_bytes())
    assert not is_pair(new_node_key("clinic").private, (site.path / "node.pub").read_bytes())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for again in (lambda: make_server(server.path, ["x"]), lambda: site_for(tmp_path, 9092, server.path)):
        with pytest.raises(ConfigError, match="is not overwritten"):
            again()
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.parametrize("who", ["server", "site"])
def test_a_user_without_a_name_is_a_number_in_the_unit_and_init_makes_all_or_nothing(
    who: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by 'docker run --user 12345': the folder stood there without its unit, and could not be made again."""
    monkeypatch.setattr("getpass.getuser", lambda: {}["getpwuid(): uid not found: 12345"])
    monkeypatch.setattr("os.getuid", lambda: 12345)
    folder, more = tmp_path / who, ["--name", "127.0.0.1"] if who == "server" else ["--server", "127.0.0.1"]
    unit = folder / f"fedveil-{who}.service"
    folder.mkdir()
    unit.write_text("the user's own", encoding="utf-8")
    taken = CliRunner().invoke(app, [who, "init", str(folder), *more])
    assert (taken.exit_code, f"{unit} is there already" in taken.output) == (1, True), taken.output
    assert not (folder / f"{who}.toml").exists()
    unit.unlink()
    done = CliRunner().invoke(app, [who, "init", str(folder), *more])
    assert (done.exit_code, done.exception) == (0, None), done.output
    assert "User=12345\n" in unit.read_text(encoding="utf-8")


def test_a_site_with_another_sites_private_key_does_not_start(tmp_path: Path) -> None:
    """The server would know it by that key, and drop every reply under the name in node.pub."""
    site = site_with_records(tmp_path, "two.csv", b"text,label\na,bad\nb,good\n")
    (site.path / "node.key").write_bytes(new_node_key("clinic").private)
    with pytest.raises(ConfigError, match=r"node.pub is not node.key's: .* put the right node.key back"):
        start_site(site, pytest.fail)
    found = {finding.what: finding for finding in examine_site_quickly(site)}
    assert not found["key pair"].ok


def test_a_site_computes_with_as_many_processes_as_its_folder_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, started = (
        site_with_records(tmp_path, "two.csv", b"text,label\na,bad\nb,good\n").path,
        list[Mapping[str, str]](),
    )
    monkeypatch.setattr(start.os, "execve", lambda *words: started.append(words[2]))
    monkeypatch.setattr(start, "why_refused", lambda _: "")
    monkeypatch.delenv(CORES, raising=False)
    text = (path / "site.toml").read_text(encoding="utf-8")
    for number in (0, 2):
        (path / "site.toml").write_text(text.replace("processes = 0", f"processes = {number}"), encoding="utf-8")
        start_site(open_site_folder(path), lambda _: None)
    assert [each.get(CORES) for each in started] == [None, "2"]
    (path / "site.toml").write_text(text.replace("processes = 0", "processes = -1"), encoding="utf-8")
    with pytest.raises(ConfigError, match="processes is -1: write a number from 1 on, or 0 for one a core"):
        open_site_folder(path)


def test_a_renewed_certificate_is_of_the_same_authority(tmp_path: Path) -> None:
    server = make_server(tmp_path / "server", ["fl.example.org"], control_host="control")
    before = (server.path / "server.pem").read_bytes()
    renew_server(open_server(server.path))
    after = (server.path / "server.pem").read_bytes()
    assert after != before
    authority = certificates.read_certificate((server.path / "ca.crt").read_bytes(), "the authority")
    renewed = certificates.read_certificate(after, "the server")
    assert certificates.is_issued_by(renewed, authority)
    assert certificates.names_of(renewed) == ["fl.example.org", "localhost", "control", "127.0.0.1"]
    assert certificates.belongs_to(renewed, (server.path / "server.key").read_bytes())
    assert (server.path / "server.key").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("name", ["no spaces here", "", "ünïcode"])
def test_a_name_that_no_certificate_can_hold_is_refused_and_nothing_is_left(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        make_server(tmp_path / "server", [name] if name else [])
    assert not (tmp_path / "server").exists()


def test_an_unknown_key_of_a_folder_is_named(tmp_path: Path) -> None:
    server = make_server(tmp_path / "server", ["fl.example.org"])
    with (server.path / "server.toml").open("a") as file:
        file.write("contrl-port = 8000\n")
    with pytest.raises(ConfigError, match="did you mean 'control-port'"):
        open_server(server.path)


def test_who_names_one_of_two_ledgers_goes_on_with_it_and_the_doctor_looks_at_that_one(tmp_path: Path) -> None:
    """So says the error of a folder with two; the doctor's word on the other one would be worth nothing."""
    server = make_server(tmp_path / "server", ["127.0.0.1"])
    site = site_for(tmp_path, free_ports(1)[0], server.path)
    site.path.joinpath("ledger").mkdir()
    first, second = (site.path / "ledger" / f"{name}.sqlite" for name in ("first", "second"))
    for file in (first, second):
        Ledger(file).close()
    with pytest.raises(LedgerError, match="name the one that goes on"):
        node_settings(site)
    named = dataclasses.replace(site, node=f'{PART} ledger="{second}"')
    assert node_settings(named)["ledger"] == str(second)
    (finding,) = doctor._ledger(named)
    assert (finding.ok, finding.found) == (True, f"{second} opens, 0 charges, mode 0600")
    second.chmod(0o640)
    (finding,) = doctor._ledger(named)
    assert (finding.ok, f"chmod 600 {second}" in finding.found) == (False, True)


def test_the_policy_of_a_new_site_is_one(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(policy_text("clinic", 2000, 4.0, 1e-5), encoding="utf-8")
    policy = load_policy(path)
    assert (policy.dataset_id, policy.public_size, policy.epsilon, policy.delta) == ("clinic", 2000, 4.0, 1e-5)
    assert not policy.allow_no_privacy


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--name", "my clinic"], "the site's name is 'my clinic'"),
        (["--epsilon", "-3"], "epsilon must be"),
        (["--delta", "2"], "delta must be"),
        ([*OWN, "--labels", "bad,good", "--delta", "1e-3"], "above 1/2000 of the public size"),
        (OWN, "--labels is needed: name all labels in the job's order"),
        ([*OWN, "--labels", "bad"], "name at least 2 different ones"),
        ([*OWN, "--labels", "bad,good", "--prompt", "q"], "--prompt is given, which the task 'classification'"),
        ([*OWN, "--task", "causal-lm", "--labels", "bad,good"], "--labels is given, which the task 'causal-lm'"),
        ([*OWN, "--task", "causal"], "did you mean 'causal-lm'"),
        ([*OWN, "--labels", "bad,good", "--max-length", "0"], "max-length must be above 0"),
        (["--model", "/srv/model"], "the fingerprint of the base model '/srv/model' is needed"),
        (["--model", "/srv/model", "--fingerprint", "0123"], "write NAME=FINGERPRINT+FILES"),
    ],
)
def test_a_site_that_could_never_work_is_not_made(words: list[str], reason: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["site", "init", str(tmp_path / "site"), "--server", "fl.example.org", *words])
    assert (done.exit_code, done.output.count("\n")) == (1, 1), done.output
    assert reason in done.output
    assert not (tmp_path / "site").exists()


def test_containers_make_keys_once_and_the_coordinator_sees_none(tmp_path: Path) -> None:
    for name in ("authority", "server", "coordinator", "site-1", "site-2"):
        (tmp_path / name).mkdir()
    container.make_keys(2, 8.0, 1e-5, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    container.make_keys(2, 8.0, 1e-5, tmp_path)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert sorted(path.name for path in (tmp_path / "coordinator").rglob("*.pub")) == ["site-1.pub", "site-2.pub"]
    for place in ("coordinator", "site-1"):
        held = [path.name for path in (tmp_path / place).rglob("*") if path.suffix == ".key"]
        assert sorted(held) == (["identity.key", "node.key"] if place == "site-1" else []), f"{place} holds {held}"
    assert not list((tmp_path / "server").rglob("ca.key")), "the server's volume holds the authority's key"

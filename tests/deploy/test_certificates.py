"""The server's folder: certificates that every Python accepts, and a renewal that may stop anywhere."""

from __future__ import annotations

import dataclasses
import os
import socket
import ssl
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from deployed import site_for
from typer.testing import CliRunner

from fedveil.cli.main import app
from fedveil.common.errors import DataError
from fedveil.common.ports import free_ports
from fedveil.deploy import certificates, server_checks, start
from fedveil.deploy.files import make_folder, put_file
from fedveil.deploy.node_keys import read_node_key
from fedveil.deploy.refusal import why_unreachable
from fedveil.deploy.server_folder import (
    RENEWAL,
    ServerFolder,
    authority_beside,
    finish_renewal,
    make_server,
    renew_server,
)

pytestmark = pytest.mark.usefixtures("programs_may_start")


class Crash(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("step", range(1, 5))  # of the tasks' key, of both, of the key, of the certificate
def test_a_renewal_that_was_interrupted_is_completed_by_the_next_start_or_renewal(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, renames, replace = make_server(tmp_path / "server", ["127.0.0.1"]), [0], Path.replace
    before = (server.path / "server.pem").read_bytes()

    def crash(self: Path, target: Path) -> Path:
        renames[0] += 1
        if renames[0] == step:
            raise Crash
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", crash)
        with pytest.raises(Crash):
            renew_server(server)
    if step > 2:
        assert (server.path / RENEWAL).stat().st_mode & 0o777 == 0o600, "others can read the new key"
        (finding,) = (f for f in server_checks.certificate_checks(server) if "interrupted" in f.found)
        assert not finding.ok
    monkeypatch.setattr(start.os, "execve", lambda *_: None)
    start.start_server(server, lambda line: None)  # raises where certificate and key do not fit
    renewed = (server.path / "server.pem").read_bytes()
    assert (renewed != before) == (step > 2), "what was written whole is not used"
    renew_server(server)
    assert (server.path / "server.pem").read_bytes() != renewed
    start.start_server(server, lambda line: None)
    assert not [path.name for path in server.path.iterdir() if "new" in path.name or path.name == RENEWAL]


def test_a_half_of_a_renewal_is_not_put_in_place(tmp_path: Path) -> None:
    server, other = (make_server(tmp_path / name, ["127.0.0.1"]) for name in ("server", "other"))
    before = (server.path / "server.pem").read_bytes()
    mixed = (other.path / "server.key").read_bytes() + before
    for content in (mixed, mixed[:300], b""):
        (server.path / RENEWAL).write_bytes(content)
        with pytest.raises(DataError):
            finish_renewal(server)
        assert (server.path / "server.pem").read_bytes() == before


@pytest.mark.parametrize("place", ["server-authority", "server/authority"])
def test_the_servers_folder_is_private_also_where_the_authority_is_made_in_it(place: str, tmp_path: Path) -> None:
    named = None if place == "server-authority" else tmp_path / "deep" / place
    server = make_server(tmp_path / "deep" / "server", ["127.0.0.1"], authority=named)
    for folder in (server.path, tmp_path / "deep" / place, server.nodes, server.runs):
        assert folder.stat().st_mode & 0o777 == 0o700, f"others can look into {folder}"


def test_no_key_of_the_authority_lies_in_what_the_server_reads_and_a_renewal_finds_it_beside(tmp_path: Path) -> None:
    made = CliRunner().invoke(app, ["server", "init", str(tmp_path / "server"), "--name", "127.0.0.1"])
    assert made.exit_code == 0, made.output
    key = (tmp_path / "server-authority" / "ca.key").read_bytes()
    inside = [path for path in (tmp_path / "server").rglob("*") if path.is_file()]
    assert [path for path in inside if key in path.read_bytes() or path.name == "ca.key"] == []
    assert f"move {tmp_path}/server-authority off this machine" in made.output
    unit = (tmp_path / "server" / "fedveil-server.service").read_text()
    assert unit.splitlines().count(f"InaccessiblePaths=-{tmp_path}/server-authority") == 1
    before = (tmp_path / "server" / "server.pem").read_bytes()
    renewed = CliRunner().invoke(app, ["server", "renew", str(tmp_path / "server")])
    assert renewed.exit_code == 0, renewed.output
    assert (tmp_path / "server" / "server.pem").read_bytes() != before


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_that_cannot_be_finished_is_not_left_half_made(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With half of its files it would be refused for ever: they are there already."""
    folder, replace = tmp_path / "folder", Path.replace
    if there:
        folder.mkdir()
        (folder / "own.txt").write_text("stays")

    def full(self: Path, target: Path) -> Path:
        if target.name == "second":
            raise OSError(28, "No space left on device")
        return replace(self, target)

    files = {"first.key": b"1", "second": b"2"}
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(DataError, match="No space left on device"):
            make_folder(folder, files, frozenset({"first.key"}))
    assert [path.name for path in tmp_path.rglob("*")] == (["folder", "own.txt"] if there else [])
    make_folder(folder, files, frozenset({"first.key"}))
    assert (folder / "second").read_bytes() == b"2"


def test_a_name_is_on_disk_before_the_next_file_s_and_before_a_folder_is_said_to_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a loss of power a key whose name was in memory alone would be the old one, beside a new certificate."""
    found, folder = list[tuple[str, list[str]]](), tmp_path / "folder"

    def sync(place: Path) -> None:
        found.append((place.name, sorted(path.name for path in place.iterdir() if path.name[0] != ".")))

    monkeypatch.setattr("fedveil.deploy.files.sync_folder", sync)
    make_folder(folder, {"first.key": b"1", "in/second": b"2", "third": b"3"}, frozenset({"first.key"}))
    names = ["first.key", "in", "third"]
    assert found == [("folder", names[:1]), ("in", ["second"]), ("folder", names), (tmp_path.name, ["folder"])]
    found.clear()
    put_file(folder / "fourth", b"4", private=True)
    assert found == [("folder", sorted([*names, "fourth"]))]


def test_a_key_of_another_kind_is_refused_as_one(tmp_path: Path) -> None:
    server, other = make_server(tmp_path / "server", ["127.0.0.1"]), ed25519.Ed25519PrivateKey.generate()
    form, no = serialization.PrivateFormat, serialization.NoEncryption()
    (server.path / "server.key").write_bytes(other.private_bytes(serialization.Encoding.PEM, form.PKCS8, no))
    with pytest.raises(DataError, match="a private key is not an elliptic-curve key: make a new pair"):
        start.start_server(server, pytest.fail)
    with pytest.raises(DataError, match="the site's private key is not an elliptic-curve key"):
        read_node_key(other.private_bytes(serialization.Encoding.PEM, form.OpenSSH, no))


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_a_folders_files_have_their_modes_whatever_the_umask_and_no_key_is_open_for_a_moment(
    umask: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    early, fchmod = list[int](), os.fchmod

    def watched(number: int, mode: int) -> None:
        early.append(os.fstat(number).st_mode & 0o777 & ~mode)
        fchmod(number, mode)

    monkeypatch.setattr(os, "fchmod", watched)
    before = os.umask(umask)
    try:
        fleet, control = free_ports(2)
        server = make_server(tmp_path / "server", ["127.0.0.1"], fleet_port=fleet, control_port=control)
        site = site_for(tmp_path, 9092, server.path)
        for place in (server.database.parent, server.runs, server.nodes):  # a start makes what is missing
            place.rmdir()
        monkeypatch.delenv("FLWR_HOME", raising=False)
        monkeypatch.setattr(start.os, "execve", lambda *_: None)
        start.start_server(server, lambda line: None)
    finally:
        os.umask(before)
    private = {
        "server.key",
        "tasks.pem",
        "server.secret",
        "ca.key",
        "node.key",
        "identity.key",
        "policy.toml",
        "site.toml",
    }
    folders = server.path, authority_beside(server.path), site.path
    made = [path for folder in folders for path in (folder, *folder.rglob("*"))]
    assert private | {"state", "runs", "nodes"} <= {path.name for path in made}
    for path in made:
        wanted = 0o700 if path.is_dir() else 0o600 if path.name in private else 0o644
        assert path.stat().st_mode & 0o777 == wanted, f"{path}: {path.stat().st_mode:o}"
    assert early
    assert not any(early), "a file could be read by others before its mode was set"


def test_a_renewal_by_another_authority_or_by_anothers_key_leaves_what_is_in_use(tmp_path: Path) -> None:
    server, other = (make_server(tmp_path / name, ["127.0.0.1"]) for name in ("server", "other"))
    before = {name: (server.path / name).read_bytes() for name in ("server.pem", "server.key")}
    with pytest.raises(DataError, match=r"is not the authority of .*ca\.crt: name that one's folder"):
        renew_server(server, authority_beside(other.path))
    foreign = (authority_beside(other.path) / "ca.key").read_bytes()
    (authority_beside(server.path) / "ca.key").write_bytes(foreign)
    with pytest.raises(DataError, match=r"ca\.key is not the key of its ca\.crt"):
        renew_server(server)
    assert {name: (server.path / name).read_bytes() for name in before} == before
    assert not (server.path / RENEWAL).exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [("ca.crt", "server.pem is not of the authority"), ("server.key", "server.key does not belong to server.pem")],
)
def test_a_server_with_a_file_of_another_does_not_start(
    name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, other = (make_server(tmp_path / name, ["127.0.0.1"]) for name in ("server", "other"))
    (server.path / name).write_bytes((other.path / name).read_bytes())
    monkeypatch.setattr(start.os, "execve", lambda *_: pytest.fail("it starts"))
    with pytest.raises(DataError, match=words):
        start.start_server(server, lambda line: None)
    assert not all(finding.ok for finding in server_checks.certificate_checks(server))


def test_a_server_with_an_expired_certificate_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    then = datetime.now(UTC) - timedelta(days=certificates.SERVER_DAYS, minutes=1)
    server = make_server(tmp_path / "server", ["127.0.0.1"], now=then)
    monkeypatch.setattr(start.os, "execve", lambda *_: pytest.fail("it starts"))
    with pytest.raises(DataError, match="the server's certificate has expired: renew it"):
        start.start_server(server, lambda line: None)
    (finding,) = (found for found in server_checks.certificate_checks(server) if not found.ok)
    assert "expired 0 days ago: renew it" in finding.found


def test_the_doctor_says_from_when_to_when_a_certificate_holds_and_for_which_names(tmp_path: Path) -> None:
    for name, days, ok, words in (
        ("later", 1, False, "not valid before"),
        ("soon", 10 - certificates.SERVER_DAYS, True, "more days, renew it"),
        ("now", 0, True, "valid for 397 more days; SHA-256"),
    ):
        server = make_server(tmp_path / name, ["127.0.0.1"], now=datetime.now(UTC) + timedelta(days=days))
        valid, *_, names = server_checks.certificate_checks(server)
        assert (valid.ok, words in valid.found, names.ok) == (ok, True, True), valid.found
    dialled = dataclasses.replace(server, names="127.0.0.1,fl.example.org")
    (finding,) = (found for found in server_checks.certificate_checks(dialled) if not found.ok)
    assert finding.found == "it does not hold for fl.example.org: renew it with 'fedveil server renew'"


def test_the_doctor_says_who_reaches_the_control_port(tmp_path: Path) -> None:
    server = make_server(tmp_path / "server", ["127.0.0.1"])
    for host, ok, words in (
        ("127.0.0.1", True, "'fedveil server start' lets its own user and root alone: keep everyone else out"),
        ("control", True, "it has no login"),
        *((host, False, "set control-host to 127.0.0.1") for host in ("0.0.0.0", "::", "", "0", "::0")),
    ):
        (finding,) = server_checks.control_checks(dataclasses.replace(server, control_host=host))
        assert (finding.ok, words in finding.found) == (ok, True), finding.found


# Python 3.13's default context


def without_identifiers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make certificates as they were: no key identifiers, no key usage in the server's."""
    add, left_out = x509.CertificateBuilder.add_extension, (x509.SubjectKeyIdentifier, x509.AuthorityKeyIdentifier)

    def some(builder: Any, extension: Any, critical: bool) -> Any:
        signs = isinstance(extension, x509.KeyUsage) and extension.digital_signature
        return builder if signs or isinstance(extension, left_out) else add(builder, extension, critical)

    monkeypatch.setattr(x509.CertificateBuilder, "add_extension", some)


def strict_handshake(port: int, authority: Path) -> str:
    """Shake hands as Python 3.13 does by default, and return why not."""
    context = ssl.create_default_context(cafile=str(authority))
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=20) as plain:
            context.wrap_socket(plain, server_hostname="127.0.0.1").close()
    except ssl.SSLCertVerificationError as error:
        return error.verify_message
    return ""


def test_certificates_pass_the_strict_check(tmp_path: Path, tls_server: Callable[[ServerFolder], int]) -> None:
    server = make_server(tmp_path / "server", ["127.0.0.1"])
    assert strict_handshake(tls_server(server), server.path / "ca.crt") == ""
    for name in ("ca.crt", "server.pem"):
        held = certificates.read_certificate((server.path / name).read_bytes(), name)
        assert certificates.lacks(held) == []
        assert held.extensions.get_extension_for_class(x509.KeyUsage).critical
    assert not [
        finding
        for finding in (*server_checks.authority_checks(server.path), *server_checks.certificate_checks(server))
        if not finding.ok
    ]


def test_a_certificate_can_do_no_more_than_it_is_for_and_lasts_as_long_as_is_said(tmp_path: Path) -> None:
    """Whoever steals a server's key can make no further certificate with it."""
    server = make_server(tmp_path / "server", ["127.0.0.1"])
    for name, days, constraints, uses in (
        ("ca.crt", 3650, x509.BasicConstraints(ca=True, path_length=0), {"key_cert_sign", "crl_sign"}),
        ("server.pem", 397, x509.BasicConstraints(ca=False, path_length=None), {"digital_signature"}),
    ):
        held = certificates.read_certificate((server.path / name).read_bytes(), name)
        found = held.extensions.get_extension_for_class(x509.BasicConstraints)
        assert (found.critical, found.value) == (True, constraints)
        usage = held.extensions.get_extension_for_class(x509.KeyUsage).value
        allowed = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
        assert {use for use in (*allowed, "key_cert_sign", "crl_sign") if getattr(usage, use)} == uses
        assert days - 0.01 < certificates.days_left(held) <= days
        began = datetime.now(UTC) - held.not_valid_before_utc
        assert timedelta(minutes=9) < began < timedelta(minutes=12), "a site whose clock is behind refuses it"
    extended = held.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(extended) == [x509.oid.ExtendedKeyUsageOID.SERVER_AUTH]


def test_an_old_folder_is_named_by_the_doctor_and_gets_a_good_server_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tls_server: Callable[[ServerFolder], int]
) -> None:
    with monkeypatch.context() as patch:
        without_identifiers(patch)
        server = make_server(tmp_path / "server", ["127.0.0.1"])
    assert "Missing" in strict_handshake(tls_server(server), server.path / "ca.crt"), "the fault is not found"
    (own,) = (finding.found for finding in server_checks.certificate_checks(server) if not finding.ok)
    assert "lacks subject key identifier, authority key identifier, key usage" in own
    assert "fedveil server renew" in own
    renew_server(server)
    renewed = certificates.read_certificate((server.path / "server.pem").read_bytes(), "the server")
    assert certificates.lacks(renewed) == []
    assert [finding for finding in server_checks.certificate_checks(server) if not finding.ok] == []
    (authority,) = (finding.found for finding in server_checks.authority_checks(server.path) if not finding.ok)
    assert "Python 3.13 and newer refuse it: the coordinator makes a new one" in authority
    assert why_unreachable(site_for(tmp_path, tls_server(server), server.path)) == "", "sites need nothing new"

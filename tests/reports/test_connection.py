"""A report on TLS, keys, certificate and the server's own check: what was asked, and what nobody knows."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import grpc
import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from made_run import MadeRun
from packaging.version import Version

from fedveil.common.bundle import own_digest
from fedveil.common.errors import ConfigError, RunFailed
from fedveil.common.ports import free_ports
from fedveil.common.run_lines import ConfigFile, read_file
from fedveil.common.server_file import CheckLine, OwnCheck, Reach, ServerFile, ServerStart
from fedveil.common.strict_json import to_json
from fedveil.deploy import doctor, fleet, fleet_grpc, shared_checks
from fedveil.deploy.certificates import SERVER_DAYS, fingerprint, read_certificate
from fedveil.deploy.commands import superlink_environment
from fedveil.deploy.fleet import asks_for_keys
from fedveil.deploy.fleet_grpc import AUTHENTICATED
from fedveil.deploy.node_keys import read_node_key
from fedveil.deploy.refusal import why_refused
from fedveil.deploy.run_check import Port, check_run
from fedveil.deploy.server_folder import ServerFolder, make_server, open_server, renew_server
from fedveil.deploy.site_folder import make_site
from fedveil.experiments.in_process import run_in_process
from fedveil.reports import report_of, write_reports
from fedveil.reports.connection import NEVER_KNOWN, NO_NETWORK, NOT_NAMED, NOT_RECORDED, SITES_OWN
from fedveil.reports.signature import NotGenuine, make_key, verified
from fedveil.server.conduct import conduct
from fedveil.server.own_check import FOLDER, began, own_check
from fedveil.server.registered import NODES
from fedveil.server.sites import Transport
from fedveil.strategies.job import configure

pytestmark = pytest.mark.rough_prices

BUNDLE, SHOWN = "ab" * 32, "AB:CD:EF"
WELL = OwnCheck(True, True, SHOWN, True, [CheckLine(True, "disk", "9 GiB free")])


def start(check: OwnCheck, reach: Reach = "network", began: str = "2026-11-24T10:00:00+00:00") -> ServerStart:
    return ServerStart(began, BUNDLE, reach, check)


def forms(folder: Path, *starts: ServerStart) -> dict[str, str]:
    """Return every form of the report of a run whose server found that."""
    run = MadeRun(folder).start().round(1, 0.7).end("completed")
    if starts:
        run.write(ServerFile(list(starts)))
    write_reports(folder)
    names = ("report.md", "report.html", "report.json")
    return {name: (folder / name).read_text(encoding="utf-8") for name in names}


# --- in words ---------------------------------------------------------------------------------------------------------


def test_every_form_states_tls_keys_certificate_bundle_and_the_check(tmp_path: Path) -> None:
    found = forms(tmp_path, start(WELL))
    for name in ("report.md", "report.html", "report.json"):
        for words in (SHOWN, BUNDLE, "9 GiB free", "TLS: on", "turned away an unregistered key"):
            assert words in found[name], (name, words)
    for name in ("report.md", "report.html"):
        assert "a proxy in front of it" in found[name]
        assert SITES_OWN.split("'")[0] in found[name]
    assert report_of(tmp_path).problems == []


@pytest.mark.parametrize(
    ("check", "reach", "words"),
    [
        (OwnCheck(), "network", NOT_NAMED),
        (OwnCheck(named=True), "network", "The sites' port could not be checked."),
        (OwnCheck(), "simulation", NO_NETWORK["simulation"]),
        (OwnCheck(), "one process", NO_NETWORK["one process"]),
    ],
)
def test_what_is_not_known_is_said_to_be_unknown_and_nothing_is_claimed(
    check: OwnCheck, reach: Reach, words: str, tmp_path: Path
) -> None:
    found = forms(tmp_path, start(check, reach))
    assert words.replace("'", "&#x27;") in found["report.md"] or words in found["report.md"]
    for text in found.values():
        assert "TLS: on" not in text
        assert "turned away" not in text
    (report,) = report_of(tmp_path).connections
    assert (report.tls, report.certificate, report.keys) == (None, "", None)
    assert report.unknown == (list(NEVER_KNOWN) if reach == "network" else [])


def test_a_port_whose_answer_does_not_tell_of_keys_was_asked(tmp_path: Path) -> None:
    text = forms(tmp_path, start(OwnCheck(True, True, SHOWN, None)))["report.md"]
    assert "authenticate by key. The port was checked, and its answer does not say." in text
    assert "could not be checked" not in text


def test_a_folder_without_the_servers_file_says_that_nothing_is_recorded(tmp_path: Path) -> None:
    found = forms(tmp_path)
    assert NOT_RECORDED in found["report.md"]
    assert NOT_RECORDED in found["report.html"].replace("&#39;", "'")
    assert report_of(tmp_path).connections == []


@pytest.mark.parametrize(
    ("check", "words"),
    [
        (OwnCheck(True, False, "", None), "port did NOT use TLS"),
        (OwnCheck(True, True, SHOWN, False), "sites did NOT have to authenticate by key"),
        (OwnCheck(True, True, SHOWN, True, [CheckLine(False, "disk", "0.1 GiB free: make room")]), "0.1 GiB free"),
    ],
)
def test_what_is_not_well_stands_first_in_every_form(check: OwnCheck, words: str, tmp_path: Path) -> None:
    found = forms(tmp_path, start(check))
    assert [text for text in report_of(tmp_path).problems if words in text]
    for name, text in found.items():
        assert words in text, name
    assert found["report.md"].index(words) < found["report.md"].index("## What is promised")


def test_starts_that_found_the_same_are_told_together(tmp_path: Path) -> None:
    later, last = "2026-11-24T11:00:00+00:00", "2026-11-24T12:00:00+00:00"
    forms(tmp_path, start(WELL), start(OwnCheck(), began=later), start(WELL, began=last))
    first, second = report_of(tmp_path).connections
    assert first.began == ["2026-11-24T10:00:00+00:00", last]
    assert second.began == [later]


def test_a_run_writes_it_down_at_each_start(toy_settings: dict[str, Any]) -> None:
    folder = run_in_process({**toy_settings, "rounds": 1}, 2)
    (one,) = read_file(ServerFile, folder).starts
    assert one.reach == "one process"
    assert len(one.bundle) == 64
    (folder / "result.json").unlink()
    run_in_process({**toy_settings, "rounds": 1, "resume": str(folder)}, 2)
    assert len(read_file(ServerFile, folder).starts) == 2
    assert len(read_file(ConfigFile, folder).resumed) == 1


def test_it_is_under_the_signature(tmp_path: Path) -> None:
    forms(tmp_path / "run", start(WELL))
    key = tmp_path / "key.pem"
    public = make_key(key)
    write_reports(tmp_path / "run", key)
    assert "report.json" in verified(tmp_path / "run", public)["files"]
    for name in ("report.json", "report.md", "report.html"):
        path = tmp_path / "run" / name
        content = path.read_text(encoding="utf-8")
        path.write_text(content.replace(SHOWN, "FF:CD:EF"), encoding="utf-8")
        with pytest.raises(NotGenuine, match="was changed"):
            verified(tmp_path / "run", public)
        path.write_text(content, encoding="utf-8")
    # A report that is made anew from another finding is another report: the signature goes.
    MadeRun(tmp_path / "run").write(ServerFile([start(OwnCheck())]))
    write_reports(tmp_path / "run")
    assert not (tmp_path / "run" / "report.signed.json").exists()


# --- what the server looks at -----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> ServerFolder:
    fleet, control = free_ports(2)
    return make_server(tmp_path / "server", ["localhost"], fleet_port=fleet, control_port=control)


@pytest.fixture(autouse=True)
def by_grpc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask as with Flower 1.39, whichever is installed; tests/deploy/test_front_door.py has the other way."""
    monkeypatch.setattr(fleet, "_calls", fleet_grpc.calls)


@contextmanager
def superlink(folder: ServerFolder, *, keys: bool = True, tls: bool = True) -> Iterator[None]:
    """A Fleet port that registers a key, or refuses it in the words of Flower's."""

    class Fleet(grpc.GenericRpcHandler):
        def service(self, details: grpc.HandlerCallDetails) -> Any:
            def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
                if keys:
                    context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"SuperNode {AUTHENTICATED}.")
                called.append(str(details.method))
                return b""

            return grpc.unary_unary_rpc_method_handler(answer)

    called: list[str] = []
    with served(folder, Fleet(), tls=tls):
        yield
    if called:
        assert [name.rpartition("/")[2] for name in called] == ["RegisterNode", "UnregisterNode"], "a key is left there"


@contextmanager
def served(folder: ServerFolder, handler: grpc.GenericRpcHandler, *, tls: bool = True) -> Iterator[None]:
    """A program at a server's Fleet port, with the folder's certificate."""
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers((handler,))
    pair = ((folder.path / "server.key").read_bytes(), (folder.path / "server.pem").read_bytes())
    place = f"127.0.0.1:{folder.fleet_port}"
    server.add_secure_port(place, grpc.ssl_server_credentials([pair])) if tls else server.add_insecure_port(place)
    server.start()
    try:
        yield
    finally:
        server.stop(None).wait()


def found(folder: ServerFolder) -> OwnCheck:
    return check_run(folder.runs, str(folder.path))


def failures(check: OwnCheck) -> str:
    return "; ".join(f"{line.what}: {line.found}" for line in check.checks if not line.ok)


def own_fingerprint(folder: ServerFolder) -> str:
    return fingerprint(read_certificate((folder.path / "server.pem").read_bytes(), "the server"))


def test_a_port_under_tls_is_asked_for_its_certificate_and_for_keys(
    folder: ServerFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_checks, "safe_versions", lambda: {"cryptography": Version("1")})
    (folder.nodes / "clinic.id").write_text("17", encoding="utf-8")
    with superlink(folder):
        check = found(folder)
    assert (check.named, check.tls, check.certificate, check.keys) == (True, True, own_fingerprint(folder), True)
    assert failures(check) == ""
    whats = {line.what for line in check.checks}
    assert {"flwr", "advisories", "disk", "authority", "server's certificate", "server's key"} <= whats
    assert CheckLine(True, "registered sites", "1") in check.checks
    said = "".join(line.found for line in check.checks)
    assert str(folder.path.parent) not in said, "a report is given to others, and no path of the server's disks is"
    assert "clinic" not in said


def test_a_package_with_known_advisories_is_found(folder: ServerFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_checks, "safe_versions", lambda: {"cryptography": Version("999")})
    assert "cryptography: " in failures(found(folder))


def test_a_server_that_takes_any_key_is_found(folder: ServerFolder) -> None:
    with superlink(folder, keys=False):
        assert found(folder).keys is False


def test_a_port_without_tls_is_found(folder: ServerFolder) -> None:
    with superlink(folder, tls=False):
        check = found(folder)
    assert (check.tls, check.certificate, check.keys) == (False, "", None)
    assert "does not speak TLS" in failures(check)


def test_a_silent_port_is_not_taken_for_a_secured_one(folder: ServerFolder) -> None:
    check = found(folder)
    assert (check.tls, check.certificate, check.keys) == (None, "", None)
    assert "does not answer" in failures(check)


def expired(folder: ServerFolder) -> None:
    folder.path.joinpath("server.toml").unlink()
    for name in ("server.pem", "server.key", "tasks.pem", "flwr/config.toml", "ca.crt"):
        (folder.path / name).unlink()
    past = datetime.now(UTC) - timedelta(days=SERVER_DAYS + 3)
    ports = {"fleet_port": folder.fleet_port, "control_port": folder.control_port}
    make_server(folder.path, ["localhost"], now=past, **ports)


def foreign(folder: ServerFolder) -> None:
    other = make_server(folder.path.parent / "other", ["localhost"])
    for name in ("server.pem", "server.key"):
        (folder.path / name).write_bytes((other.path / name).read_bytes())


@pytest.mark.parametrize(
    ("fault", "words"),
    [(expired, "expired 3 days ago: renew it"), (foreign, "it is not of the authority in ca.crt: renew it")],
)
def test_a_certificate_that_nobody_should_trust_is_told(folder: ServerFolder, fault: Any, words: str) -> None:
    fault(folder)
    with superlink(folder):
        check = found(folder)
    assert words in failures(check)
    assert check.certificate == own_fingerprint(folder), "what the port shows is told, whatever it is"


def test_a_renewed_certificate_that_the_port_does_not_show_yet_is_told(folder: ServerFolder) -> None:
    old = own_fingerprint(folder)
    with superlink(folder):
        renew_server(folder)
        check = found(folder)
    assert check.certificate == old
    assert "it shows another certificate than server.pem: restart the server" in failures(check)


@pytest.mark.parametrize("name", ["server.pem", "ca.crt", "server.toml"])
def test_a_missing_file_is_told_without_its_path(folder: ServerFolder, name: str) -> None:
    with superlink(folder):
        (folder.path / name).unlink()
        check = found(folder)
    assert name in failures(check)
    assert str(folder.path) not in failures(check)
    assert check.named


def test_names_that_cannot_be_read_are_told_without_their_path(
    folder: ServerFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NODES, str(tmp_path / "elsewhere"))
    with superlink(folder):
        check = found(folder)
    assert "the registered sites cannot be read from their folder" in failures(check)
    assert str(tmp_path) not in failures(check)


def test_a_superlink_that_names_no_folder_has_its_machine_checked_alone(tmp_path: Path) -> None:
    check = check_run(tmp_path, "")
    assert (check.named, check.tls, check.keys) == (False, None, None)
    assert {"flwr", "disk"} <= {line.what for line in check.checks}


@pytest.mark.parametrize("free", [1 << 40, 1])
def test_a_folder_of_runs_that_is_not_there_yet_is_told_without_the_path_of_its_parent(
    free: int, folder: ServerFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(free))
    for named in (str(folder.path), ""):
        check = check_run(folder.path.parent / "not" / "there", named)
        (line,) = [line for line in check.checks if line.what == "disk"]
        assert "free at the folder of runs" in line.found
        assert str(folder.path.parent) not in "".join(line.found for line in check.checks)


@dataclass(frozen=True)
class Usage:
    """Of a disk."""

    free: int


@pytest.mark.parametrize("error", [OSError, ValueError, RuntimeError])
def test_a_check_that_breaks_stops_no_other_and_what_the_port_showed_stays(
    error: type[Exception], folder: ServerFolder
) -> None:
    with superlink(folder), patch("fedveil.deploy.run_check.control_checks", side_effect=error("PRIVATE-WORDS")):
        check = found(folder)
    assert (check.tls, check.certificate, check.keys) == (True, own_fingerprint(folder), True)
    assert f"Control port: it could not be looked at ({error.__name__})" in failures(check)
    assert "PRIVATE-WORDS" not in failures(check)
    assert CheckLine(True, "registered sites", "0") in check.checks


def test_keys_that_cannot_be_asked_for_leave_what_the_port_showed(folder: ServerFolder) -> None:
    with superlink(folder), patch("fedveil.deploy.run_check.asks_for_keys", side_effect=ValueError("PRIVATE-WORDS")):
        check = found(folder)
    assert (check.tls, check.certificate, check.keys) == (True, own_fingerprint(folder), None)
    assert "keys of the sites: it could not be looked at (ValueError)" in failures(check)


@pytest.mark.parametrize("fleet", ["localhost", "0.0.0.0:", "0.0.0.0:x", "0.0.0.0:0", "0.0.0.0:70000"])
def test_an_address_of_the_sites_without_a_port_is_an_error_that_says_so(fleet: str, folder: ServerFolder) -> None:
    path = folder.path / "server.toml"
    path.write_text(path.read_text().replace(folder.fleet, fleet))
    with pytest.raises(ConfigError, match="has no port: write ADDRESS:PORT"):
        open_server(folder.path)
    check = found(folder)
    assert "has no port" in failures(check)
    assert str(folder.path) not in failures(check)


def test_a_proxy_of_the_environment_does_not_stand_before_the_own_machine(
    folder: ServerFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("grpc_proxy", "https_proxy", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_grpc_proxy", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with superlink(folder):
        assert asks_for_keys(f"127.0.0.1:{folder.fleet_port}", (folder.path / "ca.crt").read_bytes()) is True


# --- how a site asks --------------------------------------------------------------------------------------------------


class Activating(grpc.GenericRpcHandler):
    """A Fleet port that gives one answer to whoever would go online, and keeps what it was sent."""

    def __init__(self, code: grpc.StatusCode, words: str) -> None:
        self.code, self.words = code, words
        self.asked: list[tuple[str, ActivateNodeRequest, dict[str, Any]]] = []

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
            sent = {str(key): value for key, value in context.invocation_metadata()}
            self.asked.append((str(details.method), ActivateNodeRequest.FromString(request), sent))
            if self.code != grpc.StatusCode.OK:
                context.abort(self.code, self.words)
            return b""

        return grpc.unary_unary_rpc_method_handler(answer)


@pytest.mark.parametrize(
    ("code", "words", "reason", "clock"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, "Heartbeat interval", "", True),
        (grpc.StatusCode.FAILED_PRECONDITION, "no such key", "does not know this site's key: send node.pub", True),
        (grpc.StatusCode.UNAUTHENTICATED, "Invalid timestamp", "refuses the time of this site's clock: set", False),
        (grpc.StatusCode.UNAUTHENTICATED, "Invalid signature", "another answer: UNAUTHENTICATED: Invalid sig", False),
        (grpc.StatusCode.UNAVAILABLE, "gone", "the server does not answer: gone", False),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "late", "the server does not answer: late", False),
        (grpc.StatusCode.OK, "", "another answer: it let this check go online, which it must not", False),
    ],
    ids=lambda value: value.name if isinstance(value, grpc.StatusCode) else "",
)
def test_one_answer_alone_lets_a_site_in_and_no_other_says_that_its_clock_is_right(
    code: grpc.StatusCode, words: str, reason: str, clock: bool, folder: ServerFolder, tmp_path: Path
) -> None:
    site = make_site(
        *(tmp_path / "clinic", "clinic", f"127.0.0.1:{folder.fleet_port}"),
        policy="",
        node="partition-id=0 num-partitions=1",
        authority=folder.path / "ca.crt",
    )
    fleet = Activating(code, words)
    with served(folder, fleet):
        refused = why_refused(site)
        (registration,), (time,) = doctor._registration(site), doctor._clock(site)
    assert reason in refused if reason else refused == ""
    assert (registration.ok, time.ok) == (reason == "", clock), time.found
    assert ("accepts this machine's time" in time.found) == clock
    method, request, sent = fleet.asked[0]
    assert (method, request.heartbeat_interval) == ("/flwr.proto.Fleet/ActivateNode", 0.0), "the check goes online"
    key = read_node_key((site.path / "node.key").read_bytes()).public_key()
    shown = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    assert request.public_key == sent["flwr-public-key-bin"] == shown
    signed = sent["flwr-timestamp"].encode()
    key.verify(sent["flwr-signature-bin"], signed, ec.ECDSA(hashes.SHA256()))


# --- how the server app asks ------------------------------------------------------------------------------------------


def test_a_started_server_names_its_folder_and_the_app_asks_it(
    folder: ServerFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER, superlink_environment(folder, folder.home)[FOLDER])
    with superlink(folder):
        assert own_check(folder.runs, "network").certificate == own_fingerprint(folder)
        assert not own_check(folder.runs, "simulation").named, "a simulation dials no port, whatever is exported"


FAILING = f"print({json.dumps(to_json(WELL))!r}); raise SystemExit(1)"
"""Says that all is well, and then that it has failed."""


@pytest.mark.parametrize("code", ["raise SystemExit(1)", "print('no JSON')", 'print(\'{"tls": "yes"}\')', FAILING])
def test_a_check_that_cannot_be_done_is_one_that_failed(code: str, tmp_path: Path) -> None:
    check = own_check(tmp_path, "network", (sys.executable, "-c", code))
    assert "it could not be done" in failures(check)
    assert (check.tls, check.keys) == (None, None)


def test_a_check_that_takes_too_long_or_is_not_there_is_one_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedveil.server.own_check.PATIENCE", 0.2)
    well = json.dumps(to_json(WELL))
    waiting = (sys.executable, "-S", "-c", f"import time; time.sleep(3); print({well!r})")
    for command in (waiting, (str(tmp_path / "no-such-program"),)):
        for named in ("", "/srv/fedveil"):
            monkeypatch.setenv(FOLDER, named)
            check = own_check(tmp_path, "network", command)
            assert check.named == bool(named), "a report would say that nobody knows, or that a folder was asked"
            assert "it could not be done" in failures(check)
            assert str(tmp_path) not in failures(check), "a report names a path of the disks"


def test_the_app_asks_the_installed_version_by_the_folders_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def answer(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, json.dumps(to_json(WELL)).encode())

    monkeypatch.setattr(subprocess, "run", answer)
    monkeypatch.setenv(FOLDER, "/srv/fedveil")
    assert own_check(tmp_path, "network") == WELL
    own_check(tmp_path, "simulation")
    monkeypatch.delenv(FOLDER)
    own_check(tmp_path, "network")
    # -P: whatever lies where the app runs, such as the bundle's own packages, is not taken for what is installed.
    program = [sys.executable, "-P", "-m", "fedveil.deploy.run_check", str(tmp_path)]
    assert asked == [[*program, "/srv/fedveil"], [*program, ""], [*program, ""]]


def test_what_the_app_found_is_written_down_and_nothing_stands_for_it(toy_settings: dict[str, Any]) -> None:
    job = configure({**toy_settings, "privacy.mode": "none"})

    def connect(*_: Any) -> Transport:
        raise RunFailed("no round is needed")

    given = began("network", WELL)
    assert (given.reach, given.check, given.bundle) == ("network", WELL, own_digest())
    assert began("simulation").check == OwnCheck()
    with pytest.raises(RunFailed, match="no round is needed"):
        conduct(job, "given", connect, given)
    (folder,) = Path(toy_settings["output"]).iterdir()
    assert read_file(ServerFile, folder).starts == [given]


def test_a_server_app_that_claims_tls_without_asking_is_found(folder: ServerFolder) -> None:
    """The tests above would let it pass if the word of a folder alone were enough."""
    with patch("fedveil.deploy.run_check.ask_port", lambda port: Port(True, SHOWN)):
        check = found(folder)
    assert "does not answer" in failures(check)
    assert "it shows another certificate than server.pem" in failures(check)
    assert check.keys is None

"""The server's own check when a run begins, printed as JSON for the server app.

Run as ``python -m fedveil.deploy.run_check RUNS FOLDER``: where runs are kept, and the folder of ``fedveil server
start``, empty if the SuperLink was started otherwise. It reads the certificate of the port that sites dial, and whether
that takes an unregistered key, without going online. No line names a path of the disks.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import ssl
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fedveil.common.files import expanded
from fedveil.common.server_file import CheckLine, OwnCheck
from fedveil.common.strict_json import to_json
from fedveil.deploy import shared_checks as shared
from fedveil.deploy.certificates import as_fingerprint, fingerprint, read_certificate
from fedveil.deploy.check_results import Check, CheckResult, examine
from fedveil.deploy.files import read_bytes
from fedveil.deploy.fleet import asks_for_keys
from fedveil.deploy.fleet_answers import PATIENCE
from fedveil.deploy.refusal import why_unreachable
from fedveil.deploy.server_checks import authority_checks, certificate_checks, control_checks, task_checks
from fedveil.deploy.server_folder import ServerFolder, open_server
from fedveil.deploy.site_folder import SiteFolder
from fedveil.server.registered import NODES, names_in

LOCAL = "127.0.0.1"
"""In every certificate of ``fedveil server init``."""


@dataclass(frozen=True)
class Port:
    """What the port that sites dial said."""

    tls: bool | None
    """Whether it took a TLS handshake; None: it does not answer."""
    certificate: str = ""
    """SHA-256 fingerprint of what it showed."""


def ask_port(port: int) -> Port:
    """Return what a port of this machine shows, trusted or not."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with (
            socket.create_connection((LOCAL, port), timeout=PATIENCE) as plain,
            context.wrap_socket(plain) as secured,
        ):
            shown = secured.getpeercert(binary_form=True)
    except ssl.SSLError:
        return Port(False)
    except OSError:
        return Port(None)
    return Port(True, as_fingerprint(hashlib.sha256(shown or b"").digest()))


def check_run(runs: Path, named: str) -> OwnCheck:
    """Return what can be known of a server when a run begins.

    Args:
        runs: where runs are kept.
        named: the server's folder, if the SuperLink names one.
    """
    checks = [
        ("versions", shared.versions),
        ("advisories", shared.advisories),
        ("disk", lambda: shared.disk(runs, "disk", RUNS)),
    ]
    if not named:
        return OwnCheck(checks=_lines(_examined(checks), {str(runs): RUNS}))
    folder, places = expanded(named).absolute(), {str(runs): RUNS, named: FOLDER}
    opened = list(_examined([("server's folder", lambda: _opened(folder))]))
    if opened:
        return OwnCheck(named=True, checks=_lines([*_examined(checks), *opened], {**places, str(folder): FOLDER}))
    server = open_server(folder)
    port = ask_port(server.fleet_port)
    own = [
        ("authority", lambda: authority_checks(folder)),
        ("server's certificate", lambda: certificate_checks(server)),
        ("server's key", lambda: shared.private_file(folder / "server.key", "server's key")),
        ("tasks' key", lambda: task_checks(folder)),
        ("port of the sites", lambda: _port_checks(server, port)),
        ("Control port", lambda: control_checks(server)),
        ("registered sites", lambda: _registered(server)),
    ]
    keys = list[bool | None]()
    if port.tls:
        own.append(("keys of the sites", lambda: _keys(server, keys)))
    lines = _lines(_examined([*checks, *own]), {**places, str(folder): FOLDER, str(_nodes(server)): "their folder"})
    return OwnCheck(
        named=True,
        tls=port.tls,
        certificate=port.certificate,
        keys=keys[0] if keys else None,
        checks=lines,
    )


FOLDER, RUNS = "the server's folder", "the folder of runs"
"""Their names in place of their paths."""


def _opened(folder: Path) -> Iterator[CheckResult]:
    """Raise ConfigError unless the folder is a server's; nothing is said of one that is."""
    open_server(folder)
    yield from ()


def _examined(checks: Iterable[tuple[str, Check]]) -> Iterator[CheckResult]:
    """Yield as ``examine``; a check that fails in any other way stops no other, and what was found stays."""
    for what, check in checks:
        try:
            yield from examine([(what, check)])
        except (OSError, ValueError, RuntimeError) as error:
            why = f"it could not be looked at ({type(error).__name__}): run 'fedveil doctor' by hand"
            yield CheckResult(False, what, why)


def _lines(results: Iterator[CheckResult] | list[CheckResult], places: dict[str, str]) -> list[CheckLine]:
    found = []
    for result in results:
        text = result.found
        for path in sorted(places, key=len, reverse=True):  # the longest first: one may lie in another
            text = text.replace(f"{path}/", "").replace(path, places[path])
        found.append(CheckLine(result.ok, result.what, text))
    return found


def _port_checks(server: ServerFolder, port: Port) -> Iterator[CheckResult]:
    what = "port of the sites"
    local = SiteFolder(server.path, "server", f"{LOCAL}:{server.fleet_port}")
    reason = why_unreachable(local)
    yield CheckResult(not reason, what, reason or f"{server.fleet_port}, it shows a certificate of the authority")
    if not port.certificate:
        return
    own = read_certificate(read_bytes(server.path / "server.pem", "the server's certificate"), "the server")
    if port.certificate != fingerprint(own):
        yield CheckResult(
            False, what, "it shows another certificate than server.pem: restart the server with 'fedveil server start'"
        )


def _keys(server: ServerFolder, found: list[bool | None]) -> Iterator[CheckResult]:
    """Put whether the port asks for keys into ``found``, and say nothing of them."""
    path = server.path / "ca.crt"
    if path.is_file():  # that it is missing is a line of its own
        authority = read_bytes(path, "the authority's certificate")
        found.append(asks_for_keys(f"{LOCAL}:{server.fleet_port}", authority))
    yield from ()


def _registered(server: ServerFolder) -> Iterator[CheckResult]:
    # Their number alone: who takes part is no business of this line.
    yield CheckResult(True, "registered sites", str(len(names_in(_nodes(server)))))


def _nodes(server: ServerFolder) -> Path:
    return Path(os.environ.get(NODES) or server.nodes)


if __name__ == "__main__":
    print(json.dumps(to_json(check_run(Path(sys.argv[1]), sys.argv[2]))))

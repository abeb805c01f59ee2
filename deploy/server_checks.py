"""Checks of a server's folder, for ``fedveil doctor`` and for the server's own check when a run begins."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from fedveil.common.ports import dialled
from fedveil.deploy import shared_checks as shared
from fedveil.deploy.certificates import belongs_to, is_issued_by, names_of, read_certificate
from fedveil.deploy.check_results import CheckResult, examine, in_silence
from fedveil.deploy.control import control_of
from fedveil.deploy.files import read_bytes
from fedveil.deploy.refusal import why_unreachable
from fedveil.deploy.registry import online_words
from fedveil.deploy.server_folder import RENEWAL, ServerFolder, check_tasks
from fedveil.deploy.site_folder import SiteFolder
from fedveil.deploy.superlink import TABLES
from fedveil.server.registered import names_in
from fedveil.server.signing import TASKS

RENEW = "renew it with 'fedveil server renew'"
NEW_AUTHORITY = "the coordinator makes a new one ('fedveil server init' in a new folder) for every site"


def examine_server(
    folder: ServerFolder, model: str, task: str, step: Callable[[str], None] = in_silence
) -> Iterator[CheckResult]:
    """Check a server's folder; a running SuperLink is queried, a stopped one is no failure."""
    return examine(
        [
            ("versions", shared.versions),
            ("advisories", shared.advisories),
            ("authority", lambda: authority_checks(folder.path)),
            ("server's certificate", lambda: certificate_checks(folder)),
            ("server's key", lambda: shared.private_file(folder.path / "server.key", "server's key")),
            ("tasks' key", lambda: task_checks(folder.path)),
            ("Control port", lambda: control_checks(folder)),
            ("ports", lambda: _server_ports(folder)),
            ("registered sites", lambda: _registered(folder)),
            ("disk", lambda: shared.disk(folder.runs, "disk")),
            ("base model", lambda: shared.base_model(model, task, "")),
        ],
        step,
    )


def task_checks(path: Path) -> Iterator[CheckResult]:
    """The key that signs tasks, and its certificate, in a server's folder."""
    yield from shared.private_file(path / TASKS, "tasks' key")
    check_tasks(path)
    certificate = read_certificate(read_bytes(path / TASKS, "the key that signs tasks"), "the tasks")
    yield from shared.validity(certificate, "tasks' certificate", RENEW)


def authority_checks(path: Path) -> Iterator[CheckResult]:
    """The authority's certificate in a server's or a site's folder."""
    authority = read_certificate(read_bytes(path / "ca.crt", "the authority's certificate"), "the authority")
    yield from shared.validity(authority, "authority", NEW_AUTHORITY)
    yield from shared.strictness(authority, "authority", NEW_AUTHORITY)


def certificate_checks(folder: ServerFolder) -> Iterator[CheckResult]:
    """The server's certificate: its time, its issuer, its key and its names."""
    what = "server's certificate"
    server = read_certificate(read_bytes(folder.path / "server.pem", what), "the server")
    authority = read_certificate(read_bytes(folder.path / "ca.crt", "the authority's certificate"), "the authority")
    yield from shared.validity(server, what, RENEW)
    yield from shared.strictness(server, what, RENEW)
    if not is_issued_by(server, authority):
        yield CheckResult(False, what, f"it is not of the authority in ca.crt: {RENEW}")
    if (folder.path / RENEWAL).exists():
        yield CheckResult(False, what, f"a renewal was interrupted: {RENEW}, or start the server")
    if not belongs_to(server, read_bytes(folder.path / "server.key", "the server's key")):
        yield CheckResult(False, what, f"server.key is not its key: {RENEW}")
    certified = names_of(server)
    lacking = [name for name in folder.name_list if name not in certified]
    if lacking:
        yield CheckResult(False, "certificate's names", f"it does not hold for {', '.join(lacking)}: {RENEW}")
    else:
        yield CheckResult(True, "certificate's names", ", ".join(certified))


def control_checks(folder: ServerFolder) -> Iterator[CheckResult]:
    """The Control port does not listen to everybody."""
    host = folder.control_host
    open_to_all, local = _is_everywhere(host), host in ("127.0.0.1", "::1", "localhost")
    advice = "set control-host to 127.0.0.1" if open_to_all else "keep everyone else out"
    walled = "'fedveil server start' lets its own user and root alone"  # where the kernel says whose a connection is
    who = (walled if TABLES[0].is_file() else "every user of this machine does") if local else "it has no login"
    yield CheckResult(
        not open_to_all,
        "Control port",
        f"{folder.control}; who reaches it can let nodes in and submit runs, and {who}: {advice}",
    )


def _is_everywhere(host: str) -> bool:
    """Return whether an address is that of all interfaces, however it is written: 0 is 0.0.0.0 as well."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST) if host else ()
    except OSError:
        return False
    return not host or any(ipaddress.ip_address(str(place[0])).is_unspecified for *_, place in found)


def _server_ports(folder: ServerFolder) -> Iterator[CheckResult]:
    for what, host, port in (
        ("Fleet port", "127.0.0.1", folder.fleet_port),
        ("Control port", folder.control_host, folder.control_port),
    ):
        if _answers(host, port):
            local = SiteFolder(folder.path, "server", dialled(host, port))
            reason = why_unreachable(local)
            yield CheckResult(not reason, what, f"{port}, " + (reason or "a SuperLink with this certificate answers"))
        else:
            yield CheckResult(True, what, f"{port} is free: start the server with 'fedveil server start'")


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=3).close()
    except OSError:
        return False
    return True


def _registered(folder: ServerFolder) -> Iterator[CheckResult]:
    names = sorted(path.stem for path in folder.nodes.glob("*.id"))
    if not _answers(folder.control_host, folder.control_port):
        yield CheckResult(True, "registered sites", f"{', '.join(names) or 'none'} (the SuperLink is not running)")
        return
    with control_of(folder) as control:
        online = online_words(control.online(), names_in(folder.nodes))
    yield CheckResult(True, "registered sites", f"{', '.join(names) or 'none'}; {online}")

"""Become the SuperLink of a folder, or a SuperNode and its worker, unless something prevents it."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from fedveil.common.errors import DataError
from fedveil.common.ports import free_ports
from fedveil.common.registered import require_installed_rows
from fedveil.common.threads import CORES
from fedveil.deploy.certificates import belongs_to, days_left, is_issued_by, read_certificate
from fedveil.deploy.commands import (
    environment,
    own_module,
    runner_command,
    superlink_command,
    superlink_environment,
    supernode_command,
    worker_command,
)
from fedveil.deploy.files import FOLDER_MODE, put_file, read_bytes
from fedveil.deploy.health import flower_home, has_process, secret_of
from fedveil.deploy.refusal import why_refused
from fedveil.deploy.server_folder import ServerFolder, check_tasks, finish_renewal
from fedveil.deploy.site_check import check_site
from fedveil.deploy.site_folder import ANY_PORT, SiteFolder, check_name, node_settings
from fedveil.privacy.entropy import require_system_entropy

RETRY_SECONDS = 5.0
SAY_AGAIN_SECONDS = 300.0


def start_server(folder: ServerFolder, say: Callable[[str], None]) -> None:
    """Replace this process by the SuperLink and its runner.

    Raises:
        DataError: a certificate is expired or wrong, a file is missing, or a port is taken.
        MechanismError: a test has replaced the operating system's entropy.
        ConfigError: a row of user code is registered in this process.
    """
    require_system_entropy()
    require_installed_rows()
    if finish_renewal(folder):
        say("an interrupted renewal of the server's certificate is complete now")
    server = read_certificate(read_bytes(folder.path / "server.pem", "the server's certificate"), "the server")
    authority = read_certificate(read_bytes(folder.path / "ca.crt", "the authority's certificate"), "the authority")
    if days_left(server) < 0:
        raise DataError("the server's certificate has expired: renew it with 'fedveil server renew'")
    if not is_issued_by(server, authority):
        raise DataError("server.pem is not of the authority in ca.crt: renew it with 'fedveil server renew'")
    if not belongs_to(server, read_bytes(folder.path / "server.key", "the server's key")):
        raise DataError("server.key does not belong to server.pem: renew both with 'fedveil server renew'")
    check_tasks(folder.path)
    for place in (folder.database.parent, folder.runs, folder.nodes):
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
    another = "name another in server.toml"
    _check_free("the Fleet port", *_host_and_port(folder.fleet), another)
    _check_free("the Control port", folder.control_host, folder.control_port, another)
    say(f"SuperLink: sites on {folder.fleet}, control on {folder.control}")
    home = flower_home(folder.database.parent)
    secret = home / "server.secret"
    pair = superlink_command(folder, secret), runner_command(folder, secret)
    _become_pair(pair, secret, superlink_environment(folder, home))


def _become_pair(pair: tuple[list[str], list[str]], secret: Path, environment: Mapping[str, str]) -> None:
    """Make a new secret that both prove themselves by, and replace this process by their supervisor."""
    secret.parent.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
    put_file(secret, secrets.token_hex(32).encode(), private=True)
    command = [*own_module("fedveil.deploy.pair"), *map(json.dumps, pair)]
    os.execve(command[0], command, environment)


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _check_free(what: str, host: str, port: int, another: str) -> None:
    """Raise DataError if a port of this machine is taken; ``another`` says how to choose one."""
    try:
        family, kind, proto, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, proto) as one:
            # As gRPC's own: a port that was closed just now is free.
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(place)
    except OSError as error:
        raise DataError(
            f"{what} {host}:{port} cannot be listened on ({error.strerror}): stop what uses it, or {another}"
        ) from error


def start_site(folder: SiteFolder, say: Callable[[str], None], more: str = "") -> None:
    """Wait until the server lets this site in, then replace this process by the SuperNode and its worker.

    The reason why the server refuses the site is printed once, and again every five minutes: most reasons end there.

    Args:
        folder, more: the site's folder, and node settings that win over the folder's.
        say: prints one line.

    Raises:
        ConfigError: the settings are wrong, the site's name is not its key's, or the policy refuses every round.
        DataError: a file of the folder or the records cannot be read, or the SuperNode's port is taken.
    """
    check_name(folder, node_settings(folder, more))
    check_site(folder, say, more, rows=False)
    check_own_port(folder)
    secret = secret_file(folder)
    said, when = "", 0.0
    while reason := why_refused(folder):
        if reason != said or time.monotonic() - when > SAY_AGAIN_SECONDS:
            said, when = reason, time.monotonic()
            say(f"waiting: {reason}")
        time.sleep(RETRY_SECONDS)
    check_own_port(folder)  # another site that waited as well may have it by now
    if folder.runtime_port == ANY_PORT:
        folder = dataclasses.replace(folder, runtime_port=free_ports(1)[0])
    pair = supernode_command(folder, more, secret), worker_command(folder, secret, more)
    say(f"the server at {folder.server} lets this site in")
    cores = {CORES: str(folder.processes)} if folder.processes else {}
    _become_pair(pair, secret, {**environment(flower_home(folder.path), folder.road), **cores})


def check_own_port(folder: SiteFolder) -> None:
    """Raise DataError if the site's folder names a port for its own processes that something listens on."""
    another = f"give this site one of its own as runtime-port in {folder.path / 'site.toml'}, or {ANY_PORT} for any"
    if folder.runtime_port != ANY_PORT:
        _check_free("the SuperNode's port", "127.0.0.1", folder.runtime_port, another)


def is_running(folder: SiteFolder) -> bool:
    """Return whether this site's SuperNode or worker runs on this machine."""
    return has_process(secret_file(folder))


def secret_file(folder: SiteFolder) -> Path:
    """Return the file by which the site's worker proves itself to its SuperNode; new at every start."""
    return secret_of(folder.path, folder.site)

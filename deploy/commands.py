"""The command lines of Flower's programs for a server's and a site's folder, and the environment they need."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from fedveil.common.config.flat import Scalar
from fedveil.common.config.text import toml_value
from fedveil.common.hub import CLOSED
from fedveil.deploy.road import Road, past_proxies
from fedveil.deploy.server_folder import ServerFolder
from fedveil.deploy.site_folder import SiteFolder, node_settings
from fedveil.deploy.transport import superlink_words
from fedveil.server.own_check import FOLDER
from fedveil.server.registered import NODES

QUOTE, QUOTE_BY_NUMBER = r"\"", r"\u0022"
"""A quote within a text in TOML, in two ways."""


def program(name: str) -> str:
    """Return the path of a program that was installed beside this Python."""
    return str(Path(sys.executable).parent / name)


def environment(home: Path, road: Road | None = None) -> dict[str, str]:
    """Return this process's environment with Flower's own folder at ``home``, and the road of a site to its server."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    given = road.environment(os.environ) if road else past_proxies(os.environ)
    return {**given, **CLOSED, "FLWR_HOME": str(home), "PATH": path}


def superlink_environment(folder: ServerFolder, home: Path) -> dict[str, str]:
    """Return the SuperLink's environment: as ``environment``, and where its runs find this folder and the sites' names.

    A container, whose coordinator has a folder of its own, names another place for the names than ``folder`` has.
    """
    return {NODES: str(folder.nodes), **environment(home), FOLDER: str(folder.path)}


def superlink_command(folder: ServerFolder, secret: Path | None = None) -> list[str]:
    """Return the SuperLink's command: TLS on every port, and only registered keys may join.

    ``secret`` is a file that a runner proves itself by. Without it the SuperLink starts a process for every run, which
    runs the submitted code, and any local user may ask its port for runs.
    """
    return [
        *own_module("fedveil.deploy.superlink"),
        str(folder.path),
        *("--ssl-ca-certfile", str(folder.path / "ca.crt")),
        *("--ssl-certfile", str(folder.path / "server.pem")),
        *("--ssl-keyfile", str(folder.path / "server.key")),
        "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
        *_isolation(secret),
        *("--database", str(folder.database)),
        *superlink_words(folder),
    ]


def supernode_command(folder: SiteFolder, more: str = "", secret: Path | None = None) -> list[str]:
    """Return the SuperNode's command; ``more``: node settings that win over the folder's.

    ``secret`` is a file that a worker proves itself by. Without it the SuperNode starts a process for every message,
    which runs the code of the server's bundle, and any local user may ask its port for tasks.
    """
    return [
        program("flower-supernode"),
        *("--root-certificates", str(folder.path / "ca.crt")),
        *("--auth-supernode-private-key", str(folder.path / "node.key")),
        *("--superlink", folder.server),
        *("--host", "127.0.0.1", "--port", str(folder.runtime_port)),
        *_isolation(secret),
        *("--node-config", node_config(node_settings(folder, more))),
    ]


def worker_command(folder: SiteFolder, secret: Path, more: str = "") -> list[str]:
    """Return the command of the site's own worker, which runs the installed code; ``more`` as for the SuperNode."""
    return [
        *own_module("fedveil.client.worker"),
        *("--port", str(folder.runtime_port), "--secret", str(secret)),
        *("--authority", str(folder.path / "ca.crt"), "--key", str(folder.path / "node.key")),
        *("--node", json.dumps(node_settings(folder, more))),
    ]


def runner_command(folder: ServerFolder, secret: Path) -> list[str]:
    """Return the command of the server's own runner, which runs the installed code."""
    return [
        *own_module("fedveil.server.runner"),
        *("--address", folder.control, "--authority", str(folder.path / "ca.crt"), "--secret", str(secret)),
    ]


def _isolation(secret: Path | None) -> list[str]:
    """Return how Flower's process has its tasks done: by a process that knows the secret, or by itself."""
    words = ["subprocess"] if secret is None else ["process", "--superexec-auth-secret-file", str(secret)]
    return ["--isolation", *words]


def own_module(name: str) -> list[str]:
    """Return the command that runs an installed module; without -P a folder beside it would come first."""
    return [sys.executable, "-P", "-m", name]


def node_config(settings: Mapping[str, Scalar]) -> str:
    """Return settings as Flower's ``--node-config`` takes them, and the folder's ``node``.

    >>> node_config({"site": "clinic", "partition-id": 0})
    'site="clinic" partition-id=0'
    """
    return " ".join(f"{key}={_value(value)}" for key, value in settings.items())


def _value(value: Scalar) -> str:
    """Return a value in TOML; a text has no quote in it, at which both readers would take it to end."""
    text = toml_value(value)
    return f'"{text[1:-1].replace(QUOTE, QUOTE_BY_NUMBER)}"' if isinstance(value, str) else text

"""How sites reach a server, by the installed Flower: gRPC on a port of its own with 1.39, HTTP from 1.40 on."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

from packaging.version import Version

if TYPE_CHECKING:
    from fedveil.deploy.server_folder import ServerFolder

IS_HTTP = Version(version("flwr")) >= Version("1.40")
"""Whether the SuperLink has one port for all, so that a front door stands at the sites' port."""


def superlink_words(folder: ServerFolder) -> list[str]:
    """Return the words of the SuperLink's command that say where it listens."""
    fleet = [] if IS_HTTP else ["--fleet-api-address", folder.fleet]
    return [*fleet, "--host", folder.control_host, "--port", str(folder.control_port)]

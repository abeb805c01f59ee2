"""Flower's own command against a server's Control API: register, revoke, list, submit, status.

Flower's command does not show whose key a node's is: that alone comes from Flower's client of the API.
"""

from __future__ import annotations

import json
import re
import ssl
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedveil.common.config.flat import Scalar
from fedveil.common.config.text import to_toml
from fedveil.common.errors import RunFailed
from fedveil.common.foreign_words import FLOWER_KEY_IN_USE, FLOWER_NO_NODE, FLOWER_NO_RUN
from fedveil.deploy.app import app_folder
from fedveil.deploy.commands import environment, program
from fedveil.deploy.files import read_bytes
from fedveil.deploy.node_keys import public_pem
from fedveil.deploy.server_folder import CONNECTION, ServerFolder, connection_toml

if TYPE_CHECKING:
    from flwr.proto.node_pb2 import NodeInfo

NO_DETAILS = "N/A"
SHUT_OUT = "unregistered"
"""Status of a node whose key Flower keeps and lets in no more."""
UNREACHED = "Connection to the SuperLink is unavailable"
ANSWER_SECONDS = 120.0


class Control:
    """The Control API of one server; each method raises RunFailed if the server refuses or does not answer.

    Args:
        home: Flower's own folder, with the connection.
        address: HOST:PORT.
        authority: the certificate authority's certificate, PEM.
    """

    def __init__(self, home: Path, address: str, authority: bytes = b"") -> None:
        self._environment, self._home, self._address = environment(home), home, address
        self._authority = authority

    def register(self, public_key: Path) -> str:
        """Register a site's public key and return its node id; an empty string if the server knows the key already."""
        answer = self._call("supernode", "register", str(public_key), CONNECTION)
        if not answer.get("success") and FLOWER_KEY_IN_USE in str(answer.get("error-message")):
            return ""
        return str(self._good(answer, "register the key")["node-id"])

    def revoke(self, node_id: str) -> None:
        """Unregister a node, which is refused from its next call on; an unknown node is refused already."""
        answer = self._call("supernode", "unregister", node_id, CONNECTION)
        if answer.get("success") or FLOWER_NO_NODE not in str(answer.get("error-message")):
            self._good(answer, "revoke the site")

    def node_of(self, line: bytes) -> str:
        """Return the node id of a site's public key; empty if it is unknown or revoked. DataError if it is invalid."""
        key = public_pem(line)
        return next((str(n.node_id) for n in self._nodes() if n.public_key == key and n.status != SHUT_OUT), "")

    def has_node(self, node_id: str) -> bool:
        """Return whether the server has, or had, a node of this number."""
        return any(str(node.node_id) == node_id for node in self._nodes())

    def _nodes(self) -> list[NodeInfo]:
        """Return every node that was ever registered; Flower keeps the rows of those that it has shut out."""
        import httpx  # with Flower's client, seconds that only this needs
        from flwr.proto.control_pb2 import ListNodesRequest
        from flwr.supercore.control import ControlHttpClient

        failed = ""
        nodes: list[NodeInfo] = []
        try:
            with ControlHttpClient.from_server_address(
                self._address, insecure=False, root_certificates=self._authority, interceptors=()
            ) as client:
                nodes = list(client.ListNodes(ListNodesRequest()).nodes_info)
        except httpx.RequestError:
            failed = UNREACHED
        except (httpx.HTTPStatusError, ssl.SSLError, ValueError) as error:
            failed = str(error).partition("\n")[0]
        self._good({"success": not failed, "error-message": failed}, "tell whose keys it knows")
        return nodes

    def online(self) -> set[int]:
        """Return the numbers of the nodes that are online."""
        nodes = self._good(self._call("supernode", "list", CONNECTION), "list the sites")["nodes"]
        return {int(node["node-id"]) for node in nodes if node["status"] == "online"}

    def submit(self, settings: Mapping[str, Scalar]) -> str:
        """Submit this project with ``settings`` and return the run's id."""
        from fedveil.strategies.options import for_flower  # which loads torch

        overrides = self._home / "settings.toml"
        overrides.write_text(to_toml(for_flower(settings)), encoding="utf-8")
        with app_folder() as app:
            answer = self._call("run", str(app), CONNECTION, "-c", str(overrides))
        return str(self._good(answer, "submit the run")["run-id"])

    def stop(self, run: str) -> None:
        """End a run that goes on."""
        self._good(self._call("stop", run, CONNECTION), f"stop run {run}")

    def status(self, run: str) -> str:
        """Return a run's status as Flower has it, such as ``finished:failed (reason)``; ``unknown``: no such run."""
        answer = self._call("list", CONNECTION, "--run-id", run)
        if not answer.get("success") and FLOWER_NO_RUN in str(answer.get("error-message")):
            return "unknown"
        (listed,) = self._good(answer, "tell how the run stands")["runs"]
        why = listed.get("status-details", NO_DETAILS)
        return str(listed["status"]) + ("" if why == NO_DETAILS else f" ({why})")

    def _call(self, *words: str) -> dict[str, Any]:
        command = [program("flwr"), *words, "--format", "json"]
        try:
            done = subprocess.run(
                command,
                env=self._environment,
                cwd=self._home,
                capture_output=True,
                text=True,
                check=False,
                timeout=ANSWER_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return {"error-message": f"no answer in {ANSWER_SECONDS:g} s"}
        found = re.search(r"\{.*\}", done.stdout, flags=re.S)
        try:
            value: dict[str, Any] = json.loads(found.group(0)) if found else {}
        except json.JSONDecodeError:
            value = {}
        return value or {"error-message": " ".join((done.stdout + done.stderr).split())[-600:] or "no answer"}

    def _good(self, answer: dict[str, Any], what: str) -> dict[str, Any]:
        if not answer.get("success"):
            words = " ".join(str(answer.get("error-message", answer)).split())
            if UNREACHED in words:
                words = f"nothing answers at {self._address}, its Control API: run 'fedveil server start' there"
            raise RunFailed(f"the server did not {what}: {words}")
        return answer


@contextmanager
def control_of(folder: ServerFolder) -> Iterator[Control]:
    """Yield the Control API of a server's folder; needs ``server.toml`` and ``ca.crt`` of it, and no key."""
    authority = read_bytes(folder.path / "ca.crt", "the authority's certificate")
    with tempfile.TemporaryDirectory(prefix="fedveil-") as home:
        (Path(home) / "config.toml").write_text(connection_toml(folder), encoding="utf-8")
        yield Control(Path(home), folder.control, authority)

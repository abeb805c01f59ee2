"""Programs, folders and a control port of tests about deployment."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from audits.tiny_site import pins
from fedveil.common.config.text import to_toml
from fedveil.common.errors import RunFailed
from fedveil.common.paths import run_folder
from fedveil.common.ports import free_ports
from fedveil.common.run_lines import ResultFile, Status
from fedveil.common.strict_json import to_json
from fedveil.deploy.doctor import examine_site
from fedveil.deploy.server_folder import make_server
from fedveil.deploy.site_folder import SiteFolder, make_site, open_site_folder
from fedveil.server.records import write_json
from fedveil.strategies.job import configure

FEDVEIL = str(Path(sys.executable).parent / "fedveil")
SITES = [f"site-{number}" for number in range(1, 9)]
"""Of the shipped composition."""


PATIENCE = 600.0
"""Seconds for one step: what a failure costs on a busy machine, not what a step takes."""


PART = "partition-id=0 num-partitions=1"


def volumes(folder: Path) -> Path:
    """Make what the keys' container is given, empty, in a folder."""
    for name in ("authority", "server", "coordinator", *SITES):
        (folder / name).mkdir(parents=True)
    return folder


def run(words: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(
        words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
    )


def examine_site_quickly(folder: SiteFolder) -> list[Any]:
    """The results of the doctor, without a base model to load."""
    return list(examine_site(dataclasses.replace(folder, model="no/such-model")))


def site_for(tmp_path: Path, port: int, authority: Path, host: str = "127.0.0.1") -> SiteFolder:
    folder = tmp_path / f"site-{port}"
    return make_site(folder, "clinic", f"{host}:{port}", policy="", node=PART, authority=authority / "ca.crt")


def site_with_records(tmp_path: Path, name: str, content: bytes) -> SiteFolder:
    """Return the folder of a site whose records are in the file ``name``."""
    (tmp_path / name).write_bytes(content)
    server = make_server(tmp_path / f"server-{name}", ["127.0.0.1"])
    site = site_for(tmp_path, free_ports(1)[0], server.path)
    pinned = {**pins({"data.labels": "bad,good"}), "public-size": 50}
    (site.path / "policy.toml").write_text(to_toml(pinned), encoding="utf-8")
    node = to_toml({"node": f'data="{tmp_path / name}"'})
    kept = [
        line
        for line in (site.path / "site.toml").read_text(encoding="utf-8").splitlines()
        if not line.startswith("node =")
    ]
    (site.path / "site.toml").write_text("\n".join([*kept, node]), encoding="utf-8")
    return open_site_folder(site.path)


SILENT = "silent"


class FakeControl:
    """A Control API that submits to nobody and writes what a run would leave."""

    def __init__(self, results: list[Status], statuses: list[str]) -> None:
        self.results, self.statuses = results, statuses
        self.submitted: list[dict[str, Any]] = []
        self.keys: dict[str, str] = {}
        self.revoked: list[str] = []
        self.stopped: list[str] = []

    def online(self) -> set[int]:
        return {17, 18}

    def stop(self, run: str) -> None:
        self.stopped.append(run)

    def register(self, public_key: Path) -> str:
        key = public_key.read_text().split()[1]
        if key in self.keys:
            return ""
        self.keys[key] = str(17 + len(self.keys))
        return self.keys[key]

    def revoke(self, node_id: str) -> None:
        """Keep the key, as Flower does."""
        self.revoked.append(node_id)

    def node_of(self, line: bytes) -> str:
        node = self.keys.get(line.decode().split()[1], "")
        return "" if node in self.revoked else node

    def has_node(self, node_id: str) -> bool:
        return node_id in self.keys.values()

    def status(self, run: str) -> str:
        status = self.statuses.pop(0) if self.statuses else "unknown"
        if status == SILENT:
            raise RunFailed("the server did not tell how the run stands: no answer")
        return status

    def submit(self, settings: dict[str, Any]) -> str:
        self.submitted.append(dict(settings))
        run = f"10{len(self.submitted)}"
        path = run_folder(configure(settings).config, run)
        path.mkdir(parents=True, exist_ok=True)
        end(path, self.results.pop(0))
        return run


def end(path: Path, status: Status = "completed") -> None:
    """Leave the result of a run in its folder."""
    write_json(path / ResultFile.NAME, to_json(ResultFile(status, "round 2: nobody answered", None)))

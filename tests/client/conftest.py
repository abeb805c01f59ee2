"""A deployed site, its process as after a start, and the folders of a server and of a site."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runtime_api import NODE_ID
from signed_tasks import World

from audits.tiny_site import OneSite, clinic
from fedveil.client import app
from fedveil.client.process import SiteProcess
from fedveil.common.model.federated import model_of
from fedveil.deploy.server_folder import make_server
from fedveil.deploy.site_folder import make_site


@pytest.fixture
def site(toy_settings: dict[str, Any], tmp_path: Path) -> OneSite:
    return clinic(toy_settings, tmp_path)


@pytest.fixture(scope="module")
def parties(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    server, others = (make_server(folder / name, ["127.0.0.1"]) for name in ("server", "others"))
    site = make_site(folder / "clinic", "clinic", "127.0.0.1", policy="", authority=server.path / "ca.crt").path
    (server.nodes / "clinic.pub").write_bytes((site / "node.pub").read_bytes())
    (server.nodes / "clinic.id").write_text(f"{NODE_ID}\n")
    return World(server, site, others)


@pytest.fixture
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As after a start: no model is kept, and what a test does to one goes into no other test."""
    model_of.cache_clear()
    app.process.forget()
    monkeypatch.setattr(app, "process", SiteProcess())
    yield
    app.process.forget()
    model_of.cache_clear()

"""What ``fedveil doctor --health`` says of running programs, by its exit code and without a library that computes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from deployed import site_for
from typer.testing import CliRunner

from faults.connect_proxy import connect_proxy
from fedveil.cli.main import app
from fedveil.common.ports import free_ports
from fedveil.deploy.health import examine_health
from fedveil.deploy.server_folder import ServerFolder, make_server
from fedveil.deploy.site_folder import SiteFolder
from fedveil.deploy.start import secret_file


def health(folder: Path) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["doctor", str(folder), "--health"])
    return done.exit_code, done.output


def with_keys(folder: ServerFolder | SiteFolder, **values: object) -> Path:
    """Replace keys of a folder's description."""
    file = next(folder.path.glob("s*.toml"))
    text = file.read_text(encoding="utf-8")
    for key, value in values.items():
        text = re.sub(rf"(?m)^{key.replace('_', '-')} = .*$", f"{key.replace('_', '-')} = {value}", text)
    file.write_text(text, encoding="utf-8")
    return folder.path


def test_a_server_is_well_only_where_both_ports_show_a_certificate_of_the_authority(
    tmp_path: Path, tls_server: Callable[[ServerFolder], int]
) -> None:
    server, other = (make_server(tmp_path / name, ["127.0.0.1"]) for name in ("server", "other"))
    good, foreign, (closed,) = tls_server(server), tls_server(other), free_ports(1)
    for fleet, control, code in ((good, good, 0), (foreign, good, 1), (good, foreign, 1), (good, closed, 1)):
        folder = with_keys(server, fleet=f'"0.0.0.0:{fleet}"', control_port=control)
        found, said = health(folder)
        assert found == code, said
        assert said.count("failed  ") == code, said
        assert len(said.splitlines()) == 2 + code


def test_a_site_is_well_only_while_its_node_runs_and_its_server_answers(
    tmp_path: Path, tls_server: Callable[[ServerFolder], int]
) -> None:
    server = make_server(tmp_path / "server", ["127.0.0.1"])
    site = site_for(tmp_path, tls_server(server), server.path)
    code, said = health(site.path)
    assert (code, "failed  node: it does not run" in said) == (1, True), said
    program = [sys.executable, "-c", "input()", str(secret_file(site))]
    with subprocess.Popen(program, stdin=subprocess.PIPE) as running:
        assert health(site.path)[0] == 0
        with_keys(site, server=f'"127.0.0.1:{free_ports(1)[0]}"')
        code, said = health(site.path)
        assert (code, "failed  server: 127.0.0.1:" in said, "ok      node" in said) == (1, True, True), said
        running.communicate(b"\n")


def test_a_site_s_server_is_dialled_by_the_site_s_own_road(
    tmp_path: Path, tls_server: Callable[[ServerFolder], int]
) -> None:
    server = make_server(tmp_path / "server", ["fl.example.org"])
    site = site_for(tmp_path, 9092, server.path, "fl.example.org")
    with connect_proxy({"fl.example.org:9092": tls_server(server)}) as proxy:
        folder = with_keys(site, https_proxy=f'"http://127.0.0.1:{proxy.port}"')
        found = {result.what: result.ok for result in examine_health(folder)}
    assert found == {"node": False, "server": True}


@pytest.mark.parametrize("text", ["", "fleet = 3", "site = ", "server = 'x'\nsite = 'clinic'"])
def test_a_folder_that_is_none_is_unwell_in_one_line(text: str, tmp_path: Path) -> None:
    for name in ("server.toml", "site.toml"):
        (tmp_path / name).write_text(text)
        code, said = health(tmp_path)
        assert (code, said.splitlines()[-1], "failed  health: " in said) == (1, said.splitlines()[-1], True), said
        (tmp_path / name).unlink()
    assert health(tmp_path)[0] == 1


def test_a_probe_imports_no_library_that_computes_or_speaks(tmp_path: Path) -> None:
    """It runs every few seconds, beside a site that trains."""
    code = "import sys, fedveil.cli.main, fedveil.deploy.health as h; list(h.examine_health(h.Path(sys.argv[1])))"
    shown = f"{code}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    words = [sys.executable, "-c", shown, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env={**os.environ, "FEDVEIL_PROCESS": "1"})
    assert not {"torch", "numpy", "transformers", "flwr", "grpc", "cryptography", "pandas"} & set(done.stdout.split())

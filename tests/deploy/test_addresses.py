"""Addresses, ports and certificates of a server: what sites dial, and what is refused by name."""

from __future__ import annotations

import dataclasses
import re
import socket
import tomllib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from deployed import PART, site_for, site_with_records

from fedveil.common.errors import ConfigError, DataError, RunFailed
from fedveil.common.ports import free_ports
from fedveil.deploy import certificates
from fedveil.deploy import control as control_api
from fedveil.deploy.node_keys import new_node_key
from fedveil.deploy.refusal import why_unreachable
from fedveil.deploy.server_folder import ServerFolder, make_server, open_server
from fedveil.deploy.site_folder import make_site, open_site_folder
from fedveil.deploy.start import start_server, start_site
from fedveil.deploy.units import server_steps

pytestmark = pytest.mark.usefixtures("programs_may_start")


@pytest.mark.parametrize(
    ("names", "age_days", "words"),
    [
        (["127.0.0.1"], 0, ""),
        (["127.0.0.1"], certificates.SERVER_DAYS + 1, "its certificate has expired"),
        (["127.0.0.1"], -1, "its certificate is not valid yet: is this machine's clock right?"),
    ],
)
def test_a_certificate_s_time_is_checked(
    names: list[str], age_days: int, words: str, tmp_path: Path, tls_server: Callable[[ServerFolder], int]
) -> None:
    server = make_server(tmp_path / "server", names, now=datetime.now(UTC) - timedelta(days=age_days))
    site = site_for(tmp_path, tls_server(server), server.path)
    reason = why_unreachable(site)
    assert words in reason if words else reason == ""


def test_a_name_that_the_certificate_does_not_hold_for_is_named(
    tmp_path: Path, tls_server: Callable[[ServerFolder], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = make_server(tmp_path / "server", ["fl.example.org"])
    site = site_for(tmp_path, tls_server(server), server.path, host="127.0.0.2")
    monkeypatch.setattr(socket, "create_connection", lambda place, timeout: _connect("127.0.0.1", place[1]))
    assert "its certificate does not hold for the name '127.0.0.2'" in why_unreachable(site)


def test_a_server_s_address_of_ipv6_is_dialled_without_its_brackets(
    tmp_path: Path, tls_server: Callable[[ServerFolder], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, dialled = make_server(tmp_path / "server", ["fd00::1"]), list[str]()
    port = tls_server(server)

    def dial(place: tuple[str, int], timeout: float) -> socket.socket:
        dialled.append(place[0])
        return _connect("127.0.0.1", place[1])

    monkeypatch.setattr(socket, "create_connection", dial)
    assert why_unreachable(site_for(tmp_path, port, server.path, host="[fd00::1]")) == ""
    assert dialled == ["fd00::1"], "no machine is found by the brackets"
    assert "the name [fd00::1]:9092" in server_steps(server, "AB:CD"), "what no site takes is handed out"


def test_a_control_api_at_an_address_of_ipv6_is_dialled_with_brackets(tmp_path: Path) -> None:
    server = make_server(tmp_path / "server", ["127.0.0.1"], control_host="::1")
    config = tomllib.loads((server.home / "config.toml").read_text(encoding="utf-8"))
    assert config["superlink"]["fedveil"]["address"] == "[::1]:8000", "no address can be read from ::1:8000"
    with control_api.control_of(server) as control, pytest.raises(RunFailed, match=r"nothing answers at \[::1\]:8000"):
        control.node_of(new_node_key("clinic").public)


def _connect(host: str, port: int) -> socket.socket:
    plain = socket.socket()
    plain.connect((host, port))
    return plain


def test_another_authority_and_silence_are_told_apart(
    tmp_path: Path, tls_server: Callable[[ServerFolder], int]
) -> None:
    server, other = (make_server(tmp_path / name, ["127.0.0.1"]) for name in ("server", "other"))
    assert "not of the authority in ca.crt" in why_unreachable(site_for(tmp_path, tls_server(server), other.path))
    (closed,) = free_ports(1)
    assert "does not answer" in why_unreachable(site_for(tmp_path, closed, server.path))


@pytest.mark.parametrize(
    ("name", "line", "words"),
    [
        ("site.toml", 'server = "fl.example.org"', "has no port: write HOST:PORT"),
        ("site.toml", 'server = ":9092"', "has no port: write HOST:PORT"),
        ("site.toml", 'server = "fl.example.org:fleet"', "has no port: write HOST:PORT"),
        ("site.toml", 'server = "fl.example.org:²"', "has no port: write HOST:PORT"),
        ("site.toml", f'server = "fl.example.org:{"9" * 5000}"', "has no port: write HOST:PORT"),
        ("site.toml", 'server = "fl.example.org\\n:9092"', "has no port: write HOST:PORT"),
        ("server.toml", f'fleet = "0.0.0.0:{"9" * 5000}"', "has no port: write ADDRESS:PORT"),
        ("site.toml", 'server = "fl.example.org:0"', "must be from 1 to 65535, not 0"),
        ("site.toml", "runtime-port = 70000", "runtime-port must be from 1 to 65535, not 70000"),
        ("server.toml", "control-port = 70000", "control-port must be from 1 to 65535, not 70000"),
    ],
)
def test_a_port_that_none_can_be_is_said_when_a_folder_is_opened(
    name: str, line: str, words: str, tmp_path: Path
) -> None:
    server = make_server(tmp_path / "server", ["127.0.0.1"])
    site = site_for(tmp_path, 9092, server.path)
    folder, reopen = (site.path, open_site_folder) if name == "site.toml" else (server.path, open_server)
    reopen(folder)
    text, key = (folder / name).read_text(encoding="utf-8"), line.partition(" =")[0]
    (folder / name).write_text(re.sub(rf'(?m)^"?{key}"? = .*$', lambda _: line, text), encoding="utf-8")
    with pytest.raises(ConfigError, match=re.escape(words)) as refused:
        reopen(folder)
    assert str(folder / name) in str(refused.value)


@pytest.mark.parametrize(
    ("server", "words"),
    [
        ("fe80::1", r"in brackets, as \[ADDRESS\]:PORT"),
        ("localhost:x", "write HOST"),
        (":9092", "write HOST"),
        ("localhost:²", "write HOST"),
        ("localhost:" + "9" * 5000, "write HOST"),
        ("localhost\n:9092", "write HOST"),
        ("our server:9092", "write HOST"),
    ],
    ids=lambda text: text[:20],
)
def test_a_server_that_can_be_read_in_two_ways_is_none(server: str, words: str, tmp_path: Path) -> None:
    """Of an address of IPv6 without brackets the last group was the port."""
    with pytest.raises(ConfigError, match=words):
        make_site(tmp_path / "site", "clinic", server, policy="", node=PART)
    assert make_site(tmp_path / "site", "clinic", "[fe80::1]:9093", policy="", node=PART).port == 9093


def test_the_control_port_is_for_this_machine_alone_unless_the_coordinator_says_so(tmp_path: Path) -> None:
    server = make_server(tmp_path / "server", ["127.0.0.1"])
    assert server.control_host == "127.0.0.1"
    text = (server.path / "server.toml").read_text(encoding="utf-8")
    (server.path / "server.toml").write_text(re.sub(r"(?m)^.*control-host.*\n", "", text), encoding="utf-8")
    assert open_server(server.path).control_host == "127.0.0.1"
    connection = tomllib.loads((server.home / "config.toml").read_text(encoding="utf-8"))["superlink"]["fedveil"]
    assert connection["root-certificates"] == str(server.path / "ca.crt"), "another server is believed"


def test_a_port_that_is_none_or_taken_is_said(tmp_path: Path) -> None:
    for ports, said in (
        ({"fleet_port": 8000}, "fleet-port and control-port are both 8000"),
        ({"fleet_port": 70000}, "fleet-port must be from 1 to 65535, not 70000"),
    ):
        with pytest.raises(ConfigError, match=said):
            make_server(tmp_path / "server", ["127.0.0.1"], **ports)
    assert not (tmp_path / "server").exists()
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = make_server(tmp_path / "server", ["127.0.0.1"], fleet_port=port, control_port=free_ports(1)[0])
        with pytest.raises(DataError, match=rf"the Fleet port 0.0.0.0:{port} cannot be listened on \(Address already"):
            start_server(server, print)
        made = site_with_records(tmp_path, "two.csv", b"text,label\na,bad\nb,good\n")
        site = dataclasses.replace(made, runtime_port=port)
        own = rf"the SuperNode's port 127.0.0.1:{port} cannot be .* or give this site one of its own as runtime-port in"
        with pytest.raises(DataError, match=own):
            start_site(site, lambda line: pytest.fail(line) if "waiting" in line else None)
    with pytest.raises(ConfigError, match="must be from 1 to 65535, not 99999"):
        site_for(tmp_path, 99999, server.path)

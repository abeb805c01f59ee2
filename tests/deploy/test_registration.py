"""Keys of sites at the server: registered, shut out, and known again after a kill."""

from __future__ import annotations

import dataclasses
import ssl
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from deployed import FEDVEIL, FakeControl, site_for
from flwr.proto.control_pb2 import ListNodesResponse
from flwr.proto.node_pb2 import NodeInfo
from typer.testing import CliRunner

from fedveil.cli.main import app
from fedveil.common.errors import ConfigError, DataError, RunFailed
from fedveil.deploy import container, registry
from fedveil.deploy import control as control_api
from fedveil.deploy.node_keys import new_node_key, public_pem
from fedveil.deploy.server_folder import make_server, open_server

pytestmark = pytest.mark.usefixtures("programs_may_start")


def test_a_key_that_was_shut_out_is_not_said_to_be_registered(
    tmp_path: Path, fake_control: Callable[..., FakeControl]
) -> None:
    fake_control()
    server = make_server(tmp_path / "server", ["127.0.0.1"])
    register = ["server", "register", str(server.path), str(site_for(tmp_path, 9092, server.path).path / "node.pub")]
    for words in ("is registered", "was registered before"):
        assert f"clinic {words}" in CliRunner().invoke(app, register).output
    assert CliRunner().invoke(app, ["server", "revoke", str(server.path), "clinic"]).exit_code == 0
    again = CliRunner().invoke(app, register)
    assert (again.exit_code, again.output.count("\n")) == (1, 1)
    assert "clinic's key was shut out: the site makes a new one with 'fedveil site init'" in again.output


def test_a_name_keeps_its_key_and_what_is_no_sites_public_key_is_not_registered(
    tmp_path: Path, fake_control: Callable[..., FakeControl]
) -> None:
    """Who could register another key under a site's name would answer in its place."""
    control = fake_control()
    server = make_server(tmp_path / "server", ["127.0.0.1"])
    site, other = site_for(tmp_path, 9092, server.path), tmp_path / "other.pub"
    registry.register_site(server, site.path / "node.pub")
    before = {path.name: path.read_bytes() for path in server.nodes.iterdir()}
    assert before == {"clinic.id": b"17\n", "clinic.pub": (site.path / "node.pub").read_bytes()}
    other.write_bytes(new_node_key("clinic").public)
    with pytest.raises(ConfigError, match="clinic is registered with another key: revoke it first"):
        registry.register_site(server, other)
    kind, key, _ = (site.path / "node.pub").read_text(encoding="utf-8").split()
    other.write_text(f"{kind} {key} ward", encoding="utf-8")
    with pytest.raises(ConfigError, match="is the key of clinic, which is registered: ward makes its own with"):
        registry.register_site(server, other)
    private = (site.path / "node.key").read_text(encoding="utf-8")
    for text in (
        "",
        f"{kind} {key}",
        f"{kind} {key} ../ward",
        f"{kind} {key} our ward",
        f"{kind} {key} ward/../../clinic",
        f"ssh-rsa {key} ward",
        private,
    ):
        other.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=r"is not a site's node\.pub: it must be"):
            registry.register_site(server, other)
    for name in ("ward", "../nodes/clinic"):
        with pytest.raises(ConfigError, match=f"no site '{name}' is registered; registered are: clinic"):
            registry.revoke_site(server, name)
    assert (len(control.keys), control.revoked) == (1, [])
    assert {path.name: path.read_bytes() for path in server.nodes.iterdir()} == before
    registry.revoke_site(server, "clinic")
    assert (control.revoked, list(server.nodes.iterdir())) == (["17"], [])


def test_a_site_that_was_shut_out_does_not_stop_the_job_of_the_others(
    tmp_path: Path, fake_control: Callable[..., FakeControl], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its key lies in the coordinator's volume at every start of the containers."""
    fake_control()
    for name in ("authority", "server", "coordinator", "site-1", "site-2"):
        (tmp_path / name).mkdir()
    container.make_keys(2, 8.0, 1e-5, tmp_path)
    folder = tmp_path / "coordinator"

    def sites(number: int) -> str:
        words = container.job_command(number, "rounds=3", folder)
        assert words[:5] == [FEDVEIL, "server", "submit", str(folder), "--once"]
        assert words[-4:] == ["--patience", str(container.PATIENCE), "-c", "rounds=3"]
        return words[words.index("--sites") + 1]

    assert sites(2) == "2"
    registry.revoke_site(open_server(folder), "site-1")
    capsys.readouterr()
    assert (sites(2), sites(3)) == ("1", "2")
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("site-1's key was shut out")
    assert said[0].endswith("; the job goes on without it")
    assert said[1] == "site-2 was registered before"
    with pytest.raises(ConfigError, match="every site was shut out"):
        sites(1)
    (folder / "keys" / "site-3.pub").write_bytes(new_node_key("site-3").public)
    sites(3)
    registry.revoke_site(open_server(folder), "site-3")
    assert sites(2) == "1", "a site beyond the job's is no site less"
    (folder / "keys" / "site-2.pub").write_text("no key", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"site-2\.pub is not a site's node\.pub"):
        sites(2)


@pytest.mark.parametrize("lost", [("clinic.id", "clinic.pub"), ("clinic.id",), ("clinic.pub",)])
def test_whoever_was_killed_as_a_key_was_registered_registers_it_again(
    lost: tuple[str, ...], tmp_path: Path, fake_control: Callable[..., FakeControl]
) -> None:
    """Flower had the key and the folder did not: it was said to be shut out, and the site to need a new one."""
    control = fake_control()
    server = make_server(tmp_path / "server", ["127.0.0.1"])
    site = site_for(tmp_path, 9092, server.path)
    said = registry.register_site(server, site.path / "node.pub")
    before = {path.name: path.read_bytes() for path in server.nodes.iterdir()}
    for name in lost:
        (server.nodes / name).unlink()
    if len(lost) == 1:  # either file says whose key it is
        own = (site.path / "node.pub").read_text(encoding="utf-8")
        (tmp_path / "ward.pub").write_text(own.replace("clinic", "ward"), encoding="utf-8")
        with pytest.raises(ConfigError, match="is the key of clinic, which is registered: ward makes its own"):
            registry.register_site(server, tmp_path / "ward.pub")
    assert registry.register_site(server, site.path / "node.pub") == said == "clinic is registered"
    assert {path.name: path.read_bytes() for path in server.nodes.iterdir()} == before
    assert len(control.keys) == 1


@pytest.mark.parametrize("left", [("clinic.id", "clinic.pub"), ("clinic.id",), ("clinic.pub",)])
def test_whoever_was_killed_as_a_site_was_shut_out_shuts_it_out_again(
    left: tuple[str, ...], tmp_path: Path, fake_control: Callable[..., FakeControl]
) -> None:
    """Flower knew the node no more, and the site stayed registered for ever, in the folder and in words."""
    fake_control()
    server = make_server(tmp_path / "server", ["127.0.0.1"])
    site = site_for(tmp_path, 9092, server.path)
    registry.register_site(server, site.path / "node.pub")
    before = {path.name: path.read_bytes() for path in server.nodes.iterdir()}
    registry.revoke_site(server, "clinic")
    for name in left:
        (server.nodes / name).write_bytes(before[name])
    with pytest.raises(registry.ShutOut, match="clinic's key was shut out"):
        registry.register_site(server, site.path / "node.pub")
    assert "clinic is shut out" in registry.revoke_site(server, "clinic")
    assert list(server.nodes.iterdir()) == []


def test_a_key_is_on_disk_before_its_number_and_each_of_them_whole(
    tmp_path: Path, fake_control: Callable[..., FakeControl], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number without a key would let another key have the name; half a file would name nobody, or another node."""
    control, written = fake_control(), list[str]()
    server = make_server(tmp_path / "server", ["127.0.0.1"])
    site = site_for(tmp_path, 9092, server.path)
    replace, register = registry.replace_file, control.register

    def stops(path: Path, data: bytes) -> None:
        written.append(path.name)
        if len(written) == 2:
            raise KeyboardInterrupt
        replace(path, data)

    def absolute(public_key: Path) -> str:
        assert public_key.is_absolute(), "Flower's command runs in another folder"
        return register(public_key)

    monkeypatch.setattr(registry, "replace_file", stops)
    monkeypatch.setattr(control, "register", absolute)
    monkeypatch.chdir(site.path)
    with pytest.raises(KeyboardInterrupt):
        registry.register_site(server, Path("node.pub"))
    assert [path.name for path in server.nodes.iterdir()] == ["clinic.pub"]
    (server.nodes / "clinic.id").write_text("9\n", encoding="utf-8")  # of the key before, which was shut out
    assert registry.register_site(server, Path("node.pub")) == "clinic is registered"
    assert (server.nodes / "clinic.id").read_text(encoding="utf-8") == "17\n"
    assert written == ["clinic.pub", "clinic.id"] * 2


def test_a_site_stays_registered_here_until_the_server_has_shut_it_out(
    tmp_path: Path, fake_control: Callable[..., FakeControl], monkeypatch: pytest.MonkeyPatch
) -> None:
    control, synced = fake_control(), list[list[Path]]()
    server = make_server(tmp_path / "server", ["127.0.0.1"])
    registry.register_site(server, site_for(tmp_path, 9092, server.path).path / "node.pub")
    before = {path.name: path.read_bytes() for path in server.nodes.iterdir()}

    def silent(node_id: str) -> None:
        raise RunFailed("the server did not revoke the site: no answer")

    with monkeypatch.context() as patch:
        patch.setattr(control, "revoke", silent)
        with pytest.raises(RunFailed, match="no answer"):
            registry.revoke_site(server, "clinic")
    assert {path.name: path.read_bytes() for path in server.nodes.iterdir()} == before
    monkeypatch.setattr(registry, "sync_folder", lambda folder: synced.append(list(folder.iterdir())))
    registry.revoke_site(server, "clinic")
    assert synced == [[]], "after a loss of power the site's name is there again"


def test_a_number_that_is_none_shuts_nobody_else_out(tmp_path: Path, fake_control: Callable[..., FakeControl]) -> None:
    control = fake_control()
    server = make_server(tmp_path / "server", ["127.0.0.1"])
    own, number = tmp_path / "own.pub", server.nodes / "clinic.id"
    for name in ("ward", "clinic"):
        own.write_bytes(new_node_key(name).public)
        registry.register_site(server, own)
    assert number.read_text(encoding="utf-8") == "18\n"
    for text in ("1 7", "\u0967\u096d", "-17", "17.0"):  # the second are digits of Devanagari
        number.write_text(text, encoding="utf-8")
        registry.revoke_site(server, "clinic")
        assert control.revoked == ["18"], "another site is shut out"
        number.write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match="says which node is the site's"):
            registry.revoke_site(server, "clinic")
        number.unlink()
        control.revoked.clear()
        (server.nodes / "clinic.pub").write_bytes(own.read_bytes())


def test_a_site_is_shut_out_by_its_key_whatever_its_number_is_said_to_be(
    tmp_path: Path, fake_control: Callable[..., FakeControl]
) -> None:
    control = fake_control()
    server = make_server(tmp_path / "server", ["127.0.0.1"])
    registry.register_site(server, site_for(tmp_path, 9092, server.path).path / "node.pub")
    (server.nodes / "clinic.id").write_text("99\n", encoding="utf-8")
    registry.revoke_site(server, "clinic")
    assert control.revoked == ["99", "17"], "Flower did not know the number, and lets the key in"


def test_a_number_that_the_server_never_had_is_not_said_to_be_shut_out(
    tmp_path: Path, fake_control: Callable[..., FakeControl]
) -> None:
    fake_control()
    server = make_server(tmp_path / "server", ["127.0.0.1"])
    site = site_for(tmp_path, 9092, server.path)
    registry.register_site(server, site.path / "node.pub")
    (server.nodes / "clinic.id").write_text("99\n", encoding="utf-8")
    key = (server.nodes / "clinic.pub").read_bytes()
    (server.nodes / "clinic.pub").unlink()
    with pytest.raises(
        DataError, match=r"clinic\.id says 99, and the server never had such a node: nobody is shut out"
    ):
        registry.revoke_site(server, "clinic")
    assert (server.nodes / "clinic.id").is_file()
    (server.nodes / "clinic.pub").write_bytes(key)
    assert "clinic is shut out" in registry.revoke_site(server, "clinic")


def test_a_key_in_the_folder_that_is_not_text_is_no_trace(
    tmp_path: Path, fake_control: Callable[..., FakeControl]
) -> None:
    control = fake_control()
    server = make_server(tmp_path / "server", ["127.0.0.1"])
    site = site_for(tmp_path, 9092, server.path)
    (server.nodes / "ward.pub").write_bytes(b"\xff\xfe")
    registry.register_site(server, site.path / "node.pub")
    with pytest.raises(DataError, match=r"neither .*ward\.id nor .*ward\.pub says which node is the site's"):
        registry.revoke_site(server, "ward")
    (server.nodes / "clinic.pub").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="clinic is registered with another key: revoke it first"):
        registry.register_site(server, site.path / "node.pub")
    registry.revoke_site(server, "clinic")
    assert (control.revoked, [path.name for path in server.nodes.iterdir()]) == (["17"], ["ward.pub"])


def test_whose_key_a_node_s_is_is_asked_of_the_server_alone(tmp_path: Path) -> None:
    server, own, other = make_server(tmp_path / "server", ["127.0.0.1"]), new_node_key("clinic"), new_node_key("ward")
    nodes = [
        NodeInfo(node_id=7, public_key=public_pem(other.public), status="online"),
        NodeInfo(node_id=2**64 - 9, public_key=public_pem(own.public), status="registered"),
    ]
    status = [200]

    class Answers(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/control/list-nodes"
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(status[0])
            self.end_headers()
            self.wfile.write(ListNodesResponse(nodes_info=nodes).SerializeToString())

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server.path / "server.pem", server.path / "server.key")
    with HTTPServer(("127.0.0.1", 0), Answers) as answers:
        answers.socket = context.wrap_socket(answers.socket, server_side=True)
        thread = threading.Thread(target=answers.serve_forever, daemon=True)
        thread.start()
        with control_api.control_of(dataclasses.replace(server, control_port=answers.server_port)) as control:
            assert (control.node_of(own.public), control.node_of(other.public)) == (str(2**64 - 9), "7")
            assert control.node_of(new_node_key("clinic").public) == ""
            nodes[1].status = "unregistered"
            assert control.node_of(own.public) == "", "a key that was shut out is let in"
            status[0] = 500
            with pytest.raises(RunFailed, match=r"did not tell whose keys it knows: .*500 Internal Server Error'"):
                control.node_of(own.public)
            with pytest.raises(DataError, match="a site's public key is not in OpenSSH form"):
                control.node_of(b"ecdsa-sha2-nistp384 AAAA clinic")
            answers.shutdown()
    with pytest.raises(RunFailed, match=r"did not tell whose keys it knows: nothing answers at 127\.0\.0\.1"):
        control.node_of(own.public)

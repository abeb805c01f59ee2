"""A site's two processes end together, and a worker that ends comes back."""

from __future__ import annotations

import contextlib
import dataclasses
import getpass
import json
import os
import shlex
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from fedveil.common import runtime
from fedveil.common.bundle import own_digest
from fedveil.common.errors import ConfigError, DataError
from fedveil.common.hub import CLOSED
from fedveil.common.ports import free_ports
from fedveil.deploy import pair, start
from fedveil.deploy.commands import own_module
from fedveil.deploy.doctor import examine_site
from fedveil.deploy.server_folder import make_server
from fedveil.deploy.site_folder import SiteFolder, make_site
from fedveil.deploy.units import server_steps, server_unit, site_unit

pytestmark = pytest.mark.usefixtures("programs_may_start")

ROOT = Path(__file__).resolve().parents[2]
STAYS = "open({place!r}, 'a').write(f'{{os.getpid()}}\\n'); time.sleep(60)"
PATIENCE = 30.0
POLICY = """\
dataset-id = "clinic"
epsilon = 8.0
delta = 1e-3
public-size = 50
task = "classification"
text = "text"
label = "label"
labels = ["bad", "good"]
max-length = 128
"""


def program(code: str, place: Path) -> list[str]:
    return [sys.executable, "-SIc", "import os, signal, sys, time; " + code.format(place=str(place))]


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    running: list[subprocess.Popen[str]] = []

    def begin(node: str = STAYS, worker_code: str = STAYS) -> subprocess.Popen[str]:
        commands = [json.dumps(program(node, tmp_path / "node")), json.dumps(program(worker_code, tmp_path / "worker"))]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        words = [*own_module("fedveil.deploy.pair"), *commands]
        running.append(subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=env))
        return running[-1]

    yield begin
    for process in running:
        with process:
            process.kill()


def pids(place: Path, count: int = 1) -> list[int]:
    """Return who has begun, once so many have."""
    deadline = time.monotonic() + PATIENCE
    while len(lines := place.read_text().split() if place.exists() else []) < count:
        assert time.monotonic() < deadline, f"{place.name}: {len(lines)} of {count} have begun"
        time.sleep(0.05)
    return [int(line) for line in lines]


def alive(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def gone(numbers: Sequence[int]) -> bool:
    deadline = time.monotonic() + PATIENCE
    while any(map(alive, numbers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, numbers))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_whoever_stops_the_pair_stops_both(
    number: signal.Signals, started: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    both = started()
    children = pids(tmp_path / "node") + pids(tmp_path / "worker")
    began = time.monotonic()
    both.send_signal(number)
    assert both.wait(PATIENCE) == (-signal.SIGKILL if number == signal.SIGKILL else 0)
    assert gone(children), "a process outlives the pair"
    assert time.monotonic() - began < 4


def test_what_does_not_end_by_itself_is_killed(started: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    both = started(node="signal.signal(signal.SIGTERM, signal.SIG_IGN); " + STAYS)
    children = pids(tmp_path / "node") + pids(tmp_path / "worker")
    both.terminate()
    assert both.wait(PATIENCE) == 0
    assert gone(children)


def test_a_killed_worker_comes_back_and_its_node_stays(
    started: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    both = started()
    (node,), (first,) = pids(tmp_path / "node"), pids(tmp_path / "worker")
    os.kill(first, signal.SIGKILL)
    assert len(pids(tmp_path / "worker", 2)) == 2
    assert pids(tmp_path / "node") == [node]
    assert both.poll() is None


def test_a_worker_that_wants_to_begin_anew_does_as_often_as_it_wants(
    started: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    ends = f"open({{place!r}}, 'a').write(f'{{{{os.getpid()}}}}\\n'); sys.exit({pair.ANEW})"
    both = started(worker_code=ends)
    pids(tmp_path / "worker", pair.MOST_SHORT_LIVES + 2)
    assert both.poll() is None


@pytest.mark.parametrize(
    ("node", "worker_code", "code", "words"),
    [
        ("sys.exit(3)", STAYS, 3, "the SuperNode ended with 3"),
        ("sys.exit(0)", STAYS, 1, "the SuperNode ended with 0"),
        (STAYS, f"sys.exit({pair.NODE_TOO})", 1, ""),
        (STAYS, "sys.exit(1)", 1, "again and again"),
    ],
)
def test_a_pair_ends_with_its_node_and_when_its_worker_cannot_go_on(
    node: str,
    worker_code: str,
    code: int,
    words: str,
    started: Callable[..., subprocess.Popen[str]],
    tmp_path: Path,
) -> None:
    both = started(node, worker_code)
    said, _ = both.communicate(timeout=PATIENCE)
    assert both.returncode == code
    assert words in said
    for place in ("node", "worker"):
        path = tmp_path / place
        assert gone([int(line) for line in path.read_text().split()] if path.exists() else [])


def test_both_sides_mean_the_same_by_an_exit_code_and_the_supervisor_stays_small() -> None:
    assert (pair.ANEW, pair.NODE_TOO) == (runtime.ANEW, runtime.NODE_TOO)
    code = "import sys, fedveil.deploy.pair; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "flwr", "client", "typer"} & set(done.stdout.split())


@pytest.fixture
def site(tmp_path: Path) -> SiteFolder:
    (tmp_path / "records.csv").write_text("text,label\nfine,good\n")
    return make_site(
        *(tmp_path / "clinic", "clinic", "127.0.0.1:1"),
        policy=POLICY,
        node=f'data="{tmp_path / "records.csv"}"',
    )


def started_command(site: SiteFolder, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[str]]:
    """Return the SuperNode's and the worker's command that ``fedveil site start`` runs."""
    taken: list[Any] = []
    monkeypatch.setattr(start, "why_refused", lambda folder: "")
    monkeypatch.setattr(start.os, "execve", lambda *words: taken.append(words))
    start.start_site(site, lambda line: None, "partition-id=7")
    ((_, command, _),) = taken
    assert command[:4] == [sys.executable, "-P", "-m", "fedveil.deploy.pair"]
    node, own = map(json.loads, command[4:])
    return node, own


def test_a_start_makes_a_new_secret_for_the_site_s_user_alone(
    site: SiteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FLWR_HOME", raising=False)
    node, own = started_command(site, monkeypatch)
    file = site.path / "flwr" / "clinic.secret"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert node[node.index("--isolation") + 1] == "process"
    assert node[node.index("--superexec-auth-secret-file") + 1] == own[own.index("--secret") + 1] == str(file)
    assert own[:4] == [sys.executable, "-P", "-m", "fedveil.client.worker"], (
        "-P: a folder named client beside it is not ours"
    )
    settings = json.loads(own[own.index("--node") + 1])
    assert settings["policy"] == str(site.path / "policy.toml")
    assert (settings["site"], settings["partition-id"]) == ("clinic", 7)
    first = file.read_bytes()
    assert len(first) == 64
    started_command(site, monkeypatch)
    assert file.read_bytes() != first


def test_what_a_site_starts_asks_for_the_authority_s_certificate_tells_nobody_and_shows_no_secret(
    site: SiteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever runs ps sees a command, and what it starts inherits the environment."""
    monkeypatch.delenv("FLWR_HOME", raising=False)
    for name, value in CLOSED.items():
        monkeypatch.setenv(name, str(1 - int(value)))
    taken: list[Any] = []
    monkeypatch.setattr(start, "why_refused", lambda folder: "")
    monkeypatch.setattr(start.os, "execve", lambda *words: taken.append(words))
    start.start_site(site, lambda line: None)
    ((_, command, told),) = taken
    node = json.loads(command[4])
    for option, value in (
        ("--root-certificates", str(site.path / "ca.crt")),
        ("--auth-supernode-private-key", str(site.path / "node.key")),
        ("--superlink", "127.0.0.1:1"),
        ("--host", "127.0.0.1"),
    ):
        assert node[node.index(option) + 1] == value
    assert "--insecure" not in node
    assert {name: told[name] for name in CLOSED} == CLOSED
    shown = repr(command) + repr(told)
    for secret in (start.secret_file(site), site.path / "node.key", site.path / "identity.key"):
        assert [line for line in secret.read_text().splitlines() if line in shown] == [], secret.name
    folder = start.secret_file(site).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_port_that_another_site_took_while_this_one_waited_is_said(
    site: SiteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    (port,) = free_ports(1)
    taken = socket.socket()
    reasons = ["the server does not answer", ""]

    def refused(_: SiteFolder) -> str:
        if len(reasons) == 1:
            taken.bind(("127.0.0.1", port))
            taken.listen()
        return reasons.pop(0)

    monkeypatch.setattr(start, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(start, "why_refused", refused)
    monkeypatch.setattr(start.os, "execve", lambda *_: pytest.fail("it starts"))
    said: list[str] = []
    with taken, pytest.raises(DataError, match=f"the SuperNode's port 127.0.0.1:{port} cannot be listened on"):
        start.start_site(dataclasses.replace(site, runtime_port=port), said.append)
    assert said[1:] == ["waiting: the server does not answer"], "it did not wait, or said that it is let in"


def test_two_sites_of_one_machine_get_ports_of_their_own(site: SiteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever names none: a second site that was set up as the first one starts, and neither waits for the other."""
    started: list[list[str]] = []
    monkeypatch.setattr(start, "why_refused", lambda _: "")
    monkeypatch.setattr(start.os, "execve", lambda _, command, *__: started.append(command))
    with contextlib.ExitStack() as listening:
        for _ in range(2):
            assert site.runtime_port == 0
            start.start_site(site, lambda _: None)
            pair = [json.loads(part) for part in started[-1][-2:]]
            ports = {part[part.index("--port") + 1] for part in pair}
            assert len(ports) == 1, "node and worker would not meet"
            listening.enter_context(socket.create_server(("127.0.0.1", int(ports.pop()))))
    assert len(started) == 2


def test_the_doctor_tries_a_port_that_the_folder_names(site: SiteFolder) -> None:
    def found(folder: SiteFolder) -> tuple[bool, str]:
        (one,) = (finding for finding in examine_site(folder) if finding.what == "runtime port")
        return one.ok, one.found

    (port,) = free_ports(1)
    named = dataclasses.replace(site, runtime_port=port)
    assert found(site) == (True, "a free one of the loopback at each start")
    assert found(named) == (True, f"{port} is free")
    with socket.create_server(("127.0.0.1", port)):
        ok, words = found(named)
        assert not ok
        assert f"the SuperNode's port 127.0.0.1:{port} cannot be listened on" in words
        assert "or 0 for any" in words
        program = [sys.executable, "-c", "input()", str(start.secret_file(site))]
        with subprocess.Popen(program, stdin=subprocess.PIPE) as running:
            assert found(named) == (True, f"{port}; this site is running")
            running.communicate(b"\n")


def test_a_name_that_is_not_the_key_s_is_refused_before_anything_starts(
    site: SiteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start, "why_refused", lambda folder: pytest.fail("the server is asked"))
    with pytest.raises(
        ConfigError, match=r"answers as 'at-night', and its key in node\.pub is named 'clinic'"
    ) as refusal:
        start.start_site(site, pytest.fail, 'site="at-night"')
    assert "\n" not in str(refusal.value)
    renamed = dataclasses.replace(site, site="ward")
    (found,) = (finding for finding in examine_site(renamed) if finding.what == "key pair")
    assert (found.ok, "answers as 'ward'" in found.found) == (False, True)


def test_the_secret_lies_where_flower_s_folder_is_when_the_site_s_cannot_be_written(
    site: SiteFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "tmpfs"))
    started_command(site, monkeypatch)
    assert (tmp_path / "tmpfs" / "clinic.secret").exists()
    assert not (site.path / "flwr").exists()


def test_the_doctor_names_the_bundles_and_finds_an_open_secret(
    site: SiteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FLWR_HOME", raising=False)

    def said(what: str) -> tuple[bool, str]:
        without_model = dataclasses.replace(site, model="no/such-model")
        found = {finding.what: finding for finding in examine_site(without_model)}[what]
        return found.ok, found.found

    ok, words = said("bundles")
    assert ok
    assert words.startswith(f"{own_digest()} (the installed version's own)")
    assert said("worker's secret") == (True, "new at every start, for this user alone")
    started_command(site, monkeypatch)
    secret = start.secret_file(site)
    assert said("worker's secret") == (True, f"{secret}, mode 0600")
    secret.chmod(0o640)
    ok, words = said("worker's secret")
    assert not ok
    assert "chmod 600" in words
    (site.path / "policy.toml").write_text(POLICY + f'bundles = ["{"b" * 64}"]\n')
    assert said("bundles") == (True, f"{'b' * 64}; not {own_digest()} (the installed version's own)")


def test_the_units_give_their_programs_no_more_than_they_need(site: SiteFolder, tmp_path: Path) -> None:
    server = make_server(tmp_path / "server", ["127.0.0.1"])
    for (name, unit), own in (
        (*site_unit(site.path, site.site).items(), {"PrivateDevices=no", f"ReadWritePaths={site.path}"}),
        (*server_unit(server.path).items(), {"PrivateDevices=yes", f"ReadWritePaths={server.path}"}),
    ):
        held = unit.decode().splitlines()
        wanted = {"NoNewPrivileges=yes", "CapabilityBoundingSet=", "PrivateTmp=yes", "ProtectSystem=strict"}
        wanted |= {"ProtectHome=read-only", "RestrictSUIDSGID=yes", "UMask=0077", f"User={getpass.getuser()}"}
        assert {line for line in wanted | own if held.count(line) != 1} == set(), name


def test_a_folder_with_blanks_and_signs_in_its_name_is_one_word_of_a_unit_and_of_the_steps(tmp_path: Path) -> None:
    """Blanks part words in both, and in a unit a per cent sign names a specifier and a dollar sign a variable."""
    server = make_server(tmp_path / "St Mary's 5% $A", ["127.0.0.1"])
    held = server_unit(server.path)["fedveil-server.service"].decode().splitlines()
    assert f'ReadWritePaths="{tmp_path}/St Mary\'s 5%% $A"' in held
    assert [line for line in held if line.startswith("ExecStart=") and f' server start "{tmp_path}/St' in line]
    assert [line for line in held if line.endswith(' 5%% $$A"')]
    steps = server_steps(server, "00")
    assert shlex.split(steps.partition("start it")[2].partition("\n")[0]) == [
        "fedveil",
        "server",
        "start",
        str(server.path),
    ]


def test_the_unit_tells_the_first_process_alone_to_end(site: SiteFolder, tmp_path: Path) -> None:
    assert b"KillMode=mixed\n" in site_unit(site.path, site.site)["fedveil-site.service"]
    assert b"KillMode=mixed\n" in server_unit(tmp_path)["fedveil-server.service"]


def test_a_server_starts_its_superlink_and_a_runner_of_the_installed_code_with_a_secret_of_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FLWR_HOME", raising=False)
    monkeypatch.setenv("OF_A_COLLEAGUE", "is passed on")
    fleet, control = free_ports(2)
    server = make_server(tmp_path / "server", ["127.0.0.1"], fleet_port=fleet, control_port=control)
    taken: list[Any] = []
    monkeypatch.setattr(start.os, "execve", lambda *words: taken.append(words))
    first = b""
    for _ in range(2):
        start.start_server(server, lambda line: None)
        (_, command, told) = taken.pop()
        assert command[:4] == [sys.executable, "-P", "-m", "fedveil.deploy.pair"]
        link, own = map(json.loads, command[4:])
        file = server.path / "state" / "flwr" / "server.secret"
        assert link[link.index("--isolation") + 1] == "process", "Flower runs what is submitted"
        assert link[link.index("--superexec-auth-secret-file") + 1] == own[own.index("--secret") + 1] == str(file)
        assert own[:4] == [sys.executable, "-P", "-m", "fedveil.server.runner"]
        assert own[own.index("--address") + 1] == f"127.0.0.1:{control}"
        assert own[own.index("--authority") + 1] == str(server.path / "ca.crt")
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        secret = file.read_bytes()
        assert len(secret) == 64
        assert secret != first, "a secret that is seen once opens the port for good"
        assert secret.decode() not in repr(command) + repr(told)
        assert (told["FEDVEIL_SERVER"], told["OF_A_COLLEAGUE"]) == (str(server.path), "is passed on")
        first = secret


def test_a_server_whose_superlink_ends_says_so(tmp_path: Path) -> None:
    link = [sys.executable, "-c", "raise SystemExit(3)", pair.SUPERLINK]
    words = [json.dumps(link), json.dumps(program(STAYS, tmp_path / "worker"))]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [*own_module("fedveil.deploy.pair"), *words]
    ended = subprocess.run(words, env=env, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (ended.returncode, ended.stdout) == (
        3,
        "the SuperLink ended with 3, so this server ends: its lines above say why\n",
    )

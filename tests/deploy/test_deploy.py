"""Real processes on the loopback: the guides of coordinator and steward, and who is kept out and told why."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import signal
import socket
import ssl
import subprocess
import sys
import textwrap
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from flwr.common.config import parse_config_args
from flwr.proto.control_pb2 import ListNodesResponse
from flwr.proto.node_pb2 import NodeInfo
from typer.testing import CliRunner

from audits.tiny_models import TARGETS, write_reviews
from audits.tiny_site import pins
from fedveil.cli.main import app
from fedveil.client.ledger.ledger import Ledger
from fedveil.client.policy import Policy, load_policy
from fedveil.client.site import own_settings
from fedveil.common.config.sections import Columns, Scalar
from fedveil.common.config.text import to_toml
from fedveil.common.errors import ConfigError, DataError, LedgerError, RunFailed, UnreadableFile
from fedveil.common.model.base import load_base_model
from fedveil.common.paths import run_folder
from fedveil.common.ports import free_ports
from fedveil.common.run_lines import ConfigFile, ResultFile, Status, read_file, read_json
from fedveil.common.strict_json import to_json
from fedveil.common.tasks import TASKS
from fedveil.deploy import certificates, container, doctor, registry, site_check
from fedveil.deploy import control as control_api
from fedveil.deploy import submit as submission
from fedveil.deploy.commands import environment, node_config, superlink_command, supernode_command
from fedveil.deploy.doctor import examine_site
from fedveil.deploy.node_keys import is_pair, new_node_key, public_pem
from fedveil.deploy.policy_file import policy_text
from fedveil.deploy.refusal import why_refused, why_unreachable
from fedveil.deploy.server_folder import ServerFolder, authority_beside, make_server, open_server, renew_server
from fedveil.deploy.site_check import check_site, pinned_settings
from fedveil.deploy.site_folder import SiteFolder, make_site, node_settings, open_site_folder
from fedveil.deploy.start import start_server, start_site
from fedveil.deploy.units import server_steps
from fedveil.deploy.withdraw import withdraw_site
from fedveil.privacy.accounting import Release, epsilon
from fedveil.reports import report_of
from fedveil.server.checkpoint import NAME as CHECKPOINT
from fedveil.server.lock import only_writer
from fedveil.server.records import write_json
from fedveil.strategies.job import configure

pytestmark = pytest.mark.usefixtures("programs_may_start")

DOCS = Path(__file__).resolve().parents[2] / "docs"
FEDVEIL = str(Path(sys.executable).parent / "fedveil")
PATIENCE = 600.0
"""Seconds for one step: what a failure costs on a busy machine, not what a step takes."""


OWN = ["--data", ".", "--public-size", "2000"]
"""Of 'fedveil site init': a site with records of its own."""
PART = "partition-id=0 num-partitions=1"
PINNED_ALONE = """task = "classification"
text = "text"
label = "label"
labels = ["bad", "good"]
max-length = 64
"""
"""Settings of a node that plays all of a job's data."""
BUDGETED = f"epsilon = 4.0\ndelta = 1e-3\n{PINNED_ALONE}"


class Processes:
    """What a test starts in the background; ended with everything that it started itself."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.running = folder, dict[str, subprocess.Popen[bytes]]()

    def start(self, name: str, words: list[str], env: Mapping[str, str] | None = None) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                words, stdout=log, stderr=log, cwd=self.folder, env=env, start_new_session=True
            )

    def start_bare(self, name: str, words: list[str]) -> None:
        """Start one of Flower's own programs; it must find the others beside it, or it hangs half started."""
        self.start(name, words, environment(self.folder / f"{name}-flwr"))

    def ends_refused(self, name: str, words: str) -> None:
        """Flower's own SuperNode gives up by itself, for this reason, and was never online."""
        code, log = self.running.pop(name).wait(PATIENCE), self.log(name)
        assert code == 1, f"{name} ended with {code}:\n{log}"
        assert "Failed to initialize the connection" in log
        assert words in log, f"{name} was refused for another reason:\n{log}"
        assert "SuperNode ID" not in log

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    def wait_for(self, name: str, words: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while words not in self.log(name):
            ended = self.running[name].poll()
            assert ended is None, f"{name} ended with {ended}:\n{self.log(name)}"
            assert time.monotonic() < deadline, f"{name} never said {words!r}:\n{self.log(name)}"
            time.sleep(0.2)

    def stop(self, name: str) -> float:
        process, began = self.running.pop(name), time.monotonic()
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        seconds = time.monotonic() - began
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        return seconds


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    made = Processes(tmp_path)
    yield made
    for name in list(made.running):
        made.stop(name)


def run(words: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(
        words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
    )


def guide(who: str, step: int) -> list[list[str]]:
    """Return the ``fedveil`` commands of one step of a guide, in order."""
    text = (DOCS / "guides" / f"{who}.md").read_text(encoding="utf-8").split(f"\n## {step}. ")[1].split("\n## ")[0]
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.startswith("fedveil ")]


def steward(step: int) -> list[list[str]]:
    """Return the commands of both stewards: ``clinic`` is the guide's, and the other does the same."""
    both = [(site, line) for site in ("clinic", "ward") for line in guide("steward", step)]
    return [[word.replace("clinic", site) for word in line] for site, line in both]


def guides_commands() -> list[list[str]]:
    """Return the commands of coordinator and stewards in the order in which they wait for each other."""
    coordinator = [guide("coordinator", step) for step in (1, 2, 3, 4)]
    return [*coordinator[0], *steward(1), *coordinator[1], *steward(2), *coordinator[2], *coordinator[3], *steward(3)]


def ask_for_a_task(port: int) -> int:
    """Return the status with which a site's Runtime API answers whoever does not know its secret."""
    head = {"content-type": "application/protobuf", "accept": "application/protobuf"}
    return httpx.post(f"http://127.0.0.1:{port}/v1/runtime/acquire-task", content=b"", headers=head).status_code


@pytest.mark.deployment
def test_the_guides_end_in_a_finished_run(
    processes: Processes, tmp_path: Path, model_folder: Callable[[str], str]
) -> None:
    fleet, control, *runtime = free_ports(4)
    for seed, name in enumerate(("clinic.csv", "ward.csv", "test.csv")):
        write_reviews(tmp_path / name, 60, seed)
    toy = {
        "model.name": model_folder("bert"),
        "model.max-length": 24,
        "data.name": str(tmp_path / "test.csv"),
        "data.test": str(tmp_path / "test.csv"),
        "adapter.rank": 2,
        "adapter.targets": TARGETS["bert"],
        "head.start": "random",
        "rounds": 1,
        "training.local-steps": 1,
        "privacy.epsilon": 1.0,
        "privacy.delta": 1e-3,
        "device": "cpu",
    }
    (tmp_path / "toy.toml").write_text(to_toml(toy), encoding="utf-8")
    fingerprint = load_base_model(model_folder("bert"), "classification").pin
    more = {
        ("server", "init"): lambda: ["--fleet-port", str(fleet), "--control-port", str(control)],
        ("site", "init"): lambda: [
            *("--runtime-port", str(runtime.pop())),
            *("--model", model_folder("bert"), "--fingerprint", fingerprint),
        ],
        ("doctor", f"{tmp_path}/server"): lambda: ["--model", model_folder("bert")],
        ("server", "submit"): lambda: ["-c", "toy.toml"],
    }
    seen = []
    for line in guides_commands():
        words = [word.replace("/srv/fedveil", str(tmp_path)) for word in line[1:]]
        if "RUN_FOLDER" in words:
            (folder,) = (tmp_path / "server" / "runs").iterdir()
            words = [str(folder) if word == "RUN_FOLDER" else word for word in words]
        host = f"127.0.0.1:{fleet}" if "--server" in words else "127.0.0.1"
        words = [word.replace("fl.example.org", host) for word in words]
        words += more.get((words[0], words[1]), list)()
        seen.append(" ".join(words[:2]))
        if words[1] == "start":
            name = Path(words[2]).name
            processes.start(name, [FEDVEIL, *words])
            processes.wait_for(name, "Uvicorn running" if words[0] == "server" else "SuperNode ID")
            if words[0] == "site":
                processes.wait_for(name, "the worker is ready")
            continue
        done = run([FEDVEIL, *words], tmp_path)
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}{done.stderr}"
    for command in ("server init", "server start", "server register", "server submit", "site init", "site start"):
        assert command in seen, f"the guides do not say fedveil {command}"
    assert {"ledger show", "ledger remaining"} <= set(seen)
    assert [words for words in seen if words.startswith("verify")], "nobody checks the signed report"
    (folder,) = (tmp_path / "server" / "runs").iterdir()
    assert read_file(ResultFile, folder).status == "completed"
    assert "sites have the names of their keys" in (folder / "log.jsonl").read_text(encoding="utf-8")
    (connection,) = report_of(folder).connections
    shown = certificates.read_certificate((tmp_path / "server" / "server.pem").read_bytes(), "the server")
    assert (connection.tls, connection.keys, connection.certificate) == (True, True, certificates.fingerprint(shown))
    assert not connection.failed
    assert str(tmp_path) not in repr(connection), "a path of the server's disks is in the report"
    for site in ("clinic", "ward"):
        with Ledger(tmp_path / site / "ledger" / "ledger.sqlite") as ledger:
            assert [entry.dataset for entry in ledger.entries()] == [site]
        assert "trained and answered" in processes.log(site)
        assert not (tmp_path / site / "flwr" / "apps").exists(), "something of the bundle is on the disk"
        port = open_site_folder(tmp_path / site).runtime_port
        assert ask_for_a_task(port) == 401, "any user of the machine may take a site's tasks"
    check_that_trials_are_paid_on_the_same_sites(tmp_path)
    revoked = run([FEDVEIL, "server", "revoke", "server", "ward"], tmp_path)
    assert revoked.returncode == 0, revoked.stderr
    assert "does not know this site's key" in why_refused(open_site_folder(tmp_path / "ward"))
    again = run([FEDVEIL, "server", "register", "server", "ward/node.pub"], tmp_path)
    assert again.returncode == 1, "a key that is shut out is said to be let in"
    assert "was shut out" in again.stderr
    assert why_refused(open_site_folder(tmp_path / "clinic")) == ""
    assert processes.stop("clinic") < 10
    assert processes.stop("server") < 10


STRANGE_APP = """
import pathlib
from flwr.serverapp import ServerApp
pathlib.Path({mark!r}).write_text("imported")
app = ServerApp()
@app.main()
def main(grid, context):
    print("the stranger's app is run")
"""
STRANGE_SETTINGS = """
[project]
name = "stranger"
version = "1.0.0"
license = {file = "LICENSE"}
dependencies = ["flwr>=1.39.0"]
[tool.flwr.app]
publisher = "nobody"
fab-format-version = 1
flwr-version-target = "1.39.0"
[tool.flwr.app.components]
serverapp = "strange:app"
clientapp = "strange:app"
"""


@pytest.mark.deployment
@pytest.mark.parametrize("planted", [False, True], ids=["as it is", "as Flower does"])
def test_an_app_of_a_stranger_at_the_control_port_is_not_imported(
    planted: bool, processes: Processes, tmp_path: Path
) -> None:
    fleet, control = free_ports(2)
    server = make_server(tmp_path / "server", ["127.0.0.1"], fleet_port=fleet, control_port=control)
    folder, mark = tmp_path / "app", tmp_path / "mark"
    folder.mkdir()
    for name, text in (
        ("strange.py", STRANGE_APP.format(mark=str(mark))),
        ("pyproject.toml", STRANGE_SETTINGS),
        ("LICENSE", "none"),
    ):
        (folder / name).write_text(text, encoding="utf-8")
    if planted:
        server.database.parent.mkdir(exist_ok=True)
        processes.start_bare("server", superlink_command(server))
    else:
        processes.start("server", [FEDVEIL, "server", "start", str(server.path)])
    processes.wait_for("server", "Uvicorn running")
    words = [str(Path(FEDVEIL).with_name("flwr")), "run", str(folder), "fedveil", "--stream"]
    done = subprocess.run(
        words, env=environment(server.home), capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    with control_api.control_of(server) as connection:
        (listed,) = connection._call("list", "fedveil")["runs"]
    assert mark.exists() == planted
    assert ("the stranger's app is run" in done.stdout) == planted, done.stdout + done.stderr
    refusal = "the app that was submitted is not this server's"
    assert (refusal in done.stdout) != planted, "whoever submitted it is not told why"
    assert listed["status"] == ("finished:completed" if planted else "finished:failed")
    assert (refusal in listed["status-details"]) != planted
    if not planted:
        assert refusal in processes.log("server")
        assert not [path for path in server.path.rglob("*") if "strange" in path.name or path.suffix == ".fab"]


def check_that_trials_are_paid_on_the_same_sites(folder: Path) -> None:
    """Two trials on the server that runs: each site's ledger holds the run and both, and no more than was printed."""
    tables = ["[settings]", 'data.labels = "bad,good"']
    for name, rate in (("slow", 0.1), ("fast", 1.0)):
        tables += [f"[variants.{name}.settings]", f"training.learning-rate = {rate}"]
    head = ['base = "toy.toml"', "seeds = [1]", "epsilons = [1.5]", "partition-by-seed = false"]
    (folder / "trials.toml").write_text("\n".join([*head, *tables]), encoding="utf-8")
    # Trials depart from what the first run planned, and are priced as such.
    words = ["tune", "trials.toml", "--server", "server", "--sites", "2", "--ledger-epsilon", "4.0", "--yes"]
    words += ["--output", "trials"]
    for _ in range(2):  # the second time everything is there
        done = run([FEDVEIL, *words], folder)
        assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    (printed,) = re.findall(r"all 2 together: ε ([\d.]+) of 1.5 ", done.stdout)
    assert len(list((folder / "server" / "runs").iterdir())) == 3
    for site in ("clinic", "ward"):
        with Ledger(folder / site / "ledger" / "ledger.sqlite") as ledger:
            held = [entry for entry in ledger.entries() if entry.dataset == site]
            (first, *_), runs = held, list(dict.fromkeys(entry.run for entry in held))
            assert len(runs) == 3, "a trial was not charged, or one twice"
            tried = [entry for entry in held if entry.run != first.run]
            releases = [Release(entry.event, entry.count) for entry in tried]
            # What is printed holds whoever chooses the trials, which costs a little.
            assert 0.95 * float(printed) < epsilon(releases, 1e-3) < float(printed) + 1e-3


@pytest.mark.deployment
def test_three_stewards_who_follow_the_page_of_secure_sums_end_in_one_sum(
    processes: Processes, tmp_path: Path, model_folder: Callable[[str], str]
) -> None:
    """The page's command and its policy; and a site whose steward does without them joins no sum."""
    page = (
        (DOCS / "concepts" / "secure-aggregation.md")
        .read_text(encoding="utf-8")
        .split("## With real sites")[1]
        .split("\n## ")[0]
    )
    (peers,) = re.findall(r"fedveil (site peers FOLDER .*)\n", page)
    (rules,) = re.findall(r"```toml\n(.*?)```", page, flags=re.S)
    names = ("clinic", "north", "south")
    fleet, control, *runtime = free_ports(6)
    for seed, name in enumerate((*names, "lone", "test")):
        write_reviews(tmp_path / f"{name}.csv", 60, seed)
    model = ["--model", model_folder("bert")]
    fingerprint = load_base_model(model_folder("bert"), "classification").pin

    def ask(*words: str, code: int = 0) -> str:
        done = run([FEDVEIL, *words], tmp_path)
        assert done.returncode == code, f"{' '.join(words)}\n{done.stdout}{done.stderr}"
        return done.stdout

    ports = ["--fleet-port", str(fleet), "--control-port", str(control)]
    ask("server", "init", "server", "--name", "127.0.0.1", *ports)
    processes.start("server", [FEDVEIL, "server", "start", "server"])
    processes.wait_for("server", "Uvicorn running")
    (init, *_) = (line for line in guide("steward", 1) if line[1:3] == ["site", "init"])
    for name in (*names, "lone"):
        words = [word.replace("/srv/fedveil", str(tmp_path)).replace("clinic", name) for word in init[1:]]
        words = [f"127.0.0.1:{fleet}" if word == "fl.example.org" else word for word in words]
        ask(*words, *model, "--fingerprint", fingerprint, "--runtime-port", str(runtime.pop()))
        ask("server", "register", "server", f"{name}/node.pub")
    digests = set()
    for name in names:
        others = iter(f"{other}/identity.toml" for other in names if other != name)
        words = [name if word == "FOLDER" else next(others) if ".toml" in word else word for word in peers.split()]
        printed = ask(*words)
        (digest,) = re.findall(r'peers-hash = "(\w{64})"', printed)
        digests.add(digest)
        policy = tmp_path / name / "policy.toml"
        text = policy.read_text(encoding="utf-8")
        (line,) = (line for line in text.splitlines() if "mechanisms" in line and not line.startswith("#"))
        told = textwrap.dedent(rules).replace("64 hexadecimal digits", digest).replace("9.0", "90.0")
        policy.write_text(text + told, encoding="utf-8")
        assert "a key stands there for the second time (at line" in ask("doctor", name, code=1)
        policy.write_text(text.replace(line, told.rstrip()), encoding="utf-8")
        seen = ask("doctor", name)
        assert f"3 of the 3 sites {', '.join(names)} count as honest, ε alone at most 90" in seen
        assert digest in seen
    assert len(digests) == 1, "stewards who read their hashes to each other would not agree"
    for name in (*names, "lone"):
        processes.start(name, [FEDVEIL, "site", "start", name])
        processes.wait_for(name, "the worker is ready")
    toy = {
        "model.name": model_folder("bert"),
        "model.max-length": 24,
        "data.name": str(tmp_path / "test.csv"),
        "data.test": str(tmp_path / "test.csv"),
        "data.labels": "bad,good",
        "adapter.rank": 2,
        "adapter.targets": TARGETS["bert"],
        "head.start": "random",
        "rounds": 2,
        "training.local-steps": 1,
        "training.optimizer": "sgd",
        "privacy.mode": "secure-sum",
        "privacy.honest-sites": 2,
        "privacy.epsilon": 3.0,
        "privacy.delta": 1e-3,
        "device": "cpu",
    }
    (tmp_path / "toy.toml").write_text(to_toml(toy), encoding="utf-8")
    printed = ask("server", "submit", "server", "--sites", "4", "-c", "toy.toml")
    assert "lone" in printed, "nobody says why a site is not in the sum"
    (folder,) = (tmp_path / "server" / "runs").iterdir()
    assert read_file(ResultFile, folder).status == "completed"
    sharing = report_of(folder).sharing
    assert sharing is not None
    assert (sharing.honest_sites, sharing.summed) == (2, 3)
    for name in names:
        with Ledger(tmp_path / name / "ledger" / "ledger.sqlite") as ledger:
            assert ledger.epsilon(name, 1e-3) <= 3.0 < ledger.epsilon_alone(name, 1e-3) <= 90.0
    with Ledger(tmp_path / "lone" / "ledger" / "ledger.sqlite") as ledger:
        assert not ledger.entries(), "a site that joined no sum has paid for one"


@pytest.mark.deployment
def test_a_site_that_is_kept_out_says_which_reason(processes: Processes, tmp_path: Path) -> None:
    fleet, control, *runtime = free_ports(4)
    server = make_server(tmp_path / "server", ["127.0.0.1"], fleet_port=fleet, control_port=control)
    other = make_server(tmp_path / "other", ["127.0.0.1"])
    site = {
        name: make_site(
            *(tmp_path / name, name, f"127.0.0.1:{fleet}"),
            policy=policy_text(name, 10, 8.0, 1e-3),
            node=PART,
            authority=authority.path / "ca.crt",
            runtime_port=runtime.pop(),
        )
        for name, authority in (("stranger", server), ("misled", other))
    }
    processes.start("server", [FEDVEIL, "server", "start", str(server.path)])
    processes.wait_for("server", "Uvicorn running")
    for name in site:
        processes.start(name, [FEDVEIL, "site", "start", str(tmp_path / name)])
        # Nor does Flower's own program get in without our start wrapper.
        processes.start_bare(f"{name}-bare", supernode_command(site[name]))
    for name, words, flowers in (
        (
            "stranger",
            "waiting: the server does not know this site's key: send node.pub to the coordinator",
            "[code: 2004] Failed to activate SuperNode",
        ),
        ("misled", "its certificate is not of the authority in ca.crt", "handshake failed"),
    ):
        processes.wait_for(name, words)
        assert "SuperNode ID" not in processes.log(name)
        processes.stop(name)
        processes.ends_refused(f"{name}-bare", flowers)
    registration = {finding.what: finding for finding in examine_site_quickly(site["stranger"])}["registration"]
    assert not registration.ok
    assert "does not know this site's key" in registration.found
    # Killed after Flower's answer and before the folder's files, then after it and before they are gone.
    key, names = site["stranger"].path / "node.pub", ("stranger.id", "stranger.pub")
    said = registry.register_site(server, key)
    kept = {name: (server.nodes / name).read_bytes() for name in names}
    for name in names:
        (server.nodes / name).unlink()
    assert registry.register_site(server, key) == said
    assert why_refused(site["stranger"]) == ""
    registry.revoke_site(server, "stranger")
    for name in names:
        (server.nodes / name).write_bytes(kept[name])
    registry.revoke_site(server, "stranger")
    with pytest.raises(registry.ShutOut):
        registry.register_site(server, key)


def examine_site_quickly(folder: SiteFolder) -> list[Any]:
    """The results of the doctor, without a base model to load."""
    return list(examine_site(dataclasses.replace(folder, model="no/such-model")))


@pytest.mark.deployment
def test_an_expired_server_is_refused_by_itself_by_flower_and_by_name(processes: Processes, tmp_path: Path) -> None:
    fleet, control, runtime = free_ports(3)
    then = datetime.now(UTC) - timedelta(days=certificates.SERVER_DAYS + 3)
    server = make_server(tmp_path / "server", ["127.0.0.1"], fleet_port=fleet, control_port=control, now=then)
    site = make_site(
        *(tmp_path / "clinic", "clinic", f"127.0.0.1:{fleet}"),
        policy="",
        node=PART,
        authority=server.path / "ca.crt",
        runtime_port=runtime,
    )
    with pytest.raises(DataError, match="the server's certificate has expired: renew it"):
        start_server(server, print)
    processes.start_bare("server", superlink_command(server))
    processes.start("clinic", [FEDVEIL, "site", "start", str(site.path)])
    processes.wait_for("server", "Uvicorn running")
    processes.start_bare("bare", supernode_command(site))
    processes.wait_for("clinic", "its certificate has expired: the coordinator renews it with 'fedveil server renew'")
    processes.stop("clinic")
    processes.ends_refused("bare", "certificate has expired")
    processes.stop("server")
    renew_server(server)
    processes.start("server", [FEDVEIL, "server", "start", str(server.path)])
    deadline = time.monotonic() + PATIENCE
    while "does not answer" in (reason := why_refused(site)) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert "does not know this site's key" in reason


def site_for(tmp_path: Path, port: int, authority: Path, host: str = "127.0.0.1") -> SiteFolder:
    folder = tmp_path / f"site-{port}"
    return make_site(folder, "clinic", f"{host}:{port}", policy="", node=PART, authority=authority / "ca.crt")


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


def test_a_folder_is_made_once_and_keys_are_private(tmp_path: Path) -> None:
    server = make_server(tmp_path / "server", ["fl.example.org", "10.0.0.7"])
    site = site_for(tmp_path, 9092, server.path)
    for path in (server.path / "server.key", authority_beside(server.path) / "ca.key", site.path / "node.key"):
        assert path.stat().st_mode & 0o777 == 0o600, f"{path} can be read by others"
    pem = certificates.read_certificate((server.path / "server.pem").read_bytes(), "the server")
    assert {"fl.example.org", "10.0.0.7", "localhost", "127.0.0.1"} == set(certificates.names_of(pem))
    assert is_pair((site.path / "node.key").read_bytes(), (site.path / "node.pub").read_bytes())
    assert not is_pair(new_node_key("clinic").private, (site.path / "node.pub").read_bytes())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for again in (lambda: make_server(server.path, ["x"]), lambda: site_for(tmp_path, 9092, server.path)):
        with pytest.raises(ConfigError, match="is not overwritten"):
            again()
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.parametrize("who", ["server", "site"])
def test_a_user_without_a_name_is_a_number_in_the_unit_and_init_makes_all_or_nothing(
    who: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by 'docker run --user 12345': the folder stood there without its unit, and could not be made again."""
    monkeypatch.setattr("getpass.getuser", lambda: {}["getpwuid(): uid not found: 12345"])
    monkeypatch.setattr("os.getuid", lambda: 12345)
    folder, more = tmp_path / who, ["--name", "127.0.0.1"] if who == "server" else ["--server", "127.0.0.1"]
    unit = folder / f"fedveil-{who}.service"
    folder.mkdir()
    unit.write_text("the user's own", encoding="utf-8")
    taken = CliRunner().invoke(app, [who, "init", str(folder), *more])
    assert (taken.exit_code, f"{unit} is there already" in taken.output) == (1, True), taken.output
    assert not (folder / f"{who}.toml").exists()
    unit.unlink()
    done = CliRunner().invoke(app, [who, "init", str(folder), *more])
    assert (done.exit_code, done.exception) == (0, None), done.output
    assert "User=12345\n" in unit.read_text(encoding="utf-8")


def test_a_site_with_another_sites_private_key_does_not_start(tmp_path: Path) -> None:
    """The server would know it by that key, and drop every reply under the name in node.pub."""
    site = site_with_records(tmp_path, "two.csv", b"text,label\na,bad\nb,good\n")
    (site.path / "node.key").write_bytes(new_node_key("clinic").private)
    with pytest.raises(ConfigError, match=r"node.pub is not node.key's: .* put the right node.key back"):
        start_site(site, pytest.fail)
    found = {finding.what: finding for finding in examine_site_quickly(site)}
    assert not found["key pair"].ok


def test_a_renewed_certificate_is_of_the_same_authority(tmp_path: Path) -> None:
    server = make_server(tmp_path / "server", ["fl.example.org"], control_host="control")
    before = (server.path / "server.pem").read_bytes()
    renew_server(open_server(server.path))
    after = (server.path / "server.pem").read_bytes()
    assert after != before
    authority = certificates.read_certificate((server.path / "ca.crt").read_bytes(), "the authority")
    renewed = certificates.read_certificate(after, "the server")
    assert certificates.is_issued_by(renewed, authority)
    assert certificates.names_of(renewed) == ["fl.example.org", "localhost", "control", "127.0.0.1"]
    assert certificates.belongs_to(renewed, (server.path / "server.key").read_bytes())
    assert (server.path / "server.key").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("name", ["no spaces here", "", "ünïcode"])
def test_a_name_that_no_certificate_can_hold_is_refused_and_nothing_is_left(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        make_server(tmp_path / "server", [name] if name else [])
    assert not (tmp_path / "server").exists()


def test_an_unknown_key_of_a_folder_is_named(tmp_path: Path) -> None:
    server = make_server(tmp_path / "server", ["fl.example.org"])
    with (server.path / "server.toml").open("a") as file:
        file.write("contrl-port = 8000\n")
    with pytest.raises(ConfigError, match="did you mean 'control-port'"):
        open_server(server.path)


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


def test_who_names_one_of_two_ledgers_goes_on_with_it_and_the_doctor_looks_at_that_one(tmp_path: Path) -> None:
    """So says the error of a folder with two; the doctor's word on the other one would be worth nothing."""
    server = make_server(tmp_path / "server", ["127.0.0.1"])
    site = site_for(tmp_path, free_ports(1)[0], server.path)
    site.path.joinpath("ledger").mkdir()
    first, second = (site.path / "ledger" / f"{name}.sqlite" for name in ("first", "second"))
    for file in (first, second):
        Ledger(file).close()
    with pytest.raises(LedgerError, match="name the one that goes on"):
        node_settings(site)
    named = dataclasses.replace(site, node=f'{PART} ledger="{second}"')
    assert node_settings(named)["ledger"] == str(second)
    (finding,) = doctor._ledger(named)
    assert (finding.ok, finding.found) == (True, f"{second} opens, 0 charges, mode 0600")
    second.chmod(0o640)
    (finding,) = doctor._ledger(named)
    assert (finding.ok, f"chmod 600 {second}" in finding.found) == (False, True)


def test_the_policy_of_a_new_site_is_one(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(policy_text("clinic", 2000, 4.0, 1e-5), encoding="utf-8")
    policy = load_policy(path)
    assert (policy.dataset_id, policy.public_size, policy.epsilon, policy.delta) == ("clinic", 2000, 4.0, 1e-5)
    assert not policy.allow_no_privacy


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--name", "my clinic"], "the site's name is 'my clinic'"),
        (["--epsilon", "-3"], "epsilon must be"),
        (["--delta", "2"], "delta must be"),
        ([*OWN, "--labels", "bad,good", "--delta", "1e-3"], "above 1/2000 of the public size"),
        (OWN, "--labels is needed: name all labels in the job's order"),
        ([*OWN, "--labels", "bad"], "name at least 2 different ones"),
        ([*OWN, "--labels", "bad,good", "--prompt", "q"], "--prompt is given, which the task 'classification'"),
        ([*OWN, "--task", "causal-lm", "--labels", "bad,good"], "--labels is given, which the task 'causal-lm'"),
        ([*OWN, "--task", "causal"], "did you mean 'causal-lm'"),
        ([*OWN, "--labels", "bad,good", "--max-length", "0"], "max-length must be above 0"),
        (["--model", "/srv/model"], "the fingerprint of the base model '/srv/model' is needed"),
        (["--model", "/srv/model", "--fingerprint", "0123"], "write NAME=FINGERPRINT+FILES"),
    ],
)
def test_a_site_that_could_never_work_is_not_made(words: list[str], reason: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["site", "init", str(tmp_path / "site"), "--server", "fl.example.org", *words])
    assert (done.exit_code, done.output.count("\n")) == (1, 1), done.output
    assert reason in done.output
    assert not (tmp_path / "site").exists()


@pytest.mark.parametrize("name", [r"back\table", 'the "old" one', "a'b\\\"c\\", "two\nlines\t", "ä b = 'c'", "$a\x7f"])
def test_a_path_of_records_is_the_path_that_was_named_whatever_is_in_it(name: str, tmp_path: Path) -> None:
    """A backslash and a t were a tab, and so another path; after a quote the rest was no setting."""
    (tmp_path / name).touch()
    words = ["--server", "fl.example.org", "--data", str(tmp_path / name), "--public-size", "2000"]
    done = CliRunner().invoke(app, ["site", "init", str(tmp_path / "site"), *words, "--labels", "bad,good"])
    assert done.exit_code == 0, done.output
    settings = node_settings(open_site_folder(tmp_path / "site"))
    assert settings["data"] == str(tmp_path / name)
    assert parse_config_args([node_config(settings)]) == settings, "Flower reads the node's settings otherwise"


@pytest.mark.parametrize(
    ("policy", "node", "reason"),
    [
        ("epsilom = 4.0\n", PART, "did you mean 'epsilon'"),
        ("epsilon = 4.0\ndelta = 1e-3\n", f"{PART} public-size=2000", "above 1/2000"),
        ("", 'data="records.csv"', "'public-size' is needed beside 'data'"),
        ('task = "causal-lm"\n', PART, "completion, max-length is not"),
        ("", "", "this site has no records"),
        (PINNED_ALONE, 'data="records.csv" public-size=50', "the site's policy has no budget for its records"),
        (BUDGETED, 'data="records.csv" public-size=true', "'public-size' is True: give a whole number"),
        ("", "partition-id=4 num-partitions=4", "partition-id is 4 and its num-partitions 4: give a whole number"),
        (BUDGETED, 'data="records.csv" public-size=50 rank=0', "node setting 'rank' is 0"),
        (BUDGETED, 'data="records.csv" public-size=50 rank="all"', "node setting 'rank' is 'all'"),
    ],
)
def test_a_policy_that_every_round_would_refuse_stops_the_site_and_fails_the_doctor(
    policy: str, node: str, reason: str, tmp_path: Path
) -> None:
    server = make_server(tmp_path / "server", ["127.0.0.1"])
    site = site_for(tmp_path, free_ports(1)[0], server.path)
    (site.path / "policy.toml").write_text(policy, encoding="utf-8")
    site = dataclasses.replace(site, node=node)
    found = {finding.what: finding for finding in examine_site_quickly(site)}
    assert not found["policy"].ok
    assert reason in found["policy"].found
    with pytest.raises(ConfigError, match=re.escape(reason)):
        start_site(site, pytest.fail)


def site_with_records(tmp_path: Path, name: str, content: bytes) -> SiteFolder:
    """Return the folder of a site whose records are in the file ``name``."""
    (tmp_path / name).write_bytes(content)
    server = make_server(tmp_path / f"server-{name}", ["127.0.0.1"])
    site = site_for(tmp_path, free_ports(1)[0], server.path)
    pinned = {**pins({"data.labels": "bad,good"}), "public-size": 50}
    (site.path / "policy.toml").write_text(to_toml(pinned), encoding="utf-8")
    node = to_toml({"node": f'data="{tmp_path / name}"'})
    kept = [line for line in (site.path / "site.toml").read_text(encoding="utf-8").splitlines() if '"node"' not in line]
    (site.path / "site.toml").write_text("\n".join([*kept, node]), encoding="utf-8")
    return open_site_folder(site.path)


def test_a_steward_reads_which_rows_are_no_records_and_why_but_not_what_is_in_them(tmp_path: Path) -> None:
    rows = ["the film,good", "a secret,fair", ",good", *["a secret,fine"] * 25, "a secret,good,more"]
    site = site_with_records(tmp_path, "own.csv", "\n".join(["text,label", *rows]).encode())
    done = CliRunner().invoke(app, ["site", "check", str(site.path)])
    assert done.exit_code == 0, done.output
    own = tmp_path / "own.csv"
    assert done.output.splitlines() == [
        "records: 1 of 29 rows fit; the others count as none",
        "labels: good 1",
        "  no row has the label 'bad': compare how it is written in the rows and in the policy",
        "public-size: 50 declared, 1 record found: a step is divided by what is declared, so that these weigh less "
        "than they could",
        f"  {own}: row 2, {', '.join(map(str, range(4, 23)))} and 6 more has a label that is not among data.labels",
        f"  {own}: row 3 has no value in column 'text' (data.text)",
        f"  {own}: row 29 has another number of fields than the header",
    ]
    assert "secret" not in done.output
    said: list[str] = []
    check_site(site, said.append, rows=False)
    assert said == done.output.splitlines()[:1], "a start lists rows"


def test_check_and_start_refuse_records_that_reply_after_has_no_time_for(tmp_path: Path) -> None:
    rows = ["text,label", *[f"film {i},good" for i in range(51)]]
    site = site_with_records(tmp_path, "own.csv", "\n".join(rows).encode())
    rules = (site.path / "policy.toml").read_text(encoding="utf-8")

    def rule(reply_after: float, public_size: int) -> None:
        text = rules.replace('"public-size" = 50', f'"public-size" = {public_size}')
        (site.path / "policy.toml").write_text(f"reply-after = {reply_after}\n{text}", encoding="utf-8")

    check_site(site, print)  # without it answers leave when they are there
    rule(600.0, 50)
    for begin in (check_site, start_site):
        with pytest.raises(ConfigError, match=r"51 records and public-size is 50, for which alone reply-after = 600"):
            begin(site, print)
    rule(1e-6, 51)
    for begin in (check_site, start_site):
        with pytest.raises(ConfigError, match=r"took \d+\.\d seconds to read, and reply-after = 1e-06 leaves 0\.0"):
            begin(site, print)
    rule(600.0, 51)
    check_site(site, print)


def test_check_and_withdrawal_let_cells_hold_line_breaks_by_the_policy_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = site_with_records(tmp_path, "notes.csv", b'text,label\n"a film\nof two, or more",good\nthe scene,bad\n')
    with pytest.raises(UnreadableFile, match="line 2 is no row by itself"):
        check_site(site, print)
    policy = site.path / "policy.toml"
    policy.write_text(f"line-breaks = true\n{policy.read_text(encoding='utf-8')}", encoding="utf-8")
    lines, withdrawn = list[str](), list[int]()
    check_site(site, lines.append)
    assert lines == ["records: 2 of 2 rows fit", "labels: bad 1, good 1", *lines[2:]]
    assert not any("withdrawn" in line for line in lines)
    monkeypatch.setattr(Ledger, "remember", lambda _, __, records: withdrawn.append(len(records)))
    withdraw_site(site, "asked for", lines.append)
    assert withdrawn == [2 * 3], (
        "a record, of three hashes each, that goes over lines would be taken again under another name"
    )
    lines.clear()
    check_site(site, lines.append, rows=False)
    assert lines == [
        "records: 2 of 2 rows fit",
        "withdrawn: clinic is, so every round is refused but one that was charged before",
    ]
    other: list[str] = []
    check_site(site, other.append, 'dataset-id="another"', rows=False)
    assert other == lines[:1], "another data set of this ledger is not withdrawn"


UNREADABLE = [
    (
        "quote.csv",
        b'text,label\n"never closed,good\n',
        "quote.csv cannot be read as CSV: line 2 is no row by itself (unexpected end of data): double the quotes",
    ),
    (
        "latin.csv",
        "text,label\n\u00e9,good\n".encode("latin-1"),
        "latin.csv cannot be read as CSV: line 2 is not UTF-8: save the file as UTF-8",
    ),
    (
        "line.csv",
        b'text,label\nthe film,good\n"never closed,good\n',
        "line 3 is no row by itself (unexpected end of data)",
    ),
    ("half.parquet", b"PAR1half", "half.parquet cannot be read as PARQUET"),
    ("twice.csv", b"text,label,text\na,good,b\n", "two columns are called 'text'"),
    ("none.csv", b"text,label\n", "none.csv is empty: it has no records"),
    ("column.csv", b"text,stars\na,5\n", "has no column 'label' (data.label); it has text, stars"),
    ("odd.csv", b"text,label\n,good\n", "no row is a record (row 1 has no value in column 'text' (data.text)): mend"),
]


@pytest.mark.parametrize(("name", "content", "reason"), UNREADABLE, ids=[name for name, _, _ in UNREADABLE])
def test_data_that_every_round_would_answer_with_noise_alone_stop_check_and_start(
    name: str, content: bytes, reason: str, tmp_path: Path
) -> None:
    site = site_with_records(tmp_path, name, content)
    done = CliRunner().invoke(app, ["site", "check", str(site.path)])
    assert (done.exit_code, done.output.count("\n")) == (1, 1), done.output
    assert reason in done.output
    with pytest.raises(DataError, match=re.escape(reason)):
        start_site(site, pytest.fail)


def test_the_doctor_fails_on_open_keys_and_a_damaged_ledger(tmp_path: Path) -> None:
    server = make_server(tmp_path / "server", ["127.0.0.1"])
    site = site_for(tmp_path, free_ports(1)[0], server.path)
    (site.path / "node.key").chmod(0o644)
    site.ledger.parent.mkdir()
    site.ledger.write_bytes(b"")
    found = {finding.what: finding for finding in examine_site_quickly(site)}
    for what, words in (
        ("site's key", "others can read it: chmod 600"),
        ("ledger", "not a FedVeil ledger"),
        ("server", "does not answer"),
        ("base model", "cannot load the base model"),
    ):
        assert not found[what].ok, f"{what} passes"
        assert words in found[what].found
    for what in ("key pair", "authority", "policy"):
        assert found[what].ok


def test_the_doctor_s_exit_code_says_that_something_failed(tmp_path: Path) -> None:
    server = make_server(tmp_path / "server", ["127.0.0.1"])
    site = site_for(tmp_path, free_ports(1)[0], server.path)
    done = CliRunner().invoke(app, ["doctor", str(site.path)])
    assert done.exit_code == 1
    assert "failed  server: " in done.stdout


def test_containers_make_keys_once_and_the_coordinator_sees_none(tmp_path: Path) -> None:
    for name in ("authority", "server", "coordinator", "site-1", "site-2"):
        (tmp_path / name).mkdir()
    container.make_keys(2, 8.0, 1e-5, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    container.make_keys(2, 8.0, 1e-5, tmp_path)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert sorted(path.name for path in (tmp_path / "coordinator").rglob("*.pub")) == ["site-1.pub", "site-2.pub"]
    for place in ("coordinator", "site-1"):
        held = [path.name for path in (tmp_path / place).rglob("*") if path.suffix == ".key"]
        assert sorted(held) == (["identity.key", "node.key"] if place == "site-1" else []), f"{place} holds {held}"
    assert not list((tmp_path / "server").rglob("ca.key")), "the server's volume holds the authority's key"


def test_a_site_is_well_only_while_it_is_connected(tmp_path: Path) -> None:
    table = tmp_path / "tcp"
    head = "  sl  local_address rem_address   st\n"
    table.write_text(f"{head}   0: 0200A8C0:8AE2 0300A8C0:2384 01 0\n")
    assert container.site_is_well((table,))
    assert [str(path) for path in container.site_is_well.__defaults__[0]] == ["/proc/net/tcp", "/proc/net/tcp6"]
    for row in ("   0: 0200A8C0:8AE2 0300A8C0:2384 06 0\n", "   0: 0200A8C0:2384 0300A8C0:8AE2 01 0\n", ""):
        table.write_text(head + row)
        assert not container.site_is_well((table,)), row


def test_a_superlink_is_well_only_where_both_ports_show_a_certificate_of_the_authority(
    tmp_path: Path, tls_server: Callable[[ServerFolder], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, other = (make_server(tmp_path / name, ["127.0.0.1"]) for name in ("server", "other"))
    good, foreign, (closed,) = tls_server(server), tls_server(other), free_ports(1)
    monkeypatch.setattr(container, "CONTROL", "127.0.0.1")
    for fleet, control, well in (
        (good, good, True),
        (foreign, good, False),
        (good, foreign, False),
        (good, closed, False),
    ):
        monkeypatch.setattr(container, "FLEET_PORT", fleet)
        monkeypatch.setattr(container, "CONTROL_PORT", control)
        assert container.server_is_well(server.path) is well


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


@pytest.fixture
def fake_control(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeControl]:
    def make(*results: Status, statuses: tuple[str, ...] = ()) -> FakeControl:
        control = FakeControl(list(results), list(statuses))
        for module in (submission, registry):
            monkeypatch.setattr(module, "control_of", lambda folder: nullcontext(control))
        return control

    return make


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


def test_a_finished_job_is_reported_and_other_settings_make_a_new_run(
    tmp_path: Path, fake_control: Callable[..., FakeControl]
) -> None:
    server, said = make_server(tmp_path / "server", ["127.0.0.1"]), list[str]()
    control = fake_control("completed", "completed")
    first = submission.submit(server, {"rounds": 3}, said.append, once=True)
    assert submission.submit(server, {"rounds": 3}, said.append, once=True) == first
    assert len(control.submitted) == 1, "a finished job was run again"
    assert "has ended: nothing to do" in said[-1]
    assert submission.submit(server, {"rounds": 4}, said.append, once=True) != first
    assert control.submitted[-1]["output"] == str(server.runs)


def test_a_failed_job_is_submitted_anew_and_its_old_result_is_not_taken_for_the_new_one(
    tmp_path: Path, fake_control: Callable[..., FakeControl]
) -> None:
    server, said = make_server(tmp_path / "server", ["127.0.0.1"]), list[str]()
    control = fake_control("failed", "completed")
    with pytest.raises(RunFailed, match="nobody answered"):
        submission.submit(server, {"rounds": 3}, said.append, once=True)
    path = submission.submit(server, {"rounds": 3}, said.append, once=True)
    assert len(control.submitted) == 2
    assert submission._ended_well(path)
    later = time.time() + 1
    assert submission._result(path, later) is None, "a result from before the submission counts"


def test_a_job_that_still_runs_is_followed_and_not_submitted_twice(
    tmp_path: Path, fake_control: Callable[..., FakeControl]
) -> None:
    server, said = make_server(tmp_path / "server", ["127.0.0.1"]), list[str]()
    control = fake_control("failed", statuses=("running",))
    with pytest.raises(RunFailed):
        submission.submit(server, {}, said.append, once=True)
    folder = Path(read_json(server.path / "last-job.json")["folder"])
    (folder / "result.json").unlink()
    threading.Timer(0.5, end, (folder,)).start()
    assert submission.submit(server, {}, said.append, once=True) == folder
    assert len(control.submitted) == 1
    assert "is under way" in said[-1]


@pytest.mark.parametrize(
    "content", [b"{}", b"[]", b"[" * 100_000, b'{"run": 7, "folder": "x", "settings": {}}', b"\xff"]
)
def test_a_damaged_note_of_the_last_job_is_one_line(
    content: bytes, tmp_path: Path, fake_control: Callable[..., FakeControl]
) -> None:
    server, control = make_server(tmp_path / "server", ["127.0.0.1"]), fake_control()
    (server.path / "last-job.json").write_bytes(content)
    for command in (lambda: submission.stop_job(server), lambda: submission.submit(server, {}, print, once=True)):
        with pytest.raises(DataError, match=r"last-job\.json") as caught:
            command()
        assert "\n" not in str(caught.value)
    assert control.submitted == []


def test_a_resumed_job_that_still_runs_is_followed_too(
    tmp_path: Path, fake_control: Callable[..., FakeControl]
) -> None:
    server, said = make_server(tmp_path / "server", ["127.0.0.1"]), list[str]()
    control, path = fake_control(), server.runs / "fedavg-lora-7"
    path.mkdir(parents=True)
    (path / CHECKPOINT).touch()
    write_json(path / "config.json", to_json(ConfigFile("7", "", {"rounds": 9, "recipe": "plain"}, {})))
    settings = {"rounds": 9, "recipe": "plain", "output": str(server.runs), "resume": str(path)}
    write_json(server.path / "last-job.json", {"run": "8", "folder": str(path), "settings": settings})
    with only_writer(path):
        threading.Timer(2.0, end, (path,)).start()
        assert submission.submit(server, {"resume": "7"}, said.append, once=True) == path
    assert control.submitted == []
    assert "run 8 with these settings is under way" in said


def test_a_job_is_resumed_only_once_its_server_has_ended(
    tmp_path: Path, fake_control: Callable[..., FakeControl], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, said = make_server(tmp_path / "server", ["127.0.0.1"]), list[str]()
    control, path = fake_control(), server.runs / "fedavg-lora-7"
    path.mkdir(parents=True)
    (path / CHECKPOINT).touch()
    write_json(path / "config.json", to_json(ConfigFile("7", "", {}, {})))
    monkeypatch.setattr(submission, "DYING_SECONDS", 0.2)
    with only_writer(path), pytest.raises(RunFailed, match="is under way"):
        submission.submit(server, {"resume": "7"}, said.append)
    assert "is still written: waiting up to 0.2 s" in said[-1]
    with pytest.raises(DataError, match="damaged"):
        submission.submit(server, {"resume": "7"}, said.append)
    assert control.submitted == []


def test_a_run_that_flower_ended_is_followed_while_its_server_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submission, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(submission, "ASK_SECONDS", 0.0)
    ended = FakeControl([], 1000 * ["finished:failed"])
    with only_writer(tmp_path):
        threading.Timer(0.5, end, (tmp_path,)).start()
        submission._follow(ended, "7", tmp_path, print, since=0.0)  # type: ignore[arg-type]
    (tmp_path / "result.json").unlink()
    with pytest.raises(RunFailed, match="ended as finished:failed and left no result"):
        submission._follow(ended, "7", tmp_path, print, since=0.0)  # type: ignore[arg-type]


def test_a_silent_server_is_no_reason_to_submit_a_job_again(
    tmp_path: Path, fake_control: Callable[..., FakeControl]
) -> None:
    server, said = make_server(tmp_path / "server", ["127.0.0.1"]), list[str]()
    control = fake_control("failed", statuses=(SILENT,))
    with pytest.raises(RunFailed):
        submission.submit(server, {}, said.append, once=True)
    folder = Path(read_json(server.path / "last-job.json")["folder"])
    (folder / "result.json").unlink()
    with pytest.raises(RunFailed, match="no answer"):
        submission.submit(server, {}, said.append, once=True)
    with only_writer(folder):
        threading.Timer(0.5, end, (folder,)).start()
        assert submission.submit(server, {}, said.append, once=True) == folder, "whoever writes the folder is alive"
    assert len(control.submitted) == 1


def test_a_job_is_given_up_once_neither_the_server_nor_the_run_shows_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submission, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(submission, "ASK_SECONDS", 0.0)
    monkeypatch.setattr(submission, "SILENCE_SECONDS", 0.1)
    silent = FakeControl([], ["running", *1000 * [SILENT]])
    with only_writer(tmp_path):
        threading.Timer(0.5, end, (tmp_path,)).start()
        submission._follow(silent, "7", tmp_path, print, since=0.0)  # type: ignore[arg-type]
    (tmp_path / "result.json").unlink()
    with pytest.raises(RunFailed, match=r"run 7 is given up after .*no answer"):
        submission._follow(silent, "7", tmp_path, print, since=0.0)  # type: ignore[arg-type]
    assert silent.statuses, "the test ended for another reason"


def test_too_few_sites_is_an_error_that_counts_them(tmp_path: Path, fake_control: Callable[..., FakeControl]) -> None:
    server = make_server(tmp_path / "server", ["127.0.0.1"])
    control = fake_control("completed")
    for name, node in (("clinic", 17), ("ward", 19)):
        (server.nodes / f"{name}.id").write_text(f"{node}\n", encoding="utf-8")
    said: list[str] = []
    with pytest.raises(RunFailed, match="3 sites wanted, 2 online, not ward after 0 s: look at the logs of those"):
        submission.submit(server, {}, said.append, sites=3, patience=0.0)
    assert said == ["3 sites wanted, 2 online, not ward: waiting up to 0 s"]
    assert control.submitted == []


def test_sites_are_waited_for_with_longer_and_longer_pauses_and_not_beyond_what_was_said(
    tmp_path: Path, fake_control: Callable[..., FakeControl], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look costs a second of a core, and a job that waits for a clinic waits for minutes."""
    server, control, clock = make_server(tmp_path / "server", ["127.0.0.1"]), fake_control("completed"), [0.0]
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr(submission, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep, time=time.time))
    with pytest.raises(RunFailed, match="3 sites wanted"):
        submission._wait_for_sites(control, server, 3, 60.0, print)  # type: ignore[arg-type]
    assert pauses[:6] == [1.0, 2.0, 4.0, 8.0, 16.0, 20.0]
    assert sum(pauses) == 60.0
    with pytest.raises(ConfigError, match="--patience is nan"):
        submission._wait_for_sites(control, server, 3, float("nan"), print)  # type: ignore[arg-type]
    for words in ("--sites 0", "--patience -1"):
        done = CliRunner().invoke(app, ["server", "submit", str(server.path), *words.split()])
        assert done.exit_code == 2


def test_who_stops_following_a_job_is_told_that_it_goes_on_and_stop_ends_it(
    tmp_path: Path, fake_control: Callable[..., FakeControl], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C ends the command alone: the SuperLink goes on with the run, and the sites' budgets are spent."""
    server = make_server(tmp_path / "server", ["127.0.0.1"])
    words = [str(server.path)]
    control = fake_control("completed", statuses=("running", "finished:stopped"))
    none = CliRunner().invoke(app, ["stop", *words])
    assert (none.exit_code, none.output.count("\n")) == (1, 1)
    assert "no job was submitted from" in none.output

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(submission, "_follow", interrupted)
    left = CliRunner().invoke(app, ["server", "submit", *words])
    assert left.exit_code == 130
    assert f"run 101 goes on at the server, and its sites go on paying: 'fedveil stop {words[0]}'" in left.output
    stopped = CliRunner().invoke(app, ["stop", *words])
    assert stopped.output == "run 101 is stopped, and what sites have paid stays paid\n"
    assert control.stopped == ["101"]
    again = CliRunner().invoke(app, ["stop", *words])
    assert "run 101 has ended before" in again.output
    assert control.stopped == ["101"]


def test_flowers_answers_are_read_whatever_its_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flwr = tmp_path / "flwr"
    monkeypatch.setattr(control_api, "program", lambda name: str(flwr))

    def says(text: str) -> None:
        flwr.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")
        flwr.chmod(0o755)

    control = control_api.Control(tmp_path, "127.0.0.1:8000")
    says('{"success": false, "error-message": "[code: 23] Public key already in use."}')
    assert control.register(tmp_path / "node.pub") == ""
    says('{"success": false, "error-message": "[code: 1] Access denied."}')
    with pytest.raises(RunFailed, match=r"the server did not register the key: .*Access denied"):
        control.register(tmp_path / "node.pub")
    says('{"success": true, "node-id": 7}')
    control.revoke("7")
    says('{"success": false, "error-message": "Using x [code: 24] Node ID not found for account."}')
    control.revoke("7")
    says('{"success": false, "error-message": "[code: 1] Access denied."}')
    with pytest.raises(RunFailed, match=r"the server did not revoke the site: .*Access denied"):
        control.revoke("7")
    says('{"success": true, "runs": [{"run-id": "7", "status": "finished:failed"}]}')
    assert control.status("7") == "finished:failed"
    says('{"success": true, "runs": [{"status": "finished:failed", "status-details": "not this server\'s app"}]}')
    assert control.status("7") == "finished:failed (not this server's app)"
    says('{"success": true, "runs": [{"status": "running", "status-details": "N/A"}]}')
    assert control.status("7") == "running"
    says(
        """{"success": true, "nodes": [{"node-id": "7", "status": "online"}, {"node-id": "9", "status": "offline"}]}"""
    )
    assert control.online() == {7}
    says('{"success": true, "run-id": "7"}')
    control.stop("7")
    says('{"success": false, "error-message": "[code: 16] Run ID not found."}')
    assert control.status("7") == "unknown"
    says('{"success": false, "error-message": "Using x\\nConnection to the SuperLink is unavailable. Check it."}')
    with pytest.raises(
        RunFailed, match=r"list the sites: nothing answers at 127\.0\.0\.1:8000, .*'fedveil server start'"
    ):
        control.online()
    says("Connection refused")
    for ask in (control.online, lambda: control.status("7")):
        with pytest.raises(RunFailed, match="Connection refused"):
            ask()
    monkeypatch.setattr(control_api, "ANSWER_SECONDS", 0.2)
    flwr.write_text("#!/bin/sh\nexec sleep 20\n")
    with pytest.raises(RunFailed, match=r"no answer in 0\.2 s"):
        control.online()


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


def test_a_check_reads_what_every_job_that_the_policy_allows_reads() -> None:
    """In another way it would say that all is well, and each round would answer otherwise."""
    for task in TASKS.values():
        columns = Columns({role.setting: f"our {role.setting}" for role in task.roles})
        labels = {"labels": "bad,good"} if task.labelled else {}
        policy = Policy(unit="person", person="patient", task=task.name, columns=columns, max_length=64, **labels)
        asked: dict[str, Scalar] = {
            **{f"data.{key}": value for key, value in columns.items()},
            "privacy.unit": "person",
            "data.person": "patient",
            "model.task": task.name,
            "data.name": "x.csv",
            **({"data.labels": "bad, good"} if task.labelled else {}),
        }
        ours = own_settings(configure(asked).config, policy)
        assert dataclasses.replace(pinned_settings(policy), name="") == ours, task.name


def test_a_check_is_of_what_the_start_is_told_and_names_each_file(tmp_path: Path) -> None:
    site = site_with_records(tmp_path, "own.csv", b"text,label\na,good\n")
    parts = tmp_path / "parts"
    parts.mkdir()
    for name in ("one", "two"):
        (parts / f"{name}.csv").write_text("text,label\na,good\nb,fair\n", encoding="utf-8")
    said: list[str] = []
    check_site(site, said.append, f'data="{parts}"')
    assert said[0] == "records: 2 of 4 rows fit; the others count as none"
    assert any("public-size: 50 declared, 2 records found" in line for line in said)
    assert [line for line in said if "fair" in line or "row 2" in line] == [
        f"  {parts / name}.csv: row 2 has a label that is not among data.labels" for name in ("one", "two")
    ]


def test_no_more_is_declared_or_taken_than_answers_have_time_for() -> None:
    def hold(declared: int, units: int, seconds: float) -> None:
        site_check._check_time(80.0, declared, units, seconds, "person")

    hold(5, 5, 10.0)
    with pytest.raises(ConfigError, match="there are 6 persons and public-size is 5, for which alone reply-after = 80"):
        hold(5, 6, 1.0)
    with pytest.raises(ConfigError, match=r"took 10\.1 seconds .* leaves 10\.0, .*: set it to 162 or more"):
        hold(5, 5, 10.1)
    assert not list(site_check._size(50, 25, "record"))
    assert len(list(site_check._size(51, 25, "record"))) == 1


def test_a_site_check_tells_of_a_label_that_no_row_has(tmp_path: Path) -> None:
    site = site_with_records(tmp_path, "own.csv", b"text,label\nthe film,good\n" + b"a film,bad\n" * 40)
    said: list[str] = []
    check_site(site, said.append)
    assert said == ["records: 41 of 41 rows fit", "labels: bad 40, good 1"]

"""The guides of coordinator and steward with real processes on the loopback, and who is kept out."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from deployed import FEDVEIL, PART, PATIENCE, examine_site_quickly, run

from audits.tiny_models import TARGETS, write_reviews
from faults.connect_proxy import ConnectProxy, connect_proxy
from fedveil.client.ledger.ledger import Ledger
from fedveil.common.config.text import to_toml
from fedveil.common.errors import DataError
from fedveil.common.model.base import load_base_model
from fedveil.common.ports import free_ports
from fedveil.common.run_lines import ResultFile, read_file
from fedveil.deploy import certificates, registry
from fedveil.deploy import control as control_api
from fedveil.deploy.commands import environment, superlink_command, supernode_command
from fedveil.deploy.policy_file import policy_text
from fedveil.deploy.refusal import why_refused
from fedveil.deploy.server_folder import make_server, renew_server
from fedveil.deploy.site_folder import SiteFolder, make_site, open_site_folder
from fedveil.deploy.start import start_server
from fedveil.privacy.accounting import Release, epsilon
from fedveil.reports import report_of

pytestmark = pytest.mark.usefixtures("programs_may_start")


BEHIND, LOGIN = "fl.behind.example.org", "ward:s3cret"
"""The name by which a proxy alone knows the server, and the login that it takes."""
DOCS = Path(__file__).resolve().parents[2] / "docs"


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


@pytest.fixture
def way_out() -> Iterator[Callable[[Mapping[str, int], SiteFolder], ConnectProxy]]:
    """Return a function that serves a proxy, and names it in a site's file."""
    with ExitStack() as served:

        def serve(places: Mapping[str, int], site: SiteFolder) -> ConnectProxy:
            proxy = served.enter_context(connect_proxy(places))
            file = site.path / "site.toml"
            named = f'https-proxy = "http://{LOGIN}@127.0.0.1:{proxy.port}"'
            text, found = re.subn(r'(?m)^"?https-proxy"? = ""$', named, file.read_text(encoding="utf-8"))
            assert found == 1
            file.write_text(text, encoding="utf-8")
            return proxy

        yield serve


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
    processes: Processes,
    tmp_path: Path,
    model_folder: Callable[[str], str],
    way_out: Callable[[Mapping[str, int], SiteFolder], ConnectProxy],
) -> None:
    """In one site's way is a proxy, which alone knows the server's name."""
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
        ("server", "init"): lambda: [*("--name", BEHIND), "--fleet-port", str(fleet), "--control-port", str(control)],
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
        dialled = BEHIND if f"{tmp_path}/ward" in words else "127.0.0.1"
        host = f"{dialled}:{fleet}" if "--server" in words else "127.0.0.1"
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
        if words[:3] == ["site", "init", f"{tmp_path}/ward"]:
            proxy = way_out({f"{BEHIND}:{fleet}": fleet}, open_site_folder(tmp_path / "ward"))
    assert len(proxy.heads) > 2, "the site has found another way out"
    assert all("Basic d2FyZDpzM2NyZXQ=" in head for head in proxy.heads)
    assert "s3cret" not in processes.log("ward")
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
        ("misled", "its certificate is not of the authority in ca.crt", "handshake"),
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

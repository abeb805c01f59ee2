"""One SuperLink and some SuperNodes on this machine, with TLS and node keys, a tiny model and data made up."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

from audits.tiny_models import write_reviews
from audits.tiny_site import tiny_run
from faults.bundle import PROJECT, make_bundle
from faults.fault_plan import VARIABLE, FaultPlan
from faults.processes import Processes, wait_until
from faults.warm import WarmPrograms
from fedveil.common.config.flat import Scalar
from fedveil.common.model.base import load_base_model
from fedveil.common.paths import run_folder
from fedveil.common.ports import free_ports
from fedveil.common.run_lines import ResultFile, read_file
from fedveil.common.threads import CORES, THREADS
from fedveil.deploy.commands import environment, own_module, superlink_command, supernode_command, worker_command
from fedveil.deploy.control import Control, control_of
from fedveil.deploy.policy_file import models_of, pins_of_job, policy_text
from fedveil.deploy.registry import register_site, revoke_site
from fedveil.deploy.server_folder import make_server
from fedveil.deploy.site_folder import SiteFolder, make_site
from fedveil.deploy.start import secret_file
from fedveil.server.own_check import FOLDER
from fedveil.server.registered import NODES
from fedveil.strategies.job import configure

SIZES = {"clinic": 50, "ward": 70, "lab": 90}
"""The sites and their public sizes: three different weights."""
MORE_SIZES = {"mill": 60, "dock": 60}
"""Of sites that join for one scenario."""
RECORDS = 40
PATIENCE = 600.0
"""Seconds for anything to happen; a failure's price, not a deadline of the federation."""
RESTART_SECONDS = 2.0

Place = Callable[[list[str]], list[str]]
"""From a command to the command that runs it somewhere else."""


@dataclass(frozen=True)
class Run:
    """A submitted run."""

    flower_id: str
    name: str
    """What records and ledgers call it: for a resumed run, the id of its first start."""
    path: Path

    def ended(self) -> bool:
        """Whether it has said how it ended."""
        return (self.path / ResultFile.NAME).exists()

    def result(self) -> ResultFile:
        """Return how it ended, waiting for it."""
        wait_until(self.ended, f"the end of run {self.name}", PATIENCE)
        return read_file(ResultFile, self.path)


class Federation:
    """Made in an empty folder; a context manager that ends every process that it started."""

    def __init__(self, folder: Path, addresses: tuple[str, ...] = (), worker: str = "") -> None:
        """Make all but processes.

        Args:
            folder: an empty one.
            addresses: more addresses of the server.
            worker: module of the sites' own worker, as with ``fedveil site start``, in which case the bundle is the
                project itself and the server knows its folder; empty: Flower runs the suite's bundle.
        """
        self._worker = worker
        self.folder, self.processes, self.plan = folder, Processes(folder), FaultPlan(folder / "plan")
        self.plan.folder.mkdir()
        self.plan.write({})
        fleet, control, *self._runtime = free_ports(2 + len(SIZES) + len(MORE_SIZES))
        self.server = make_server(folder / "server", ["127.0.0.1", *addresses], fleet_port=fleet, control_port=control)
        self.sites: dict[str, SiteFolder] = {}
        self._places, self._stutters, self._proxies = dict[str, Place](), dict[str, bool](), dict[str, str]()
        self._said = dict[str, int]()
        self._bundle = make_bundle(folder / "app")
        self._programs = WarmPrograms(folder / "bin", self._environment("warm"))
        self.settings: dict[str, Scalar] = {
            **tiny_run(folder),
            "data.name": str(write_reviews(folder / "test.csv", RECORDS, 9)),
            "data.test": str(folder / "test.csv"),
            "data.labels": "bad,good",
            "privacy.noise-multiplier": 2.0,
            "round-retries": 0,
            "output": str(self.server.runs),
        }

    def __enter__(self) -> Federation:
        try:
            wait_until(self._programs.ready, "the libraries to be loaded", PATIENCE)
            self.start_server()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.processes.kill_all()
        self._programs.end()

    def start_server(self) -> None:
        """Start the SuperLink and wait until its Control API answers."""
        command = self._warm(superlink_command(self.server))
        places = {NODES: str(self.server.nodes)} | ({FOLDER: str(self.server.path)} if self._worker else {})
        self.processes.start("superlink", command, {**self._environment("server"), **places})

        def answers() -> bool:
            try:
                socket.create_connection(("127.0.0.1", self.server.control_port), timeout=1).close()
            except OSError:
                return False
            return True

        wait_until(answers, "the SuperLink", PATIENCE)

    def add_site(self, name: str, address: str = "127.0.0.1", inside: Place = list) -> None:
        """Make a site that dials the server at ``address``, let it in, and start it.

        Args:
            name: one of SIZES or MORE_SIZES.
            address: what it dials.
            inside: puts a command into the network where this site is.
        """
        self.let_in(name, address, inside)
        self.start_site(name)

    def let_in(self, name: str, address: str = "127.0.0.1", inside: Place = list) -> None:
        """Make a site as ``add_site``, and let it in."""
        data = write_reviews(self.folder / f"{name}.csv", RECORDS, len(self.sites))
        job = configure(self.settings)
        config = job.config
        fingerprint = load_base_model(config.model.name, config.model.task).pin
        self._places[name] = inside
        self.sites[name] = make_site(
            *(self.folder / name, name, f"{address}:{self.server.fleet_port}"),
            policy=policy_text(
                *(name, {**SIZES, **MORE_SIZES}[name], 50.0, 1e-3),
                *(pins_of_job(job), models_of(config.model.name, fingerprint)),
            ),
            node=f'data="{data}"',
            authority=self.server.path / "ca.crt",
            runtime_port=self._runtime.pop(),
        )
        with self.control():
            register_site(self.server, self.sites[name].path / "node.pub")

    def leave(self, name: str) -> None:
        """End a site, and shut it out."""
        self.processes.kill(name)
        with self.control():
            revoke_site(self.server, name)
        del self.sites[name]

    def start_site(self, name: str, *, stutters: bool = False) -> None:
        """Start a site's SuperNode, or the one that stutters."""
        command = self._pair(self.sites[name]) if self._worker else self._warm(supernode_command(self.sites[name]))
        if stutters:
            command[0] = str(self._programs.folder / "stuttering-node")
        self._stutters[name], self._said[name] = stutters, len(self.processes.log(name))
        self.processes.start(name, self._places[name](command), {**self._environment(name), **self._road(name)})

    def lead(self, name: str, address: str, proxy: str = "") -> None:
        """Let a site dial the server at another address from its next start on, through the proxy HOST:PORT if any."""
        self.sites[name] = replace(self.sites[name], server=f"{address}:{self.server.fleet_port}")
        self._proxies[name] = f"http://{proxy}" if proxy else ""

    def own_environment(self) -> Mapping[str, str]:
        """Return the environment of a program of the suite's own."""
        return self._environment("own")

    def _road(self, name: str) -> dict[str, str]:
        return {"https_proxy": self._proxies[name]} if self._proxies.get(name) else {}

    def wait_online(self, *names: str, restart: bool = False) -> float:
        """Wait until the sites have come online since they were last started, and return the seconds.

        With ``restart`` a node that is refused, because the server takes it for online still, is started
        again, as its service unit does.
        """
        began = time.monotonic()

        def all_online() -> bool:
            for name in names:
                log = self.processes.log(name)[self._said[name] :]
                if restart and self.processes.ended(name):
                    time.sleep(RESTART_SECONDS)
                    self.start_site(name, stutters=self._stutters[name])
                    return False
                if "SuperNode ID" not in log:
                    return False
            return True

        wait_until(all_online, f"{', '.join(names)} to come online", PATIENCE)
        return time.monotonic() - began

    def submit(self, **settings: Scalar) -> Run:
        """Submit a run of the suite's bundle; settings are named with ``__`` for the dot and ``_`` for the dash."""
        wanted = {**self.settings, **{k.replace("__", ".").replace("_", "-"): v for k, v in settings.items()}}
        with self.control() as control:
            run = control.submit(wanted)
        config = configure(wanted).config
        path = run_folder(config, run)
        return Run(run, path.name.removeprefix(f"{config.method}-"), path)

    @contextmanager
    def control(self) -> Iterator[Control]:
        """Yield the Control API, which submits the suite's bundle in place of the project."""
        with (
            nullcontext() if self._worker else patch("fedveil.deploy.app.PROJECT", self._bundle),
            patch("fedveil.deploy.control.program", lambda name: str(self._programs.folder / name)),
            control_of(self.server) as control,
        ):
            yield control

    def wait_held(self, site: str, round_number: int) -> None:
        """Wait until a site has come to the fault at which it waits."""
        wait_until(lambda: self.plan.held(site, round_number), f"{site} in round {round_number}", PATIENCE)

    def number(self, site: str) -> int:
        """Return Flower's number of a site's node, which the server alone has."""
        return int((self.server.nodes / f"{site}.id").read_text())

    def kill_app(self, run: Run) -> None:
        """Send SIGKILL to a run's server process."""
        os.kill(int((self.plan.folder / f"{run.flower_id}.pid").read_text()), signal.SIGKILL)

    def app_is_dead(self, run: Run) -> bool:
        """Whether a run's server process has begun and is gone."""
        file = self.plan.folder / f"{run.flower_id}.pid"
        return file.exists() and not _alive(int(file.read_text()))

    def _pair(self, site: SiteFolder) -> list[str]:
        """Return the command of a site's SuperNode and worker, as ``fedveil site start`` runs them."""
        secret = secret_file(site)
        secret.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        secret.write_text(secrets.token_hex(32))
        secret.chmod(0o600)
        worker = worker_command(site, secret)
        worker[worker.index("fedveil.client.worker")] = self._worker
        return [
            *own_module("fedveil.deploy.pair"),
            json.dumps(supernode_command(site, secret=secret)),
            json.dumps(worker),
        ]

    def _warm(self, command: list[str]) -> list[str]:
        words = command[3:] if command[1:3] == ["-P", "-m"] else command  # a module of our own, or a program
        return [str(self._programs.folder / Path(words[0]).name), *words[1:]]

    def _environment(self, name: str) -> Mapping[str, str]:
        base = environment(self.folder / name / "flwr")
        return {
            **base,
            VARIABLE: str(self.plan.folder),
            "PYTHONPATH": os.pathsep.join([str(PROJECT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]),
            "PATH": f"{self.folder / 'bin'}{os.pathsep}{base['PATH']}",
            THREADS: "1",
            CORES: "1",  # not one thread for each core in each of a dozen processes
        }


def _alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"

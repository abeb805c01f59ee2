"""An idle deployed round: two sites whose work is nothing, over gRPC with TLS and keys; where its seconds go.

    .venv/bin/python benchmarks/idle_round.py                # about two minutes on 2 cores
    .venv/bin/python benchmarks/idle_round.py --plain        # the same with Flower's process for every message

Measured at the sites: from one round's last reply to the next one's. Flower's SuperNode sleeps 3 s after it found
no task, and then looks every 0.5 s for the reply: that is the floor, and all that comes on top of it, ours or not,
counts as ours. The limits: 4 s a round in the median, of which 0.5 s ours; and 0.5 s from a task to its reply.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from fedveil.common.model.base import load_base_model
from fedveil.common.ports import free_ports
from fedveil.common.run_lines import RoundLine, read_lines
from fedveil.deploy.commands import environment, own_module, program, supernode_command, worker_command
from fedveil.deploy.files import put_file
from fedveil.deploy.policy_file import models_of, pins_of_job, policy_text
from fedveil.deploy.refusal import why_refused
from fedveil.deploy.registry import register_site
from fedveil.deploy.server_folder import ServerFolder, make_server
from fedveil.deploy.site_folder import SiteFolder, make_site
from fedveil.deploy.submit import submit
from fedveil.strategies.job import configure

# The audits' tiny sites are no part of the installed package.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from audits.tiny_models import write_reviews
from audits.tiny_site import tiny_run

SITES = ("clinic", "ward")
SLEEP, LOOK = 3.0, 0.5
"""Seconds of Flower's SuperNode: between tasks, and between two looks for a reply."""
MOST_ROUND, MOST_OURS = 4.0, 0.5
FIRST = 2
"""Rounds left out at the start: libraries and models are loaded in them."""


@contextmanager
def process(folder: Path, name: str, command: list[str]) -> Iterator[None]:
    with (folder / f"{name}.log").open("wb") as log:
        started = subprocess.Popen(command, env=environment(folder / f"{name}-flwr"), stdout=log, stderr=log)
    try:
        yield
    finally:
        started.terminate()
        started.wait()


def site_command(site: SiteFolder, stamps: Path, *, plain: bool) -> list[str]:
    """Return what ``fedveil site start`` becomes, with a worker that writes down when it has tasks."""
    if plain:
        return supernode_command(site)
    secret = site.path / "secret"
    put_file(secret, os.urandom(32), private=True)
    worker = [sys.executable, __file__, "--worker", str(stamps), *worker_command(site, secret)[4:]]
    pair = supernode_command(site, "", secret), worker
    return [*own_module("fedveil.deploy.pair"), *map(json.dumps, pair)]


def stamped_worker(stamps: Path) -> int:
    """Be a worker that writes a line for every task: when it had it, and when the reply was handed over."""
    from fedveil.client import worker
    from fedveil.client.runtime import Node, Task

    acquire, push = Node.acquire, Task.push
    began = 0.0

    def timed_acquire(node: Node) -> str:
        nonlocal began
        token = acquire(node)
        began = time.time()
        return token

    def timed_push(task: Task, *words: Any) -> None:
        push(task, *words)
        with stamps.open("a") as file:
            file.write(f"{began} {time.time()}\n")

    Node.acquire, Task.push = timed_acquire, timed_push  # type: ignore[method-assign]
    return worker.main()


def play(folder: Path, rounds: int, *, plain: bool) -> tuple[list[float], list[float]]:
    """Return the seconds of each round, and of each site from task to reply (none of plain sites)."""
    fleet, control, *runtime = free_ports(2 + len(SITES))
    server = make_server(folder / "server", ["127.0.0.1"], fleet_port=fleet, control_port=control)
    settings = {
        **tiny_run(folder),
        "data.test": str(folder / "reviews.csv"),
        "data.labels": "bad,good",
        "rounds": rounds,
        "training.local-steps": 1,
        "privacy.noise-multiplier": 2.0,
        "min-sites": len(SITES),
    }
    sites = [made_site(folder, name, server, runtime.pop(), settings) for name in SITES]
    with ExitStack() as stack:
        stack.enter_context(
            process(folder, "server-process", [program("fedveil"), "server", "start", str(server.path)])
        )
        while "does not answer" in why_refused(sites[0]):
            time.sleep(0.5)
        for site in sites:
            register_site(server, site.path / "node.pub")
            stamps = folder / f"{site.site}.stamps"
            stack.enter_context(process(folder, site.site + "-process", site_command(site, stamps, plain=plain)))
        run = submit(server, settings, print, sites=len(SITES), patience=300)
    if plain:
        return [line.seconds for line in read_lines(RoundLine, run)][FIRST:], []
    stamps = [
        [*map(float, line.split())] for site in SITES for line in (folder / f"{site}.stamps").read_text().splitlines()
    ]
    by_round = [sorted(replies) for replies in zip(*_columns(stamps), strict=True)]
    ends = [replies[-1] for replies in by_round]
    return [b - a for a, b in zip(ends[FIRST:], ends[FIRST + 1 :], strict=False)], [b - a for a, b in stamps]


def _columns(stamps: list[list[float]]) -> list[list[float]]:
    each = len(stamps) // len(SITES)
    return [[end for _, end in stamps[i * each : (i + 1) * each]] for i in range(len(SITES))]


def made_site(folder: Path, name: str, server: ServerFolder, port: int, settings: dict[str, Any]) -> SiteFolder:
    data, job = write_reviews(folder / f"{name}.csv", 40, len(name)), configure(settings)
    config = job.config
    fingerprint = load_base_model(config.model.name, config.model.task).pin
    return make_site(
        *(folder / name, name, server.fleet.replace("0.0.0.0", "127.0.0.1")),
        policy=policy_text(name, 50, 50.0, 1e-3, pins_of_job(job), models_of(config.model.name, fingerprint)),
        node=f'data="{data}"',
        authority=server.path / "ca.crt",
        runtime_port=port,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--plain", action="store_true")
    words = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fedveil-idle-") as name:
        seconds, answers = play(Path(name), words.rounds, plain=words.plain)
    whole = statistics.median(seconds)
    print(f"rounds measured:                  {len(seconds)}, from {min(seconds):.2f} to {max(seconds):.2f} s")
    print(f"a round, median:                  {whole:.2f} s   limit {MOST_ROUND} s")
    if words.plain:
        return
    ours, answer = whole - SLEEP - LOOK, statistics.median(answers[FIRST:])
    print(f"  the SuperNode's sleep and look: {SLEEP + LOOK:.2f} s")
    print(f"  everything else:                {ours:.2f} s   limit {MOST_OURS} s")
    print(f"from task to reply, median:       {answer:.2f} s   limit {MOST_OURS} s (within the look)")
    if whole > MOST_ROUND or ours > MOST_OURS or answer > MOST_OURS:
        sys.exit("an idle round takes longer than its limit")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        file = Path(sys.argv[2])
        del sys.argv[1:3]
        sys.exit(stamped_worker(file))
    main()

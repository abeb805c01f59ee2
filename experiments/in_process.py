"""A whole federation in one process: the same messages, encoded and decoded, without Flower.

Model and records are loaded once for all sites. Sites are described by node configurations, exactly as a SuperNode
would be, and ledgers are charged and refuse as anywhere.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fedveil.client.app import answer
from fedveil.client.node import name_of
from fedveil.common.config.flat import Scalar
from fedveil.common.ends import ends_wait
from fedveil.common.errors import ConfigError
from fedveil.common.files import expanded
from fedveil.common.log import shown_otherwise
from fedveil.common.messages.blocks import Layout, payload_bytes
from fedveil.common.messages.round import Reply, SumReply, Task
from fedveil.common.messages.wire import encode_reply, encode_task
from fedveil.common.paths import run_folder
from fedveil.common.run_lines import ConfigFile
from fedveil.experiments.progress import Watch, followed
from fedveil.experiments.simulate import check_output, check_simulated
from fedveil.experiments.site_count import check_usual_sites, record_sites
from fedveil.experiments.under_way import conducting
from fedveil.server.conduct import conduct
from fedveil.server.ledger import with_ledger
from fedveil.server.model import ServerModel
from fedveil.server.named import check_named
from fedveil.server.own_check import began
from fedveil.server.records import RunFolder
from fedveil.server.replies import read_reply, replies_to
from fedveil.server.sites import Exchange, Transport
from fedveil.server.spool import reply_on_disk
from fedveil.strategies.job import Job, configure, with_recipe

SHOWN_OF_ROUND = 100
"""How often a round's progress is written down, about, where more sites than that answer."""


def simulated_nodes(count: int, ledgers: Path) -> list[dict[str, Scalar]]:
    """Return node configurations of ``count`` sites that divide the run's data set."""
    return [
        {"partition-id": i, "num-partitions": count, "ledger": str(ledgers / f"site-{i}.sqlite")} for i in range(count)
    ]


class InProcessTransport:
    """Calls every site in turn; what travels passes through the wire format both ways."""

    def __init__(self, nodes: Sequence[dict[str, Scalar]], settings: Mapping[str, Scalar], job: Job) -> None:
        self._nodes, self._settings, self._job = nodes, dict(settings), job
        self._layout_of_round: Callable[[int], Layout] = lambda _: {}
        self._folder: RunFolder | None = None
        self._memories: list[dict[str, bytes]] = [{} for _ in nodes]

    def for_model(self, server_model: ServerModel, folder: RunFolder | None = None) -> InProcessTransport:
        """Take from the server what replies must look like, and where to say who has answered."""
        self._layout_of_round, self._folder = server_model.reply_layout, folder
        return self

    def nodes(self, wanted: int, besides: Container[int]) -> list[int]:
        """Return one number per site, at once: no site joins later."""
        del wanted
        return [node for node in range(len(self._nodes)) if node not in besides]

    def registered(self) -> Mapping[int, str] | None:
        """Return the sites' names where the run names some; else None: these sites have no keys."""
        return dict(enumerate(map(name_of, self._nodes))) if self._job.config.named_sites else None

    def exchange(self, tasks: Mapping[int, Task], timeout: float) -> Exchange:
        """Let every site answer its task; ``timeout`` does not apply."""
        replies: dict[int, Reply | SumReply] = {}
        down = up = 0
        for node, task in tasks.items():
            content = encode_task(task)
            down += payload_bytes(content)
            with ends_wait():
                record = self.deliver(node, task, content)
            up += payload_bytes(record)
            expected = replies_to(task, self._job, self._layout_of_round(task.round_number))
            replies[node] = reply_on_disk(
                read_reply(record, expected, task, node), self._folder.path if self._folder else None
            )
            self._say(task, replies, len(tasks))
        return Exchange(replies, down, up)

    def _say(self, task: Task, replies: Mapping[int, Reply | SumReply], asked: int) -> None:
        # A thousand sites would write down a thousand names a thousand times.
        if self._folder is not None and (len(replies) == asked or not len(replies) % max(1, asked // SHOWN_OF_ROUND)):
            answered = [reply.site for reply in replies.values()]
            self._folder.progress(self._folder.shown.answered(task.round_number, answered, asked))

    def deliver(self, node: int, task: Task, content: Any) -> Any:
        """Return the message that a node sends back for a task's message; a test may send another.

        A node with neither records nor a policy of its own is a simulated one, as in Flower's simulation.
        """
        here = self._nodes[node]
        simulated = not {"data", "policy"} & here.keys()
        reply = answer(content, here, self._settings, task.run, self._memories[node], simulated=simulated)
        return encode_reply(reply)


def run_in_process(
    settings: Mapping[str, Scalar],
    nodes: Sequence[dict[str, Scalar]] | int,
    run: str = "",
    kind: type[InProcessTransport] = InProcessTransport,
    begun: Callable[[Path], None] = lambda _: None,
) -> Path:
    """Conduct a run over ``nodes`` and return its folder.

    Args:
        settings: overrides of the defaults, flat.
        nodes: configurations of the nodes, or how many simulated sites divide the data. Simulated ones keep their
            ledgers in the run's folder; nodes that name a ledger of an earlier run are charged on top of it.
        run: the run's id; empty: a fresh one, as Flower draws it.
        kind: of the transport, which may misbehave.
        begun: called with the run's folder before anything is loaded.

    Raises:
        ConfigError: a setting is wrong, or the folder holds a run of this id that is not resumed.
        DataError, RunFailed: as for ``conduct``.
    """
    settings, _ = with_recipe(settings, sites=nodes if isinstance(nodes, int) else len(nodes))
    job, run = configure(settings), run or str(secrets.randbits(63))
    folder = run_folder(job.config, run)
    if not job.config.resume and (folder / ConfigFile.NAME).exists():
        raise ConfigError(f"{folder} holds a run already: give this one another id, or set resume = {run!r}")
    described = simulated_nodes(nodes, folder / "ledgers") if isinstance(nodes, int) else list(nodes)
    transport = kind(described, settings, job)
    if job.config.site_names:
        check_named(job, transport.registered())
    begun(folder)

    def connect(server_model: ServerModel, folder: RunFolder) -> Transport:
        return transport.for_model(server_model, folder)

    fresh = not job.config.privacy.ledger and all(_ledger_is_fresh(node, folder) for node in described)
    return conduct(job, run, connect, began("one process", fresh_ledgers=fresh))


def simulate_in_process(
    settings: Mapping[str, Scalar],
    nodes: Sequence[dict[str, Scalar]] | int,
    watch: Watch,
    *,
    begun: Callable[[Path], None] = lambda _: None,
    alone: bool = True,
    level: int = logging.WARNING,
) -> Path:
    """Run one federation of simulated sites in this process to its end and return the run's folder.

    Args:
        settings, watch, begun: as for ``simulate``, whose errors it has.
        nodes: of the sites, or how many sites divide the data.
        alone: whether the process is there for this run alone, so that ``fedveil stop`` may end it.
        level: of the sites' log lines that go to standard error.
    """
    sites = nodes if isinstance(nodes, int) else len(nodes)
    settings = with_ledger(settings)
    job = configure(settings)
    if isinstance(nodes, int) and job.config.resume:
        check_usual_sites(run_folder(job.config, ""))
    check_simulated(job, sites)
    check_output(expanded(job.config.output))
    with ExitStack() as until_over:
        until_over.enter_context(shown_otherwise(level))

        def start(folder: Path) -> None:
            if isinstance(nodes, int):
                record_sites(folder, sites)
            folder.mkdir(parents=True, exist_ok=True)
            if alone:
                until_over.enter_context(conducting(folder))
            begun(folder)
            until_over.enter_context(followed(folder, watch))

        return run_in_process(settings, nodes, begun=start)


def _ledger_is_fresh(node: Mapping[str, Scalar], folder: Path) -> bool:
    """Return whether a node's ledger lies in a run's folder, where that of a simulated one is that names none."""
    if "ledger" in node:
        return folder in expanded(str(node["ledger"])).absolute().parents
    return not {"data", "policy"} & node.keys()

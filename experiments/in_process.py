"""A whole federation in one process: the same messages, encoded and decoded, without Flower.

For tests, benchmarks and debugging. Sites are described by node configurations, exactly as a
SuperNode would be.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedveil.client.app import answer
from fedveil.common.config.flat import Scalar
from fedveil.common.errors import ConfigError
from fedveil.common.messages.blocks import Layout, payload_bytes
from fedveil.common.messages.round import Reply, SumReply, Task
from fedveil.common.messages.wire import encode_reply, encode_task
from fedveil.common.paths import run_folder
from fedveil.common.run_lines import ConfigFile
from fedveil.server.conduct import conduct
from fedveil.server.model import ServerModel
from fedveil.server.records import RunFolder
from fedveil.server.replies import read_reply, replies_to
from fedveil.server.sites import Exchange, Transport
from fedveil.strategies.job import Job, configure, with_recipe


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
        self._memories: list[dict[str, bytes]] = [{} for _ in nodes]

    def for_model(self, server_model: ServerModel) -> InProcessTransport:
        """Take from the server what replies must look like."""
        self._layout_of_round = server_model.reply_layout
        return self

    def nodes(self, wanted: int, besides: Collection[int]) -> list[int]:
        """Return one number per site, at once: no site joins later."""
        del wanted
        return [node for node in range(len(self._nodes)) if node not in besides]

    def registered(self) -> Mapping[int, str] | None:
        """Return None: these sites have no keys."""
        return None

    def exchange(self, tasks: Mapping[int, Task], timeout: float) -> Exchange:
        """Let every site answer its task; ``timeout`` does not apply."""
        replies: dict[int, Reply | SumReply] = {}
        down = up = 0
        for node, task in tasks.items():
            content = encode_task(task)
            down += payload_bytes(content)
            record = self.deliver(node, task, content)
            up += payload_bytes(record)
            expected = replies_to(task, self._job, self._layout_of_round(task.round_number))
            replies[node] = read_reply(record, expected, task, node)
        return Exchange(replies, down, up)

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
) -> Path:
    """Conduct a run over ``nodes`` and return its folder.

    Args:
        settings: overrides of the defaults, flat.
        nodes: configurations of the nodes, or how many simulated sites divide the data. Simulated ones keep their
            ledgers in the run's folder; nodes that name a ledger of an earlier run are charged on top of it.
        run: the run's id; empty: a fresh one, as Flower draws it.
        kind: of the transport, which may misbehave.

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

    def connect(server_model: ServerModel, _: RunFolder) -> Transport:
        return transport.for_model(server_model)

    return conduct(job, run, connect)

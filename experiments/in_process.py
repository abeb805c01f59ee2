"""A whole federation in one process: the same messages, encoded and decoded, without Flower.

For tests, benchmarks and debugging. Sites are described by node configurations, exactly as a
SuperNode would be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from client.app import answer
from common.config import Scalar
from common.errors import ProtocolError
from common.messages import Refusal, Reply, TrainTask
from common.paths import run_folder
from common.wire import Layout, decode_reply, encode_reply, encode_task, payload_bytes
from server.conduct import conduct
from server.evaluation import Evaluator
from server.records import RunFolder
from server.rounds import Exchange, Transport
from strategies import Job, configure


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

    def for_evaluator(self, evaluator: Evaluator) -> InProcessTransport:
        """Take from the server what replies must look like."""
        self._layout_of_round = evaluator.reply_layout
        return self

    def nodes(self) -> list[int]:
        """Return one number per site."""
        return list(range(len(self._nodes)))

    def exchange(self, tasks: Mapping[int, TrainTask], timeout: float) -> Exchange:
        """Let every site answer its task; ``timeout`` does not apply."""
        replies: dict[int, Reply] = {}
        down = up = 0
        for node, task in tasks.items():
            content = encode_task(task)
            down += payload_bytes(content)
            reply = answer(content, self._nodes[node], self._settings, task.run, self._memories[node])
            record, layout = encode_reply(reply), self._layout_of_round(task.round_number)
            up += payload_bytes(record)
            try:
                replies[node] = decode_reply(record, layout, task.run, task.round_number)
            except ProtocolError as error:
                replies[node] = Refusal(task.run, task.round_number, f"node {node}", "task", str(error))
        return Exchange(replies, down, up)


def run_in_process(settings: Mapping[str, Scalar], nodes: Sequence[dict[str, Scalar]] | int, run: str = "1") -> Path:
    """Conduct a run over ``nodes`` (or so many simulated sites) and return its folder."""
    job = configure(settings)
    folder = run_folder(job.config, run)
    described = simulated_nodes(nodes, folder / "ledgers") if isinstance(nodes, int) else list(nodes)
    transport = InProcessTransport(described, settings, job)

    def connect(evaluator: Evaluator, _: RunFolder) -> Transport:
        return transport.for_evaluator(evaluator)

    return conduct(job, run, connect)

"""Flower wiring of the server: nodes, messages, and the end of a run. The loop is in ``rounds``."""

from __future__ import annotations

import time
from collections.abc import Mapping

from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp

from common.errors import ProtocolError, RunFailed
from common.messages import Refusal, Reply, TrainTask
from common.wire import Layout, decode_reply, encode_task, payload_bytes
from server.conduct import conduct
from server.evaluation import Evaluator
from server.records import RunFolder
from server.rounds import Exchange
from strategies import Job, configure

POLL_SECONDS = 0.5
app = ServerApp()


class FlowerTransport:
    """Tasks over Flower's grid; tells the run's folder who has answered."""

    def __init__(self, grid: Grid, job: Job, evaluator: Evaluator, folder: RunFolder) -> None:
        self._grid, self._job, self._folder = grid, job, folder
        self._layout_of_round = evaluator.reply_layout

    def nodes(self) -> list[int]:
        """Return the nodes online; wait up to the round's time-out for ``min-sites`` of them."""
        deadline = time.monotonic() + self._job.config.round_timeout
        while True:
            nodes = sorted(self._grid.get_node_ids())
            if len(nodes) >= self._job.config.min_sites:
                return nodes
            if time.monotonic() > deadline:
                raise RunFailed(f"{len(nodes)} sites are online, min-sites asks for {self._job.config.min_sites}")
            self._folder.progress(phase="waiting for sites", online=len(nodes), wanted=self._job.config.min_sites)
            time.sleep(POLL_SECONDS)

    def exchange(self, tasks: Mapping[int, TrainTask], timeout: float) -> Exchange:
        """Send the tasks, poll for replies, give up on the rest after ``timeout`` seconds."""
        task = next(iter(tasks.values()))
        messages, down = [], 0
        for node, one in tasks.items():
            content = encode_task(one)
            down += payload_bytes(content)
            messages.append(Message(content, node, "train", group_id=str(one.round_number)))
        nodes = dict(zip(self._grid.push_messages(messages), tasks, strict=True))
        waiting, replies, up = set(nodes), dict[int, Reply](), 0
        layout = self._layout_of_round(task.round_number)
        deadline = time.monotonic() + timeout
        while waiting and time.monotonic() < deadline:
            for message in self._grid.pull_messages(waiting):
                asked = message.metadata.reply_to_message_id
                waiting.discard(asked)
                replies[nodes[asked]], size = self._read(message, task, nodes[asked], layout)
                up += size
            self._folder.progress(
                phase="training",
                round=task.round_number,
                rounds=self._job.config.rounds,
                answered=[reply.site for reply in replies.values()],
                asked=len(tasks),
            )
            if waiting:
                time.sleep(POLL_SECONDS)
        for message_id in waiting:
            node = nodes[message_id]
            replies[node] = self._no_reply(task, node, "late", f"no answer in {timeout:g} s")
        return Exchange(replies, down, up)

    def _read(self, message: Message, task: TrainTask, node: int, layout: Layout) -> tuple[Reply, int]:
        if message.has_error():
            return self._no_reply(task, node, "failed", message.error.reason or "no reason given"), 0
        try:
            reply = decode_reply(message.content, layout, task.run, task.round_number)
        except ProtocolError as error:
            return self._no_reply(task, node, "task", str(error)), payload_bytes(message.content)
        return reply, payload_bytes(message.content)

    def _no_reply(self, task: TrainTask, node: int, kind: str, reason: str) -> Refusal:
        return Refusal(task.run, task.round_number, f"node {node}", kind, " ".join(reason.split())[:1000])


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Flower's entry point: check every setting before anything else, then conduct the run."""
    job = configure(dict(context.run_config))
    conduct(job, str(context.run_id), lambda evaluator, folder: FlowerTransport(grid, job, evaluator, folder))

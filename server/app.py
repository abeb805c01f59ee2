"""Flower wiring of the server: nodes, messages, and the end of a run. The loop is in ``rounds``."""

from __future__ import annotations

import time
from collections.abc import Mapping

from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp

from common.errors import FedVeilError, ProtocolError, RunFailed
from common.messages import Refusal, Reply, TrainTask
from common.paths import run_folder
from common.wire import Layout, decode_reply, encode_task, layout_of, payload_bytes
from server.evaluation import Evaluator
from server.records import RunFolder
from server.report import federation_epsilon, markdown_report, round_line
from server.rounds import Exchange, RoundOutcome, run_rounds
from strategies import Job, ServerState, configure

POLL_SECONDS = 0.2
app = ServerApp()


class FlowerTransport:
    """Tasks over Flower's grid; tells the run's folder who has answered."""

    def __init__(self, grid: Grid, job: Job, layout: Layout, folder: RunFolder) -> None:
        self._grid, self._job, self._layout, self._folder = grid, job, layout, folder

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
        waiting, replies, up = set(nodes), list[Reply](), 0
        deadline = time.monotonic() + timeout
        while waiting and time.monotonic() < deadline:
            for message in self._grid.pull_messages(waiting):
                asked = message.metadata.reply_to_message_id
                waiting.discard(asked)
                reply, size = self._read(message, task, nodes[asked])
                replies.append(reply)
                up += size
            self._folder.progress(
                phase="training",
                round=task.round_number,
                rounds=self._job.config.rounds,
                answered=[reply.site for reply in replies],
                asked=len(tasks),
            )
            if waiting:
                time.sleep(POLL_SECONDS)
        replies += [self._no_reply(task, nodes[m], "late", f"no answer in {timeout:g} s") for m in waiting]
        return Exchange(replies, down, up)

    def _read(self, message: Message, task: TrainTask, node: int) -> tuple[Reply, int]:
        if message.has_error():
            return self._no_reply(task, node, "failed", message.error.reason or "no reason given"), 0
        try:
            reply = decode_reply(message.content, self._layout, task.run, task.round_number)
        except ProtocolError as error:
            return self._no_reply(task, node, "task", str(error)), payload_bytes(message.content)
        return reply, payload_bytes(message.content)

    def _no_reply(self, task: TrainTask, node: int, kind: str, reason: str) -> Refusal:
        return Refusal(task.run, task.round_number, f"node {node}", kind, " ".join(reason.split())[:1000])


class _Terminal:
    """Prints one line a round beside what the folder writes."""

    def __init__(self, job: Job, folder: RunFolder) -> None:
        self._job, self._folder = job, folder
        self.baseline: float = 0.0
        self.last: RoundOutcome | None = None
        self.stop_reason = ""

    def started(self, baseline) -> None:  # type: ignore[no-untyped-def]
        self._folder.started(baseline)
        self.baseline = baseline.accuracy
        self._folder.say(f"before training: accuracy {100 * baseline.accuracy:.1f} %")

    def finished(self, outcome: RoundOutcome, state: ServerState) -> None:
        self._folder.finished(outcome, state)
        self.last = outcome
        self._folder.say(round_line(self._job, outcome))

    def stopped(self, reason: str) -> None:
        self.stop_reason = reason
        self._folder.say(f"run ends early: {reason}")


def conduct(job: Job, run: str, grid: Grid) -> None:
    """Run a job over Flower and leave everything in its folder.

    Raises:
        RunFailed: the run could not go on; the folder's ``result.json`` has the same reason.
    """
    folder = RunFolder(run_folder(job.config, run), job, run)
    folder.progress(phase="loading model and data")
    try:
        evaluator = Evaluator(job)
        layout = layout_of(job.strategy.contribution(evaluator.trained_start()))
        terminal = _Terminal(job, folder)
        state = run_rounds(job, run, FlowerTransport(grid, job, layout, folder), evaluator, terminal)
        folder.save_adapter(evaluator.model, state.adapter, evaluator.label_names)
        (folder.path / "report.md").write_text(markdown_report(folder.path), encoding="utf-8")
        last = terminal.last
        folder.result(
            "stopped" if terminal.stop_reason else "completed",
            terminal.stop_reason,
            accuracy_before=terminal.baseline,
            accuracy=last.score.accuracy if last else terminal.baseline,
            epsilon=federation_epsilon(folder.path),
            rounds=state.round_number,
        )
    except FedVeilError as error:
        folder.result("failed", str(error))
        raise
    except Exception as error:
        folder.result("failed", f"{type(error).__name__}: {error}")
        raise


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Flower's entry point: check every setting before anything else, then conduct the run."""
    job = configure(dict(context.run_config))
    print(f"run folder: {run_folder(job.config, str(context.run_id))}", flush=True)
    conduct(job, str(context.run_id), grid)

"""Flower wiring of the server: nodes, messages, and the end of a run. The loop is in ``rounds``."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.superlink.grid import InMemoryGrid

from fedveil.common.log import place_of
from fedveil.common.messages.blocks import Layout, payload_bytes
from fedveil.common.messages.round import Reply, SumReply, Task
from fedveil.common.messages.signed import check_unsigned
from fedveil.common.messages.wire import encode_task
from fedveil.common.paths import run_folder
from fedveil.common.registered import require_installed_rows
from fedveil.common.server_file import Reach
from fedveil.server.conduct import conduct
from fedveil.server.model import ServerModel
from fedveil.server.own_check import began, own_check
from fedveil.server.pulls import Pulls, room_for
from fedveil.server.records import RunFolder
from fedveil.server.registered import registered_names
from fedveil.server.replies import read_reply, refusal, replies_to
from fedveil.server.signing import Signing, signing_of
from fedveil.server.sites import Exchange
from fedveil.server.spool import reply_on_disk
from fedveil.strategies.job import Job, configure

POLL_SECONDS, SIMULATED_POLL_SECONDS = 0.5, 0.1
"""How often answers are asked for; in a simulation they lie in this process's own memory."""
PATIENCE_SECONDS = 60.0
"""Trouble at the SuperLink that lasts longer ends the run."""
AT_ONCE = 16
"""Tasks that are encoded at the same time: each is as large as what travels."""
RAY_WITHOUT_MEMORY = "ray.exceptions.OutOfMemoryError"
Answer = TypeVar("Answer")
log = logging.getLogger("fedveil.server")
app = ServerApp()


@dataclass(frozen=True)
class _Sent:
    """A task on its way."""

    node: int
    digest: bytes
    """What the answer names it by; empty where nothing is signed."""


class FlowerTransport:
    """Tasks over Flower's grid; tells the run's folder who has answered."""

    def __init__(
        self, grid: Grid, job: Job, server_model: ServerModel, folder: RunFolder, signing: Signing | None = None
    ) -> None:
        self._grid, self._job, self._folder, self._signing = grid, job, folder, signing
        self._layout_of_round = server_model.reply_layout
        self._poll_seconds = SIMULATED_POLL_SECONDS if isinstance(grid, InMemoryGrid) else POLL_SECONDS
        log.info("sites have the names %s", "in their replies" if self.registered() is None else "of their keys")

    def nodes(self, wanted: int, besides: Container[int]) -> list[int]:
        """Return the nodes online other than ``besides``; wait up to the round's time-out for ``wanted`` of them."""
        deadline = time.monotonic() + self._job.config.round_timeout
        while True:
            nodes = sorted(node for node in set(_patiently(self._grid.get_node_ids)) if node not in besides)
            if len(nodes) >= wanted or time.monotonic() > deadline:
                self._folder.progress(self._folder.shown.ready())
                return nodes
            self._folder.progress(self._folder.shown.waiting(len(nodes), wanted))
            time.sleep(self._poll_seconds)

    def registered(self) -> Mapping[int, str] | None:
        """Return the name that each node's key is registered under, where the coordinator's folder says so."""
        return registered_names()

    def exchange(self, tasks: Mapping[int, Task], timeout: float) -> Exchange:
        """Send the tasks, poll for replies, give up on the rest after ``timeout`` seconds.

        A message lives no longer than its deadline: a site that was away does not train, and pay,
        for a round that is over, and a reply that comes later is refused by the SuperLink.
        """
        task, deadline = next(iter(tasks.values())), time.monotonic() + timeout
        sent, down = self._push(tasks, timeout)
        unsent = set(tasks) - {one.node for one in sent.values()}
        replies: dict[int, Reply | SumReply] = {
            node: refusal(task, node, "failed", "the SuperLink did not take its task") for node in unsent
        }
        up, again = 0, set[int]()
        layout = self._layout_of_round(task.round_number)
        waiting, pulls = set(sent), Pulls(self._grid, room_for(layout))
        while waiting and time.monotonic() < deadline:
            for asked, message in list(pulls.pull(waiting)):
                waiting.discard(asked)
                node = sent[asked].node
                if fault := self._fault(message, sent[asked]):
                    name = (self.registered() or {}).get(node, "a node without a name")
                    log.warning("a message is not taken for the answer of %s, it may be forged: %s", name, fault)
                    replies[node] = refusal(task, node, "failed", f"unsigned: {fault}")
                    if node not in again and (left := deadline - time.monotonic()) > 0:
                        # Flower keeps the first answer to a message alone. A site that has answered repeats, for free.
                        again.add(node)
                        anew, more = self._push({node: tasks[node]}, left)
                        sent, waiting, down = {**sent, **anew}, waiting | set(anew), down + more
                    continue
                replies[node], size = self._read(message, task, node, layout)
                up += size
            answered = [reply.site for reply in replies.values()]
            self._folder.progress(self._folder.shown.answered(task.round_number, answered, len(tasks)))
            if waiting:
                time.sleep(self._poll_seconds)
        for message_id in waiting:
            node, why = sent[message_id].node, _late(message_id, pulls, timeout)
            replies[node] = refusal(task, node, "late", why)
        return Exchange(replies, down, up)

    def _push(self, tasks: Mapping[int, Task], timeout: float) -> tuple[dict[str, _Sent], int]:
        """Return what the SuperLink took, by the message's id, and what it weighs in bytes; a few tasks at a time."""
        nodes, taken, weight = list(tasks), dict[str, _Sent](), 0
        for first in range(0, len(nodes), AT_ONCE):
            more, size = self._push_some({node: tasks[node] for node in nodes[first : first + AT_ONCE]}, timeout)
            taken, weight = taken | more, weight + size
        return taken, weight

    def _push_some(self, tasks: Mapping[int, Task], timeout: float) -> tuple[dict[str, _Sent], int]:
        contents: dict[int, RecordDict] = {}
        digests: dict[int, bytes] = {}
        terms: Any = {"ttl": timeout + POLL_SECONDS, "group_id": str(next(iter(tasks.values())).round_number)}

        def push() -> list[str | None]:
            # Made anew in every attempt: a SuperLink that failed half-way may know the last one's ids already. A
            # site that gets both answers the second from what it released, and pays once.
            contents.update({node: encode_task(task) for node, task in tasks.items()})
            if self._signing:
                digests.update({node: self._signing.sign(content, node) for node, content in contents.items()})
            return list(self._grid.push_messages([Message(c, node, "train", **terms) for node, c in contents.items()]))

        # Flower leaves ids out, or writes None, where the SuperLink did not take a message.
        ids = _patiently(push)
        taken = {m: _Sent(node, digests.get(node, b"")) for node, m in zip(contents, ids, strict=False) if m}
        return taken, sum(payload_bytes(contents[one.node]) for one in taken.values())

    def _fault(self, message: Message | None, sent: _Sent) -> str:
        """Return why a message is not what the node answered; empty: it is, or no one signs.

        An error of Flower's has no content that could be signed: it is no site's word, and leaves a site out at most.
        """
        if self._signing is None or (message is not None and message.has_error()):
            return ""
        if message is None:
            return "it cannot be unpacked"
        return self._signing.fault(message.content, sent.digest, sent.node)

    def _read(self, message: Message | None, task: Task, node: int, layout: Layout) -> tuple[Reply | SumReply, int]:
        if message is None:
            return refusal(task, node, "reply", "the message cannot be unpacked"), 0
        if message.has_error():
            reason = in_short(message.error.reason or "no reason given")
            return refusal(task, node, "failed", f"unsigned: {reason}" if self._signing else reason), 0
        expected = replies_to(task, self._job, layout)
        reply = read_reply(message.content, expected, task, node)
        return reply_on_disk(reply, self._folder.path), payload_bytes(message.content)


def _late(message_id: str, pulls: Pulls, timeout: float) -> str:
    what = "no whole answer" if message_id in pulls.under_way else "no answer"
    trouble = f" (the SuperLink failed: {pulls.trouble})" if pulls.trouble else ""
    return f"{what} in {timeout:g} s{trouble}"


def _patiently(call: Callable[[], Answer]) -> Answer:
    """Return what ``call`` returns, tried again for a while: a SuperLink whose database is busy is no lost run."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return call()
        except Exception as error:
            # A run that Flower has ended has no right to ask any more, however often it does.
            refused = getattr(getattr(error, "response", None), "status_code", 0) in (401, 403)
            if refused or time.monotonic() > deadline:
                raise
            log.warning("the SuperLink failed, asked again: %s", place_of(error))
            time.sleep(POLL_SECONDS)


def in_short(reason: str) -> str:
    """Return a simulation's own words about a full memory as one sentence, and all others as they are."""
    if RAY_WITHOUT_MEMORY not in reason:
        return reason
    memory = re.search(r"was ([\d.]+)GB / ([\d.]+)GB", reason)
    full = f" ({memory[1]} of {memory[2]} GB)" if memory else ""
    return f"this machine's memory is full{full}, so Ray ended a worker: end other programs, or run with --workers 1"


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Flower's entry point: check every setting before anything else, then conduct the run."""
    job = configure(dict(context.run_config))
    run = str(context.run_id)
    reach: Reach = "simulation" if isinstance(grid, InMemoryGrid) else "network"
    if reach == "network":
        require_installed_rows()
    check = own_check(run_folder(job.config, run).parent, reach)
    start = began(reach, check, fresh_ledgers=reach == "simulation" and not job.config.privacy.ledger)

    def connect(server_model: ServerModel, folder: RunFolder) -> FlowerTransport:
        signing = None
        if reach == "network":
            signing = signing_of(run, dict(context.run_config))
            if signing is None:
                check_unsigned(job.config)
        return FlowerTransport(grid, job, server_model, folder, signing)

    conduct(job, run, connect, start)

"""A site's end of Flower's Runtime API: tasks come from the site's SuperNode, replies go to it.

The SuperNode serves it on the loopback (HTTP), and hands message, context and bundle to the process that holds a task.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Context, Message
from flwr.app.error import Error
from flwr.common.constant import ErrorCode, SubStatus
from flwr.common.serde import context_from_proto, context_to_proto
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node as ProtoNode
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullTaskInputRequest, PushTaskOutputRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree
from flwr.supernode.runtime.run_clientapp import push_message

from fedveil.common.runtime import ANEW, HeldTask, NotOurNode, Runtime

log = logging.getLogger("fedveil.site")
PIECE_SECONDS = 0.02
"""Until a piece of a message that the node is still receiving is asked for again; doubled up to a second."""
MESSAGE_SECONDS = 30.0
"""How long a task may be without its message: it comes milliseconds later, or another worker took it and died."""


class LostMessage(Exception):
    """A task has no message: a worker before this one took it, and died before it was at work."""


@dataclass(frozen=True)
class Task(HeldTask):
    """One task as the node holds it for us."""

    def pull(self) -> tuple[Message, Context, bytes]:
        """Return message, context and bundle.

        The message first: a worker that dies before ``PullTaskInput`` leaves the task to the next one, and one that
        dies after it has the node answer for it.

        Raises:
            LostMessage: there is no message.
            TaskLost: the node has given the task up.
        """
        tree = self._message_tree()
        given = self.client.PullTaskInput(PullTaskInputRequest())
        context = context_from_proto(given.context)
        node, run = ProtoNode(node_id=context.node_id), context.run_id
        message: Message = pull_and_inflate_object_from_tree(
            tree,
            make_pull_object_fn_protobuf(self.client.PullObject, node, run),
            make_confirm_message_received_fn_protobuf(self.client.ConfirmMessageReceived, node, run),
            return_type=Message,
            max_tries_per_object=None,
            initial_backoff=PIECE_SECONDS,
            backoff_cap=1.0,
        )
        message.metadata.__dict__["_message_id"] = tree.object_id
        return message, context, given.fab.content

    def push(self, reply: Message, context: Context) -> None:
        """Hand over the reply, and what the site keeps until the next message."""
        push_message(self.client, reply, context)
        self.beat.stop()  # a finished task has no more signs of life to give
        self.client.PushTaskOutput(
            PushTaskOutputRequest(context=context_to_proto(context), sub_status=SubStatus.COMPLETED, details="")
        )

    def _message_tree(self) -> ObjectTree:
        deadline = time.monotonic() + MESSAGE_SECONDS
        while time.monotonic() < deadline:
            found = self.client.PullMessages(PullAppMessagesRequest())
            if found.messages_list:
                return found.message_object_trees[0]
            time.sleep(PIECE_SECONDS)
        raise LostMessage


class Node(Runtime):
    """The Runtime API of this site's SuperNode.

    Args:
        port: on 127.0.0.1.
        secret: what the SuperNode was started with.
    """

    def __init__(self, port: int, secret: bytes) -> None:
        super().__init__(f"127.0.0.1:{port}", secret, TaskType.CLIENT_APP)
        self._port = port

    def acquire(self) -> str:
        """Return the token of the next task; empty: no task is there, or the node is not there.

        Raises:
            NotOurNode: the node does not take our secret, or another user of this machine listens at its port.
        """
        token = super().acquire()
        if token and not is_own_port(self._port):
            raise NotOurNode(f"another user of this machine listens on port {self._port}")
        return token

    @contextmanager
    def task(self, token: str) -> Iterator[Task]:
        """Hold a task: keep telling the node that it is being worked on.

        Raises:
            TaskLost: the node has given it up, or its run is over.
        """
        with self.hold(token, _start_anew) as task:
            yield Task(task.client, task.beat)


def _start_anew() -> None:
    """End the process, in the middle of a round, whose result is not taken: charged it is, and the next task waits."""
    log.error("the node has given the task up: the worker starts anew")
    os._exit(ANEW)


def is_own_port(port: int, table: Path = Path("/proc/net/tcp")) -> bool:
    """Whether it is this process's user who listens on a port of 127.0.0.1; True where there is no Linux to tell.

    Who listens there first would otherwise hand out tasks, and be handed what the site answers.
    """
    if not table.is_file():
        return True
    local, listening = f"0100007F:{port:04X}", "0A"
    rows = (line.split() for line in table.read_text(encoding="ascii").splitlines()[1:])
    return {int(row[7]) for row in rows if row[1] == local and row[3] == listening} == {os.getuid()}


def failed(message: Message, reason: str) -> Message:
    """Return the answer to a message that the client could not answer."""
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)

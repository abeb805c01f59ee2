"""A client of Flower's Runtime API: tasks come from the site's SuperNode, replies go to it.

Everything of Flower that it calls internal is in this file, and ``tests/test_worker.py`` holds it to the version.
Flower's own way for a task starts a process, unpacks the bundle that the server sent and runs the code in it. A
SuperNode in ``--isolation process`` starts none: it serves this API on the loopback (HTTP), and hands message, context
and bundle to whoever knows the secret that it was started with.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from flwr.app import Context, Message
from flwr.app.error import Error
from flwr.common.constant import ErrorCode, SubStatus
from flwr.common.serde import context_from_proto, context_to_proto
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node as ProtoNode
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import push_message

log = logging.getLogger("fedveil.site")
PIECE_SECONDS = 0.02
"""Until a piece of a message that the node is still receiving is asked for again; doubled up to a second."""
MESSAGE_SECONDS = 30.0
"""How long a task may be without its message: it comes milliseconds later, or another worker took it and died."""
ANEW, NODE_TOO = 75, 76
"""Exit codes of a worker: start it anew, or the SuperNode as well."""
_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
_REFUSED = (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN)


class TaskLost(Exception):
    """The node has given the task up, or wants no more of its run."""


class NotOurNode(Exception):
    """What answers at the node's address is not the site's own SuperNode."""


class LostMessage(Exception):
    """A task has no message: a worker before this one took it, and died before it was at work."""


@dataclass(frozen=True)
class Task:
    """One task as the node holds it for us."""

    client: RuntimeHttpClient
    beat: HeartbeatSender

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


class Node:
    """The Runtime API of this site's SuperNode.

    Args:
        port: on 127.0.0.1.
        secret: what the SuperNode was started with.
    """

    def __init__(self, port: int, secret: bytes) -> None:
        self._port, self._address = port, f"127.0.0.1:{port}"
        self._version = RuntimeVersionHttpInterceptor(component_name="fedveil")
        signed = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods={_ACQUIRE})
        self._client = self._connect(signed)

    def _connect(self, interceptor: ProtobufClientInterceptor) -> RuntimeHttpClient:
        return RuntimeHttpClient.from_server_address(
            self._address, insecure=True, root_certificates=None, interceptors=[self._version, interceptor]
        )

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def acquire(self) -> str:
        """Return the token of the next task; empty: there is none, or the node is not there.

        Raises:
            NotOurNode: the node does not take our secret, or another user of this machine listens at its port.
        """
        try:
            given = self._client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
        except httpx.TransportError:
            return ""
        except httpx.HTTPStatusError as error:
            if error.response.status_code in _REFUSED:
                raise NotOurNode("it does not take this site's secret") from error
            return ""
        if given.token and not is_own_port(self._port):
            raise NotOurNode(f"another user of this machine listens on port {self._port}")
        return str(given.token)

    @contextmanager
    def task(self, token: str) -> Iterator[Task]:
        """Hold a task: keep telling the node that it is being worked on.

        Raises:
            TaskLost: the node has given it up, or its run is over.
        """
        client = self._connect(RuntimeTokenHttpInterceptor(token))
        beat = HeartbeatSender(lambda: _is_held(client))
        beat.start()
        try:
            yield Task(client, beat)
        except httpx.HTTPStatusError as error:
            if error.response.status_code in _REFUSED:
                raise TaskLost from error
            raise
        finally:
            if beat.is_running:
                beat.stop()
            client.close()


def _is_held(client: RuntimeHttpClient) -> bool:
    """Send one sign of life; False: the node did not answer. A task that is not ours any more ends the process."""
    try:
        held = client.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success
    except httpx.HTTPStatusError as error:
        held = error.response.status_code not in _REFUSED
    except httpx.HTTPError:
        return False
    if not held:
        # In the middle of a round, whose result nobody takes: charged it is, and the next task waits.
        log.error("the node has given the task up: the worker starts anew")
        os._exit(ANEW)
    return True


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

"""A site's worker: one long-lived process of the installed package that answers a SuperNode's tasks.

Flower's own way starts a process for every message, which unpacks the bundle that the server sent and runs
the code in it. A SuperNode in ``--isolation process`` starts none: it serves its Runtime API on the loopback
and hands message, context and bundle to whoever proves, by a secret, that the site's user started it. This is
that one. It hashes the bundle in memory, asks the policy, and runs the installed ``client.app``; the bundle is
written nowhere and nothing of it is executed. The run's settings come in the context.

Everything here that Flower calls internal is in this file, and ``tests/test_worker.py`` holds it to the version.
The supervisor (``experiments.deploy.pair``) starts it anew whenever it ends.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
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

from client import app as installed
from client.outgoing import UNTOLD
from client.site import policy_of
from common.bundle import bundle_digest, own_digest
from common.config import Scalar
from common.errors import ConfigError
from common.log import about, place_of, set_up
from common.wire import encode_reply, round_of

log = logging.getLogger("fedveil.site")
POLL_SECONDS = 0.2
"""Between two questions for a task. One takes 2.7 ms of a core, both processes together; with the work of an idle round
it stays within the half second after which the SuperNode looks for the reply."""
LOOK_SECONDS = 2.0
"""Between two looks, while there is no task, at whether the files with the site's records have changed."""
PIECE_SECONDS = 0.02
"""Until a piece of a message that the node is still receiving is asked for again; doubled up to a second."""
MESSAGE_SECONDS = 30.0
"""How long a task may be without its message: it comes milliseconds later, or another worker took it and died."""
ANEW, NODE_TOO = 75, 76
"""Exit codes for the supervisor: start this process anew, or the SuperNode as well."""
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


def reply_to(message: Message, context: Context, bundle: bytes, node: Mapping[str, Scalar]) -> Message:
    """Return the site's answer: of the installed client, or the policy's refusal of the bundle.

    Args:
        message: what the server sent.
        context: the run's settings, and what the site kept; ``node`` takes the place of the node's settings in it.
        bundle: the bundle as received.
        node: the site's own settings, from its folder: nobody else says which policy, ledger and records.
    """
    context.node_config = dict(node)
    try:
        try:
            policy_of(node).check_bundle(bundle_digest(bundle), own_digest())
        except Exception as error:
            refused = installed.refusal(error, node, str(context.run_id), round_of(message.content))
            return Message(encode_reply(refused), reply_to=message)
        return installed.app(message, context)
    except Exception as error:  # Flower would send its words
        log.error("failed: %s", place_of(error), extra=about(str(context.run_id), None, installed.name_of(node)))
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, UNTOLD), reply_to=message)


def work(node: Node, settings: Mapping[str, Scalar]) -> int:
    """Answer tasks until the process must be started anew; return the exit code that says how."""
    records, looked = stamp(settings), time.monotonic()
    while True:
        try:
            token = node.acquire()
            if not token:
                if time.monotonic() - looked > LOOK_SECONDS:
                    looked = time.monotonic()
                    if stamp(settings) != records:
                        log.info("the site's records have changed: the worker starts anew")
                        return ANEW
                time.sleep(POLL_SECONDS)
                continue
            with node.task(token) as task:
                message, context, bundle = task.pull()
                task.push(reply_to(message, context, bundle, settings), context)
        except TaskLost:
            log.error("the node has given a task up")
        except LostMessage:
            log.error("a task has no message: node and worker start anew")
            return NODE_TOO
        except NotOurNode as error:
            log.error("the worker leaves: %s", error)
            return NODE_TOO
        except Exception as error:  # of Flower's own, or the node is gone; it answers for the task within a minute
            log.error("the worker starts anew: %s", place_of(error))
            return ANEW
        if not installed.is_clean():
            log.warning("a task has changed the model for good: the worker starts anew")
            return ANEW


def stamp(settings: Mapping[str, Scalar]) -> tuple[tuple[str, int, int], ...]:
    """Return name, time and size of the files that hold the site's own records."""
    if "data" not in settings:
        return ()
    source = Path(str(settings["data"])).expanduser()
    found = sorted(source.rglob("*")) if source.is_dir() else [source]
    states = [(str(path), path.stat()) for path in found if path.is_file()]
    return tuple((name, state.st_mtime_ns, state.st_size) for name, state in states)


def main() -> int:
    """Run from the supervisor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True, help="the SuperNode's Runtime API on 127.0.0.1")
    parser.add_argument("--secret", type=Path, required=True, help="file with the secret that it was started with")
    parser.add_argument("--node", required=True, help="the node's settings as JSON")
    words = parser.parse_args()
    set_up()
    logging.getLogger("fedveil").propagate = False  # libraries put handlers of their own on the root
    settings: dict[str, Scalar] = json.loads(words.node)
    where = about("", None, installed.name_of(settings))
    try:
        allowed = ", ".join(digits[:12] for digits in policy_of(settings).allowed_bundles(own_digest()))
    except ConfigError as error:
        log.error("%s", error, extra=where)
        return 1
    log.info("the worker is ready; it joins runs of the bundle %s, by the installed code", allowed, extra=where)
    return work(Node(words.port, words.secret.read_bytes()), settings)


if __name__ == "__main__":
    sys.exit(main())

"""A registered site that speaks to Flower's Fleet API by itself: as anybody, to anybody, and asks what there is.

Flower checks that a call is of a registered key and of that key's node, and nothing of a message that the call carries:
neither whose it is, nor to whom it goes. What holds against that is FedVeil's own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Message, RecordDict
from flwr.app.message.message import make_message, remove_content_from_message
from flwr.app.metadata import Metadata
from flwr.common.constant import HEARTBEAT_MAX_INTERVAL, SUPERLINK_NODE_ID
from flwr.common.serde import message_to_proto
from flwr.proto import fleet_pb2, message_pb2
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from fedveil.common.errors import RunFailed
from fedveil.deploy import fleet_grpc, fleet_http
from fedveil.deploy.fleet_answers import Call
from fedveil.deploy.node_keys import pem_of
from fedveil.deploy.road import Road
from fedveil.deploy.transport import IS_HTTP

SERVER = SUPERLINK_NODE_ID
"""The server's number, the same everywhere."""
SENT_SECONDS = 30.0
MOST_TRIES = 3000
"""Microseconds between two tasks of one push, before and after, that are tried; the finding's were 59 to 83."""


@dataclass(frozen=True)
class Impostor:
    """Calls to the Fleet API in one run, all under the one registered key."""

    fleet: Any
    """A ``Fleet``, or what calls the API's handlers."""
    own: int
    """The node's own number."""
    run: int

    @property
    def node(self) -> Node:
        """What each call says of who calls: that alone is checked."""
        return Node(node_id=self.own)

    def receive(self) -> Message | None:
        """Return the next task for this node, whole."""
        answer = self.fleet.PullMessages(PullMessagesRequest(node=self.node))
        if not answer.messages_list:
            return None
        (told, *_), (tree, *_) = answer.messages_list, answer.message_object_trees
        ids = [one.object_id for one in iterate_object_tree(tree)]
        contents = {name: self._whole(name) for name in ids}
        name = told.metadata.message_id
        self.fleet.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(node=self.node, run_id=self.run, message_object_id=name)
        )
        message = cast(Message, inflate_object_from_contents(name, contents))
        message.metadata.__dict__["_message_id"] = name
        return message

    def message(self, content: RecordDict, sender: int, to: int, like: Message, answers: str = "") -> Message:
        """Return a message of anybody to anybody, otherwise as ``like``; ``answers`` is the id of the task."""
        told = like.metadata
        words = (sender, to, answers, told.group_id, told.created_at, told.ttl, told.message_type)
        return _made(self.run, content, words, None if answers else told.src_task_id)

    def push(self, message: Message, *, parts: bool = True) -> bool:
        """Push a message with its parts, and return whether Flower keeps it; half sent without ``parts``."""
        objects, tree = get_all_nested_objects(message), get_object_tree(message)
        told = message_to_proto(remove_content_from_message(message))
        request = PushMessagesRequest(node=self.node, messages_list=[told], message_object_trees=[tree])
        answer = self.fleet.PushMessages(request)
        for name in answer.objects_to_push if parts else ():
            self.fleet.PushObject(
                PushObjectRequest(
                    node=self.node,
                    run_id=self.run,
                    object_id=name,
                    object_content=objects[name].deflate(),
                    session_id=answer.session_id,
                )
            )
        return message.metadata.message_id in answer.objects_to_push

    def sees(self, name: str) -> bool:
        """Return whether Flower has an object of this id; whose it is it does not ask."""
        return bool(self._pull(name).object_found)

    def names_of_task(self, like: Message, to: int, tries: int = MOST_TRIES) -> Iterator[str]:
        """Yield what another node's task of the same push may be called, computed from the own one.

        The ids are hashes of messages that differ in the addressee and a few microseconds, if contents are the same.
        """
        told = like.metadata
        for step in range(1, tries):
            for sign in (1, -1):
                created = round(told.created_at * 1e6 + sign * step) / 1e6
                words = (told.src_node_id, to, "", told.group_id, created, told.ttl, told.message_type)
                yield _made(self.run, like.content, words, told.src_task_id).metadata.message_id

    def name_of_task(self, like: Message, to: int, tries: int = MOST_TRIES) -> str:
        """Return the id of another node's task that waits for it; empty: none is found."""
        return next((name for name in self.names_of_task(like, to, tries) if self.sees(name)), "")

    def answers_as(self, content: RecordDict, like: Message, who: int, tries: int = MOST_TRIES) -> bool:
        """Answer another node's task of the same push as that node; return whether Flower keeps one of the tries."""
        names = self.names_of_task(like, who, tries)
        return any(self.push(self.message(content, who, SERVER, like, name)) for name in names)

    def _whole(self, name: str) -> bytes:
        """Return an object, once the sender has sent it."""
        deadline = time.monotonic() + SENT_SECONDS
        while not (answer := self._pull(name)).object_available:
            if time.monotonic() > deadline:
                raise RunFailed(f"an object of a task is not there after {SENT_SECONDS:g} s")
            time.sleep(0.01)
        return bytes(answer.object_content)

    def _pull(self, name: str) -> Any:
        return self.fleet.PullObject(PullObjectRequest(node=self.node, run_id=self.run, object_id=name))


def _made(run: int, content: RecordDict, words: tuple[Any, ...], task: int | None = None) -> Message:
    sender, to, answers, group, created, ttl, kind = words
    told = Metadata(run, "", sender, to, answers, group, created, ttl, kind, src_task_id=task)
    message = make_message(told, content)
    message.metadata.__dict__["_message_id"] = message.object_id
    return message


@dataclass(frozen=True)
class Fleet:
    """The Fleet API of a server, as a method of each of its calls; NotAnswered where the server refuses one."""

    call: Call
    key: Any

    def __getattr__(self, method: str) -> Callable[[Any], Any]:
        name = f"{method}Response"
        answer = getattr(fleet_pb2, name, None) or getattr(message_pb2, name)
        return lambda request: self.call(method, request, answer, self.key)


@contextmanager
def online(key: Path, address: str, authority: bytes, run: int) -> Iterator[Impostor]:
    """Yield an impostor with a registered site's private key, that passes for online meanwhile."""
    node_key: Any = load_ssh_private_key(key.read_bytes(), None)
    with (fleet_http if IS_HTTP else fleet_grpc).calls(address, authority, Road()) as call:
        fleet = Fleet(call, node_key)
        request = ActivateNodeRequest(public_key=pem_of(node_key), heartbeat_interval=HEARTBEAT_MAX_INTERVAL)
        yield Impostor(fleet, fleet.ActivateNode(request).node_id, run)

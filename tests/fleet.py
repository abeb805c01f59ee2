"""A SuperLink in memory: Flower's own state, and its handlers of the calls of server and nodes, without a network."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.server.superlink.fleet.message_handler import message_handler
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID, TaskType
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid.http_grid import HttpGrid
from flwr.superlink.servicer.runtime import runtime_handlers

from faults.impostor import Impostor

Answer = Callable[[Message], RecordDict]
"""From a task to what a site sends back."""


class Link:
    """The state of a SuperLink with one run under way, and its nodes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store = ObjectStoreFactory(FLWR_IN_MEMORY_DB_NAME)
        factory = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), self.store)
        self.state: Any = factory.state()
        self.run = self.state.create_run("fab", "1", "ab", {}, NOOP_FEDERATION_ID, None, "", TaskType.SERVER_APP)
        (task,) = self.state.get_tasks(run_ids=[self.run])
        self.state.claim_task(task.task_id)
        self.state.activate_task(task.task_id)
        for name, value in (("_task_id", task.task_id), ("_run_id", self.run), ("_node_id", SUPERLINK_NODE_ID)):
            monkeypatch.setattr(TaskIdentity, name, value)
        self.keys: dict[int, ec.EllipticCurvePrivateKey] = {}

    def join(self) -> Impostor:
        """Let a node in and return its calls to the Fleet API, which Flower checks for the node's own number alone."""
        key = ec.generate_private_key(ec.SECP384R1())
        node = self.state.create_node("", "", public_key_to_bytes(key.public_key()), 30)
        self.state.activate_node(node, 1e6)
        self.keys[node] = key
        handlers: Any = message_handler
        store = self.store.store()
        calls = {
            "PullMessages": partial(handlers.pull_messages, state=self.state, store=store),
            "PushMessages": partial(handlers.push_messages, state=self.state),
            "PushObject": partial(handlers.push_object, state=self.state),
            "PullObject": partial(handlers.pull_object, state=self.state),
            "ConfirmMessageReceived": partial(handlers.confirm_message_received, state=self.state, store=store),
        }

        def checked(call: Callable[[Any], Any]) -> Callable[[Any], Any]:
            def checks(request: Any) -> Any:
                assert request.node.node_id == node  # as the interceptor does
                return call(request)

            return checks

        return Impostor(SimpleNamespace(**{name: checked(call) for name, call in calls.items()}), node, self.run)

    def grid(self) -> HttpGrid:
        """Return the grid of the run's ServerApp."""
        task, store = SimpleNamespace(run_id=self.run), self.store.store()
        runtime, fleet = runtime_handlers, message_handler
        client = SimpleNamespace(
            GetNodes=lambda request: runtime.get_nodes(request, self.state, task),  # type: ignore[arg-type]
            PushMessages=lambda request: runtime.push_messages(request, self.state, task),  # type: ignore[arg-type]
            PullMessages=lambda request: runtime.pull_messages(request, self.state, task),  # type: ignore[arg-type]
            PushObject=lambda request: fleet.push_object(request, self.state),
            PullObject=lambda request: fleet.pull_object(request, self.state),
            ConfirmMessageReceived=lambda request: fleet.confirm_message_received(request, self.state, store),
        )
        grid = HttpGrid(token="of nobody")
        grid._client = client  # type: ignore[assignment]
        grid._run = SimpleNamespace(run_id=self.run)  # type: ignore[assignment]
        return grid


@contextmanager
def answering(site: Impostor, answer: Answer) -> Iterator[list[Message]]:
    """Let a node answer its tasks meanwhile; yield the list that its tasks are put into."""
    ended, got = threading.Event(), list[Message]()

    def work() -> None:
        while not ended.wait(0.02):
            if (task := site.receive()) is None:
                continue
            got.append(task)
            name = task.metadata.message_id
            site.push(site.message(answer(task), site.own, SUPERLINK_NODE_ID, task, name))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield got
    finally:
        ended.set()
        thread.join(10)

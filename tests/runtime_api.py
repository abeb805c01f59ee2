"""The Runtime API of Flower's SuperNode, served from this process: all that is missing is the SuperLink."""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import uvicorn
from flwr.app import Context, Message, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.app.metadata import Metadata
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supernode.main import create_app
from flwr.supernode.nodestate import NodeStateFactory

from fedveil.client import runtime
from fedveil.common import runtime as flower

NODE_ID, RUN_ID = 7, 1
SECRET = b"a secret of the site's own"


class RuntimeApi:
    """What a SuperNode in process isolation serves, and the part of it that fetches tasks and sends replies."""

    def __init__(self, port: int, secret: bytes | None) -> None:
        self.port = port
        objects = ObjectStoreFactory()
        factory = NodeStateFactory(objectstore_factory=objects)
        self.state, self._store = factory.state(), objects.store()
        self.state.set_node_id(NODE_ID)
        app = create_app(state_factory=factory, superexec_auth_secret=secret)
        self.server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))

    def give(
        self,
        content: RecordDict | None,
        bundle: bytes,
        settings: Mapping[str, Any],
        node: Mapping[str, Any],
        *,
        message_type: str = "train",
    ) -> None:
        """Store a task as the SuperNode does when a message comes; without ``content`` its message is lost."""
        run = Run.create_empty(RUN_ID)
        run.fab_id, run.fab_version = "fedveil/fedveil", "0.1.0"
        run.fab_hash = hashlib.sha256(bundle).hexdigest()
        context = Context(RUN_ID, NODE_ID, dict(node), RecordDict(), dict(settings), series_id=0)
        if kept := self.state.get_run_series_context(0):
            context.state = kept.state
        self.state.set_run_series_context(0, context)
        self.state.store_run(run)
        self.state.store_fab(Fab(run.fab_hash, bundle, {}))
        self.state.create_task(task_type=TaskType.CLIENT_APP, run_id=RUN_ID, fab_hash=run.fab_hash)
        if content is None:
            return
        metadata = Metadata(RUN_ID, "", 1, NODE_ID, "", "1", time.time(), 600.0, message_type)
        message = make_message(metadata, content)
        message.metadata.__dict__["_message_id"] = message.object_id
        self._store.preregister(RUN_ID, get_object_tree(message))
        for identity, thing in get_all_nested_objects(message).items():
            self._store.put(identity, thing.deflate())
        self.state.store_message(remove_content_from_message(message))

    def reply(self) -> Message:
        """Return the only reply that is waiting, as the SuperNode would send it."""
        (bare,) = self.state.get_messages(is_reply=True)
        tree = self._store.get_object_tree(bare.metadata.message_id)
        contents: dict[str, bytes] = {}
        waiting = [tree]
        while waiting:
            one = waiting.pop()
            contents[one.object_id] = self._store.get(one.object_id) or b""
            waiting.extend(one.children)
        assert all(contents.values()), "a part of the reply was never handed over"
        whole = inflate_object_from_contents(tree.object_id, contents)
        assert isinstance(whole, Message)
        return whole

    def kept(self) -> RecordDict:
        """Return what the site keeps for its next message."""
        context = self.state.get_run_series_context(0)
        assert context is not None
        return context.state

    def waiting(self) -> int:
        """Return how many tasks nobody has taken."""
        return len(self.state.get_tasks(statuses=["pending"]))


@contextmanager
def runtime_api(secret: bytes | None = SECRET) -> Iterator[RuntimeApi]:
    """Serve a Runtime API on a free port."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = int(one.getsockname()[1])
    api = RuntimeApi(port, secret)
    thread = threading.Thread(target=api.server.run, daemon=True)
    thread.start()
    while not api.server.started:
        assert thread.is_alive(), "the Runtime API did not start"
        time.sleep(0.01)
    try:
        yield api
    finally:
        api.server.should_exit = True
        thread.join()


class OneTask(runtime.Node):
    """Asks until it has had one task, and then takes the node for somebody else's, which ends the worker."""

    had = False

    def acquire(self) -> str:
        if self.had:
            raise flower.NotOurNode("enough")
        token = super().acquire()
        self.had = bool(token)
        return token

"""The Control and Runtime API of Flower's SuperLink over TLS, served from this process: no site can join it."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import uvicorn
from flwr.common.constant import NOOP_FLWR_AID
from flwr.proto.task_pb2 import Task
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.fab import Fab
from flwr.superlink.main import create_app

from fedveil.deploy.server_folder import ServerFolder

PATIENCE = 300.0
SECRET = b"a secret of the server's own"


class SuperLinkApi:
    """What a SuperLink in process isolation serves on its Control port."""

    def __init__(self, folder: ServerFolder, secret: bytes | None) -> None:
        app = create_app()
        app.state.superexec_auth_secret = secret
        self.folder, self.state = folder, app.state.linkstate_factory.state()
        self.server = uvicorn.Server(
            uvicorn.Config(
                app,
                host="127.0.0.1",
                port=folder.control_port,
                log_level="error",
                ssl_certfile=folder.path / "server.pem",
                ssl_keyfile=str(folder.path / "server.key"),
            )
        )

    def give(self, bundle: bytes, settings: Mapping[str, Any]) -> int:
        """Store a run as the Control API does when it is submitted, and return its task's number."""
        fab = Fab(hashlib.sha256(bundle).hexdigest(), bundle, {})
        self.state.store_fab(fab)
        run = self.state.create_run(
            *("fedveil/fedveil", "0.1.0", fab.hash_str, dict(settings), NOOP_FEDERATION_ID, None, NOOP_FLWR_AID),
            TaskType.SERVER_APP,
        )
        (task,) = self.state.get_tasks(run_ids=[run])
        return int(task.task_id)

    def task(self, number: int) -> Task:
        """Return how a task stands."""
        (task,) = self.state.get_tasks(task_ids=[number])
        return task

    def wait(self, number: int, what: Callable[[Task], bool]) -> Task:
        """Return a task once it is as a test wants it."""
        deadline = time.monotonic() + PATIENCE
        while not what(task := self.task(number)):
            assert time.monotonic() < deadline, f"{task}\n{self.log(number)}"
            time.sleep(0.1)
        return task

    def end(self, number: int) -> Task:
        """Return a task once it is over."""
        return self.wait(number, lambda task: task.status.status == "finished")

    def log(self, number: int) -> str:
        """Return what whoever submitted a run is shown of its log."""
        return str(self.state.get_task_log(number, None)[0])


@contextmanager
def superlink_api(folder: ServerFolder, secret: bytes | None = SECRET) -> Iterator[SuperLinkApi]:
    """Serve the APIs of a server's folder at its Control port."""
    api = SuperLinkApi(folder, secret)
    thread = threading.Thread(target=api.server.run, daemon=True)
    thread.start()
    while not api.server.started:
        assert thread.is_alive(), "the SuperLink's API did not start"
        time.sleep(0.01)
    try:
        yield api
    finally:
        api.server.should_exit = True
        thread.join()

"""A client of Flower's Runtime API: how a site's worker and a server's runner are handed tasks, and hold one.

Flower's own way for a task starts a process, unpacks the bundle that came with it and runs the code in it. A SuperNode
or a SuperLink in ``--isolation process`` starts none: it serves this API, and hands tasks to a process that knows
the secret that it was started with. What of Flower is internal is called here, in ``client.runtime`` and in
``server.runner``; ``test_worker.py`` and ``test_runner.py`` hold it to the version.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
from flwr.proto.runtime_pb2 import AcquireTaskRequest, SendTaskHeartbeatRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.runtime import RuntimeHttpClient

log = logging.getLogger("fedveil")
ANEW, NODE_TOO = 75, 76
"""Exit codes of a worker: restart it, or Flower's process as well."""
_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
_REFUSED = (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN)


class TaskLost(Exception):
    """Flower's process has given the task up, or wants no more of its run."""


class NotOurNode(Exception):
    """What answers at the address is not the Flower process that this one was started with."""


@dataclass(frozen=True)
class HeldTask:
    """One task as Flower's process holds it for us."""

    client: RuntimeHttpClient
    beat: HeartbeatSender


class Runtime:
    """The Runtime API of a SuperNode or a SuperLink.

    Args:
        address: HOST:PORT.
        secret: what Flower's process was started with.
        kind: of the tasks that are taken.
        authority: certificate of the authority, PEM, that the API's own must be of; None: it speaks plain HTTP.
    """

    def __init__(self, address: str, secret: bytes, kind: TaskType, authority: bytes | None = None) -> None:
        self.address, self.authority, self._kind = address, authority, kind
        self._version = RuntimeVersionHttpInterceptor(component_name="fedveil")
        signed = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods={_ACQUIRE})
        self._client = self._connect(signed)

    def _connect(self, interceptor: ProtobufClientInterceptor) -> RuntimeHttpClient:
        return RuntimeHttpClient.from_server_address(
            self.address,
            insecure=self.authority is None,
            root_certificates=self.authority,
            interceptors=[self._version, interceptor],
        )

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def acquire(self) -> str:
        """Return the token of the next task; empty: no task, or no answer.

        Raises:
            NotOurNode: our secret is not taken.
        """
        try:
            given = self._client.AcquireTask(AcquireTaskRequest(supported_task_types=[self._kind]))
        except httpx.TransportError:
            return ""
        except httpx.HTTPStatusError as error:
            if error.response.status_code in _REFUSED:
                raise NotOurNode("Flower's process does not take the secret that both were started with") from error
            return ""
        return str(given.token)

    @contextmanager
    def hold(self, token: str, lost: Callable[[], None]) -> Iterator[HeldTask]:
        """Hold a task: keep telling Flower's process that it is being worked on.

        Args:
            token: the task's.
            lost: called, in another thread, when the task is not ours any more.

        Raises:
            TaskLost: Flower's process has given it up, or its run is over.
        """
        client = self._connect(RuntimeTokenHttpInterceptor(token))
        beat = HeartbeatSender(lambda: _is_held(client, lost))
        beat.start()
        try:
            yield HeldTask(client, beat)
        except httpx.HTTPStatusError as error:
            if error.response.status_code in _REFUSED:
                raise TaskLost from error
            raise
        finally:
            if beat.is_running:
                beat.stop()
            client.close()


def _is_held(client: RuntimeHttpClient, lost: Callable[[], None]) -> bool:
    """Send one sign of life; False: no answer."""
    try:
        is_held = client.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success
    except httpx.HTTPStatusError as error:
        is_held = error.response.status_code not in _REFUSED
    except httpx.HTTPError:
        return False
    if not is_held:
        lost()
    return True

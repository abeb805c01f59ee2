"""A SuperNode that sends every reply twice, and once more all the replies before it; and some it never sends whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import grpc
import httpx
from flwr.proto.message_pb2 import PushObjectResponse
from flwr.supernode.cli import flower_supernode

from faults.fault_plan import open_plan
from fedveil.deploy.transport import IS_HTTP

if IS_HTTP:  # which the types of the installed Flower need not know
    connection = import_module("flwr.supernode.fleet_http_connection")
else:
    connection = import_module("flwr.client.grpc_rere_client.connection")
STUB = "FleetHttpClient" if IS_HTTP else "FleetStub"
"""The class whose methods are a node's calls to the Fleet API."""

NODE = "the stuttering node"
"""Its name in a plan."""
HALF = "announced and never sent"


class StutteringStub(getattr(connection, STUB)):  # type: ignore[misc]
    """The calls of a node to the Fleet API; what became of a repeated push goes to ``pushes.txt``."""

    PushMessages: Callable[..., Any]
    PushObject: Callable[..., Any]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._sent: list[Any] = []
        self._round = 0
        self.PushMessages = self._stuttered(self.PushMessages)
        self.PushObject = self._swallowed(self.PushObject)

    def _stuttered(self, push: Callable[..., Any]) -> Callable[..., Any]:
        def call(request: Any, **options: Any) -> Any:
            self._round = int(request.messages_list[0].metadata.group_id)
            answer = push(request, **options)
            for what, again in [("a duplicate", request), *(("a replay", old) for old in self._sent)]:
                _note(what, partial(push, again, **options))
            self._sent.append(request)
            return answer

        return call

    def _swallowed(self, push: Callable[..., Any]) -> Callable[..., Any]:
        def call(request: Any, **options: Any) -> Any:
            if open_plan().fault(NODE, self._round) == HALF:
                return PushObjectResponse(stored=True)
            return push(request, **options)

        return call


def _note(what: str, repeat: Callable[[], Any]) -> None:
    try:
        answer = repeat()
        outcome = f"accepted, {len(answer.objects_to_push)} objects wanted"
    except (grpc.RpcError, httpx.HTTPError) as error:
        outcome = f"refused ({' '.join(str(error).split())[:120]})"
    with (open_plan().folder / "pushes.txt").open("a") as file:
        file.write(f"{what}: {outcome}\n")


def main() -> None:
    """Be a SuperNode, with its command line."""
    setattr(connection, STUB, StutteringStub)
    flower_supernode()

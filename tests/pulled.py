"""Grids whose pulls do what a test says, and a server's exchange over them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import torch

from fedveil.common.messages.round import TrainTask
from fedveil.server.app import FlowerTransport
from fedveil.server.collect.shown import Shown

SHOWN = Shown(1, "record", 0)
"""Of a run whose folder tells who has answered."""


class Grid:
    """A grid whose pulls do what a test says, by the id of the task's message."""

    def __init__(self, **pulled: Callable[[], list[Any]]) -> None:
        self._pulled, self.asked = pulled, list[str]()

    def push_messages(self, messages: list[Any]) -> list[str]:
        return list(self._pulled)

    def pull_messages(self, wanted: list[str]) -> list[Any]:
        self.asked += wanted
        pulled = self._pulled[wanted[0]]()
        for message in pulled:
            message.metadata = SimpleNamespace(reply_to_message_id=wanted[0])
        return pulled


def exchange(grid: Any, tasks: int, timeout: float = 1.0, progress: Callable[[Any], None] = lambda _: None) -> Any:
    job = SimpleNamespace(config=SimpleNamespace(rounds=1, round_timeout=timeout))
    server_model, folder = (
        SimpleNamespace(reply_layout=lambda _: {}),
        SimpleNamespace(progress=progress, shown=SHOWN),
    )
    transport = FlowerTransport(*cast(Any, (grid, job, server_model, folder)))
    task = TrainTask("1", 1, {"x": {"B": torch.zeros(2)}}, {}, "", "ab" * 16, "cd" * 16)
    return transport.exchange(dict.fromkeys(range(1, tasks + 1), task), timeout)


def answered(reason: str) -> Callable[[], list[Any]]:
    return lambda: [SimpleNamespace(has_error=lambda: True, error=SimpleNamespace(reason=reason))]

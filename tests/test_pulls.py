"""A site that announces a reply and never sends all of it holds up nobody but itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from threading import Event
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from common.messages import Refusal, TrainTask
from server import pulls
from server.app import FlowerTransport
from server.pulls import Pulls


class Grid:
    """A grid whose pulls do what a test says, by the id of the task's message."""

    def __init__(self, **pulled: Callable[[], list[Any]]) -> None:
        self._pulled, self.asked = pulled, list[str]()

    def push_messages(self, messages: list[Any]) -> list[str]:
        return list(self._pulled)

    def pull_messages(self, wanted: list[str]) -> list[Any]:
        self.asked += wanted
        return self._pulled[wanted[0]]()


def raises(error: Exception) -> Callable[[], list[Any]]:
    def pull() -> list[Any]:
        raise error

    return pull


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[Event]:
    """An event until which a pull hangs."""
    monkeypatch.setattr(pulls, "USUAL_SECONDS", 0.05)
    event = Event()
    yield event
    event.set()


def hangs(event: Event) -> Callable[[], list[Any]]:
    def pull() -> list[Any]:
        event.wait(30)
        return ["whole at last"]

    return pull


def test_a_pull_that_hangs_holds_up_no_other_and_is_not_begun_twice(stuck: Event) -> None:
    grid = Grid(a=hangs(stuck), b=lambda: ["reply"], c=list)
    mine = Pulls(cast(Any, grid))
    assert list(mine.pull({"a", "b", "c"})) == [("b", "reply")]
    assert list(mine.pull({"a", "c"})) == []
    assert grid.asked.count("a") == 1
    assert mine.under_way == {"a"}
    stuck.set()
    deadline = time.monotonic() + 10
    found: list[Any] = []
    while not found and time.monotonic() < deadline:
        found = list(mine.pull({"a", "c"}))
    assert found == [("a", "whole at last")]


def test_what_cannot_be_unpacked_is_no_reply_and_trouble_at_the_superlink_is_tried_again() -> None:
    pulled = [raises(ConnectionError("busy")), lambda: ["reply"]]
    grid = Grid(a=raises(ValueError("not a message")), b=lambda: pulled.pop(0)())
    mine = Pulls(cast(Any, grid))
    assert list(mine.pull({"a", "b"})) == [("a", None)]
    assert "ConnectionError" in mine.trouble
    assert list(mine.pull({"b"})) == [("b", "reply")]


def test_an_exchange_ends_at_its_deadline_whoever_hangs(stuck: Event, monkeypatch: pytest.MonkeyPatch) -> None:
    # Flower's messages can be made within a run only.
    monkeypatch.setattr("server.app.Message", lambda *content, **terms: content)
    error = SimpleNamespace(has_error=lambda: True, error=SimpleNamespace(reason="away"))
    grid = Grid(a=hangs(stuck), b=list, c=lambda: [error])
    job = SimpleNamespace(config=SimpleNamespace(rounds=1))
    folder = SimpleNamespace(progress=lambda **_: None)
    transport = FlowerTransport(*cast(Any, (grid, job, SimpleNamespace(reply_layout=lambda _: {}), folder)))
    task = TrainTask("1", 1, {"x": {"B": torch.zeros(2)}}, {}, "", "ab" * 16, "cd" * 16)
    began = time.monotonic()
    replies = transport.exchange({1: task, 2: task, 3: task}, 1.0).replies
    assert time.monotonic() - began < 10
    assert len(grid.asked) > 3, "a reply that was not there is not asked for again"
    told = {node: (reply.kind, reply.reason) for node, reply in replies.items() if isinstance(reply, Refusal)}
    assert told == {1: ("late", "no whole answer in 1 s"), 2: ("late", "no answer in 1 s"), 3: ("failed", "away")}

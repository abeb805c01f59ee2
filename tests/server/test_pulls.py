"""A site that announces a reply and never sends all of it holds up nobody but itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from threading import Event
from types import SimpleNamespace
from typing import Any, cast

import pytest
from pulled import SHOWN, Grid, answered, exchange

from fedveil.common.messages.round import Refusal
from fedveil.server import pulls
from fedveil.server.app import FlowerTransport
from fedveil.server.pulls import Pulls

REPLY: Any = SimpleNamespace()
LATE: Any = SimpleNamespace()


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
        return [LATE]

    return pull


def test_a_pull_that_hangs_holds_up_no_other_and_is_not_begun_twice(stuck: Event) -> None:
    grid = Grid(a=hangs(stuck), b=lambda: [REPLY], c=list)
    mine = Pulls(cast(Any, grid), 0)
    assert list(mine.pull({"a", "b", "c"})) == [("b", REPLY)]
    assert list(mine.pull({"a", "c"})) == []
    assert grid.asked.count("a") == 1
    assert mine.under_way == {"a"}
    stuck.set()
    deadline = time.monotonic() + 10
    found: list[Any] = []
    while not found and time.monotonic() < deadline:
        found = list(mine.pull({"a", "c"}))
    assert found == [("a", LATE)]


def test_what_cannot_be_unpacked_is_no_reply_and_trouble_at_the_superlink_is_tried_again() -> None:
    pulled = [raises(ConnectionError("busy")), lambda: [REPLY]]
    grid = Grid(a=raises(ValueError("not a message")), b=lambda: pulled.pop(0)())
    mine = Pulls(cast(Any, grid), 0)
    assert list(mine.pull({"a", "b"})) == [("a", None)]
    assert "ConnectionError" in mine.trouble
    assert list(mine.pull({"b"})) == [("b", REPLY)]


def test_an_exchange_ends_at_its_deadline_whoever_hangs(stuck: Event, monkeypatch: pytest.MonkeyPatch) -> None:
    # Flower's messages can be made within a run only.
    monkeypatch.setattr("fedveil.server.app.Message", lambda *content, **terms: content)
    error = SimpleNamespace(has_error=lambda: True, error=SimpleNamespace(reason="away"))
    grid = Grid(a=hangs(stuck), b=list, c=lambda: [error])
    began = time.monotonic()
    replies = exchange(grid, 3).replies
    assert time.monotonic() - began < 10
    assert len(grid.asked) > 3, "a reply that was not there is not asked for again"
    told = {node: (reply.kind, reply.reason) for node, reply in replies.items() if isinstance(reply, Refusal)}
    assert told == {1: ("late", "no whole answer in 1 s"), 2: ("late", "no answer in 1 s"), 3: ("failed", "away")}


class BusyGrid(Grid):
    """A grid whose SuperLink fails ``failures`` times at every kind of call."""

    def __init__(self, failures: int, **pulled: Callable[[], list[Any]]) -> None:
        super().__init__(**pulled)
        self.left = {"push": failures, "nodes": failures}

    def _fail(self, call: str) -> None:
        self.left[call] -= 1
        if self.left[call] >= 0:
            raise ConnectionError("500 database is locked")

    def push_messages(self, messages: list[Any]) -> list[str]:
        self._fail("push")
        return super().push_messages(messages)

    def get_node_ids(self) -> list[int]:
        self._fail("nodes")
        return [3, 1, 2]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedveil.server.app.Message", lambda *content, **terms: content)
    monkeypatch.setattr("fedveil.server.app.POLL_SECONDS", 0.01)


@pytest.mark.usefixtures("quick")
def test_a_superlink_that_fails_now_and_then_ends_no_run() -> None:
    busy = BusyGrid(2, a=answered("asked"))
    assert exchange(busy, 1).replies[1].reason == "asked"
    job = SimpleNamespace(config=SimpleNamespace(round_timeout=5.0))
    folder = SimpleNamespace(progress=lambda _: None, shown=SHOWN)
    transport = FlowerTransport(*cast(Any, (busy, job, SimpleNamespace(reply_layout=lambda _: {}), folder)))
    assert transport.nodes(1, {2}) == [1, 3]


@pytest.mark.usefixtures("quick")
def test_a_superlink_that_keeps_failing_ends_the_run_with_its_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedveil.server.app.PATIENCE_SECONDS", 0.05)
    with pytest.raises(ConnectionError, match="locked"):
        exchange(BusyGrid(10**6, a=list), 1)


@pytest.mark.usefixtures("quick")
def test_a_server_whose_run_has_been_ended_does_not_go_on_asking() -> None:
    class Ended(Grid):
        def push_messages(self, messages: list[Any]) -> list[str]:
            self.asked.append("push")
            error = ConnectionError("401 Unauthorized")
            error.response = SimpleNamespace(status_code=401)  # type: ignore[attr-defined]
            raise error

    ended = Ended(a=list)
    with pytest.raises(ConnectionError, match="401"):
        exchange(ended, 1)
    assert ended.asked == ["push"]


@pytest.mark.usefixtures("quick")
def test_a_task_that_the_superlink_does_not_take_is_a_failed_site_and_not_a_lost_run() -> None:
    grid = Grid(a=answered("asked"), b=list)
    grid.push_messages = lambda messages: ["a", None]  # type: ignore[method-assign,assignment,list-item]
    exchanged = exchange(grid, 2)
    told = {node: (reply.kind, reply.reason) for node, reply in exchanged.replies.items()}
    assert told == {1: ("failed", "asked"), 2: ("failed", "the SuperLink did not take its task")}
    whole = exchange(Grid(a=answered("asked"), b=answered("asked")), 2).bytes_down
    assert exchanged.bytes_down == whole / 2, "a task that was never sent counts as sent"
    grid.push_messages = lambda messages: []  # type: ignore[method-assign]
    assert {reply.kind for reply in exchange(grid, 2).replies.values()} == {"failed"}

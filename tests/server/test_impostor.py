"""A registered site that speaks as the server and as others, at Flower's own state of a SuperLink."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from fleet import Link, answering
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID

from faults.impostor import Impostor
from fedveil.common.messages.round import Refusal, TrainResult, TrainTask
from fedveil.common.messages.wire import encode_reply
from fedveil.server.app import FlowerTransport
from fedveil.server.collect.shown import Shown
from fedveil.server.pulls import HEADER_PARTS
from fedveil.server.sites import Exchange
from fedveil.strategies.ffa_lora import FFALoRA

TRIES = 150
"""Of microseconds each way; between two tasks of one push the finding counted 59 to 83."""
LAYOUT = {"layer": {"B": (3,)}}
STATE = {"layer": {"B": torch.ones(3)}}


def task_of(number: int = 1) -> TrainTask:
    return TrainTask("1", number, STATE, {}, "", "ab" * 16, "cd" * 16)


def result(site: str, value: float = 1.0, number: int = 1) -> RecordDict:
    return encode_reply(TrainResult("1", number, site, 50, {"layer": {"B": torch.full((3,), value)}}, None))


class Run:
    """A round of two sites, the victim and the impostor, over the server's transport."""

    def __init__(self, link: Link, timeout: float = 60.0) -> None:
        config = SimpleNamespace(rounds=1, round_timeout=timeout)
        job = SimpleNamespace(config=config, strategy=FFALoRA())
        model = SimpleNamespace(reply_layout=lambda _: LAYOUT)
        folder = SimpleNamespace(progress=lambda _: None, shown=Shown(1, "record", 0), path=Path())
        self.transport = FlowerTransport(*cast(Any, (link.grid(), job, model, folder)))
        self.timeout = timeout

    def ask(self, *nodes: int) -> Exchange:
        return self.transport.exchange(dict.fromkeys(nodes, task_of()), self.timeout)


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> Link:
    monkeypatch.setattr("fedveil.server.app.POLL_SECONDS", 0.02)
    return Link(monkeypatch)


def exchanged(link: Link, victim: Impostor, own: Impostor, attack: Callable[[Message], bool]) -> tuple[Any, list[bool]]:
    """Return what the server takes for the victim's answer, and what came of the impostor's attack.

    The attack happens once the impostor has its task of the same push, and before the victim answers.
    """
    came: list[bool] = []

    def slowly(task: Message) -> RecordDict:
        while not came:
            time.sleep(0.01)
        return result("victim")

    def meanwhile(task: Message) -> RecordDict:
        came.append(attack(task))
        return result("own")

    with answering(victim, slowly), answering(own, meanwhile):
        replies = Run(link).ask(victim.own, own.own).replies
    return replies[victim.own], came


@pytest.mark.parametrize("what", ["an answer", "a refusal", "an answer to the server's own number"])
def test_no_answer_in_another_sites_name_is_taken(link: Link, what: str) -> None:
    victim, own = link.join(), link.join()
    forged = encode_reply(Refusal("1", 1, "victim", "policy", "never")) if what == "a refusal" else result("victim", 9)

    def attack(task: Message) -> bool:
        if what == "an answer to the server's own number":
            return own.push(own.message(forged, SUPERLINK_NODE_ID, SUPERLINK_NODE_ID, task))
        return own.answers_as(forged, task, victim.own, TRIES)

    reply, came = exchanged(link, victim, own, attack)
    assert isinstance(reply, TrainResult), f"a forgery was taken: {reply}"
    assert float(reply.contribution["layer"]["B"][0]) == 1.0, "a forgery was taken"
    assert came == [what == "an answer to the server's own number"], "the task's name was computed"


def test_nobody_sees_who_was_asked(link: Link) -> None:
    victim, own, other = link.join(), link.join(), link.join()
    Run(link).transport._push(dict.fromkeys((victim.own, own.own), task_of()), 60.0)
    task = own.receive()
    assert task is not None
    assert own.name_of_task(task, other.own, TRIES) == "", "no task, and it is found"
    assert own.name_of_task(task, victim.own, TRIES) == "", "who was asked is seen"


@pytest.mark.parametrize("guessed", ["its answer", "its refusal"])
def test_no_guess_at_an_answer_is_confirmed(link: Link, guessed: str) -> None:
    victim, own = link.join(), link.join()
    refused = Refusal("1", 1, "victim", "budget", "data set 'victim' has spent 8 of 8")

    def said() -> RecordDict:
        return result("victim", 0.0) if guessed == "its answer" else encode_reply(refused)

    Run(link).transport._push({victim.own: task_of()}, 60.0)
    task = victim.receive()
    assert task is not None
    answer = victim.message(said(), victim.own, SUPERLINK_NODE_ID, task, task.metadata.message_id)
    assert victim.push(answer)
    assert own.sees(answer.content.object_id), "what is there is not seen: no case"
    assert not [part for part in (said(), *said().children.values()) if own.sees(part.object_id)]


def test_a_message_to_the_server_that_answers_no_task_is_logged(link: Link, caplog: pytest.LogCaptureFixture) -> None:
    victim, own = link.join(), link.join()
    with caplog.at_level(logging.WARNING, "fedveil.server"):
        exchanged(
            *(link, victim, own),
            lambda task: own.push(own.message(result("x"), SUPERLINK_NODE_ID, SUPERLINK_NODE_ID, task)),
        )
    assert any("answers no task" in line for line in caplog.messages)


@pytest.mark.parametrize("parts", [3 * HEADER_PARTS, 1], ids=["many parts", "one large part"])
def test_an_answer_larger_than_any_is_not_pulled_whole(link: Link, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many objects none is pulled; of a large one all, since Flower tells no sizes, and nothing after it."""
    monkeypatch.setattr("fedveil.server.pulls.HEADER_BYTES", 2**16)
    site, run = link.join(), Run(link)
    pulled, pull = list[int](), link.state.get_object

    def noted(*of: Any) -> Any:
        content = pull(*of)
        pulled.append(len(content or b""))
        return content

    monkeypatch.setattr(link.state, "get_object", noted)

    def large(task: Message) -> RecordDict:
        arrays = {f"{i}": Array("float32", (2**15,), "f32le", bytes([i]) * 2**17) for i in range(parts)}
        return RecordDict({"adapter": ArrayRecord(arrays), **result("site").config_records})

    with answering(site, large):
        reply = run.ask(site.own).replies[site.own]
    assert isinstance(reply, Refusal)
    assert (reply.kind, reply.reason) == ("reply", "the message cannot be unpacked")
    assert sum(size >= 2**17 for size in pulled) == (0 if parts > 1 else 1)


def test_a_message_to_the_server_that_is_never_sent_whole_holds_up_nobody(link: Link) -> None:
    victim, own = link.join(), link.join()
    began = time.monotonic()
    reply, came = exchanged(
        *(link, victim, own),
        lambda task: own.push(own.message(result("x"), SUPERLINK_NODE_ID, SUPERLINK_NODE_ID, task), parts=False),
    )
    assert came == [True]
    assert isinstance(reply, TrainResult)
    assert time.monotonic() - began < 30

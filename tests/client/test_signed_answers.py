"""Signed answers at the server: forged ones are logged and counted, and never displace the honest one."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from bundles import own_bundle
from fleet import Link, answering
from flwr.app import Context, Message, RecordDict
from flwr.app.error import Error
from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from flwr.supercore.task_identity import TaskIdentity
from signed_tasks import ANSWER, SETTINGS, TASK, World, forged, honest, result

from audits.tiny_site import OneSite
from fedveil.client import app as installed
from fedveil.client import worker
from fedveil.common.messages.round import Refusal, TrainResult
from fedveil.common.messages.wire import encode_reply, encode_task, round_of
from fedveil.server import app as server_app
from fedveil.server.app import FlowerTransport
from fedveil.server.collect.shown import Shown
from fedveil.server.own_check import FOLDER
from fedveil.server.registered import NODES
from fedveil.server.signing import signing_of
from fedveil.strategies.ffa_lora import FFALoRA

pytestmark = pytest.mark.usefixtures("fresh_process")


# The transport.
class Grid:
    """Flower's store: the first answer to a message is kept, and whoever can name a message may answer."""

    def __init__(self, *answers: Callable[[Message], list[Message]]) -> None:
        self.answers, self.pushed = list(answers), list[Message]()

    def push_messages(self, messages: list[Message]) -> list[str]:
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"m{len(self.pushed)}"
            self.pushed.append(message)
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, wanted: list[str]) -> list[Message]:
        (name,) = wanted
        return self.answers[int(name[1:])](self.pushed[int(name[1:])])


def transport(parties: World, grid: Grid, monkeypatch: pytest.MonkeyPatch, *, signs: bool = True) -> FlowerTransport:
    monkeypatch.setattr(server_app, "POLL_SECONDS", 0.01)
    for name in ("_run_id", "_node_id", "_task_id"):  # as in a process that Flower has started
        monkeypatch.setattr(TaskIdentity, name, 1)
    monkeypatch.setenv(NODES, str(parties.server.nodes))
    monkeypatch.setenv(FOLDER, str(parties.server.path))
    job = SimpleNamespace(strategy=FFALoRA(), config=SimpleNamespace())
    folder = SimpleNamespace(progress=lambda _: None, shown=Shown(1, "record", 0), path=Path())
    model = SimpleNamespace(reply_layout=lambda _: {"l": {"A": (2, 2)}})
    signing = signing_of("17", SETTINGS) if signs else None
    return FlowerTransport(cast(Any, grid), cast(Any, job), cast(Any, model), cast(Any, folder), signing)


def broken(_: Message) -> list[Message]:
    raise IndexError  # as of Flower's for bytes that are no message


def replayed(parties: World) -> Callable[[Message], list[Message]]:
    record = result(parties)
    return lambda message: [Message(record, reply_to=message)]


@pytest.mark.parametrize("kind", ["forged", "replayed", "broken"])
def test_a_forged_answer_is_logged_and_does_not_displace_the_site_s_own(
    kind: str, parties: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lie = {"forged": forged, "replayed": replayed(parties), "broken": broken}[kind]
    grid = Grid(lie, honest(parties))
    with caplog.at_level(logging.WARNING, "fedveil.server"):
        replies = transport(parties, grid, monkeypatch).exchange({7: TASK}, 20.0).replies
    assert isinstance(replies[7], TrainResult), replies
    assert "not taken for the answer of clinic, it may be forged" in caplog.text
    assert len(grid.pushed) == 2
    nonces = {message.content.config_records["header"]["nonce"] for message in grid.pushed}
    assert len(nonces) == 2, "whoever saw the first task could name the second"


def test_a_site_that_is_forged_twice_is_absent_and_asked_no_third_time(
    parties: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = Grid(forged, forged)
    replies = transport(parties, grid, monkeypatch).exchange({7: TASK}, 20.0).replies
    told = replies[7]
    assert isinstance(told, Refusal)
    assert (told.kind, told.reason.partition(":")[0]) == ("failed", "unsigned")
    assert "I am the clinic" not in told.reason
    assert len(grid.pushed) == 2


def test_a_server_that_checks_nothing_takes_the_forged_answer(parties: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault."""
    replies = transport(parties, Grid(forged), monkeypatch, signs=False).exchange({7: TASK}, 20.0).replies
    assert replies[7] == replace(ANSWER, reason="I am the clinic")


def test_an_error_of_flower_s_is_no_site_s_word_and_leaves_it_out_as_unsigned(
    parties: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = Grid(lambda message: [Message(Error(3, "the SuperNode says so"), reply_to=message)])
    told = transport(parties, grid, monkeypatch).exchange({7: TASK}, 20.0).replies[7]
    assert isinstance(told, Refusal)
    assert (told.kind, told.reason) == ("failed", "unsigned: the SuperNode says so")
    assert len(grid.pushed) == 1


def test_a_node_that_nobody_registered_is_told_so(parties: World, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = Grid(honest(parties), honest(parties))
    told = transport(parties, grid, monkeypatch).exchange({8: TASK}, 20.0).replies[8]
    assert isinstance(told, Refusal)
    assert "fedveil server register" in told.reason


@pytest.mark.parametrize("signs", [True, False], ids=["signed", "planted: nobody signs"])
def test_a_registered_site_that_knows_every_name_makes_nobody_pay_and_speaks_for_nobody(
    signs: bool,
    parties: World,
    site: OneSite,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """At Flower's own state of a SuperLink: a task in the server's name, and an answer before the victim's own."""
    link = Link(monkeypatch)
    victim, own, run = link.join(), link.join(), str(link.run)
    (tmp_path / "clinic.pub").write_bytes(parties.public)
    (tmp_path / "clinic.id").write_text(str(victim.own))
    monkeypatch.setattr(server_app, "POLL_SECONDS", 0.02)
    monkeypatch.setenv(NODES, str(tmp_path))
    monkeypatch.setenv(FOLDER, str(parties.server.path))
    context = Context(link.run, victim.own, {}, RecordDict(), dict(site.settings), 0)
    trained = site.model().trained()
    layout = {layer: {name: tuple(t.shape) for name, t in factors.items()} for layer, factors in trained.items()}
    lie = encode_reply(Refusal(run, 1, "clinic", "policy", "never"))
    like = make_message(Metadata(link.run, "", 1, own.own, "", "1", time.time(), 90.0, "train"), RecordDict())
    stolen: list[str] = []

    def answer(message: Message) -> RecordDict:
        if round_of(message.content) == 1 and not stolen:
            stolen.append(message.metadata.message_id)
            assert own.push(own.message(lie, victim.own, 1, like, stolen[0]))
        installed.process.keep_lookout(None, signed=signs)
        return worker.reply_to(message, context, own_bundle(), site.node, parties.keys if signs else None).content

    job = SimpleNamespace(strategy=FFALoRA(), config=SimpleNamespace())
    folder = SimpleNamespace(progress=lambda _: None, shown=Shown(1, "record", 0), path=Path())
    parts = (link.grid(), job, SimpleNamespace(reply_layout=lambda _: layout), folder)
    transport = FlowerTransport(*cast(Any, parts), signing_of(run, site.settings) if signs else None)
    assert own.push(own.message(encode_task(site.task(3, run=run)), 1, victim.own, like)), "no forgery, no case"
    with caplog.at_level(logging.WARNING), answering(victim, answer):
        reply = transport.exchange({victim.own: site.task(1, run=run)}, 120.0).replies[victim.own]
    if signs:
        assert isinstance(reply, TrainResult), reply
        assert site.charges() == [(run, 1, "training")]
        assert "refused (task): the task is not signed" in caplog.text
        assert "not taken for the answer of clinic, it may be forged" in caplog.text
    else:
        assert isinstance(reply, Refusal)
        assert reply.reason == "never"
        assert (run, 3, "training") in site.charges(), "the forged task is free: the case above shows nothing"

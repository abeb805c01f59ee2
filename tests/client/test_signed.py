"""Signatures of tasks and answers: what is not the server's, or not the site's, is found before anything follows."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from fleet import Link, answering
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.app.error import Error
from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from flwr.supercore.task_identity import TaskIdentity
from runtime_api import NODE_ID, RUN_ID, SECRET, runtime_api
from test_worker import OneTask, fresh_process, own_bundle  # noqa: F401

from audits.tiny_site import OneSite, clinic
from fedveil.client import app as installed
from fedveil.client import process as site_process
from fedveil.client import worker
from fedveil.client.process import SiteProcess
from fedveil.common.errors import DataError, PolicyRefusal, ProtocolError
from fedveil.common.messages import signed
from fedveil.common.messages.round import KeyTask, Refusal, TrainResult, TrainTask
from fedveil.common.messages.signed import Asked, SiteKeys, check_task, digest, is_answer, sign_answer, sign_task
from fedveil.common.messages.wire import decode_reply, encode_reply, encode_task, round_of
from fedveil.deploy import start
from fedveil.deploy.certificates import Issued, new_authority, new_server_certificate, new_task_certificate
from fedveil.deploy.commands import worker_command
from fedveil.deploy.server_folder import TASKS, ServerFolder, authority_beside, check_tasks, make_server, renew_server
from fedveil.deploy.site_folder import make_site
from fedveil.server import app as server_app
from fedveil.server.app import FlowerTransport
from fedveil.server.collect.shown import Shown
from fedveil.server.own_check import FOLDER
from fedveil.server.registered import NODES
from fedveil.server.signing import CERTIFICATE, read_tasks_key, signing_of
from fedveil.strategies.job import configure

SETTINGS = {"rounds": 2, "privacy.epsilon": 8.0, "head.train": True, "strategy": "fed-sb"}
ASKED = Asked("17", SETTINGS, 7)
TASK = TrainTask("17", 3, {"l": {"A": torch.ones(2, 2)}}, {}, "", "0a" * 16, "1b" * 16)
ANSWER = Refusal("17", 3, "clinic", "budget", "spent")


@dataclass(frozen=True)
class World:
    """A server, its folder, a site that it has registered as node 7, and the same of another federation."""

    server: ServerFolder
    site: Path
    others: ServerFolder

    @property
    def keys(self) -> SiteKeys:
        return SiteKeys.read(self.server.path / "ca.crt", self.site / "node.key")

    @property
    def public(self) -> bytes:
        return (self.site / "node.pub").read_bytes()

    def authority(self) -> Issued:
        folder = authority_beside(self.server.path)
        return Issued((folder / "ca.crt").read_bytes(), (folder / "ca.key").read_bytes())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    server, others = (make_server(folder / name, ["127.0.0.1"]) for name in ("server", "others"))
    site = make_site(folder / "clinic", "clinic", "127.0.0.1", policy="", authority=server.path / "ca.crt").path
    (server.nodes / "clinic.pub").write_bytes((site / "node.pub").read_bytes())
    (server.nodes / "clinic.id").write_text(f"{NODE_ID}\n")
    return World(server, site, others)


def signed_task(world: World, asked: Asked = ASKED, folder: Path | None = None) -> RecordDict:
    record = encode_task(TASK)
    sign_task(record, asked, *read_tasks_key(folder or world.server.path))
    return record


def check(world: World, record: RecordDict, asked: Asked = ASKED, now: datetime | None = None) -> bytes:
    task = asked.task(record)
    check_task(record, task, world.keys.authority, now)
    return digest(task)


def header(record: RecordDict, **changes: Any) -> RecordDict:
    fields = {**record.config_records["header"], **changes}
    record["header"] = ConfigRecord({key: value for key, value in fields.items() if value is not None})
    return record


def body_with(record: RecordDict, position: int, byte: int) -> RecordDict:
    packed = record.config_records["header"]["body"]
    assert isinstance(packed, bytes)
    return header(record, body=packed[:position] + bytes([byte]) + packed[position + 1 :])


def block_with(record: RecordDict, **changes: Any) -> RecordDict:
    one = record.array_records["adapter"]["state"]
    parts = {"dtype": one.dtype, "shape": one.shape, "stype": one.stype, "data": one.data, **changes}
    record["adapter"] = ArrayRecord({"state": Array(**parts)})
    return record


def added(record: RecordDict, name: str, one: Any) -> RecordDict:
    record[name] = one
    return record


def renamed(record: RecordDict) -> RecordDict:
    record["basis"] = record.array_records["adapter"]
    del record["adapter"]
    return record


def data_of(record: RecordDict) -> bytes:
    return record.array_records["adapter"]["state"].data


ALTERED: dict[str, Callable[[RecordDict], RecordDict]] = {
    "another round": lambda record: body_with(record, 1, 4),
    "another kind": lambda record: body_with(record, 0, 2),
    "another run's name": lambda record: body_with(record, 7, ord("2")),
    "another nonce": lambda record: header(record, nonce=bytes(16)),
    "another protocol": lambda record: header(record, protocol=6),
    "another number": lambda record: block_with(record, data=data_of(record)[:-1] + b"\x01"),
    "a number less": lambda record: block_with(record, data=data_of(record)[:-4]),
    "another shape": lambda record: block_with(record, shape=(2, 2)),
    "another type": lambda record: block_with(record, stype="f64le"),
    "a block renamed": renamed,
    "a block more": lambda record: added(record, "basis", record.array_records["adapter"]),
    "an empty block more": lambda record: added(record, "basis", ArrayRecord({})),
    "a field more": lambda record: header(record, more=1),
    "another type of field": lambda record: header(record, body="text"),
    "a header more": lambda record: added(record, "more", ConfigRecord({"a": 1})),
    "a metric": lambda record: added(record, "more", MetricRecord({"a": 1.0})),
    "no header": lambda record: RecordDict({"adapter": record.array_records["adapter"]}),
}
"""What whoever hands a message on could change in it."""


def test_a_task_as_the_server_signed_it_is_taken_and_one_that_is_encoded_anew_is_another(world: World) -> None:
    first, second = signed_task(world), signed_task(world)
    assert check(world, first) == check(world, first) != check(world, second)


@pytest.mark.parametrize("change", ALTERED.values(), ids=ALTERED)
def test_a_task_that_was_altered_is_refused(change: Callable[[RecordDict], RecordDict], world: World) -> None:
    with pytest.raises(ProtocolError):
        check(world, change(signed_task(world)))


OTHERS = {
    "another run": replace(ASKED, run="18"),
    "another site": replace(ASKED, node=8),
    "another figure": replace(ASKED, settings={**SETTINGS, "privacy.epsilon": 9.0}),
    "another type": replace(ASKED, settings={**SETTINGS, "rounds": 2.0}),
    "a truth value for a number": replace(ASKED, settings={**SETTINGS, "head.train": 1}),
    "a text for a number": replace(ASKED, settings={**SETTINGS, "rounds": "2"}),
    "a setting more": replace(ASKED, settings={**SETTINGS, "seed": 1}),
    "a setting less": replace(ASKED, settings={"rounds": 2}),
    "a value under another name": replace(ASKED, settings={**SETTINGS, "strategy": "x", "y": "fed-sb"}),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_a_task_for_another_run_site_or_settings_is_refused(other: Asked, world: World) -> None:
    with pytest.raises(ProtocolError, match="not of this message, run, site and settings"):
        check(world, signed_task(world, other))


def test_each_attempt_at_a_sum_is_signed_for_itself(world: World) -> None:
    record, again = (encode_task(KeyTask("17", 3, attempt)) for attempt in (0, 1))
    sign_task(record, ASKED, *read_tasks_key(world.server.path))
    fields = record.config_records["header"]
    moved = header(again, nonce=fields["nonce"], signature=fields["signature"], certificate=fields["certificate"])
    check(world, record)
    with pytest.raises(ProtocolError, match="not of this message"):
        check(world, moved)


@pytest.mark.parametrize("lost", ["signature", "certificate"])
@pytest.mark.parametrize("wrong", [None, "text", 7, True])
def test_a_task_without_signature_or_certificate_is_refused(lost: str, wrong: Any, world: World) -> None:
    with pytest.raises(ProtocolError, match="not signed"):
        check(world, header(signed_task(world), **{lost: wrong}))
    with pytest.raises(ProtocolError):
        check(world, header(signed_task(world), **{lost: b""}))


def test_only_a_certificate_that_signs_tasks_of_this_authority_does(world: World) -> None:
    """A registered site, another federation, the server's TLS key, and the authority itself sign in vain."""

    def under(issued: Issued) -> RecordDict:
        record = signed_task(world)
        return header(record, certificate=signed.certificate_der(issued.certificate))

    with pytest.raises(ProtocolError, match="none of this federation's authority"):
        check(world, signed_task(world, folder=world.others.path))
    authority = world.authority()
    for issued in (new_server_certificate(["127.0.0.1"], authority), new_authority("x"), authority):
        with pytest.raises(ProtocolError, match="certificate"):
            check(world, under(issued))
    own = new_task_certificate(authority)
    with pytest.raises(ProtocolError, match="not of this message"):
        check(world, under(own))  # of another key than the one that signed
    # Planted: whoever takes any certificate of the authority takes the TLS server's.
    (folder := world.site.parent / "tls").mkdir(exist_ok=True)
    server = new_server_certificate(["127.0.0.1"], authority)
    (folder / TASKS).write_bytes(own.key + server.certificate)
    with pytest.raises(ProtocolError, match="not one that signs tasks"):
        check(world, signed_task(world, folder=folder))


def test_a_certificate_that_signs_tasks_serves_no_tls(world: World, tmp_path: Path) -> None:
    made = new_task_certificate(world.authority())
    (tmp_path / "tasks.crt").write_bytes(made.certificate)
    words = ["openssl", "verify", "-CAfile", str(world.server.path / "ca.crt")]
    for purpose, fits in (("sslserver", False), ("sslclient", False), ("any", True)):
        done = subprocess.run(
            [*words, "-purpose", purpose, str(tmp_path / "tasks.crt")], capture_output=True, check=False
        )
        assert (done.returncode == 0) is fits, (purpose, done.stdout, done.stderr)


def test_a_certificate_holds_from_its_first_to_its_last_day(world: World) -> None:
    record = signed_task(world)
    for days, holds in ((-1, False), (0, True), (396, True), (398, False)):
        now = datetime.now(UTC) + timedelta(days=days)
        if holds:
            check(world, record, now=now)
        else:
            with pytest.raises(ProtocolError, match="fedveil server renew"):
                check(world, record, now=now)


# Answers.


def answered(world: World, task: bytes = b"\7" * 32, **changes: Any) -> RecordDict:
    record = encode_reply(replace(ANSWER, **changes))
    sign_answer(record, task, world.keys)
    return record


def result(world: World, task: bytes = b"\7" * 32) -> RecordDict:
    record = encode_reply(TrainResult("17", 3, "clinic", 50, TASK.state, None))
    sign_answer(record, task, world.keys)
    return record


def test_an_answer_is_taken_as_it_was_signed_over_its_task(world: World) -> None:
    for record in (answered(world), result(world)):
        assert is_answer(record, b"\7" * 32, world.public)
        assert not is_answer(record, b"\x08" * 32, world.public), "an answer to another task, or an earlier one"


@pytest.mark.parametrize("change", ALTERED.values(), ids=ALTERED)
def test_an_answer_that_was_altered_is_not_taken(change: Callable[[RecordDict], RecordDict], world: World) -> None:
    assert not is_answer(change(result(world)), b"\7" * 32, world.public)


def test_an_answer_by_another_key_without_a_signature_or_with_the_tasks_own_is_not_taken(world: World) -> None:
    stranger = make_site(world.site.parent / "ward", "ward", "127.0.0.1", policy="").path
    keys = SiteKeys.read(world.server.path / "ca.crt", stranger / "node.key")
    forged = encode_reply(ANSWER)
    sign_answer(forged, b"\7" * 32, keys)
    assert is_answer(forged, b"\7" * 32, (stranger / "node.pub").read_bytes())
    assert not is_answer(forged, b"\7" * 32, world.public)
    for wrong in (None, b"", "text", 1, bytes(104)):
        assert not is_answer(header(answered(world), signature=wrong), b"\7" * 32, world.public)
    for public in (b"", b"ecdsa-sha2-nistp384 AAAA clinic", b"no key"):
        assert not is_answer(answered(world), b"\7" * 32, public)
    task = signed_task(world)
    assert not is_answer(task, digest(ASKED.task(task)), world.public)


@pytest.mark.parametrize("odd", [{"shape": (1 << 70,)}, {"shape": "x"}, {"stype": "\ud800"}, {"dtype": None}])
def test_whatever_a_peer_writes_into_a_message_is_no_answer_and_no_error(odd: dict[str, Any], world: World) -> None:
    record = result(world)
    for name, value in odd.items():
        record.array_records["adapter"]["state"].__dict__[name] = value
    assert not is_answer(record, b"\7" * 32, world.public)
    assert not is_answer(header(result(world), protocol=1 << 63), b"\7" * 32, world.public)


# The server's folder.


def test_a_server_does_not_start_with_a_key_that_sites_refuse(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start.os, "execve", lambda *_: pytest.fail("it starts"))
    monkeypatch.setattr(start, "require_system_entropy", lambda: None)
    server = make_server(tmp_path / "server", ["127.0.0.1"])
    own, path = (server.path / TASKS).read_bytes(), server.path / TASKS
    assert path.stat().st_mode & 0o777 == 0o600
    key, mark, certificate = own.partition(CERTIFICATE)
    others = (world.others.path / TASKS).read_bytes().partition(CERTIFICATE)
    for content in (b"", key, mark + certificate, others[0] + mark + certificate, b"".join(others)):
        path.write_bytes(content)
        with pytest.raises(DataError, match="fedveil server renew"):
            start.start_server(server, lambda line: None)
    path.unlink()
    with pytest.raises(DataError, match="fedveil server renew"):
        start.start_server(server, lambda line: None)
    renew_server(server)
    check_tasks(server.path)
    assert path.read_bytes() != own, "the renewal leaves the key that signs tasks to expire"


def test_what_signs_is_found_by_the_folder_that_the_superlink_names(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(FOLDER, raising=False)
    assert signing_of("17", SETTINGS) is None
    monkeypatch.setenv(FOLDER, str(tmp_path))
    with pytest.raises(DataError, match="the key that signs tasks cannot be read"):
        signing_of("17", SETTINGS)
    monkeypatch.setenv(FOLDER, str(world.server.path))
    signing = signing_of("17", SETTINGS)
    assert signing is not None
    record = encode_task(TASK)
    assert signing.sign(record, 7) == check(world, record)


# The site.


@pytest.fixture
def site(toy_settings: dict[str, Any], tmp_path: Path) -> OneSite:
    return clinic(toy_settings, tmp_path)


def asked_by(world: World, site: OneSite, record: RecordDict, keys: SiteKeys | None = None) -> Message:
    """Return a site's answer to a task, as the worker gives it."""
    metadata = Metadata(RUN_ID, "", 1, NODE_ID, "", "1", 1e9, 6e9, "train")
    context = Context(RUN_ID, NODE_ID, {}, RecordDict(), dict(site.settings), 0)
    installed.process.keep_lookout(None, signed=True)
    return worker.reply_to(make_message(metadata, record), context, own_bundle(), site.node, keys or world.keys)


def task_of(world: World, site: OneSite, **changes: Any) -> tuple[RecordDict, bytes]:
    record, asked = encode_task(site.task()), Asked(str(RUN_ID), site.settings, NODE_ID)
    return record, sign_task(record, replace(asked, **changes), *read_tasks_key(world.server.path))


def test_a_site_trains_what_the_server_asks_of_it_and_signs_what_it_answers(world: World, site: OneSite) -> None:
    record, task = task_of(world, site)
    reply = asked_by(world, site, record)
    assert is_answer(reply.content, task, world.public)
    assert site.charges() == [("1", 1, "training")]


FORGED: dict[str, Callable[[World, OneSite], RecordDict]] = {
    "not signed": lambda _, site: encode_task(site.task()),
    "signed by a registered site": lambda world, site: by_a_site(world, site),
    "of another federation": lambda world, site: by(world.others.path, site),
    "for another site": lambda world, site: task_of(world, site, node=8)[0],
    "of another run": lambda world, site: task_of(world, site, run="2")[0],
    "of other settings": lambda world, site: task_of(world, site, settings={**site.settings, "rounds": 9})[0],
    "another round": lambda world, site: body_with(task_of(world, site)[0], 1, 9),
    "other numbers": lambda world, site: altered_numbers(task_of(world, site)[0]),
}


def by(folder: Path, site: OneSite) -> RecordDict:
    record = encode_task(site.task())
    sign_task(record, Asked(str(RUN_ID), site.settings, NODE_ID), *read_tasks_key(folder))
    return record


def by_a_site(world: World, site: OneSite) -> RecordDict:
    """Return a task with the server's certificate, which every site has seen, and a site's own signature."""
    record, _ = task_of(world, site)
    sign_answer(record, b"", world.keys)
    return record


def altered_numbers(record: RecordDict) -> RecordDict:
    data = data_of(record)
    return block_with(record, data=data[:-4] + b"\0\0\x80\x3f")


@pytest.mark.parametrize("forged", FORGED.values(), ids=FORGED)
def test_a_forged_task_is_refused_before_anything_is_read_loaded_or_charged(
    forged: Callable[[World, OneSite], RecordDict],
    world: World,
    site: OneSite,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    record = forged(world, site)
    opened: list[object] = []
    for module, name in (
        (worker, "bundle_digest"),
        (worker, "policy_of"),
        (site_process, "open_site"),
        (SiteProcess, "model_of"),
    ):
        honest = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *words, own=honest, **more: opened.append(own) or own(*words, **more))
    with caplog.at_level(logging.WARNING, "fedveil.site"):
        reply = asked_by(world, site, record)
    refused = decode_reply(reply.content, {}, "1", record_round(record))
    assert isinstance(refused, Refusal)
    assert refused.kind == "task"
    assert not opened, "something was opened for a task that is not the server's"
    assert not site.charges()
    assert not site.ledger.exists()
    assert "refused (task): the task's" in caplog.text or "refused (task): the task is not signed" in caplog.text


def record_round(record: RecordDict) -> int:
    packed = record.config_records["header"]["body"]
    assert isinstance(packed, bytes)
    return packed[1]


def test_a_site_that_checks_nothing_pays_for_a_forged_task(world: World, site: OneSite, monkeypatch: Any) -> None:
    """The planted fault."""
    monkeypatch.setattr(worker, "check_task", lambda *_: None)
    asked_by(world, site, FORGED["signed by a registered site"](world, site))
    assert site.charges() == [("1", 1, "training")]


def test_a_refusal_is_signed_over_its_task_as_any_answer(world: World, site: OneSite) -> None:
    site.rule(bundles=["0" * 64])
    record, task = task_of(world, site)
    reply = asked_by(world, site, record)
    assert isinstance(decode_reply(reply.content, {}, "1", 1), Refusal)
    assert is_answer(reply.content, task, world.public)
    forged = FORGED["for another site"](world, site)
    told = asked_by(world, site, forged).content
    assert not is_answer(told, task, world.public), "the refusal of a forged task serves for the server's"


def test_a_worker_of_a_site_s_folder_takes_no_task_that_nobody_signed(world: World, site: OneSite) -> None:
    """Through the Runtime API, and with the keys that the worker's command names."""
    folder = make_site(
        *(site.ledger.parent / "folder", "clinic", "127.0.0.1"), policy="", authority=world.server.path / "ca.crt"
    )
    command = worker_command(folder, Path("secret"))
    told = dict(zip(command[4::2], command[5::2], strict=True))
    keys = SiteKeys.read(Path(told["--authority"]), Path(told["--key"]))
    with runtime_api() as api:
        for record, charged in ((encode_task(site.task()), 0), (task_of(world, site)[0], 1)):
            api.give(record, own_bundle(), site.settings, {})
            with closing(OneTask(api.port, SECRET)) as node:
                worker.work(node, site.node, keys)
            public = (folder.path / "node.pub").read_bytes()
            assert is_answer(api.reply().content, task_digest(record, site), public)
            assert len(site.charges()) == charged


def task_digest(record: RecordDict, site: OneSite) -> bytes:
    return digest(Asked(str(RUN_ID), site.settings, NODE_ID).task(record))


def test_a_worker_without_its_keys_does_not_begin(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(worker, "write_no_dumps", lambda: None)
    monkeypatch.setattr(worker, "require_system_entropy", lambda: None)
    monkeypatch.setattr(
        logging.getLogger("fedveil"), "propagate", True
    )  # which the worker sets, for all tests after it
    monkeypatch.setattr(worker.log, "error", lambda line, *words, **_: said.append(line % words))
    monkeypatch.setattr(worker, "work", lambda *_: pytest.fail("it begins"))
    (tmp_path / "empty").touch()
    good = {"--authority": world.server.path / "ca.crt", "--key": world.site / "node.key"}
    for option in good:
        for wrong in (tmp_path / "gone", tmp_path / "empty", world.site / "node.pub"):
            files = [str(word) for pair in {**good, option: wrong}.items() for word in pair]
            monkeypatch.setattr(sys, "argv", ["worker", "--port", "1", "--secret", "x", "--node", "{}", *files])
            assert worker.main() == 1
            assert "cannot be read: restore them" in said.pop()
    monkeypatch.setattr(sys, "argv", ["worker", "--port", "1", "--secret", "x", "--node", "{}"])
    with pytest.raises(SystemExit):
        worker.main()


DRAWN = {"privacy.mode": "client-level", "privacy.unit": "site", "privacy.cohort": 60, "privacy.site-rate": 0.5}


def test_sites_whose_draw_is_a_secret_are_drawn_by_signed_tasks_alone(
    toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = {**toy_settings, **DRAWN, "privacy.epsilon": 1e6}
    for rate, refused in ((0.5, True), (1.0, False)):
        config = configure({**whole, "privacy.site-rate": rate}).config
        if refused:
            with pytest.raises(PolicyRefusal, match=r"privacy\.site-rate = 0\.5 counts on nobody knowing"):
                signed.check_unsigned(config)
        else:
            signed.check_unsigned(config)
    site = clinic({**whole, "privacy.site-rate": 0.5}, tmp_path)
    site.rule(mechanisms=["client-level"])
    monkeypatch.setattr(installed, "process", SiteProcess())
    told = site.ask(site.task())
    assert isinstance(told, Refusal)
    assert "nobody signs" in told.reason
    installed.process.keep_lookout(None, signed=True)
    taken = site.ask(site.task())
    assert isinstance(taken, TrainResult), taken


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


def transport(world: World, grid: Grid, monkeypatch: pytest.MonkeyPatch, *, signs: bool = True) -> FlowerTransport:
    monkeypatch.setattr(server_app, "POLL_SECONDS", 0.01)
    for name in ("_run_id", "_node_id", "_task_id"):  # as in a process that Flower has started
        monkeypatch.setattr(TaskIdentity, name, 1)
    monkeypatch.setenv(NODES, str(world.server.nodes))
    monkeypatch.setenv(FOLDER, str(world.server.path))
    job = SimpleNamespace(strategy=SimpleNamespace(chooses=lambda: False), config=SimpleNamespace())
    folder = SimpleNamespace(progress=lambda _: None, shown=Shown(1, "record", 0))
    model = SimpleNamespace(reply_layout=lambda _: {"l": {"A": (2, 2)}})
    signing = signing_of("17", SETTINGS) if signs else None
    return FlowerTransport(cast(Any, grid), cast(Any, job), cast(Any, model), cast(Any, folder), signing)


def honest(world: World) -> Callable[[Message], list[Message]]:
    def answer(message: Message) -> list[Message]:
        record = encode_reply(TrainResult("17", 3, "clinic", 50, TASK.state, None))
        sign_answer(record, digest(ASKED.task(message.content)), world.keys)
        return [Message(record, reply_to=message)]

    return answer


def forged(message: Message) -> list[Message]:
    return [Message(encode_reply(replace(ANSWER, reason="I am the clinic")), reply_to=message)]


def broken(_: Message) -> list[Message]:
    raise IndexError  # as of Flower's for bytes that are no message


def replayed(world: World) -> Callable[[Message], list[Message]]:
    record = result(world)
    return lambda message: [Message(record, reply_to=message)]


@pytest.mark.parametrize("kind", ["forged", "replayed", "broken"])
def test_a_forged_answer_is_logged_and_does_not_displace_the_site_s_own(
    kind: str, world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lie = {"forged": forged, "replayed": replayed(world), "broken": broken}[kind]
    grid = Grid(lie, honest(world))
    with caplog.at_level(logging.WARNING, "fedveil.server"):
        replies = transport(world, grid, monkeypatch).exchange({7: TASK}, 20.0).replies
    assert isinstance(replies[7], TrainResult), replies
    assert "not taken for the answer of clinic, it may be forged" in caplog.text
    assert len(grid.pushed) == 2
    nonces = {message.content.config_records["header"]["nonce"] for message in grid.pushed}
    assert len(nonces) == 2, "whoever saw the first task could name the second"


def test_a_site_that_is_forged_twice_is_absent_and_asked_no_third_time(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = Grid(forged, forged)
    replies = transport(world, grid, monkeypatch).exchange({7: TASK}, 20.0).replies
    told = replies[7]
    assert isinstance(told, Refusal)
    assert (told.kind, told.reason.partition(":")[0]) == ("failed", "unsigned")
    assert "I am the clinic" not in told.reason
    assert len(grid.pushed) == 2


def test_a_server_that_checks_nothing_takes_the_forged_answer(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault."""
    replies = transport(world, Grid(forged), monkeypatch, signs=False).exchange({7: TASK}, 20.0).replies
    assert replies[7] == replace(ANSWER, reason="I am the clinic")


def test_an_error_of_flower_s_is_no_site_s_word_and_leaves_it_out_as_unsigned(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = Grid(lambda message: [Message(Error(3, "the SuperNode says so"), reply_to=message)])
    told = transport(world, grid, monkeypatch).exchange({7: TASK}, 20.0).replies[7]
    assert isinstance(told, Refusal)
    assert (told.kind, told.reason) == ("failed", "unsigned: the SuperNode says so")
    assert len(grid.pushed) == 1


def test_a_node_that_nobody_registered_is_told_so(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = Grid(honest(world), honest(world))
    told = transport(world, grid, monkeypatch).exchange({8: TASK}, 20.0).replies[8]
    assert isinstance(told, Refusal)
    assert "fedveil server register" in told.reason


@pytest.mark.parametrize("signs", [True, False], ids=["signed", "planted: nobody signs"])
def test_a_registered_site_that_knows_every_name_makes_nobody_pay_and_speaks_for_nobody(
    signs: bool,
    world: World,
    site: OneSite,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """At Flower's own state of a SuperLink: a task in the server's name, and an answer before the victim's own."""
    link = Link(monkeypatch)
    victim, own, run = link.join(), link.join(), str(link.run)
    (tmp_path / "clinic.pub").write_bytes(world.public)
    (tmp_path / "clinic.id").write_text(str(victim.own))
    monkeypatch.setattr(server_app, "POLL_SECONDS", 0.02)
    monkeypatch.setenv(NODES, str(tmp_path))
    monkeypatch.setenv(FOLDER, str(world.server.path))
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
        return worker.reply_to(message, context, own_bundle(), site.node, world.keys if signs else None).content

    job = SimpleNamespace(strategy=SimpleNamespace(chooses=lambda: False), config=SimpleNamespace())
    folder = SimpleNamespace(progress=lambda _: None, shown=Shown(1, "record", 0))
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

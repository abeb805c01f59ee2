"""A site that takes signed tasks alone, and a server that takes signed answers alone."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bundles import own_bundle
from flwr.app import Context, Message, RecordDict
from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from runtime_api import NODE_ID, RUN_ID, SECRET, OneTask, runtime_api
from signed_tasks import World, block_with, body_with, data_of

from audits.tiny_site import OneSite, clinic
from fedveil.client import app as installed
from fedveil.client import process as site_process
from fedveil.client import worker
from fedveil.client.process import SiteProcess
from fedveil.common.errors import PolicyRefusal
from fedveil.common.messages import signed
from fedveil.common.messages.round import Refusal, TrainResult
from fedveil.common.messages.signed import Asked, SiteKeys, digest, is_answer, sign_answer, sign_task
from fedveil.common.messages.wire import decode_reply, encode_task
from fedveil.deploy.commands import worker_command
from fedveil.deploy.site_folder import make_site
from fedveil.server.signing import read_tasks_key
from fedveil.strategies.job import configure

pytestmark = pytest.mark.usefixtures("fresh_process")


# The site.
def asked_by(parties: World, site: OneSite, record: RecordDict, keys: SiteKeys | None = None) -> Message:
    """Return a site's answer to a task, as the worker gives it."""
    metadata = Metadata(RUN_ID, "", 1, NODE_ID, "", "1", 1e9, 6e9, "train")
    context = Context(RUN_ID, NODE_ID, {}, RecordDict(), dict(site.settings), 0)
    installed.process.keep_lookout(None, signed=True)
    return worker.reply_to(make_message(metadata, record), context, own_bundle(), site.node, keys or parties.keys)


def task_of(parties: World, site: OneSite, **changes: Any) -> tuple[RecordDict, bytes]:
    record, asked = encode_task(site.task()), Asked(str(RUN_ID), site.settings, NODE_ID)
    return record, sign_task(record, replace(asked, **changes), *read_tasks_key(parties.server.path))


def test_a_site_trains_what_the_server_asks_of_it_and_signs_what_it_answers(parties: World, site: OneSite) -> None:
    record, task = task_of(parties, site)
    reply = asked_by(parties, site, record)
    assert is_answer(reply.content, task, parties.public)
    assert site.charges() == [("1", 1, "training")]


FORGED: dict[str, Callable[[World, OneSite], RecordDict]] = {
    "not signed": lambda _, site: encode_task(site.task()),
    "signed by a registered site": lambda parties, site: by_a_site(parties, site),
    "of another federation": lambda parties, site: by(parties.others.path, site),
    "for another site": lambda parties, site: task_of(parties, site, node=8)[0],
    "of another run": lambda parties, site: task_of(parties, site, run="2")[0],
    "of other settings": lambda parties, site: task_of(parties, site, settings={**site.settings, "rounds": 9})[0],
    "another round": lambda parties, site: body_with(task_of(parties, site)[0], 1, 9),
    "other numbers": lambda parties, site: altered_numbers(task_of(parties, site)[0]),
}


def by(folder: Path, site: OneSite) -> RecordDict:
    record = encode_task(site.task())
    sign_task(record, Asked(str(RUN_ID), site.settings, NODE_ID), *read_tasks_key(folder))
    return record


def by_a_site(parties: World, site: OneSite) -> RecordDict:
    """Return a task with the server's certificate, which every site has seen, and a site's own signature."""
    record, _ = task_of(parties, site)
    sign_answer(record, b"", parties.keys)
    return record


def altered_numbers(record: RecordDict) -> RecordDict:
    data = data_of(record)
    return block_with(record, data=data[:-4] + b"\0\0\x80\x3f")


@pytest.mark.parametrize("forged", FORGED.values(), ids=FORGED)
def test_a_forged_task_is_refused_before_anything_is_read_loaded_or_charged(
    forged: Callable[[World, OneSite], RecordDict],
    parties: World,
    site: OneSite,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    record = forged(parties, site)
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
        reply = asked_by(parties, site, record)
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


def test_a_site_that_checks_nothing_pays_for_a_forged_task(parties: World, site: OneSite, monkeypatch: Any) -> None:
    """The planted fault."""
    monkeypatch.setattr(worker, "check_task", lambda *_: None)
    asked_by(parties, site, FORGED["signed by a registered site"](parties, site))
    assert site.charges() == [("1", 1, "training")]


def test_a_refusal_is_signed_over_its_task_as_any_answer(parties: World, site: OneSite) -> None:
    site.rule(bundles=["0" * 64])
    record, task = task_of(parties, site)
    reply = asked_by(parties, site, record)
    assert isinstance(decode_reply(reply.content, {}, "1", 1), Refusal)
    assert is_answer(reply.content, task, parties.public)
    forged = FORGED["for another site"](parties, site)
    told = asked_by(parties, site, forged).content
    assert not is_answer(told, task, parties.public), "the refusal of a forged task serves for the server's"


def test_a_worker_of_a_site_s_folder_takes_no_task_that_nobody_signed(parties: World, site: OneSite) -> None:
    """Through the Runtime API, and with the keys that the worker's command names."""
    folder = make_site(
        *(site.ledger.parent / "folder", "clinic", "127.0.0.1"), policy="", authority=parties.server.path / "ca.crt"
    )
    command = worker_command(folder, Path("secret"))
    told = dict(zip(command[4::2], command[5::2], strict=True))
    keys = SiteKeys.read(Path(told["--authority"]), Path(told["--key"]))
    with runtime_api() as api:
        for record, charged in ((encode_task(site.task()), 0), (task_of(parties, site)[0], 1)):
            api.give(record, own_bundle(), site.settings, {})
            with closing(OneTask(api.port, SECRET)) as node:
                worker.work(node, site.node, keys)
            public = (folder.path / "node.pub").read_bytes()
            assert is_answer(api.reply().content, task_digest(record, site), public)
            assert len(site.charges()) == charged


def task_digest(record: RecordDict, site: OneSite) -> bytes:
    return digest(Asked(str(RUN_ID), site.settings, NODE_ID).task(record))


def test_a_worker_without_its_keys_does_not_begin(
    parties: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    good = {"--authority": parties.server.path / "ca.crt", "--key": parties.site / "node.key"}
    for option in good:
        for wrong in (tmp_path / "gone", tmp_path / "empty", parties.site / "node.pub"):
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


@pytest.mark.parametrize("rate", [0.5, 1.0])
def test_the_size_of_a_task_tells_of_no_secret_draw(rate: float, toy_settings: dict[str, Any]) -> None:
    frozen = {**toy_settings, **DRAWN, "privacy.site-rate": rate, "privacy.epsilon": 1e6, "strategy": "ffa-lora"}
    job = configure(frozen)
    model = job.model(("bad", "good"))
    state = job.strategy.downlink(job.start(model.start))
    assert bool(job.lasting(1, state, {})) == (rate == 1), "a task names what its site has from rounds it was drawn for"

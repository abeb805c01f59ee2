"""A site runs its own code: the worker against the Runtime API of the pinned Flower, and what it leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from bundles import own_bundle
from flwr.app import Context, Message, RecordDict
from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import ErrorCode
from flwr.supercore.heartbeat import HeartbeatSender
from runtime_api import SECRET, OneTask, RuntimeApi, runtime_api

from audits.tiny_models import TARGETS
from audits.tiny_site import OneSite, clinic
from fedveil.client import app as installed
from fedveil.client import lookout, runtime, worker
from fedveil.client.leftovers import tensors_digest
from fedveil.client.local_training import train_round
from fedveil.client.outgoing import UNTOLD
from fedveil.client.process import SiteProcess
from fedveil.common import runtime as flower
from fedveil.common.bundle import PROJECT, bundle_digest, files_of, own_digest
from fedveil.common.messages.round import Refusal, TrainResult
from fedveil.common.messages.wire import decode_reply, encode_task

pytestmark = [pytest.mark.slow, pytest.mark.rough_prices, pytest.mark.usefixtures("fresh_process")]

FLWR_CLIENTAPP = Path(sys.executable).parent / "flwr-clientapp"


@pytest.fixture
def api() -> Iterator[RuntimeApi]:
    with runtime_api() as served:
        yield served


def work(api: RuntimeApi, site: OneSite, secret: bytes = SECRET) -> int:
    with closing(OneTask(api.port, secret)) as node:
        return worker.work(node, site.node)


def acquired(port: int, secret: bytes) -> str:
    """Return the token of the task that a node gives out, if it does."""
    with closing(runtime.Node(port, secret)) as node:
        return node.acquire()


def answered(api: RuntimeApi, site: OneSite) -> TrainResult | Refusal:
    layout = {
        layer: {name: tuple(tensor.shape) for name, tensor in factors.items()}
        for layer, factors in site.model().trained().items()
    }
    return decode_reply(api.reply().content, layout, "1", 1)


def test_the_installed_client_answers_and_the_node_keeps_what_it_must_remember(api: RuntimeApi, site: OneSite) -> None:
    for _ in range(2):
        api.give(encode_task(site.task()), own_bundle(), site.settings, {})
        assert work(api, site) == flower.NODE_TOO
        assert isinstance(answered(api, site), TrainResult)
        assert site.charges() == [("1", 1, "training")], "what was kept did not come back: the same task was paid twice"
        assert "kept" in api.kept()


def test_whose_policy_records_and_ledger_is_the_folder_s_word_and_not_the_node_s(
    api: RuntimeApi, site: OneSite, tmp_path: Path
) -> None:
    lax = tmp_path / "lax.toml"
    lax.write_text("allow-no-privacy = true\n")
    site.rule(max_rounds=1)
    others = {"site": "ward", "policy": str(lax), "ledger": str(tmp_path / "other.sqlite"), "data": "/etc/passwd"}
    api.give(encode_task(site.task()), own_bundle(), site.settings | {"privacy.mode": "none"}, others)
    work(api, site)
    refused = answered(api, site)
    assert isinstance(refused, Refusal)
    assert (refused.site, refused.kind) == ("clinic", "policy")
    assert "allow-no-privacy = false" in refused.reason
    assert not (tmp_path / "other.sqlite").exists()


MARK = """
import pathlib
from flwr.clientapp import ClientApp
pathlib.Path({mark!r}).write_text("the bundle's code ran")
app = ClientApp()
"""


def foreign_bundle(mark: Path) -> bytes:
    """Return this version's bundle with another ``client/app.py``, which leaves a mark as soon as it is imported."""
    return own_bundle(client__app=MARK.format(mark=str(mark)))


def test_a_bundle_that_is_not_allowed_is_refused_by_its_hash_and_nothing_of_it_runs(
    api: RuntimeApi, site: OneSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark, home = tmp_path / "mark", tmp_path / "home"
    monkeypatch.setenv("FLWR_HOME", str(home))
    api.give(encode_task(site.task()), foreign_bundle(mark), site.settings, site.node)
    work(api, site)
    refused = answered(api, site)
    assert isinstance(refused, Refusal)
    assert refused.kind == "policy"
    asked = f"the site's policy has bundles = {own_digest()[:12]}; the run asks for"
    assert refused.reason.startswith(f"{asked} one of other files: run the same version")
    own = files_of(PROJECT)
    settings = own["pyproject.toml"].replace(b"[project]\n", b'[project]\nmaintainers = [{name = "a stranger"}]\n')
    other = build_fab_from_files(own | {"pyproject.toml": settings})[0]
    api.give(encode_task(site.task()), other, site.settings, site.node)
    work(api, site)
    refused = answered(api, site)
    assert isinstance(refused, Refusal)
    assert refused.reason.startswith(f"{asked} the bundle {bundle_digest(other)[:12]}: run the same")
    assert not site.charges()
    assert not mark.exists()
    assert not home.exists(), "something of the bundle was unpacked"


def test_the_refusal_of_a_bundle_is_of_the_run_that_is_resumed(api: RuntimeApi, site: OneSite, tmp_path: Path) -> None:
    resumed = {**site.settings, "resume": "77"}
    api.give(encode_task(site.task()), foreign_bundle(tmp_path / "mark"), resumed, site.node)
    work(api, site)
    assert isinstance(decode_reply(api.reply().content, {}, "77", 1), Refusal)


def test_a_bundle_that_the_policy_names_gives_settings_and_no_code(
    api: RuntimeApi, site: OneSite, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    site.rule(bundles=[bundle_digest(foreign_bundle(mark))])
    api.give(encode_task(site.task()), foreign_bundle(mark), site.settings, site.node)
    work(api, site)
    assert isinstance(answered(api, site), TrainResult)
    assert not mark.exists()
    api.give(encode_task(site.task()), own_bundle(), site.settings, site.node)
    work(api, site)
    assert isinstance(answered(api, site), Refusal), "a list of bundles must name the own one too, or refuse it"


def test_flower_s_own_way_runs_the_bundle_s_code_which_the_mark_shows(site: OneSite, tmp_path: Path) -> None:
    """The planted fault: the way before there was a worker."""
    mark = tmp_path / "mark"
    with runtime_api(secret=None) as api:
        api.give(encode_task(site.task()), foreign_bundle(mark), site.settings, site.node)
        token = acquired(api.port, b"any")
        words = ["--insecure", "--runtime-api-address", f"127.0.0.1:{api.port}", "--token", token]
        env = {**os.environ, "FLWR_HOME": str(tmp_path / "home"), "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1"}
        subprocess.run([str(FLWR_CLIENTAPP), *words], env=env, capture_output=True, timeout=120, check=False)
    assert mark.exists(), "the bundle's code did not run: the tests above would pass whatever the worker does"


def test_without_the_site_s_secret_nobody_gets_a_task(api: RuntimeApi, site: OneSite) -> None:
    api.give(encode_task(site.task()), own_bundle(), site.settings, site.node)
    assert work(api, site, secret=b"guessed") == flower.NODE_TOO
    assert api.waiting() == 1
    with runtime_api(secret=None) as open_to_all:
        open_to_all.give(encode_task(site.task()), own_bundle(), site.settings, site.node)
        assert acquired(open_to_all.port, b"guessed"), "planted: without a secret it hands tasks to anyone"


def test_a_node_that_another_user_of_the_machine_plays_gets_no_answer(
    api: RuntimeApi, site: OneSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.give(encode_task(site.task()), own_bundle(), site.settings, site.node)
    monkeypatch.setattr(runtime, "is_own_port", lambda port: False)
    assert work(api, site) == flower.NODE_TOO
    assert not site.charges()


def test_whose_port_it_is_is_what_the_system_says(tmp_path: Path) -> None:
    row = "   0: {}:{:04X} 00000000:0000 {} 00000000:00000000 00:00000000 00000000  {}        0 1\n"
    table = tmp_path / "tcp"
    for port in (0x2386, 0x401, 0xBEEF):  # the kernel writes four digits, in capitals
        for rows, own in (
            ([("0100007F", port, "0A", os.getuid())], True),
            ([("0100007F", port, "0A", os.getuid() + 1)], False),
            ([("0100007F", port, "0A", os.getuid()), ("0100007F", port, "01", os.getuid() + 1)], True),
            ([("0100007F", port, "0A", os.getuid()), ("0100007F", port, "0A", os.getuid() + 1)], False),
            ([("0100007F", port + 1, "0A", os.getuid())], False),
            ([("00000000", port, "0A", os.getuid())], False),
            ([], False),
        ):
            table.write_text("head\n" + "".join(row.format(*values) for values in rows))
            assert runtime.is_own_port(port, table) is own, rows
    assert runtime.is_own_port(0x2386, tmp_path / "none"), "where there is no Linux no site would get a task"


def answer_of(code: int) -> httpx.HTTPStatusError:
    """Return the error of an answer with this status."""
    return httpx.HTTPStatusError("", request=httpx.Request("POST", "http://node"), response=httpx.Response(code))


class FakeClient:
    """What a node's client is to a worker; each call but a sign of life is written down, and fails as a test says."""

    def __init__(self, **fails: Exception) -> None:
        self.fails, self.called, self.beaten = fails, list[str](), threading.Event()
        self.answers = {
            "AcquireTask": SimpleNamespace(token="one"),
            "SendTaskHeartbeat": SimpleNamespace(success=True),
            "PullMessages": SimpleNamespace(messages_list=[]),
        }

    def __getattr__(self, name: str) -> Callable[..., SimpleNamespace | None]:
        return partial(self._answer, name)

    def _answer(self, name: str, *_: object) -> SimpleNamespace | None:
        if name == "SendTaskHeartbeat":
            self.beaten.set()
        else:
            self.called.append(name)
        if name in self.fails:
            raise self.fails[name]
        return self.answers.get(name)


@pytest.fixture
def fake_node(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[runtime.Node, FakeClient]]:
    def make(**fails: Exception) -> tuple[runtime.Node, FakeClient]:
        client = FakeClient(**fails)
        monkeypatch.setattr(runtime.Node, "_connect", lambda *_: client)
        monkeypatch.setattr(runtime, "is_own_port", lambda _: True)
        return runtime.Node(1, SECRET), client

    return make


def test_a_node_that_has_an_error_of_its_own_is_asked_again_and_one_that_knows_us_not_is_left(
    fake_node: Callable[..., tuple[runtime.Node, FakeClient]],
) -> None:
    assert fake_node()[0].acquire() == "one"
    assert fake_node(AcquireTask=answer_of(500))[0].acquire() == ""
    for code in (401, 403):
        with pytest.raises(flower.NotOurNode, match="does not take the secret"):
            fake_node(AcquireTask=answer_of(code))[0].acquire()


def test_a_task_is_held_by_signs_of_life_that_end_with_it_however_it_ends(
    fake_node: Callable[..., tuple[runtime.Node, FakeClient]],
) -> None:
    """Signs that went on would be refused by and by, and end the worker in the middle of another task."""
    beats: list[HeartbeatSender] = []

    def fail(node: runtime.Node, client: FakeClient, error: Exception) -> None:
        with node.task("one") as task:
            assert client.beaten.wait(10), "the node never hears of the task again, and gives it up"
            beats.append(task.beat)
            raise error

    for raised, expected in (
        (answer_of(401), flower.TaskLost),
        (answer_of(403), flower.TaskLost),
        (answer_of(500), httpx.HTTPStatusError),
        (ValueError(), ValueError),
    ):
        node, client = fake_node()
        with pytest.raises(expected):
            fail(node, client, raised)
        assert not beats.pop().is_running
        assert client.called == ["close"]


def test_a_sign_of_life_that_is_refused_ends_the_process_and_one_that_is_lost_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def leave(code: int) -> None:
        raise SystemExit(code)

    def held(client: Any) -> bool:
        return flower._is_held(client, runtime._start_anew)

    monkeypatch.setattr(runtime.os, "_exit", leave)
    assert held(FakeClient())
    assert held(FakeClient(SendTaskHeartbeat=answer_of(500)))
    assert not held(FakeClient(SendTaskHeartbeat=httpx.ConnectError("")))
    given_up = FakeClient()
    given_up.answers["SendTaskHeartbeat"] = SimpleNamespace(success=False)
    for client in (given_up, *(FakeClient(SendTaskHeartbeat=answer_of(code)) for code in (401, 403))):
        with pytest.raises(SystemExit, match=str(flower.ANEW)):
            held(client)


def test_a_task_is_answered_for_only_once_its_message_is_there_and_beats_no_more_once_it_is_done(
    fake_node: Callable[..., tuple[runtime.Node, FakeClient]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that dies before it asked for the input leaves the task to the next one."""
    monkeypatch.setattr(runtime, "MESSAGE_SECONDS", 0.05)
    node, client = fake_node()
    with pytest.raises(runtime.LostMessage), node.task("one") as task:
        task.pull()
    assert set(client.called) == {"PullMessages", "close"}
    node, client = fake_node()
    beats: list[bool] = []
    monkeypatch.setattr(runtime, "push_message", lambda *_: beats.append(task.beat.is_running))
    monkeypatch.setattr(client, "PushTaskOutput", lambda _: beats.append(task.beat.is_running), raising=False)
    with node.task("one") as task:
        task.push(
            make_message(Metadata(1, "", 7, 1, "", "1", 0.0, 600.0, "train"), RecordDict()),
            Context(1, 7, {}, RecordDict(), {}, 0),
        )
    assert beats == [True, False]


@pytest.mark.parametrize("kind", ["evaluate", "train.other"])
def test_what_the_client_cannot_answer_is_told_in_one_constant_line(kind: str, api: RuntimeApi, site: OneSite) -> None:
    api.give(encode_task(site.task()), own_bundle(), site.settings, site.node, message_type=kind)
    work(api, site)
    reply = api.reply()
    assert reply.has_error()
    assert (reply.error.code, reply.error.reason) == (ErrorCode.CLIENT_APP_RAISED_EXCEPTION, UNTOLD)


def test_a_task_whose_message_another_worker_took_has_the_node_started_anew(
    api: RuntimeApi, site: OneSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "MESSAGE_SECONDS", 0.2)
    api.give(None, own_bundle(), site.settings, site.node)
    assert work(api, site) == flower.NODE_TOO
    assert not site.charges()


def test_a_node_that_is_not_there_is_waited_for() -> None:
    assert acquired(1, SECRET) == ""


def test_records_that_have_changed_are_read_by_a_process_of_their_own(
    api: RuntimeApi, site: OneSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookout, "LOOK_SECONDS", -1.0)
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        with Path(str(site.node["data"])).open("a") as file:
            file.write("one more,bad,nobody\n")

    monkeypatch.setattr(worker.time, "sleep", sleep)
    with closing(runtime.Node(api.port, SECRET)) as node:
        assert worker.work(node, site.node) == flower.ANEW
    assert len(slept) == 1


@pytest.mark.parametrize("planted", [False, True], ids=["honest", "a worker that drops nothing before a task"])
def test_a_server_that_keeps_a_task_waiting_keeps_no_deleted_record_in_use(
    planted: bool, api: RuntimeApi, site: OneSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, held = worker.reply_to, list[int]()

    def reply(*words: Any) -> Message:
        answer = honest(*words)
        held.append(len(installed.process.cache.records["clinic"].source.examples))
        path = Path(str(site.node["data"]))
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
        if len(held) == 1:
            api.give(encode_task(site.task(2)), own_bundle(), site.settings, site.node)
        return answer

    monkeypatch.setattr(worker, "reply_to", reply)
    if planted:
        look = lookout.Lookout.look
        monkeypatch.setattr(lookout.Lookout, "look", lambda own: look(own) and False)
    api.give(encode_task(site.task()), own_bundle(), site.settings, site.node)
    with closing(runtime.Node(api.port, SECRET)) as node:
        assert worker.work(node, site.node) == flower.ANEW, "its memory is not given back"
    assert held == ([40, 40] if planted else [40, 39]), "a task was answered from records that are gone"


def test_a_task_that_changes_what_is_frozen_is_the_last_of_its_process(
    api: RuntimeApi, site: OneSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = train_round
    weight = next(p for p in site.model().module.parameters() if not p.requires_grad)

    def leaves_something(*words: Any) -> TrainResult:
        result = honest(*words)
        weight.data.view(-1)[0] += 1e-6  # moves no version counter
        return result

    monkeypatch.setattr("fedveil.client.process.train_round", leaves_something)
    api.give(encode_task(site.task()), own_bundle(), site.settings, site.node)
    assert work(api, site) == flower.ANEW
    monkeypatch.setattr(SiteProcess, "is_clean", lambda own: True)
    api.give(encode_task(site.task(2)), own_bundle(), site.settings, site.node)
    assert work(api, site) == flower.NODE_TOO, "planted: a worker that does not look goes on to the next task"


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_private_rounds_leave_nothing_in_a_model_and_whatever_is_left_is_found(
    family: str,
    model_folder: Callable[[str], str],
    toy_settings: dict[str, Any],
    toy_generation: dict[str, Any],
    tmp_path: Path,
) -> None:
    settings = toy_settings if family == "bert" else toy_generation
    own = {"model.name": model_folder(family), "adapter.targets": TARGETS[family]}
    site = clinic({**settings, **own}, tmp_path)
    if family != "bert":
        site.node["data"], site.settings["data.labels"] = settings["data.name"], ""
    for number in (1, 2):
        site.train(number)
        assert installed.process.is_clean(), "an honest round must not cost a restart"
    model = installed.process.model
    assert model is not None
    changes: list[Callable[[], object]] = [
        lambda: setattr(model.module, "angles", torch.ones(3)),
        lambda: model.module.register_buffer("since", torch.zeros(2), persistent=False),
        lambda: next(iter(model.module.parameters())).data.mul_(1.0000001),
    ]
    before = tensors_digest(model.module)
    for change in changes:
        change()
        assert not installed.process.is_clean()
        after = tensors_digest(model.module)
        assert after != before
        before = after


def test_a_server_that_asks_with_ever_other_settings_does_not_fill_the_memory(site: OneSite) -> None:
    for seed in (45, 46, 47):
        site.settings["data.seed"] = seed
        site.train(run=str(seed))
        assert list(installed.process.cache.records) == ["clinic"]

"""A message that comes twice: answered from what was released, or paid for again; never free, never stale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from audits.tiny_site import OneSite
from fedveil.client.local_training import train_round
from fedveil.client.memory import Memory
from fedveil.common.errors import LackingTensors
from fedveil.common.messages.blocks import layout_of
from fedveil.common.messages.named import digests
from fedveil.common.messages.round import Refusal, TrainResult, TrainTask
from fedveil.common.messages.state import BASIS, HEAD, STATE, Place
from fedveil.common.messages.tensors import entries, scale
from fedveil.common.messages.wire import decode_task, encode_task

pytestmark = pytest.mark.rough_prices


def same(left: TrainResult, right: TrainResult) -> bool:
    """Return whether two results are equal in every field and bit for bit."""
    fields = replace(left, contribution={}) == replace(right, contribution={})
    pairs = zip(entries(left.contribution), entries(right.contribution), strict=True)
    return fields and all(a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in pairs)


def check_that_a_repeated_task_is_free_and_the_same(site: OneSite) -> None:
    first, charged = site.train(1), site.charges()
    again = site.train(1)
    assert site.charges() == charged, "the repeated task was charged"
    assert same(first, again), "the repeated task was answered with a new release"


def test_a_repeated_task_gets_the_kept_reply_and_touches_no_record(
    site: OneSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_that_a_repeated_task_is_free_and_the_same(site)

    def fail(*_: Any) -> Any:
        raise AssertionError("a record was touched")

    monkeypatch.setattr("fedveil.client.cache.RecordCache.prepare", fail)
    monkeypatch.setattr("fedveil.client.process.train_round", fail)
    site.train(1)


def test_a_site_that_recalls_nothing_is_found_out(site: OneSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedveil.client.memory.Memory.recall", lambda *_: None)
    with pytest.raises(AssertionError, match="was charged"):
        check_that_a_repeated_task_is_free_and_the_same(site)


def test_a_site_that_trains_again_without_paying_is_found_out(site: OneSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedveil.client.memory.Memory.recall", lambda *_: None)
    paid: list[bool] = []

    def free(one: Any, job: Any, *rest: Any) -> Any:
        if paid:
            one = replace(one, ledger_path=one.ledger_path.with_name("free.sqlite"))
        paid.append(True)
        return train_round(one, job, *rest)

    monkeypatch.setattr("fedveil.client.process.train_round", free)
    with pytest.raises(AssertionError, match="new release"):
        check_that_a_repeated_task_is_free_and_the_same(site)


def test_a_node_that_lost_its_memory_pays_again(site: OneSite) -> None:
    first = site.train(1)
    site.memory.clear()
    again = site.train(1)
    assert site.charges() == [("1", 1, "training")] * 2
    assert not same(first, again)
    assert first.spending is not None
    assert again.spending is not None
    assert again.spending.epsilon_total > first.spending.epsilon_total


def test_a_round_that_failed_after_its_charge_is_charged_again(site: OneSite, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("fedveil.client.local_training._local_steps", lambda *_: 1 / 0)
        reply = site.ask(site.task(1))
    assert isinstance(reply, Refusal)
    assert reply.kind == "failed"
    assert site.charges() == [("1", 1, "training")], "a round that fails after the charge stays charged"
    site.train(1)
    assert site.charges() == [("1", 1, "training")] * 2


def test_another_question_in_the_same_round_is_paid_for(site: OneSite) -> None:
    first = site.train(1)
    other = site.ask(site.task(1, change=lambda state: scale(state, 1.5)))
    assert isinstance(other, TrainResult)
    assert not same(first, other)
    assert len(site.charges()) == 2


@pytest.mark.parametrize("answered", [2, 4])
def test_a_task_of_an_earlier_round_is_refused_before_any_charge(site: OneSite, answered: int) -> None:
    site.train(answered)
    got = site.refuse(1)
    assert got.kind == "task"
    assert f"has answered round {answered}" in got.reason
    site.train(1, run="another-run")


def test_only_the_last_reply_is_kept(site: OneSite) -> None:
    site.train(1)
    keys, size = set(site.memory), sum(map(len, site.memory.values()))
    for round_number in (2, 3, 4):
        site.train(round_number)
    assert set(site.memory) == keys
    assert abs(sum(map(len, site.memory.values())) - size) < 100


def ask_for_fed_sb(site: OneSite, init: str) -> None:
    """Let the site's run start Fed-SB from a full gradient, so that B and A are sent once."""
    public = {"start.data": str(site.node["data"])} if init == "public-gradient" else {}
    site.settings |= {"strategy": "fed-sb", "adapter.start": init, **public}


def naming(task: TrainTask, *parts: str) -> TrainTask:
    """Return a task that names its frozen factors, or these parts, in place of sending them."""
    return replace(task, named=digests({part: getattr(task, part) for part in parts or (BASIS,)}))


def refused(site: OneSite, task: TrainTask) -> str:
    """Return the kind of the refusal that a task gets, with nothing charged."""
    before, reply = site.charges(), site.ask(task)
    assert isinstance(reply, Refusal), "the site took part"
    assert site.charges() == before, "a refused round was charged"
    return reply.kind


def test_wrong_factors_sent_once_are_not_kept_and_the_right_ones_are_taken_later(site: OneSite) -> None:
    ask_for_fed_sb(site, "public-gradient")
    task = site.task(1)
    wrong = replace(task, basis=scale(task.basis, 1.5))
    assert refused(site, wrong) == "task"
    assert refused(site, naming(wrong)) == "tensors", "wrong factors were kept"
    assert isinstance(site.ask(task), TrainResult)


def test_wrong_factors_do_not_replace_the_right_ones(site: OneSite) -> None:
    ask_for_fed_sb(site, "public-gradient")
    site.train(1)
    task = site.task(2)
    assert refused(site, replace(task, basis=scale(task.basis, 1.5))) == "task"
    assert isinstance(site.ask(naming(task)), TrainResult), "the node lost what it had"


def test_wrong_factors_in_round_0_are_refused_like_any(site: OneSite) -> None:
    ask_for_fed_sb(site, "dp-gradient")
    task, factors = site.task(0), site.task(1).basis
    assert refused(site, replace(task, basis=scale(factors, 1.5))) == "task"


def test_factors_sent_once_are_kept_once_and_do_not_make_a_task_another(site: OneSite) -> None:
    ask_for_fed_sb(site, "public-gradient")
    task = site.task(1)
    assert task.basis, "this strategy sends nothing once: the test tests nothing"
    first = site.ask(task)
    again = site.ask(naming(task))
    assert isinstance(first, TrainResult)
    assert isinstance(again, TrainResult)
    assert same(first, again)
    site.memory.clear()
    assert (refused(site, naming(task)), len(site.charges())) == ("tensors", 1)


LAYER = {"layer": {"B": torch.ones(3, 2)}}
OTHER = {"layer": {"B": torch.ones(4, 2)}}
ACKNOWLEDGED = TrainTask("run", 1, LAYER, {}, "", "", "")


def memory_of(task: TrainTask) -> dict[str, bytes]:
    """Return what a node keeps that has acknowledged all of a task."""
    kept: dict[str, bytes] = {}
    result = TrainResult(task.run, task.round_number, "site", 1, {}, None)
    Memory(kept).keep(task, result, {STATE: task.state, BASIS: task.basis})
    return kept


@pytest.mark.parametrize(
    "kept",
    [
        memory_of(replace(ACKNOWLEDGED, state=OTHER)),
        memory_of(replace(ACKNOWLEDGED, state=scale(LAYER, 2.0))),
        memory_of(replace(ACKNOWLEDGED, run="another")),
        memory_of(replace(ACKNOWLEDGED, state={}, basis=LAYER)),
        {**memory_of(ACKNOWLEDGED), "tensors": b"cut"},
        {},
    ],
    ids=["of other shapes", "of other numbers", "of another run", "of another part", "damaged", "lost"],
)
def test_tensors_that_are_not_those_that_a_task_names_are_asked_for_again(kept: dict[str, bytes]) -> None:
    sent, layout = encode_task(naming(ACKNOWLEDGED, STATE)), layout_of(LAYER)
    with pytest.raises(LackingTensors):
        decode_task(sent, layout, kept=Memory(kept).tensors("run"))
    found = decode_task(sent, layout, kept=Memory(memory_of(ACKNOWLEDGED)).tensors("run"))
    assert torch.equal(found.state["layer"]["B"], LAYER["layer"]["B"])


LIES: dict[str, Callable[[dict[Place, bytes]], dict[Place, bytes]]] = {
    "a wrong hash": lambda named: dict.fromkeys(named, bytes(32)),
    "hashes that change places": lambda named: dict(zip(named, reversed(named.values()), strict=True)),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_server_that_lies_about_a_hash_is_refused_before_a_record_is_read(
    lie: str, site: OneSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.settings |= {"strategy": "fedavg-lora", "phases": "2 head on features, 2 adapter+head on examples"}
    first, task = site.train(1), naming(site.task(2), STATE)
    task = replace(task, named={place: one for place, one in task.named.items() if place[1] != HEAD})
    assert len(task.named) > 1
    assert set(first.contribution) == {HEAD}, "the site sends an adapter that its round does not train"

    def fail(*_: Any) -> Any:
        raise AssertionError("a record was touched")

    with monkeypatch.context() as patch:
        patch.setattr("fedveil.client.cache.RecordCache.prepare", fail)
        patch.setattr("fedveil.client.process.train_round", fail)
        assert refused(site, replace(task, named=LIES[lie](dict(task.named)))) == "tensors"
        assert refused(site, naming(site.task(2), STATE)) == "tensors", "the head that was trained is not kept"
        other = replace(task, run="2")
        assert refused(site, other) == "tensors", "tensors of another run serve this one"
    assert isinstance(site.ask(task), TrainResult)


def test_a_site_that_takes_any_tensor_for_the_named_one_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedveil.common.messages.named.mark_of", lambda _: bytes(32))
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        test_tensors_that_are_not_those_that_a_task_names_are_asked_for_again(
            memory_of(replace(ACKNOWLEDGED, state=scale(LAYER, 2.0)))
        )

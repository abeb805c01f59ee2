"""A message that comes twice: answered from what was released, or paid for again; never free, never stale."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from audits.tiny_site import OneSite
from fedveil.client.local_training import train_round
from fedveil.client.memory import Memory
from fedveil.common.messages.blocks import encode_state, layout_of
from fedveil.common.messages.round import Refusal, TrainResult, TrainTask
from fedveil.common.messages.state import AdapterState
from fedveil.common.messages.tensors import entries, fingerprint, scale

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


def refused(site: OneSite, task: TrainTask) -> str:
    """Return the kind of the refusal that a task gets, with nothing charged."""
    before, reply = site.charges(), site.ask(task)
    assert isinstance(reply, Refusal), "the site took part"
    assert site.charges() == before, "a refused round was charged"
    return reply.kind


def test_wrong_factors_sent_once_are_not_kept_and_the_right_ones_are_taken_later(site: OneSite) -> None:
    ask_for_fed_sb(site, "public-gradient")
    task = site.task(1)
    assert refused(site, replace(task, basis=scale(task.basis, 1.5))) == "task"
    assert refused(site, replace(task, basis={})) == "basis", "wrong factors were kept: the site asks for no others"
    assert isinstance(site.ask(task), TrainResult)


def test_wrong_factors_do_not_replace_the_right_ones(site: OneSite) -> None:
    ask_for_fed_sb(site, "public-gradient")
    site.train(1)
    task = site.task(2)
    assert refused(site, replace(task, basis=scale(task.basis, 1.5))) == "task"
    assert isinstance(site.ask(replace(task, basis={})), TrainResult), "the node lost what it had"


def test_wrong_factors_in_round_0_are_refused_like_any(site: OneSite) -> None:
    ask_for_fed_sb(site, "dp-gradient")
    task = site.task(0)
    assert refused(site, replace(task, state={}, basis=scale(task.basis, 1.5))) == "task"


def test_factors_sent_once_are_kept_once_and_do_not_make_a_task_another(site: OneSite) -> None:
    ask_for_fed_sb(site, "public-gradient")
    task = site.task(1)
    assert task.basis, "this strategy sends nothing once: the test tests nothing"
    first = site.ask(task)
    again = site.ask(replace(task, basis={}))
    assert isinstance(first, TrainResult)
    assert isinstance(again, TrainResult)
    assert same(first, again)
    site.memory.clear()
    lost = site.ask(replace(task, basis={}))
    assert isinstance(lost, Refusal)
    assert (lost.kind, len(site.charges())) == ("basis", 1)


LAYER = {"layer": {"B": torch.ones(3, 2)}}
OTHER = {"layer": {"B": torch.ones(4, 2)}}


def basis_task(basis: AdapterState, whole: AdapterState) -> TrainTask:
    return TrainTask("run", 1, {}, basis, fingerprint(whole), "", "")


@pytest.mark.parametrize(
    "kept",
    [
        {
            "basis-layers": b'["layer"]',
            "basis": encode_state(OTHER),
            "basis-of": b"0" * 64,
        },
        {"basis-layers": b'["layer"]', "basis": encode_state(LAYER)},
        {"basis-layers": b'["layer"]', "basis": b"cut", "basis-of": fingerprint(LAYER).encode()},
    ],
    ids=["of other shapes", "without its mark", "damaged"],
)
def test_a_kept_basis_that_is_not_the_tasks_is_asked_for_again(kept: dict[str, bytes]) -> None:
    assert Memory(kept).with_basis(basis_task({}, LAYER), layout_of(LAYER)) is None
    whole = {**kept, "basis": encode_state(LAYER), "basis-of": fingerprint(LAYER).encode()}
    found = Memory(whole).with_basis(basis_task({}, LAYER), layout_of(LAYER))
    assert found is not None
    assert torch.equal(found.basis["layer"]["B"], LAYER["layer"]["B"])

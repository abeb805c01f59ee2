"""When an answer with ``reply-after`` leaves: at its time, for short records and for long ones."""

from __future__ import annotations

import gc
import itertools
import math
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from timed_site import Clock, Played, timing

from audits.tiny_site import OneSite, clinic
from fedveil.client import budget, deadline, local_training, process, rehearsals
from fedveil.client.deadline import TRAINED, Deadline
from fedveil.client.ledger import ledger
from fedveil.client.ledger.ledger import Ledger
from fedveil.client.ledger.rows import price
from fedveil.client.timing import Timing
from fedveil.common.messages.round import TrainResult
from fedveil.common.messages.tensors import entries
from fedveil.common.model.federated import FederatedModel
from fedveil.privacy import randomness
from fedveil.privacy.dpsgd import PrivateSteps

pytestmark = pytest.mark.rough_prices


@pytest.fixture
def site(toy_settings: dict[str, Any], tmp_path: Path) -> OneSite:
    return clinic({**toy_settings, "training.sample-rate": 0.1, "training.local-steps": 10}, tmp_path)


# --- the collector of garbage, which takes the longer the more records are held ---------------------------------------
@contextmanager
def collected_by(clock: Clock, held: object) -> Iterator[None]:
    """Have the collector run often, and take a second wherever it goes over ``held``."""

    def takes_a_second(phase: str, _: object) -> None:
        if phase == "start" and any(found is held for found in gc.get_objects()):
            clock.sleep(1.0)

    usual = gc.get_threshold()
    gc.callbacks.append(takes_a_second)
    gc.set_threshold(50, 1, 1)
    try:
        yield
    finally:
        gc.set_threshold(*usual)
        gc.callbacks.remove(takes_a_second)


def make_garbage() -> None:
    for _ in range(500):
        circle: list[object] = []
        circle.append(circle)


def time_of_an_answer(held: list[object], monkeypatch: pytest.MonkeyPatch) -> float:
    """Return when an answer leaves, with garbage wherever its time stands still, and from a thread of the node's."""
    clock = Clock()
    monkeypatch.setattr(deadline, "time", clock)
    own_sleep = clock.sleep

    def sleep(seconds: float) -> None:
        own_sleep(seconds)
        if seconds != 1.0:
            make_garbage()  # by the thread that says to the node that the task is being worked on

    at = Deadline(60.0, began=clock.now)
    gc.freeze()  # all but what is held, or a collection would take long
    held.append([])
    with collected_by(clock, held[0]):
        make_garbage()
        with at.extended():
            make_garbage()
            with at.extended():
                make_garbage()
            make_garbage()
        make_garbage()
        clock.sleep = sleep  # type: ignore[method-assign]
        at.wait()
        make_garbage()  # as the reply is handed over
    assert gc.isenabled()
    return clock.now


def test_when_an_answer_leaves_does_not_follow_from_how_much_garbage_is_looked_for_among(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held: list[object] = []
    assert time_of_an_answer(held, monkeypatch) == 1060.0
    assert not any(found is held[0] for found in gc.get_objects()), "nor does when the next task is asked for"
    Deadline(60.0)
    assert any(found is held[0] for found in gc.get_objects()), "what is held is garbage at some time, and then goes"
    with Deadline().extended():
        assert gc.isenabled()
    gc.freeze()  # as for all tests


@pytest.mark.parametrize("call", ["disable", "freeze"])
def test_a_collector_that_runs_where_time_does_not_count_is_found(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    freeze, calls = gc.freeze, list[None]()

    def planted() -> None:
        calls.append(None)
        if call == "freeze" and len(calls) == 1:
            freeze()  # the test's own

    monkeypatch.setattr(deadline.gc, call, planted)
    assert time_of_an_answer([], monkeypatch) > 1060.0


def fill(site: OneSite, words: int) -> None:
    """Give the site records of so many words."""
    rows = [f"{' '.join(['film'] * words)} n{i},{('bad', 'good')[i % 2]},a" for i in range(40)]
    Path(str(site.node["data"])).write_text("\n".join(["text,label,author", *rows]), encoding="utf-8")


def check_that_lengths_do_not_show(site: OneSite, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, words in (("short", 2), ("long", 40)):
        with monkeypatch.context() as patch:
            path = site.ledger.with_name(f"{name}.csv")
            site.node["data"], site.node["ledger"] = str(path), str(path.with_suffix(".sqlite"))
            fill(site, words)
            played = Played(site, timing(long=0.04, empty=0.02), patch)
            reply, _ = played.at_its_time(played.least)
            assert isinstance(reply, TrainResult), reply
            assert not played.failures
            assert not played.passes_postpone, "passes postpone the answer: it follows from the records when it leaves"


def test_an_answer_leaves_at_its_time_for_short_records_and_for_long_ones(
    site: OneSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_that_lengths_do_not_show(site, monkeypatch)


def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Deadline, "wait", lambda _: None)


def training_postpones(monkeypatch: pytest.MonkeyPatch) -> None:
    train, take, answers = local_training.train_round, local_training._take_steps, list[Deadline]()

    def noting(*words: Any) -> TrainResult:
        answers.extend(word for word in words if isinstance(word, Deadline))
        return train(*words)

    def postponed(*words: Any) -> Any:
        with answers[-1].extended():
            return take(*words)

    monkeypatch.setattr(process, "train_round", noting)
    monkeypatch.setattr(local_training, "_take_steps", postponed)


@pytest.mark.parametrize("plant", [no_wait, training_postpones])
def test_an_answer_whose_time_follows_from_lengths_is_found_out(
    plant: Callable[[pytest.MonkeyPatch], None], site: OneSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError, match=r"reply-after|postpone"):
        check_that_lengths_do_not_show(site, monkeypatch)


def check_that_noise_is_in_time(site: OneSite, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every pass take three times what it was rehearsed to take, in a round that draws all records in each step."""
    fill(site, 40)
    played = Played(site, timing(long=0.04, empty=0.3), monkeypatch)
    played.slower = 3.0
    monkeypatch.setattr(randomness, "private_poisson_sample", lambda size, _: torch.arange(size))
    reply, _ = played.at_its_time(played.least)
    assert isinstance(reply, TrainResult), reply
    state = site.task(1).state
    moved = [float((t != state[layer][name]).double().mean()) for layer, name, t in entries(reply.contribution)]
    assert all(share > 0.9 for share in moved)
    assert len(site.charges()) == played.failures == 1


def test_a_round_that_would_be_late_sends_noise_in_time(
    site: OneSite, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    check_that_noise_is_in_time(site, monkeypatch)
    assert any("noise alone is sent: TooLate" in record.getMessage() for record in caplog.records)


def test_a_reserve_for_the_noise_of_two_steps_is_found_out(site: OneSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Timing, "reserve", lambda self, steps: max(self.passes.values()) + 2 * self.empty)
    with pytest.raises(AssertionError, match="reply-after"):
        check_that_noise_is_in_time(site, monkeypatch)


def test_steps_that_draw_no_record_take_nothing_of_the_time_that_noise_needs(
    site: OneSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pass takes nearly all the time, nine steps take noise alone, and the last one has a pass again."""
    played = Played(site, timing(empty=0.15), monkeypatch)
    allowed = played.least
    slow = TRAINED * allowed - played.timing.reserve(10) - 0.1
    losses = FederatedModel.losses

    def once(model: FederatedModel, batch: Any) -> Any:
        played.clock.sleep(slow)
        return losses(model, batch)

    drawn = itertools.cycle([1, *[0] * 8, 1])
    monkeypatch.setattr(FederatedModel, "losses", once)
    monkeypatch.setattr(randomness, "private_poisson_sample", lambda size, _: torch.arange(min(size, next(drawn))))
    reply, _ = played.at_its_time(allowed)
    assert isinstance(reply, TrainResult), reply
    assert played.failures == 1


@contextmanager
def locked(path: Path, seconds: float = math.inf) -> Iterator[None]:
    """Hold a ledger's lock as another process would, at most so long."""
    other = sqlite3.connect(path, timeout=5.0, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    timer = threading.Timer(min(seconds, 1e6), other.close)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        other.close()


@pytest.mark.parametrize("initial", [False, True], ids=["a round", "round 0"])
def test_a_failure_is_noted_once_the_reply_is_there_and_no_lock_makes_that_late(
    initial: bool, site: OneSite, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    site.settings["training.local-steps"] = 1
    if initial:
        site.settings |= {"strategy": "fed-sb", "adapter.start": "dp-gradient", "start.sample-rate": 1.0}
        site.settings |= {"privacy.epsilon": 50.0}
    played = Played(site, timing(), monkeypatch)
    monkeypatch.setattr(rehearsals, "rehearse_initial", lambda *_: played.timing)
    privatise, held = PrivateSteps._privatise, list[Any]()

    def fail(steps: PrivateSteps, batches: Any, losses: Any) -> None:
        if parts := list(batches):
            held.append(locked(site.ledger))
            held[-1].__enter__()
            raise MemoryError
        held.append("noise")
        privatise(steps, parts, losses)

    noted = local_training.note_failure

    def note(*words: Any) -> None:
        held.append("noted")
        noted(*words)

    monkeypatch.setattr(PrivateSteps, "_privatise", fail)
    monkeypatch.setattr(local_training, "note_failure", note)
    site.rule(reply_after=2.0)
    reply, _, counted = played.ask(0 if initial else 1)
    held[0].__exit__(None, None, None)
    assert isinstance(reply, TrainResult), reply
    assert held[1:] == ["noise", "noted"]
    assert counted == pytest.approx(2.0)
    assert "the ledger has no row of a round that failed" in caplog.text
    assert not played.failures


def check_that_what_follows_from_no_record_postpones(slow: str, site: OneSite, monkeypatch: pytest.MonkeyPatch) -> None:
    site.settings["training.local-steps"] = 1
    played = Played(site, timing(), monkeypatch)
    Ledger(site.ledger).close()
    if slow == "a price":

        def priced(*terms: Any) -> Any:
            played.clock.sleep(2.0)
            return price(*terms)

        monkeypatch.setattr(ledger, "price", priced)
    if slow == "a search for noise":
        planned = budget.plan_of

        def searched(*terms: Any) -> Any:
            played.clock.sleep(2.0)
            return planned(*terms)

        monkeypatch.setattr(budget, "plan_of", searched)
    held = 0.4  # of the real clock, from the moment that the site first wants to write
    if slow == "a lock":
        lowered = Ledger.lower_budget

        def waited(*terms: Any) -> Any:
            with locked(site.ledger, held):
                return lowered(*terms)

        monkeypatch.setattr(Ledger, "lower_budget", waited)
    reply, whole = played.at_its_time(1.5)
    assert isinstance(reply, TrainResult), reply
    assert whole > 1.5 + (held / 2 if slow == "a lock" else 1.5)
    assert not played.failures, "noise alone was sent"


SLOW = ["a price", "a search for noise", "a lock"]


@pytest.mark.parametrize("slow", SLOW)
def test_what_follows_from_no_record_postpones_the_answer_and_takes_nothing_of_the_round(
    slow: str, site: OneSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_that_what_follows_from_no_record_postpones(slow, site, monkeypatch)


@pytest.mark.parametrize("slow", SLOW)
def test_a_price_or_a_lock_that_takes_the_rounds_time_is_found_out(
    slow: str, site: OneSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def counted(_: Deadline) -> Iterator[None]:
        yield

    monkeypatch.setattr(Deadline, "extended", counted)
    with pytest.raises(AssertionError):
        check_that_what_follows_from_no_record_postpones(slow, site, monkeypatch)

"""Runs whose sums sites are lost from: what is left, what a site refuses, and who pays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Container, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from summed_runs import SUMMED, gone, last_adapter, no_noise, spent

from audits.faults import zero_noise
from faults.faulty_server import lying
from faults.sum_scenarios import SURVIVOR_LIES, wrong_after_a_lie
from fedveil.client.ledger.ledger import Ledger
from fedveil.client.ledger.sums import Sums
from fedveil.common.errors import ConfigError, RunFailed
from fedveil.common.messages.round import (
    KeyReply,
    KeyTask,
    Refusal,
    ShareReply,
    ShareTask,
    SurvivorReply,
    SurvivorTask,
    Task,
    TrainTask,
    UnmaskReply,
    UnmaskTask,
)
from fedveil.common.messages.sum_messages import decode_sum_reply, decode_sum_task
from fedveil.common.messages.wire import encode_reply, encode_task, kind_of_task
from fedveil.common.run_lines import RoundLine, read_lines
from fedveil.experiments.in_process import InProcessTransport, run_in_process
from fedveil.privacy import dpsgd
from fedveil.privacy.secure_sum import Agreement, Holder, KeyOffer, RecoverableAttempt, Sharing, rounding
from fedveil.privacy.secure_sum.shares import SHARE_BYTES
from fedveil.reports import report_of
from fedveil.server.collect import drop_outs
from fedveil.server.collect import masked as masked_rounds
from fedveil.strategies.job import configure

pytestmark = pytest.mark.rough_prices


SITES, DROP_OUTS = 6, 2


STAGES: Mapping[str, type[Task]] = {"shares": ShareTask, "vector": TrainTask, "list": SurvivorTask, "end": UnmaskTask}


@pytest.fixture
def lossy(toy_settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings of a run of two rounds from whose sums two sites may be lost."""
    return {**toy_settings, **SUMMED, "privacy.drop-outs": DROP_OUTS, "round-retries": 0}


def losing(lost: Mapping[int, type[Task]], rounds: Collection[int] = (1,)) -> type[InProcessTransport]:
    """Return a transport that loses nodes, each from the first task of its kind on, in these rounds."""

    class Losing(InProcessTransport):
        def deliver(self, node: int, task: Task, content: Any) -> Any:
            stages = list(STAGES.values())
            if task.round_number in rounds and node in lost and type(task) in stages[stages.index(lost[node]) :]:
                return encode_reply(Refusal(task.run, task.round_number, f"site-{node}", "failed", "the line is cut"))
            return super().deliver(node, task, content)

    return Losing


def quiet(settings: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return settings of a run without noise or sampling, of one round."""
    monkeypatch.setattr(rounding, "add_private_noise", no_noise)
    monkeypatch.setattr(dpsgd, "add_private_noise", zero_noise)
    return {**settings, "rounds": 1, "training.sample-rate": 1.0, "max-share": 1.0, "max-update-norm": 1e9}


def test_the_sum_of_those_that_are_left_is_that_of_plain_uploads(
    lossy: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    same = quiet(lossy, monkeypatch)
    lost = {1: TrainTask, 4: TrainTask}
    summed = run_in_process(same, SITES, run="sum", kind=losing(lost))
    plain = {**same, "privacy.mode": "dp-sgd", "privacy.honest-sites": 0, "privacy.drop-outs": 0}
    wanted = last_adapter(run_in_process(plain, SITES, run="plain", kind=losing(lost)))
    everybody = last_adapter(run_in_process(plain, SITES, run="all"))
    got = last_adapter(summed)
    assert float((got - wanted).norm()) < 0.02 * float((got - everybody).norm())


@pytest.mark.many
def test_of_a_hundred_sites_ten_are_lost_and_the_others_have_their_sum(
    lossy: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four are lost before they share, six with their vectors; the server's words are those of ninety, bit for bit."""
    own, sums_seen, mask, unmask = dict[str, Any](), [], RecoverableAttempt.masked, drop_outs.unmasked

    def masked(attempt: RecoverableAttempt, words: Any) -> Any:
        own[attempt.offer.site] = words.astype(np.uint64)
        return mask(attempt, words)

    def unmasked(*seen: Any) -> Any:
        sums_seen.append(unmask(*seen))
        return sums_seen[-1]

    monkeypatch.setattr(RecoverableAttempt, "masked", masked)
    monkeypatch.setattr(drop_outs, "unmasked", unmasked)
    lost = {node: ShareTask if node < 4 else TrainTask for node in range(10)}
    many = {"privacy.drop-outs": 10, "privacy.honest-sites": 80, "min-sites": 85, "rounds": 1}
    folder = run_in_process({**lossy, **many}, 100, kind=losing(lost))
    (line,) = read_lines(RoundLine, folder)
    left = [f"site-{i}" for i in range(10, 100)]
    assert (line.attempts, sorted(line.participants)) == (1, sorted(left))
    assert [found.tolist() for found in sums_seen] == [
        sum(own[site].astype("u8") for site in left).astype("u4").tolist()
    ]
    assert {site for site, paid in spent(folder).items() if paid} == set(left)


def test_two_sites_are_lost_wherever_and_a_round_counts_at_the_first_attempt(lossy: dict[str, Any]) -> None:
    for first, second in (("shares", "vector"), ("list", "end")):
        folder = run_in_process(lossy, SITES, run=first, kind=losing({1: STAGES[first], 4: STAGES[second]}))
        one, two = read_lines(RoundLine, folder)
        late = first == "list"  # their vectors were there
        left = [f"site-{i}" for i in range(SITES) if late or i not in (1, 4)]
        assert (one.attempts, one.participants, two.attempts) == (1, left, 1)
        assert two.participants == [f"site-{i}" for i in range(SITES)]
        assert {failure.site for failure in one.failures} == {"site-1", "site-4"}
        paid = {site: [number for number, _ in rows] for site, rows in spent(folder).items()}
        assert paid == {f"site-{i}": [1, 2] if late or i not in (1, 4) else [2] for i in range(SITES)}
        report = report_of(folder)
        assert {site.agreement for site in report.sites} == {"agrees"}
        assert "as long as 2 sites of each sum are honest" in report.claim.sentence


@pytest.mark.parametrize("stage", STAGES)
def test_one_site_more_is_lost_and_there_is_no_sum(stage: str, lossy: dict[str, Any]) -> None:
    lost = dict.fromkeys((1, 2, 4), STAGES[stage])
    with pytest.raises(RunFailed, match="0 sites succeeded"):
        run_in_process(lossy, SITES, kind=losing(lost))
    folder = next(Path(lossy["output"]).iterdir())
    (line,) = read_lines(RoundLine, folder)
    assert "3 sites" in line.failures[-1].reason
    assert ", 4 are needed" in line.failures[-1].reason


def test_a_run_goes_on_without_sites_that_are_gone_at_the_same_price_while_so_many_are_left(
    lossy: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Of six sites two are lost in round 1 and one in round 2: round 3 has three, of which none may be lost."""
    waited: list[int] = []
    folder = run_in_process({**lossy, "rounds": 3}, SITES, kind=gone({1: 1, 4: 1, 2: 2}, waited))
    lines = read_lines(RoundLine, folder)
    left = ([0, 2, 3, 5], [0, 3, 5], [0, 3, 5])
    assert [line.participants for line in lines] == [[f"site-{i}" for i in sites] for sites in left]
    assert [line.attempts for line in lines] == [1, 1, 1]
    assert waited == [6, 3, 3], "a round waits for sites that are gone, or that may be lost"
    assert "4 sites are left, of which 1 may be lost" in caplog.text
    assert "3 sites are left, of which 0 may be lost" in caplog.text
    whole = run_in_process({**lossy, "rounds": 3}, SITES, run="all")
    assert prices(folder) == prices(whole), "the price depends on how many are left"
    assert {site.agreement for site in report_of(folder).sites} == {"agrees", "none"}, "two sites have no round"


@pytest.mark.parametrize("faulty", [False, True])
def test_a_site_that_is_offline_between_rounds_costs_no_time(
    faulty: bool, lossy: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Flower says it: the node is not among those online. Waiting for it would take a whole round-timeout."""
    waits: list[int] = []

    class Offline(InProcessTransport):
        def nodes(self, wanted: int, besides: Container[int]) -> list[int]:
            rounds = len(waits)
            online = [node for node in super().nodes(wanted, besides) if node != 1 or not rounds]
            waits.append(max(0, wanted - len(online)))
            return online

    if faulty:  # the planted fault: all sites of the last sum are waited for
        monkeypatch.setattr(masked_rounds, "may_be_lost", lambda *own: 0)
    folder = run_in_process({**lossy, "rounds": 3}, SITES, kind=Offline)
    assert any(waits) == faulty
    assert [len(line.participants) for line in read_lines(RoundLine, folder)] == [6, 5, 5]


def prices(folder: Path) -> list[tuple[Any, int, float]]:
    """Return what site 0 was charged for in each of three rounds."""
    with Ledger(folder / "ledgers" / "site-0.sqlite") as ledger:
        entries = ledger.entries()
    assert [entry.round_number for entry in entries] == [1, 2, 3]
    return [(entry.event, entry.count, entry.delta) for entry in entries]


def test_a_run_whose_sites_are_too_few_for_a_sum_stops_and_says_what_to_do(lossy: dict[str, Any]) -> None:
    again = {**lossy, "rounds": 3, "round-retries": 1}
    with pytest.raises(RunFailed, match="0 sites succeeded") as caught:
        run_in_process(again, SITES, kind=gone({1: 1, 4: 1, 2: 2, 3: 2}, []))
    folder = next(Path(lossy["output"]).iterdir())
    done, failed = read_lines(RoundLine, folder)
    assert (done.complete, failed.complete) == (True, False)
    reasons = [failure.reason for failure in failed.failures if failure.kind == "quorum"]
    assert reasons == [
        "2 sites have sent a vector that counts, 3 are needed",
        "2 sites gave a key, 3 are needed for a sum: start the others, and resume the run",
    ]
    assert "needed. 2 sites gave a key, 3 are needed for a sum: start the others" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fewer_sites_than_may_be_lost_from_are_asked_for_nothing_that_costs(lossy: dict[str, Any]) -> None:
    with pytest.raises(RunFailed, match="0 sites gave a key, 6 are needed"):
        run_in_process(lossy, SITES - 1)
    assert not list(Path(lossy["output"]).rglob("ledgers/*.sqlite"))


def test_an_attempt_begins_with_so_many_sites_that_min_sites_are_left(lossy: dict[str, Any]) -> None:
    with pytest.raises(RunFailed, match="0 sites gave a key, 7 are needed"):
        run_in_process({**lossy, "min-sites": 5}, SITES)
    assert not list(Path(lossy["output"]).rglob("ledgers/*.sqlite"))


def test_a_server_that_tells_sites_of_different_survivors_gets_no_sum(lossy: dict[str, Any]) -> None:
    class Lying(InProcessTransport):
        def exchange(self, tasks: Mapping[int, Task], timeout: float) -> Any:
            told = {
                node: replace(task, survivors=tuple(s for s in task.survivors if s != "site-0"))
                if isinstance(task, SurvivorTask) and node > 2
                else task
                for node, task in tasks.items()
            }
            return super().exchange(told, timeout)

    with pytest.raises(RunFailed, match="3 sites have signed the survivors, and 4 are needed"):
        run_in_process(lossy, SITES, kind=Lying)


def test_a_site_that_signs_nothing_costs_the_others_no_attempt(lossy: dict[str, Any]) -> None:
    class Lying(InProcessTransport):
        def exchange(self, tasks: Mapping[int, Task], timeout: float) -> Any:
            exchange = super().exchange(tasks, timeout)
            if isinstance(reply := exchange.replies.get(1), SurvivorReply):
                unsigned = replace(reply, agreement=replace(reply.agreement, signature=bytes(64)))
                return replace(exchange, replies={**exchange.replies, 1: unsigned})
            return exchange

    (line,) = read_lines(RoundLine, run_in_process({**lossy, "rounds": 1}, SITES, kind=Lying))
    assert (line.attempts, len(line.participants)) == (1, SITES)


@pytest.mark.parametrize("bad", ["one fewer", "no number of the field"])
def test_a_site_that_tells_no_shares_costs_the_others_no_attempt_and_is_noted(bad: str, lossy: dict[str, Any]) -> None:
    class Lying(InProcessTransport):
        def exchange(self, tasks: Mapping[int, Task], timeout: float) -> Any:
            exchange = super().exchange(tasks, timeout)
            if isinstance(reply := exchange.replies.get(0), UnmaskReply):
                wrong = reply.shares[1:] if bad == "one fewer" else (b"\xff" * SHARE_BYTES, *reply.shares[1:])
                return replace(exchange, replies={**exchange.replies, 0: replace(reply, shares=wrong)})
            return exchange

    (line,) = read_lines(RoundLine, run_in_process({**lossy, "rounds": 1}, SITES, kind=Lying))
    assert (line.attempts, len(line.participants)) == (1, SITES)
    assert [(failure.site, failure.kind) for failure in line.failures] == [("site-0", "reply")]
    assert "not one share of each site" in line.failures[0].reason


def test_a_server_that_tells_a_site_another_model_gets_no_sum(lossy: dict[str, Any]) -> None:
    class Lying(InProcessTransport):
        def exchange(self, tasks: Mapping[int, Task], timeout: float) -> Any:
            told = dict(tasks)
            if isinstance(task := told.get(1), TrainTask):
                layer = next(iter(task.state))
                moved = {name: tensor + 1.0 for name, tensor in task.state[layer].items()}
                told[1] = replace(task, state={**task.state, layer: moved})
            return super().exchange(told, timeout)

    with pytest.raises(RunFailed, match="the sum's length"):
        run_in_process(lossy, SITES, kind=Lying)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"privacy.mode": "dp-sgd", "privacy.honest-sites": 0}, "is a sum lost with a site"),
        ({"privacy.drop-outs": -1}, "privacy.drop-outs"),
    ],
)
def test_drop_outs_of_what_is_no_sum_are_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        configure({**SUMMED, "privacy.drop-outs": 1, **wrong})


# --- messages ---------------------------------------------------------------------------------------------------------
def test_what_is_sent_for_a_sum_comes_back_as_it_was() -> None:
    offer = KeyOffer("north", bytes(range(32)), bytes(range(64)))
    tasks = (
        KeyTask("1", 2, 3),
        ShareTask("1", 2, 3, (offer, replace(offer, site="south"))),
        SurvivorTask("1", 2, 3, ("north", "south")),
        UnmaskTask("1", 2, 3, (("north", bytes(64)), ("south", b"x" * 64))),
    )
    replies = (
        KeyReply("1", 2, "north", offer),
        ShareReply("1", 2, "north", Sharing(offer, (bytes(82), b"y" * 82))),
        SurvivorReply("1", 2, "north", Agreement("north", bytes(32), bytes(64))),
        UnmaskReply("1", 2, "north", (bytes(33), b"z" * 33)),
    )
    for task, reply in zip(tasks, replies, strict=True):
        record = encode_task(task)
        assert kind_of_task(record) is type(task)
        assert decode_sum_task(record) == task
        assert decode_sum_reply(encode_reply(reply), task) == reply
        refusal = Refusal("1", 2, "north", "policy", "no")
        assert decode_sum_reply(encode_reply(refusal), task) == refusal
        for other in replies:
            if other is not reply:
                with pytest.raises(Exception, match="expects a message of kind"):
                    decode_sum_reply(encode_reply(other), task)
        with pytest.raises(Exception, match="answers run"):
            decode_sum_reply(encode_reply(replace(reply, run="2")), task)


def test_a_server_that_lies_about_survivors_gets_no_shares_and_no_second_list(
    lossy: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lies of ``make faults`` in one process: four sites, of which one may be lost."""
    names = list(SURVIVOR_LIES)

    class Lying(InProcessTransport):
        exchange = lying(InProcessTransport.exchange, lambda number: names[number - 1])  # type: ignore[assignment]

    own = {**lossy, "privacy.drop-outs": 1, "min-sites": 3, "round-retries": 1}
    folder = run_in_process(own, 4, kind=Lying)
    paid = Counter(number for rows in spent(folder).values() for number, _ in rows)
    for line, name in zip(read_lines(RoundLine, folder), names, strict=True):
        assert wrong_after_a_lie(SURVIVOR_LIES[name], line, paid[line.round_number], 4) == []
        assert wrong_after_a_lie(SURVIVOR_LIES[name], replace(line, attempts=3), paid[line.round_number], 4)
    # The planted fault: sites that sign whatever they are asked for.
    monkeypatch.setattr(Holder, "survivors", property(lambda own: (), lambda own, value: None))
    monkeypatch.setattr(Sums, "sign", lambda *own: None)
    names.reverse()
    with pytest.raises(RunFailed, match="signed a second list"):
        run_in_process({**own, "rounds": 1}, 4, run="signing", kind=Lying)

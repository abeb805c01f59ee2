"""Attempts at a sum: what is lost, who pays, and which keys the next one has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from summed_runs import Losing, Watched, releases, spent, words_of

from audits.bands import out_of_band
from audits.sum_site import SumSite
from fedveil.client.ledger.ledger import Ledger
from fedveil.common.errors import ProtocolError, RunFailed
from fedveil.common.messages.blocks import WORDS_STYPE, block_data
from fedveil.common.messages.round import KeyReply, KeyTask, Refusal, Task, TrainResult, TrainTask
from fedveil.common.messages.wire import decode_reply, encode_reply
from fedveil.common.run_lines import Absence, PrivacyLine, RoundLine, read_lines
from fedveil.experiments.in_process import InProcessTransport, run_in_process
from fedveil.privacy.accounting import Release
from fedveil.privacy.events import Event, sampled_gaussian
from fedveil.privacy.privacy_filter import promised
from fedveil.reports import federation_epsilon, report_of
from fedveil.server.collect.base import Collected

pytestmark = [pytest.mark.rough_prices, pytest.mark.one_length]


def test_an_upload_is_uniform_words_and_nothing_else(summed: dict[str, Any]) -> None:
    seen: list[np.ndarray] = []

    class Looking(Watched):
        def look(self, node: int, task: Task, record: Any) -> None:
            if isinstance(task, TrainTask):
                assert set(record.array_records) == {"sum"}
                seen.append(words_of(record))

    run_in_process(summed, 4, kind=Looking)
    for shift in (0, 8, 16, 24):
        cells = np.bincount(np.concatenate(seen) >> shift & 255, minlength=256)
        expected = cells.sum() / 256
        assert not out_of_band(float(((cells - expected) ** 2 / expected).sum()), 255)


def test_a_lost_vector_costs_all_sites_a_charge_and_the_next_attempt_has_new_keys(summed: dict[str, Any]) -> None:
    kept: list[Losing] = []

    class Kept(Losing):
        def __init__(self, *own: Any) -> None:
            super().__init__(*own)
            kept.append(self)

    folder = run_in_process(summed, 4, kind=Kept)
    assert {tuple(rows) for rows in spent(folder).values()} == {
        ((1, "summed-gaussian"), (1, "summed-gaussian"), (2, "summed-gaussian"))
    }
    first, second = read_lines(RoundLine, folder)
    assert (first.attempts, second.attempts) == (2, 1)
    assert first.participants == [f"site-{i}" for i in range(4)]
    assert [(f.site, f.kind) for f in first.failures] == [("site-2", "failed")]
    tasks = [task for _, task, _ in kept[0].sent if isinstance(task, TrainTask)]
    keys = [{offer.public for offer in task.offers} for task in tasks]
    assert len({key for own in keys for key in own}) == 4 * 3, "a key serves two attempts"
    data = report_of(folder)
    # What the others sent in vain stands in the report; of the lost vector only the site's later total tells.
    assert [site.agreement for site in data.sites] == ["agrees", "agrees", "larger", "agrees"]
    event = releases(folder)[0].event
    known = [Release(event, 1), Release(event.of_honest(4), 2)]
    assert data.sites[0].epsilon_all_honest == promised(known, 1e-3)[0], "of how many sites the other was is not known"


def test_without_a_whole_attempt_there_is_no_sum_and_no_plain_upload(summed: dict[str, Any]) -> None:
    class Gone(Watched):
        def deliver(self, node: int, task: Task, content: Any) -> Any:
            record = super().deliver(node, task, content)
            lost = isinstance(task, TrainTask) and node == 2
            return encode_reply(Refusal(task.run, 1, "site-2", "failed", "the line is cut")) if lost else record

        def look(self, node: int, task: Task, record: Any) -> None:
            assert "adapter" not in record.array_records, "a site sent its tensors"

    with pytest.raises(RunFailed, match=r"round 1: 0 sites succeeded in 2 attempts.*site-2 .failed"):
        run_in_process(summed, 4, kind=Gone)
    (folder,) = Path(summed["output"]).iterdir()
    sent = [(line.site, line.round_number) for line in read_lines(PrivacyLine, folder)]
    assert sent == 2 * [("site-0", 1), ("site-1", 1), ("site-3", 1)], "what was thrown away was charged and sent"
    with Ledger(folder / "ledgers" / "site-0.sqlite") as ledger:
        held = [Release(entry.event, entry.count) for entry in ledger.entries()]
    assert federation_epsilon(folder) == pytest.approx(promised(held, 1e-3)[0], abs=1e-9)


def test_fewer_sites_than_a_sum_needs_are_asked_for_nothing_that_costs(summed: dict[str, Any]) -> None:
    with pytest.raises(RunFailed, match="0 sites gave a key, 3 are needed"):
        run_in_process(summed, 2, run="few")
    folder = Path(summed["output"])
    assert not list(folder.rglob("ledgers/*.sqlite"))


def test_sites_that_spent_their_budget_end_the_run_well_and_cost_the_others_nothing(summed: dict[str, Any]) -> None:
    once = promised([alone_of(1)], 1e-3)[0]
    folder = run_in_process({**summed, "rounds": 3, "privacy.epsilon": 1.01 * once}, 4)
    assert {len(rows) for rows in spent(folder).values()} == {1}
    result = json.loads((folder / "result.json").read_text())
    assert (result["status"], result["rounds"]) == ("stopped", 1)
    assert result["honest_sites"] == summed["privacy.honest-sites"]


def spending(gone: Mapping[int, int], offline: Mapping[int, int]) -> Any:
    """Return a transport whose nodes have no budget left, or are offline, from the round on that is given by node.

    How many nodes are waited for goes to its ``waited``, which has one entry a round as long as nothing goes wrong.
    """

    class Spending(InProcessTransport):
        waited: ClassVar[list[int]] = []

        def deliver(self, node: int, task: Task, content: Any) -> Any:
            if isinstance(task, TrainTask):
                record = super().deliver(node, task, content)
                if task.round_number + 1 < gone.get(node, 99):
                    return record
                reply = decode_reply(record, self._layout_of_round(task.round_number), task.run, task.round_number)
                return encode_reply(replace(reply, offer=None)) if isinstance(reply, TrainResult) else record
            if task.round_number >= gone.get(node, 99):
                return encode_reply(Refusal(task.run, task.round_number, f"site-{node}", "budget", "it is spent"))
            return super().deliver(node, task, content)

        def nodes(self, wanted: int, besides: Any) -> list[int]:
            self.waited.append(wanted)
            there = super().nodes(wanted, besides)
            return [node for node in there if len(self.waited) < offline.get(node, 99)]

    return Spending


def test_a_site_that_is_offline_after_another_spent_its_budget_fails_the_run_with_advice(
    summed: dict[str, Any],
) -> None:
    """In round 2 site-0 has no budget left and three make the sum; in round 3 site-1 is offline."""
    kind = spending({0: 2}, {1: 3})
    with pytest.raises(RunFailed, match=r"round 3: .*3 are needed for a sum: start the others, and resume.*site-0 "):
        run_in_process({**summed, "rounds": 3}, 4, kind=kind)
    lines = read_lines(RoundLine, next(Path(summed["output"]).iterdir()))
    assert [line.participants for line in lines[:2]] == [
        [f"site-{i}" for i in range(4)],
        ["site-1", "site-2", "site-3"],
    ]


def test_budgets_that_are_spent_one_after_the_other_end_the_run_well(summed: dict[str, Any]) -> None:
    folder = run_in_process({**summed, "rounds": 4}, 4, kind=spending({0: 2, 1: 3}, {}))
    result = json.loads((folder / "result.json").read_text())
    assert (result["status"], result["rounds"]) == ("stopped", 2)
    assert result["reason"] == "too few sites for a sum have budget left after round 2"


def test_a_round_of_carried_refusals_alone_is_told_without_a_failure() -> None:
    got = Collected(refusals={0: Absence(3, 1, "site-0", "budget", "it is spent")}, needed=2)
    assert "site-0 (budget): it is spent" in got.too_few(3)


def test_who_refused_before_the_last_sum_is_not_missed_from_it_twice(summed: dict[str, Any]) -> None:
    kind = spending({0: 2}, {})
    run_in_process({**summed, "rounds": 4, "privacy.drop-outs": 2}, 6, kind=kind)
    assert kind.waited == [6, 4, 4, 4]


def alone_of(count: int) -> Any:
    from fedveil.privacy.accounting import Release

    return Release(Event("summed-gaussian", {**sampled_gaussian(2.0, 0.25).figures, "honest_sites": 2}), count)


@pytest.mark.parametrize("lie", ["state", "keys"])
def test_a_server_that_tells_a_site_something_else_gets_no_sum(
    lie: str, summed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lying(InProcessTransport):
        def exchange(self, tasks: Mapping[int, Task], timeout: float) -> Any:
            told = dict(tasks)
            if isinstance(task := told.get(1), TrainTask):
                if lie == "state":
                    layer = next(iter(task.state))
                    moved = {name: tensor + 1.0 for name, tensor in task.state[layer].items()}
                    told[1] = replace(task, state={**task.state, layer: moved})
                else:
                    told[1] = replace(task, offers=task.offers[:-1])
            return super().exchange(told, timeout)

    with pytest.raises(RunFailed, match="0 sites succeeded") as caught:
        run_in_process(summed, 4, kind=Lying)
    assert "the sum's length" in str(caught.value) or "sum" in str(caught.value)


def test_a_reply_without_masks_counts_for_nothing(summed: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: a site that sends what it would send in a run of plain uploads."""

    class Bare(InProcessTransport):
        def deliver(self, node: int, task: Task, content: Any) -> Any:
            record = super().deliver(node, task, content)
            if isinstance(task, TrainTask) and node == 1:
                reply = decode_reply(record, self._layout_of_round(1), task.run, task.round_number)
                assert isinstance(reply, TrainResult)
                return encode_reply(replace(reply, words=b"", contribution=task.state))
            return record

    with pytest.raises(RunFailed, match=r"site-1|node 1"):
        run_in_process(summed, 4, kind=Bare)


class Asking(Watched):
    """Counts the keys that are asked for by round, and keeps the last of its kind."""

    last: Asking

    def __init__(self, *own: Any) -> None:
        super().__init__(*own)
        self.asked: list[tuple[int, int, int]] = []
        type(self).last = self

    def deliver(self, node: int, task: Task, content: Any) -> Any:
        if isinstance(task, KeyTask):
            self.asked.append((node, task.round_number, task.attempt))
        return super().deliver(node, task, content)


def test_keys_of_the_next_round_come_with_the_vectors(summed: dict[str, Any]) -> None:
    folder = run_in_process({**summed, "rounds": 3}, 4, run="1", kind=Asking)
    assert Asking.last.asked == [(node, 1, 0) for node in range(4)]
    assert [line.attempts for line in read_lines(RoundLine, folder)] == [1, 1, 1]
    replies = [reply for _, task, reply in Asking.last.sent if isinstance(task, TrainTask)]
    layout = Asking.last._layout_of_round(1)
    offers = [
        result.offer
        for number, reply in zip([1] * 4 + [2] * 4 + [3] * 4, replies, strict=True)
        if isinstance(result := decode_reply(reply, layout, "1", number), TrainResult)
    ]
    assert [offer is not None for offer in offers] == [True] * 8 + [False] * 4, "a key of a round that is not there"
    assert len({offer.public for offer in offers if offer}) == 8


def test_a_node_that_lost_its_key_is_asked_for_one_in_the_next_attempt(summed: dict[str, Any]) -> None:
    class Restarted(Asking):
        def deliver(self, node: int, task: Task, content: Any) -> Any:
            if isinstance(task, TrainTask) and (node, task.round_number, task.attempt) == (3, 2, 0):
                self._memories[3].clear()
            return super().deliver(node, task, content)

    folder = run_in_process(summed, 4, kind=Restarted)
    first, second = read_lines(RoundLine, folder)
    assert (first.attempts, second.attempts) == (1, 2)
    assert [(f.site, f.kind) for f in second.failures] == [("site-3", "task")]
    assert Restarted.last.asked == [(node, number, number - 1) for number in (1, 2) for node in range(4)]
    # The three others have paid for the attempt that was thrown away; the one that had no key has not.
    assert [len(rows) for rows in spent(folder).values()] == [3, 3, 3, 2]


def test_a_site_that_cannot_pay_for_the_next_round_sends_no_key_and_says_so_when_asked(clinics: SumSite) -> None:
    clinics.rule(max_rounds=1)
    assert clinics.train(1).offer is None
    reply = clinics.key(2)
    assert isinstance(reply, Refusal)
    assert (reply.kind, "max-rounds" in reply.reason) == ("policy", True)
    clinics.rule(max_rounds=2)
    assert isinstance(clinics.key(2), KeyReply)


@pytest.mark.parametrize("broken", ["check_budget", "next_key"])
def test_a_vector_that_is_paid_for_leaves_whatever_fails_on_the_way_to_the_next_key(
    broken: str, clinics: SumSite, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    task = clinics.task(1)

    def fail(*_: Any) -> None:
        raise OSError("PRIVATE-WORDS")

    monkeypatch.setattr(f"fedveil.client.process.{broken}", fail)
    reply = clinics.site.ask(task)
    assert isinstance(reply, TrainResult), f"a paid vector is lost: {reply}"
    assert reply.offer is None
    assert "no key for the next round" in caplog.text
    assert "PRIVATE-WORDS" not in caplog.text


def test_a_reply_that_has_a_key_and_no_vector_is_refused(clinics: SumSite) -> None:
    reply = clinics.train(1)
    assert reply.offer is not None
    again = decode_reply(encode_reply(reply), {"sum": {"words": (len(reply.words) // 4,)}}, "1", 1)
    assert again == reply
    plain = encode_reply(replace(reply, words=b""))
    with pytest.raises(ProtocolError, match="a key of a secure sum and no vector"):
        decode_reply(plain, {}, "1", 1)


@pytest.mark.parametrize("length", [0, -4])
def test_a_vector_of_another_length_costs_the_attempt(length: int, summed: dict[str, Any]) -> None:
    class Short(InProcessTransport):
        def deliver(self, node: int, task: Task, content: Any) -> Any:
            record = super().deliver(node, task, content)
            if isinstance(task, TrainTask) and node == 1:
                nonce = record.config_records["header"]["nonce"]
                data = nonce + block_data(record.array_records["sum"]["words"])[:length]
                record["sum"] = ArrayRecord({"words": Array("uint32", (len(data) // 4,), WORDS_STYPE, data)})
            return record

    with pytest.raises(RunFailed, match=r"bytes, [0-9]+ are expected"):
        run_in_process(summed, 4, kind=Short)
    paid = spent(next(Path(summed["output"]).iterdir()))
    assert {tuple(rows) for rows in paid.values()} == {((1, "summed-gaussian"),) * 2}

"""Rounds under faults, in one process: quorum, retries, hostile replies. Good work counts whatever one site does."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_rounds import Faulty, faulty, plain
from made_run import told as stating
from safetensors.torch import load_file

from fedveil.common.errors import ConfigError, RunFailed
from fedveil.common.files import length
from fedveil.common.messages.formats import Float32
from fedveil.common.messages.round import (
    KeyReply,
    KeyTask,
    NoisedCount,
    Refusal,
    Reply,
    Spending,
    SumReply,
    Task,
    TrainResult,
    TrainTask,
)
from fedveil.common.messages.state import AdapterState
from fedveil.common.messages.tensors import apply
from fedveil.common.messages.wire import decode_reply, encode_reply
from fedveil.common.run_lines import Absence, ConfigFile, PrivacyLine, ResultFile, RoundLine, read_file, read_lines
from fedveil.common.words import LONGEST_REASON, clean
from fedveil.experiments.in_process import InProcessTransport, run_in_process
from fedveil.privacy.accountant import TRAINING, Accountant
from fedveil.privacy.events import sampled_gaussian
from fedveil.privacy.secure_sum.attempt import KeyOffer
from fedveil.reports import report_of
from fedveil.server.app import in_short
from fedveil.server.collect.base import Collected
from fedveil.server.members import mark_of
from fedveil.server.replies import read_reply, refusal

pytestmark = pytest.mark.rough_prices

Tamper = Callable[[TrainResult], Any]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return {
        **load_file(str(folder / "adapter" / "adapter_model.safetensors")),
        **load_file(str(folder / "adapter" / "head.safetensors")),
    }


def same(left: Path, right: Path) -> bool:
    a, b = adapter(left), adapter(right)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Quorum, attempts, deadline


def test_a_round_below_quorum_asks_again_only_those_that_failed(toy_settings: dict[str, Any]) -> None:
    kind, made = faulty(lost={0: [1, 2]})
    settings = {**plain(toy_settings), "min-sites": 2}
    folder = run_in_process(settings, 3, "retried", kind)
    assert made[0].asked == [(1, [0, 1, 2]), (1, [1, 2]), (2, [0, 1, 2])]
    first = read_lines(RoundLine, folder)[0]
    assert (first.complete, first.attempts) == (True, 2)
    assert first.participants == ["site-0", "site-1", "site-2"]
    late = sorted(mark_of(node, "retried") for node in (1, 2))
    assert [(f.attempt, f.site, f.kind) for f in first.failures] == [(1, site, "late") for site in late]
    assert first.refusals == [], "a site that succeeded in the second attempt is no longer missing"
    assert same(folder, run_in_process(settings, 3, "whole")), "the retried round is not the round without a fault"


def test_a_site_that_counted_before_is_named_when_it_is_late_and_cannot_rename_itself(
    toy_settings: dict[str, Any],
) -> None:
    def refuse(result: TrainResult) -> Any:
        return encode_reply(Refusal(result.run, result.round_number, "site-2", "policy", "no"))

    for transport, kind in ((faulty(lost={1: [1]})[0], "late"), (hostile(refuse, from_round=2), "policy")):
        folder = run_in_process(plain(toy_settings), 3, kind, transport)
        (failure,) = read_lines(RoundLine, folder)[1].failures
        assert (failure.site, failure.kind) == ("site-1", kind)


def test_weights_follow_who_took_part(toy_settings: dict[str, Any]) -> None:
    kind, _ = faulty(lost={0: [2], 1: [2]})
    folder = run_in_process(plain(toy_settings), 3, "lost", kind)
    gone, _ = faulty(away={0: [2], 1: [2]})
    assert [line.participants for line in read_lines(RoundLine, folder)] == [["site-0", "site-1"]] * 2
    assert same(folder, run_in_process(plain(toy_settings), 3, "away", gone)), "a lost site still has a weight"


def test_a_reason_that_several_sites_have_is_told_once() -> None:
    full = in_short(
        "<class 'ray.exceptions.OutOfMemoryError'>:<'1 worker(s) were killed due to the node running low on memory. "
        "Memory on the node (IP: 192.0.2.2, ID: 09fe) was 22.44GB / 23.54GB (0.953110), which exceeds the threshold"
    )
    assert full.startswith(
        "this machine's memory is full (22.44 of 23.54 GB), so Ray ended a worker: end other programs"
    )
    assert in_short("no answer") == "no answer"
    told = [("site-0", full), ("site-1", full), ("site-2", "no answer")]
    got = Collected(refusals={i: Absence(1, 2, site, "failed", why) for i, (site, why) in enumerate(told)})
    assert got.too_few(1) == (
        f"round 1: 0 sites succeeded, 1 needed. site-0, site-1 (failed): {full}; site-2 (failed): no answer"
    )


def test_a_run_below_quorum_stops_with_a_reason_and_keeps_what_was_trained(toy_settings: dict[str, Any]) -> None:
    kind, made = faulty(lost={1: [1], 2: [1], 3: [1]})
    settings = {**plain(toy_settings), "min-sites": 2, "round-retries": 2, "rounds": 3}
    with pytest.raises(RunFailed, match=r"round 2: 1 site succeeded in 3 attempts, 2 needed. site-1 \(late\)"):
        run_in_process(settings, 2, "short", kind)
    assert made[0].asked[1:] == [(2, [0, 1]), (2, [1]), (2, [1])]
    folder = Path(settings["output"]) / "ffa-lora-short"
    result = read_file(ResultFile, folder)
    assert (result.status, result.reached and result.reached.rounds) == ("failed", 1)
    assert "resume" in result.reason
    last = read_lines(RoundLine, folder)[-1]
    assert (last.round_number, last.complete, last.participants) == (2, False, [])
    assert [f.attempt for f in last.failures] == [1, 2, 3]
    whole = run_in_process({**settings, "rounds": 3}, 2, "one", faulty(lost={})[0])
    assert not same(folder, whole), "the test cannot tell one round from three"
    assert (folder / "report.md").is_file()
    resumed = run_in_process({**settings, "resume": "short"}, 2, "again")
    assert resumed == folder
    assert [(r.round_number, r.complete) for r in read_lines(RoundLine, folder)] == [
        *((1, True), (2, False), (2, True), (3, True)),
    ]
    assert same(resumed, whole)


def test_nobody_is_asked_and_charged_while_a_quorum_is_out_of_reach(toy_settings: dict[str, Any]) -> None:
    kind, made = faulty(away={0: [1], 1: [1]})
    with pytest.raises(RunFailed, match=r"1 site could be asked, 2 more are needed"):
        run_in_process({**toy_settings, "min-sites": 2}, 2, "few", kind)
    assert made[0].asked == []
    assert not list(Path(toy_settings["output"]).glob("*/ledgers/*"))


def test_a_site_that_joins_late_or_comes_back_takes_part_from_the_next_round(toy_settings: dict[str, Any]) -> None:
    kind, _ = faulty(away={0: [2], 1: [0]})
    lines = read_lines(RoundLine, run_in_process({**plain(toy_settings), "rounds": 3}, 3, "late", kind))
    assert [line.participants for line in lines] == [
        ["site-0", "site-1"],
        ["site-1", "site-2"],
        ["site-0", "site-1", "site-2"],
    ]


# Hostile replies: node 1 lies, nodes 0 and 2 are good


def hostile(tamper: Tamper, from_round: int = 1) -> type[InProcessTransport]:
    class Hostile(InProcessTransport):
        def deliver(self, node: int, task: TrainTask, content: Any) -> Any:
            record = super().deliver(node, task, content)
            if node != 1 or task.round_number < from_round:
                return record
            honest: Reply = decode_reply(record, self._layout_of_round(task.round_number), task.run, task.round_number)
            assert isinstance(honest, TrainResult)
            sent = tamper(honest)
            return encode_reply(sent) if isinstance(sent, TrainResult) else sent

    return Hostile


def scaled(factor: float) -> Tamper:
    return lambda r: replace(r, contribution=apply(lambda t: t + factor, r.contribution))


def spending(**changes: Any) -> Tamper:
    return lambda r: replace(r, spending=stating(r.spending, **changes) if r.spending else None)


def counted(noise_std: float) -> Tamper:
    return lambda r: replace(r, noised_correct=NoisedCount(20.0, noise_std))


def record_of(change: Callable[[Any], None]) -> Tamper:
    def tamper(result: TrainResult) -> Any:
        record = encode_reply(result)
        change(record)
        return record

    return tamper


def more_tensors(result: TrainResult) -> TrainResult:
    state: AdapterState = {f"{layer}.{i}": f for layer, f in result.contribution.items() for i in range(100)}
    return replace(result, contribution=state)


def wide(record: Any) -> None:
    from flwr.app import Array, ArrayRecord

    record["adapter"] = ArrayRecord({"state": Array("float32", (1000000,), Float32.stype, bytes(4000000))})


def nothing(record: Any) -> None:
    record.clear()


def garbage(record: Any) -> None:
    record["header"]["body"] = b"\xff\xfe garbage" * 50


LIES: dict[str, tuple[Tamper, str, int]] = {
    "NaN": (scaled(float("nan")), "not finite", 1),
    "infinite": (scaled(float("inf")), "not finite", 1),
    "huge": (scaled(1e30), "norm", 1),
    "a hundred times too large": (scaled(100.0), "norm", 1),
    "another model's adapter": (
        lambda r: replace(r, contribution={f"other.{name}": f for name, f in r.contribution.items()}),
        "other layers",
        1,
    ),
    "wrong shapes": (
        lambda r: replace(r, contribution=apply(lambda t: torch.cat([t, t]), r.contribution)),
        "shapes",
        1,
    ),
    "100 times too many tensors": (more_tensors, "other layers", 1),
    "a payload that is too long": (record_of(wide), "bytes", 1),
    "no record at all": (record_of(nothing), "no header", 1),
    "garbage": (record_of(garbage), "", 1),
    "an old round": (lambda r: replace(r, round_number=1), "round 1", 2),
    "another run": (lambda r: replace(r, run="other"), "other", 1),
    "another site's name": (lambda r: replace(r, site="site-0"), "another node", 1),
    "no name": (lambda r: replace(r, site=" "), "names no site", 1),
    "a size that outweighs all others": (lambda r: replace(r, public_size=10**6 * r.public_size), "max-size-ratio", 1),
    "another size than before": (lambda r: replace(r, public_size=r.public_size + 1), "public size", 2),
}


def liar(lies: Mapping[str, tuple[Tamper, str, int]]) -> tuple[type[InProcessTransport], dict[int, str]]:
    """Return a transport whose node 1 tells a lie a round, and the rounds' lies.

    First come those that need no past; then, after an honest round, the others.
    """
    new, known = ([lie for lie, (*_, first) in lies.items() if first == number] for number in (1, 2))
    lie_of = dict(enumerate(new, 1)) | dict(enumerate(known, len(new) + 2))

    def tamper(result: TrainResult) -> Any:
        return lies[lie_of[result.round_number]][0](result) if result.round_number in lie_of else result

    return hostile(tamper), lie_of


def test_lies_are_dropped_named_and_change_no_bit(toy_settings: dict[str, Any]) -> None:
    kind, lie_of = liar(LIES)
    settings = {**plain(toy_settings), "rounds": max(lie_of), "evaluate-every": max(lie_of)}
    folder = run_in_process(settings, 3, "lie", kind)
    for line in read_lines(RoundLine, folder):
        lie = lie_of.get(line.round_number, "")
        assert line.participants == (["site-0", "site-2"] if lie else ["site-0", "site-1", "site-2"]), lie
        if lie:
            (failure,) = line.failures
            assert failure.kind == ("late" if lie == "an old round" else "reply"), lie
            assert LIES[lie][1] in failure.reason, f"the records do not say what was wrong: {failure.reason}"
            assert len(failure.reason) <= LONGEST_REASON
    gone, _ = faulty(away={number - 1: [1] for number in lie_of})
    assert same(folder, run_in_process(settings, 3, "good", gone)), "the good replies imply another adapter"


PRIVATE_LIES: dict[str, tuple[Tamper, str, int]] = {
    "no spending": (lambda r: replace(r, spending=None), "no privacy spending", 1),
    "less noise": (spending(noise_multiplier=0.1), "noise multiplier", 1),
    "a higher rate": (spending(sample_rate=0.9), "sample rate", 1),
    "a larger clip": (spending(clip_norm=5.0), "clip norm", 1),
    "another delta": (spending(delta=0.1), "delta", 1),
    "a larger budget": (spending(epsilon_budget=100.0), "budget", 1),
    "more than the budget, and some left": (spending(epsilon_total=9.0), "remainder", 1),
    "fewer steps": (spending(steps_round=1), "steps", 1),
    "a total that goes back": (spending(epsilon_round=0.0, epsilon_total=0.01), "went back", 2),
    "a noise beyond arithmetic": (spending(noise_multiplier=1e200), "noise multiplier 1e+200 is above", 1),
    "a count's noise beyond arithmetic": (counted(1e200), "noise of the count 1e+200 is above", 1),
    "a count with hardly any noise": (counted(1e-9), "noise of the count", 1),
    "a remainder beyond arithmetic": (spending(epsilon_remaining=1e306), "remainder", 1),
    "a round dearer than all rounds": (spending(epsilon_round=1e306), "price of the round", 1),
    "a rate of 0": (spending(sample_rate=0.0), "above 0", 1),
    "a delta of 0": (spending(delta=0.0), "above 0", 1),
    "huge under privacy": (scaled(1e6), "norm", 1),
}


def test_spendings_that_contradict_the_run_are_dropped(toy_settings: dict[str, Any]) -> None:
    kind, lie_of = liar(PRIVATE_LIES)
    settings = {**toy_settings, "rounds": max(lie_of), "evaluate-every": max(lie_of)}
    folder = run_in_process(settings, 3, "lie", kind)
    told = {(line.round_number, line.site) for line in read_lines(PrivacyLine, folder)}
    for line in read_lines(RoundLine, folder):
        if lie := lie_of.get(line.round_number):
            words = PRIVATE_LIES[lie][1]
            assert line.participants == ["site-0", "site-2"], lie
            assert words in line.failures[0].reason, lie
            # Whatever an update that is too long holds, its price is that of an honest one, and it was sent.
            believed = words == "norm"
            assert ((line.round_number, "site-1") in told) == believed, f"believed in the privacy records: {lie}"


def test_a_spending_in_a_run_without_privacy_is_no_claim(toy_settings: dict[str, Any]) -> None:
    spent = Spending(TRAINING, sampled_gaussian(0.8, 0.1), 2, 2, 1e-3, 0.5, 1.5, 8.0, 6.5, Accountant("pld", "0.6.0"))
    folder = run_in_process(plain(toy_settings), 3, "lie", hostile(lambda r: replace(r, spending=spent)))
    assert "without privacy" in read_lines(RoundLine, folder)[0].failures[0].reason


def test_unknown_records_in_a_good_reply_are_never_looked_at(toy_settings: dict[str, Any]) -> None:
    from flwr.app import MetricRecord

    def add(record: Any) -> None:
        record["more"] = MetricRecord({"a": 1.0})

    folder = run_in_process(plain(toy_settings), 3, "more", hostile(record_of(add)))
    assert same(folder, run_in_process(plain(toy_settings), 3, "whole"))


def test_a_name_stays_with_the_node_that_had_it(toy_settings: dict[str, Any]) -> None:
    """Node 1 takes site-2's name; it comes first by number, but the name was node 2's in round 1."""
    kind = hostile(lambda r: replace(r, site="site-2"), from_round=2)
    folder = run_in_process(plain(toy_settings), 3, "named", kind)
    gone, _ = faulty(away={1: [1]})
    assert same(folder, run_in_process(plain(toy_settings), 3, "good", gone)), "a name was taken over"


@pytest.mark.parametrize("way", ["result", "refusal"])
def test_what_is_sent_in_another_sites_name_is_recorded_under_the_senders_number(
    toy_settings: dict[str, Any], way: str
) -> None:
    """Node 1 has not counted yet and says that it is site-2, which is late in round 2 and goes on in round 3."""

    class Impostor(Faulty):
        away: Mapping[int, Collection[int]] = {0: [1]}
        lost: Mapping[int, Collection[int]] = {1: [2]}

        def deliver(self, node: int, task: TrainTask, content: Any) -> Any:
            record = super().deliver(node, task, content)
            if node != 1:
                return record
            if way == "refusal":
                return encode_reply(Refusal(task.run, task.round_number, "site-2", "policy", "never"))
            honest = decode_reply(record, self._layout_of_round(task.round_number), task.run, task.round_number)
            return encode_reply(replace(honest, site="site-2"))

    folder = run_in_process({**plain(toy_settings), "rounds": 3}, 3, way, Impostor)
    lines = read_lines(RoundLine, folder)
    assert [line.participants for line in lines] == [["site-0", "site-2"], ["site-0"], ["site-0", "site-2"]]
    late, kind = ("site-2", "late"), "reply" if way == "result" else "policy"
    told = [[(f.site, f.kind) for f in line.failures] for line in lines]
    assert told == [[], [(mark_of(1, way), kind), late], [(mark_of(1, way), kind)]]


def test_a_node_is_not_recorded_by_a_name_that_went_back_to_its_owner(toy_settings: dict[str, Any]) -> None:
    """Node 1 counts as site-1 and goes offline; node 2 counts as site-1; then both are online."""
    sizes: dict[int, int] = {}

    class StartedAgain(Faulty):
        away: Mapping[int, Collection[int]] = {0: [2], 1: [1]}

        def deliver(self, node: int, task: TrainTask, content: Any) -> Any:
            record = super().deliver(node, task, content)
            honest = decode_reply(record, self._layout_of_round(task.round_number), task.run, task.round_number)
            assert isinstance(honest, TrainResult)
            sizes[node] = honest.public_size
            return encode_reply(replace(honest, site="site-1", public_size=sizes[1]) if node == 2 else honest)

    folder = run_in_process({**plain(toy_settings), "rounds": 3}, 3, "again", StartedAgain)
    lines = read_lines(RoundLine, folder)
    assert [line.participants for line in lines] == 3 * [["site-0", "site-1"]]
    assert [[f.site for f in line.failures] for line in lines] == [[], [], [mark_of(2, "again")]]


def test_max_update_norm_is_a_bound_of_its_own(toy_settings: dict[str, Any]) -> None:
    with pytest.raises(RunFailed, match=r"norm .* is above 1e-06"):
        run_in_process({**plain(toy_settings), "max-update-norm": 1e-6}, 2)


def test_a_reply_that_does_not_count_for_what_it_holds_was_paid_for(toy_settings: dict[str, Any]) -> None:
    settings = {**toy_settings, "rounds": 2}
    folder = run_in_process(settings, 3, "larger", hostile(scaled(1e6), from_round=2))
    last, paid = read_lines(RoundLine, folder)[-1], read_lines(PrivacyLine, folder)
    assert (last.participants, [failure.kind for failure in last.failures]) == (["site-0", "site-2"], ["reply"])
    assert [line.site for line in paid if line.round_number == 2] == ["site-1", "site-0", "site-2"]
    site = report_of(folder).sites[1]
    assert (site.rounds_joined, site.agreement) == (1, "agrees")
    assert site.epsilon_total == max(line.spent.epsilon_total for line in paid if line.spent)


def test_a_site_may_be_larger_than_the_others_within_the_ratio(toy_settings: dict[str, Any]) -> None:
    large = hostile(lambda r: replace(r, public_size=10**6 * r.public_size))
    folder = run_in_process({**plain(toy_settings), "max-size-ratio": 1e7}, 3, "large", large)
    assert read_lines(RoundLine, folder)[0].participants == ["site-0", "site-1", "site-2"]


def test_a_hostile_reason_fills_neither_disk_nor_terminal(toy_settings: dict[str, Any]) -> None:
    assert clean("a\x1b[31m\nb" * 10000).isprintable()
    assert len(clean("x" * 10**6)) == LONGEST_REASON


def test_a_refusal_s_reason_is_cleaned_and_a_reply_that_breaks_its_reader_is_one() -> None:
    task = TrainTask("run", 1, {}, {}, "", "", "")
    told = encode_reply(Refusal("run", 1, "site-1", "policy", "no\x1b[31m\nmore"))
    assert read_reply(told, {}, task, 7) == Refusal("run", 1, "site-1", "policy", "no?[31m more")
    broken = Refusal("run", 1, mark_of(7, "run"), "reply", "the message cannot be read (AttributeError)")
    assert read_reply(object(), {}, task, 7) == broken


def test_what_is_said_of_a_node_is_cleaned_as_its_own_words_are() -> None:
    """Flower hands on the words of a node that failed: they are as hostile as a reply's."""
    told = refusal(TrainTask("run", 1, {}, {}, "", "", ""), 7, "failed", "no\x1b[31m\nmore " * 1000)
    assert (told.site, told.kind, told.reason[:19]) == (mark_of(7, "run"), "failed", "no?[31m more no?[31")
    assert told.reason.isprintable()
    assert len(told.reason) <= LONGEST_REASON


@pytest.mark.parametrize(
    ("run", "number", "kind"), [("run", 1, "late"), ("other", 2, "reply"), ("run", 3, "reply"), ("run", 0, "reply")]
)
def test_a_reply_is_late_if_it_is_of_an_earlier_round_and_else_it_is_wrong(run: str, number: int, kind: str) -> None:
    task = TrainTask("run", 2, {}, {}, "", "", "")
    for told in (TrainResult(run, number, "site-1", 10, {}, None), Refusal(run, number, "site-1", "policy", "no")):
        got = read_reply(encode_reply(told), {}, task, 7)
        assert isinstance(got, Refusal)
        assert (got.round_number, got.site, got.kind) == (2, mark_of(7, "run"), kind)


@pytest.mark.parametrize("site", ["", " ", "\u00a0\u3000"])
def test_whatever_is_asked_a_reply_without_a_name_is_refused(site: str) -> None:
    train, key = TrainTask("run", 1, {}, {}, "", "", ""), KeyTask("run", 1, 0)
    asked: list[tuple[Task, Reply | SumReply]] = [
        (train, TrainResult("run", 1, site, 10, {}, None)),
        (train, Refusal("run", 1, site, "policy", "no")),
        (key, KeyReply("run", 1, site, KeyOffer(site, bytes(32), bytes(64)))),
        (key, Refusal("run", 1, site, "policy", "no")),
    ]
    for task, reply in asked:
        got = read_reply(encode_reply(reply), {}, task, 7)
        assert isinstance(got, Refusal)
        assert (got.site, got.kind) == (mark_of(7, "run"), "reply"), reply


def test_a_vector_of_a_sum_is_taken_where_one_was_asked_for_and_tensors_where_they_were() -> None:
    plain = TrainTask("run", 1, {}, {}, "", "", "")
    summed = replace(plain, offers=(KeyOffer("site-1", bytes(32), bytes(64)),))
    tensors = TrainResult("run", 1, "site-1", 10, {"layer": {"B": torch.ones(1)}}, None)
    vector = replace(tensors, contribution={}, words=bytes(4))
    for task, right, wrong in ((plain, tensors, vector), (summed, vector, tensors)):
        assert read_reply(encode_reply(right), {"layer": {"B": (1,)}}, task, 7) == right
        got = read_reply(encode_reply(wrong), {"layer": {"B": (1,)}}, task, 7)
        assert isinstance(got, Refusal)
        assert "against what was asked for" in got.reason


# Resuming refuses what it must


def test_a_run_does_not_go_on_with_other_settings_and_says_which(toy_settings: dict[str, Any]) -> None:
    kind, _ = faulty(lost={1: [0, 1], 2: [0, 1]})
    with pytest.raises(RunFailed):
        run_in_process(plain(toy_settings), 2, "x", kind)
    folder = Path(toy_settings["output"]) / "ffa-lora-x"
    before = {name: length(folder / name) for name in ("rounds.jsonl", "result.json", "checkpoint.safetensors")}
    with pytest.raises(ConfigError, match=r"resume: training.local-steps is 3, the run was started with 2"):
        run_in_process({**plain(toy_settings), "training.local-steps": 3, "resume": "x"}, 2)
    assert before == {name: length(folder / name) for name in before}, "a refused resumption touched the run"
    run_in_process({**plain(toy_settings), "round-timeout": 5.0, "resume": str(folder)}, 2)
    with pytest.raises(ConfigError, match=r"is complete"):
        run_in_process({**plain(toy_settings), "resume": "x"}, 2)
    with pytest.raises(ConfigError, match=r"holds no checkpoint"):
        run_in_process({**plain(toy_settings), "resume": "y"}, 2)
    assert read_file(ConfigFile, folder).resumed

"""Runs whose server sees a sum and no part of it: what it gets, what a site refuses, what both prices are."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from typer.testing import CliRunner

from audits.bands import out_of_band, related
from audits.faults import DOUBLED, SOUND, Fault, zero_noise
from audits.sum_site import SumSite
from audits.summed import CELLS, SHIFTS, noise_again, unevenness
from audits.tiny_site import clinic
from faults.faulty_server import lying
from faults.sum_scenarios import SERVER_LIES, wrong_after_a_lie
from fedveil.cli.main import app
from fedveil.client import app as client_app
from fedveil.client import sums
from fedveil.client.cache import RecordCache
from fedveil.client.ledger.ledger import Ledger
from fedveil.client.ledger.sums import Sums
from fedveil.client.rehearsals import Rehearsals
from fedveil.common.config.sections import Scalar
from fedveil.common.errors import ConfigError, MechanismError, ProtocolError, RunFailed
from fedveil.common.messages.round import KeyReply, KeyTask, Refusal, Task, TrainResult, TrainTask
from fedveil.common.messages.state import HEAD
from fedveil.common.messages.tensors import entries
from fedveil.common.messages.wire import WORDS_STYPE, block_data, decode_reply, encode_reply, encode_task
from fedveil.common.model.federated import FederatedModel
from fedveil.common.run_lines import Absence, PrivacyLine, ResultFile, RoundLine, read_file, read_lines
from fedveil.experiments.in_process import InProcessTransport, run_in_process
from fedveil.privacy import dpsgd, randomness
from fedveil.privacy.accounting import Release, alone
from fedveil.privacy.events import Event, sampled_gaussian
from fedveil.privacy.figures import epsilon_text
from fedveil.privacy.plan import PrivacyPlan
from fedveil.privacy.privacy_filter import promised
from fedveil.privacy.randomness import noise_grid
from fedveil.privacy.secure_sum import AttemptName, Identity, Roster, SiteAttempt, noise_share, rounding, total
from fedveil.privacy.shared_noise import SecureSumPlan
from fedveil.reports import federation_epsilon, markdown_report, report_of
from fedveil.server import checkpoint
from fedveil.server.collect import masked_sum
from fedveil.server.collect.base import Collected
from fedveil.strategies.job import configure

pytestmark = [pytest.mark.rough_prices, pytest.mark.one_length]

SUMMED: dict[str, Any] = {
    "privacy.mode": "secure-sum",
    "privacy.honest-sites": 2,
    "privacy.noise-multiplier": 2.0,
    "privacy.epsilon": 40.0,
    "training.optimizer": "sgd",
    "training.learning-rate": 0.5,
    "training.local-steps": 1,
    "training.sample-rate": 0.25,
}


@pytest.fixture
def summed(toy_settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings of a run of two rounds whose sites share the noise of a sum."""
    return {**toy_settings, **SUMMED}


def spent(folder: Path) -> dict[str, list[tuple[int, str]]]:
    """Return round and kind of everything in each site's ledger."""
    found = {}
    for path in sorted((folder / "ledgers").glob("*.sqlite")):
        with Ledger(path) as ledger:
            found[path.stem] = [(entry.round_number, entry.event.kind) for entry in ledger.entries()]
    return found


def no_noise(sums: torch.Tensor, std: float, step: float = 0.0) -> torch.Tensor:
    """Round without noise."""
    grid = step or noise_grid(std)
    return (sums / grid).round() * grid


# --- what the server gets ---------------------------------------------------------------------------------------------


HEAD_LAST: dict[str, Any] = {"rounds": 3, "phases": "2 adapter on jacobians, 1 head on features"}
HEAD_FIRST = "2 head on features, 2 adapter on jacobians, 1 head on features"


def last_adapter(folder: Path) -> torch.Tensor:
    state = checkpoint._read(folder / checkpoint.NAME)[1]
    return torch.cat([tensor.double().flatten() for _, _, tensor in entries(state.adapter)])


@pytest.mark.parametrize("phases", [{}, HEAD_LAST, {"rounds": 5, "phases": HEAD_FIRST}])
def test_without_noise_a_round_is_that_of_plain_uploads(
    summed: dict[str, Any], phases: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounding, "add_private_noise", no_noise)
    monkeypatch.setattr(dpsgd, "add_private_noise", zero_noise)
    same = {**summed, **phases, "training.sample-rate": 1.0, "max-share": 1.0, "max-update-norm": 1e9}
    masked = run_in_process(same, 4, run="sum")
    plain = {**same, "privacy.mode": "dp-sgd", "privacy.honest-sites": 0}
    wanted = last_adapter(run_in_process(plain, 4, run="plain"))
    begun = run_in_process({**plain, "training.learning-rate": 1e-9}, 4, run="start")
    start = last_adapter(begun)
    moved = float((wanted - start).norm())
    assert float((last_adapter(masked) - wanted).norm()) < 1e-3 * moved  # the grid is a thousandth of the noise


def test_a_run_ends_in_a_report_with_both_prices(summed: dict[str, Any]) -> None:
    folder = run_in_process(summed, 4)
    assert spent(folder) == {f"site-{i}": [(1, "summed-gaussian"), (2, "summed-gaussian")] for i in range(4)}
    report = report_of(folder)
    assert [site.agreement for site in report.sites] == ["agrees"] * 4
    reached = read_file(ResultFile, folder).reached
    assert reached is not None
    assert (reached.epsilon, reached.honest_sites) == (report.headline.epsilon, 2)
    share = noise_share(2.0, 1.0, 2)
    bare = promised([dataclasses.replace(r, event=sampled_gaussian(share, 0.25)) for r in releases(folder)], 1e-3)[0]
    assert report.sites[0].epsilon_alone == pytest.approx(bare, abs=1e-6)
    assert report.sites[0].epsilon_worst is not None
    assert bare > 1.3 * report.sites[0].epsilon_worst
    assert (
        "as long as 2 sites of each sum are honest (h = 2). The sums of this run that counted cost, at the same δ, "
        f"if no other site adds its noise, or the masks fail (alone): ε {epsilon_text(bare)}; if 3 sites of each "
        "sum are honest (h = 3): ε" in report.claim.sentence
    )
    assert "if all 4 sites of each sum are honest (h = 4): ε" in report.claim.sentence
    told_by_report = markdown_report(folder)
    assert "second price" in told_by_report
    assert "A person with several records at one site or at several of one sum has a larger ε" in told_by_report
    told = [json.loads(line)["message"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert sum("worst site, h = 2)" in line for line in told) == 2
    assert not [line for line in told if "ε" in line and "h = 2" not in line]
    ledger = str(folder / "ledgers" / "site-0.sqlite")
    alone = f"if no other site adds its noise to a sum (alone): ε {epsilon_text(bare, decimals=4)}"
    for words in (["show", ledger], ["remaining", ledger, "--dataset", "site-0", "--epsilon", "40"]):
        headline = CliRunner().invoke(app, ["ledger", *words]).output.splitlines()[0]
        assert f", counting on h = 2 honest sites of each sum; {alone}" in headline


@pytest.mark.parametrize(("honest", "colluders", "lost"), [(1, 2, False), (2, 1, False), (2, 1, True)])
def test_a_report_says_what_the_sums_cost_if_all_their_sites_are_honest(
    honest: int, colluders: int, lost: bool, summed: dict[str, Any]
) -> None:
    """By the round with fewest sites: where one of four is lost, three add noise."""

    class Losing(InProcessTransport):
        def nodes(self, wanted: int, besides: Any) -> list[int]:
            return super().nodes(wanted, besides)[: 3 if lost else 4]

    own = {"privacy.honest-sites": honest, "privacy.colluders": colluders}
    folder = run_in_process({**summed, **own}, 4, kind=Losing)
    sites, report = 3 if lost else 4, report_of(folder)
    noise = 2.0 * (sites / honest) ** 0.5
    wanted = promised([dataclasses.replace(r, event=sampled_gaussian(noise, 0.25)) for r in releases(folder)], 1e-3)[0]
    found = report.sites[0]
    assert found.epsilon_all_honest == pytest.approx(wanted, abs=1e-6)
    assert found.epsilon_recomputed is not None
    assert wanted < found.epsilon_recomputed
    assert (
        f"if all {sites} sites of each sum are honest (h = {sites}): ε {epsilon_text(wanted)}" in report.claim.sentence
    )
    assert ("That holds whatever other sites do (h = 1)" in report.claim.sentence) == (honest == 1)
    if honest == 1:
        assert found.epsilon_alone == pytest.approx(found.epsilon_recomputed, abs=1e-3)
        assert "if no other site" not in report.claim.sentence.lower()


def test_a_round_0_that_sums_nothing_is_no_sum_of_no_sites(summed: dict[str, Any]) -> None:
    folder = run_in_process(summed, 4)
    wanted = report_of(folder).sites[0].epsilon_all_honest
    path = folder / RoundLine.NAME
    begun = {**json.loads(path.read_text().splitlines()[0]), "round": 0, "participants": []}
    path.write_text(f"{json.dumps(begun)}\n{path.read_text()}")
    assert wanted is not None
    assert report_of(folder).sites[0].epsilon_all_honest == wanted
    assert "if all 4 sites of each sum are honest" in report_of(folder).claim.sentence


def test_a_sum_has_no_noise_of_what_rests(summed: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen, read = list[tuple[int, int]](), masked_sum.total

    def spy(vectors: Any, std: float) -> torch.Tensor:
        found = read(vectors, std)
        seen.append((len(seen) + 1, found.numel()))
        return found

    monkeypatch.setattr(masked_sum, "total", spy)
    folder = run_in_process(
        {**summed, "rounds": 4, "phases": "1 head on features, 2 adapter on jacobians, 1 head on features"}, 4
    )
    state = checkpoint._read(folder / checkpoint.NAME)[1]
    trained = {k: sum(t.numel() for n, t in fs.items() if state.trains(k, n)) for k, fs in state.adapter.items()}
    head, below = trained.pop(HEAD), sum(trained.values())
    assert head
    assert seen == [(1, head), (2, below), (3, below), (4, head)]


def releases(folder: Path) -> list[Any]:
    with Ledger(folder / "ledgers" / "site-0.sqlite") as ledger:
        return ledger.spent("site-0")


@dataclass
class Lying(InProcessTransport):
    """Passes everything on, but for what a test changes."""


class Watched(InProcessTransport):
    """Keeps all that sites send."""

    sent: list[tuple[int, Task, Any]]

    def deliver(self, node: int, task: Task, content: Any) -> Any:
        record = super().deliver(node, task, content)
        if not hasattr(self, "sent"):
            self.sent = []
        self.sent.append((node, task, record))
        self.look(node, task, record)
        return record

    def look(self, node: int, task: Task, record: Any) -> None:
        """Look at a reply."""


def words_of(record: Any) -> np.ndarray:
    return np.frombuffer(block_data(record.array_records["sum"]["words"]), dtype="<u4")


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


# --- attempts ---------------------------------------------------------------------------------------------------------


class Losing(Watched):
    """Loses the vector of one site in the first attempt at round 1."""

    def deliver(self, node: int, task: Task, content: Any) -> Any:
        record = super().deliver(node, task, content)
        if isinstance(task, TrainTask) and (node, task.round_number, task.attempt) == (2, 1, 0):
            return encode_reply(Refusal(task.run, 1, "site-2", "failed", "the line is cut"))
        return record


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


# --- one deployed site ------------------------------------------------------------------------------------------------


@pytest.fixture
def clinics(summed: dict[str, Any], tmp_path: Path) -> SumSite:
    return SumSite(clinic({**summed, "privacy.delta": 1e-3}, tmp_path))


def own_noise(clinics: SumSite) -> torch.Tensor:
    """Return what a site adds to a sum into which it draws no record, over its share of the noise."""
    clinics.site.settings["training.sample-rate"] = 1e-6
    task = clinics.task()
    reply = clinics.site.ask(task)
    assert isinstance(reply, TrainResult), reply
    assert reply.spending is not None
    assert reply.contribution == {}
    return unmasked(clinics, task, reply)


def unmasked(clinics: SumSite, task: TrainTask, reply: TrainResult, clip: float = 1.0) -> torch.Tensor:
    """Return a site's vector without its masks, which the other sites of the attempt take off, over its share."""
    job, model = configure(clinics.site.settings), clinics.site.model()
    vectors = [np.frombuffer(reply.words, dtype="<u4").astype(np.uint32)]
    for other in clinics.others.values():
        other.agree(task.offers, clinics.roster, sums.terms_of(job, 50), sums._hashes(task, job, model))
        vectors.append(other.masked(np.zeros(len(vectors[0]), dtype=np.uint32)))
    share = noise_share(2.0, clip, 2)
    return total(vectors, share) / share


def test_a_sites_vector_has_its_share_of_noise(clinics: SumSite, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong() -> bool:
        # Of four vectors: in one alone, 562 numbers, one site more is missed in one run of twenty.
        noise = torch.cat([own_noise(clinics) for _ in range(4)])
        return out_of_band(float(noise.square().sum()), noise.numel())

    assert not wrong()
    # The planted fault: a share for one site more than is counted on.
    monkeypatch.setattr(SecureSumPlan, "noise_std", noise_share(2.0, 1.0, 3))
    assert wrong()


def test_a_margin_on_the_noise_is_on_a_sites_share_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """By one part in a hundred, as where rounding was never compared: of a million numbers that shows."""
    event = Event("summed-gaussian", {**sampled_gaussian(2.0, 0.25).figures, "honest_sites": 2})
    plan = SecureSumPlan(event, 10.0, 1e-3, 40.0)

    def beyond() -> bool:
        module = torch.nn.Linear(1000, 1000, bias=False)
        steps = plan.stepping()(module, torch.optim.SGD(module.parameters()), plan, noise_margin=1.01)
        steps.order = (module.weight,)
        with steps:
            steps.step([], lambda _: torch.zeros(0))
        assert steps.words is not None
        drawn = total([steps.words], plan.noise_std) / (1.01 * plan.noise_std)
        return out_of_band(float(drawn.square().sum()), drawn.numel())

    assert not beyond()

    def without(own: Any, plan: PrivacyPlan, margin: float) -> None:
        own.share, own.margin = plan.noise_std, 1.0

    monkeypatch.setattr(dpsgd.ClipAndShare, "read", without)
    assert beyond(), "the check is blind"


def test_a_round_of_a_sum_makes_no_second_sum_and_keeps_the_words_of_the_first() -> None:
    event = Event("summed-gaussian", {**sampled_gaussian(2.0, 0.25).figures, "honest_sites": 2})
    plan, module = SecureSumPlan(event, 10.0, 1e-3, 40.0), torch.nn.Linear(3, 2, bias=False)
    with plan.stepping()(module, torch.optim.SGD(module.parameters()), plan) as steps:
        steps.order = (module.weight,)
        steps.step([], lambda _: torch.zeros(0))
        first = steps.words
        with pytest.raises(MechanismError, match="a second sum was not paid for"):
            steps.step([], lambda _: torch.zeros(0))
        assert steps.words is first is not None
    assert "words" not in vars(module.weight), "a vector without its masks is left on the model"


def prices_at_first_use(clinics: SumSite, number: int, monkeypatch: pytest.MonkeyPatch) -> tuple[float, float]:
    """Return both prices that the ledger has as the first records of a round reach the model, made-up ones apart."""
    seen, losses, rehearse = list[tuple[float, float]](), FederatedModel.losses, Rehearsals.hold_to
    rehearsing = False

    def spy(model: FederatedModel, batch: Any) -> torch.Tensor:
        if not rehearsing and not seen:
            with Ledger(clinics.site.ledger) as ledger:
                seen.append((ledger.epsilon("clinic", 1e-3), ledger.epsilon_alone("clinic", 1e-3)))
        return losses(model, batch)

    def apart(*own: Any) -> None:
        nonlocal rehearsing
        rehearsing = True
        rehearse(*own)
        rehearsing = False

    with monkeypatch.context() as patched:
        patched.setattr(FederatedModel, "losses", spy)
        patched.setattr(Rehearsals, "hold_to", apart)
        patched.setattr(randomness, "private_poisson_sample", lambda size, rate: torch.arange(size))
        clinics.train(number)
    return seen[0]


def test_both_prices_are_written_before_a_record_is_used(clinics: SumSite, monkeypatch: pytest.MonkeyPatch) -> None:
    clinics.rule(epsilon=50.0, delta=1e-3)
    found = [prices_at_first_use(clinics, number, monkeypatch) for number in (1, 2)]
    with Ledger(clinics.site.ledger) as ledger:
        spent = ledger.spent("clinic")
        for number, prices in enumerate(found, start=1):
            paid = [dataclasses.replace(release, count=number) for release in spent]
            assert prices == (promised(paid, 1e-3)[0], promised(alone(paid), 1e-3)[0]), (
                "a record was used before it was paid"
            )
        assert {release.event.figures["honest_sites"] for release in spent} == {2.0}
        assert ledger.epsilon("clinic", 1e-3) == promised(spent, 1e-3)[0]
        assert ledger.epsilon_alone("clinic", 1e-3) == promised(alone(spent), 1e-3)[0] > 1.3 * promised(spent, 1e-3)[0]
    # The planted fault: the charge is written down elsewhere, and not here before the reply has left.
    charged = Ledger.charge

    def late(ledger: Ledger, *own: Any, **terms: Any) -> Any:
        with Ledger(ledger.path.with_name("late.sqlite")) as aside:
            return charged(aside, *own, **terms)

    monkeypatch.setattr(Ledger, "charge", late)
    assert prices_at_first_use(clinics, 3, monkeypatch) == found[1], "the check is blind"


def test_the_price_alone_has_a_ceiling_that_plain_rounds_count_to_as_well(clinics: SumSite) -> None:
    clinics.train(1)
    with Ledger(clinics.site.ledger) as ledger:
        once = ledger.epsilon_alone("clinic", 1e-3)
    clinics.rule(epsilon_alone=1.01 * once)
    reply = clinics.key(2)
    assert isinstance(reply, Refusal)
    assert (reply.kind, "epsilon-alone" in reply.reason) == ("budget", True)
    clinics.site.settings |= {"privacy.mode": "dp-sgd", "privacy.honest-sites": 0}
    assert "epsilon-alone" in clinics.site.refuse(2).reason
    clinics.rule(epsilon_alone=100.0)
    clinics.site.train(2)
    with Ledger(clinics.site.ledger) as ledger:
        kinds = {release.event.kind for release in ledger.spent("clinic")}
        assert kinds == {"summed-gaussian", "sampled-gaussian"}
        assert ledger.epsilon_alone("clinic", 1e-3) > 1.1 * once


def test_a_sum_that_no_longer_fits_the_budget_says_on_how_many_sites_its_price_counts(clinics: SumSite) -> None:
    clinics.train(1)
    with Ledger(clinics.site.ledger) as ledger:
        once, honest = ledger.epsilon("clinic", 1e-3), ledger.honest_sites("clinic")
    clinics.rule(epsilon=1.01 * once, delta=1e-3)
    reply = clinics.key(2)
    assert isinstance(reply, Refusal)
    assert re.search(rf"this would make it [\d.]+ \(h = {honest}\), the budget is", reply.reason), reply.reason


def test_the_price_alone_is_never_of_more_noise_than_a_site_draws() -> None:
    for honest in (1, 2, 3, 7, 50):
        for noise in (0.37, 1.9492, 2.0, 4.6164):
            event = Event("summed-gaussian", {**sampled_gaussian(noise, 0.3, 0.7).figures, "honest_sites": honest})
            assert event.alone().noise_multiplier * 0.7 <= noise_share(noise, 0.7, honest)
            assert event.alone().noise_multiplier == pytest.approx(noise / honest**0.5)
    assert sampled_gaussian(2.0, 0.3).alone() == sampled_gaussian(2.0, 0.3)


def test_the_price_of_more_honest_sites_is_never_of_more_noise_than_they_draw() -> None:
    for honest in (1, 2, 3, 7):
        for noise in (0.37, 1.9492, 2.0, 4.6164):
            event = Event("summed-gaussian", {**sampled_gaussian(noise, 0.3).figures, "honest_sites": honest})
            for sites in (1, 2, 5, 12):
                priced = event.of_honest(sites)
                drawn = sites * Fraction(noise_share(noise, 1.0, honest)) ** 2
                assert Fraction(priced.noise_multiplier) ** 2 <= drawn
                assert priced.noise_multiplier == pytest.approx(noise * (sites / honest) ** 0.5)
                assert priced.figures["honest_sites"] == sites


@pytest.mark.parametrize("fault", [SOUND, DOUBLED], ids=lambda fault: fault.name or "as it is")
def test_a_sum_without_one_record_is_nearer_than_a_clip_and_one_rounding_or_is_found(
    fault: Fault, clinics: SumSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deployed vector without noise and masks: of all records, and of all but one that is longer than a clip."""
    clip, records_of = 0.05, RecordCache.prepare
    clinics.site.settings["privacy.clip-norm"] = clip
    monkeypatch.setattr(rounding, "add_private_noise", no_noise)
    monkeypatch.setattr(randomness, "private_poisson_sample", lambda size, rate: torch.arange(size))

    def vector(number: int, left_out: int | None = None) -> torch.Tensor:
        def some(*own: Any) -> Any:
            records = records_of(*own)
            return [record for i, record in enumerate(records) if i != left_out]

        with monkeypatch.context() as patched:
            patched.setattr(RecordCache, "prepare", some)
            task = clinics.task(number)
            reply = clinics.site.ask(task)
        assert isinstance(reply, TrainResult), reply
        return unmasked(clinics, task, reply, clip) * noise_share(2.0, clip, 2)

    with fault.plant():
        whole = vector(1)
        moved = [float((whole - vector(2 + i, i)).norm()) / clip for i in range(3)]
    most = 1.0 + noise_grid(noise_share(2.0, clip, 2)) / clip * whole.numel() ** 0.5
    assert most < 1.2
    assert max(moved) > 0.9, "no record that is left out was longer than a clip"
    assert (max(moved) > most) == bool(fault.name), moved


def test_one_key_has_one_vector_whatever_is_lost(clinics: SumSite) -> None:
    task = clinics.task()
    kept = dict(clinics.site.memory)
    first = clinics.site.ask(task)
    assert isinstance(first, TrainResult)
    again = clinics.site.ask(task)
    assert isinstance(again, TrainResult)
    assert again.words == first.words, "the same task is answered with another vector"
    assert len(clinics.site.charges()) == 1
    # The node died after it had answered, and came up with what it had kept before.
    clinics.site.memory.clear()
    clinics.site.memory.update(kept)
    clinics.refuse(task, "was charged under this key of its masks before")
    clinics.site.memory.clear()
    clinics.refuse(task, "has no key for that attempt")


def test_a_key_of_the_memory_that_the_ledger_forgets_is_found(
    clinics: SumSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted fault: without the ledger's word a second vector leaves under one key."""
    monkeypatch.setattr(Sums, "use_key", lambda *own: None)
    task = clinics.task()
    kept = dict(clinics.site.memory)
    vectors = []
    for _ in range(2):
        clinics.site.memory.clear()
        clinics.site.memory.update(kept)
        reply = clinics.site.ask(task)
        assert isinstance(reply, TrainResult)
        vectors.append(np.frombuffer(reply.words, dtype="<u4").astype(np.uint32))
    bare = (vectors[0] - vectors[1]).view(np.int32).astype(np.float64) * noise_grid(noise_share(2.0, 1.0, 2))
    assert np.abs(bare).max() < 50, "the difference of two vectors under one mask is not bare"


def test_a_task_of_another_attempt_than_the_key_is_refused(clinics: SumSite) -> None:
    task = clinics.task()
    clinics.refuse(replace(task, attempt=1), "has no key for that attempt")
    clinics.refuse(replace(task, offers=()), "keys of a secure sum, or lacks them")
    clinics.refuse(replace(task, offers=task.offers[:2]), "need 3")
    assert isinstance(clinics.site.ask(task), TrainResult)


def test_lies_about_an_attempt_are_refused_and_cost_nothing(clinics: SumSite) -> None:
    early = clinics.task(1, attempt=0)
    stale = {offer.site: offer for offer in early.offers}
    task = clinics.task(1, attempt=1)
    clinics.refuse(early, "has no key for that attempt")
    clinics.refuse(replace(task, round_number=2), "has no key for that attempt")
    own, north, south = task.offers
    mole = SiteAttempt(AttemptName("1", 1, 1, clinics.roster.digest), "mole", Identity.new()).offer
    for offers, words in (
        ((own, stale["north"], south), "'north' is not signed by that site for this attempt"),
        ((stale["clinic"], north, south), "'clinic' is not signed by that site for this attempt"),
        ((own, north, replace(south, public=north.public)), "'south' is there twice"),
        ((own, north, replace(south, public=bytes(32))), "'south' is not signed"),
        ((own, north, south, mole), "'mole' is not in the roster"),
        ((north, south), "own key is not among those"),
    ):
        clinics.refuse(replace(task, offers=offers), words)
    assert clinics.site.ask(task).words, "a lie has taken the key away"  # type: ignore[union-attr]


def test_a_round_asked_again_with_other_sites_has_another_noise_and_another_charge(clinics: SumSite) -> None:
    """Without their masks: masked vectors differ whatever is below the masks."""
    clinics.site.settings["training.sample-rate"] = 1e-6  # no record, so that what is left is the site's noise
    folder = clinics.site.ledger.parent
    clinics.peers["east"] = Identity.new()
    clinics.roster = Roster({**clinics.roster.keys, "east": clinics.peers["east"].public})
    (folder / "peers.toml").write_text(clinics.roster.text())
    clinics.rule(honest_sites=4)
    everyone, vectors, noises = dict(clinics.peers), [], list[torch.Tensor]()

    def ask(attempt: int, left_out: str) -> None:
        clinics.peers = {name: peer for name, peer in everyone.items() if name != left_out}
        task = clinics.task(1, attempt=attempt)
        reply = clinics.site.ask(task)
        assert isinstance(reply, TrainResult), reply
        vectors.append(np.frombuffer(reply.words, dtype="<u4").astype(np.uint32))
        noises.append(unmasked(clinics, task, reply))
        assert len(clinics.site.charges()) == attempt + 1

    ask(0, "east")
    ask(1, "south")
    assert not uneven(vectors[0] - vectors[1]), "the difference of two attempts is no uniform words"
    assert uneven(vectors[0] - vectors[0]), "the check is blind"
    for noise in noises:
        assert not out_of_band(float(noise.square().sum()), noise.numel())
    assert not related(*noises), "the noise of one attempt is in the next one, too"
    with noise_again():  # the planted fault
        ask(2, "east")
        ask(3, "south")
    assert not uneven(vectors[2] - vectors[3]), "the masks alone make two vectors another"
    assert related(*noises[2:]), "the check is blind"


def uneven(words: np.ndarray) -> bool:
    return any(out_of_band(unevenness(words, shift), CELLS - 1) for shift in SHIFTS)


def test_a_key_is_given_for_the_run_of_the_message_alone(clinics: SumSite) -> None:
    """The budget of the run that the task names would be asked, by the settings of the one that the message is in."""
    own = clinics.site
    reply = client_app.answer(encode_task(KeyTask("2", 1, 0)), own.node, own.settings, "1", own.memory)
    assert isinstance(reply, Refusal)
    assert (reply.kind, "or of another run" in reply.reason) == ("task", True)
    assert not own.memory


def test_a_plain_run_takes_no_keys(clinics: SumSite) -> None:
    task = clinics.task()
    clinics.site.settings |= {"privacy.mode": "dp-sgd", "privacy.honest-sites": 0}
    clinics.refuse(task, "keys of a secure sum, or lacks them")
    reply = clinics.key()
    assert isinstance(reply, Refusal)
    assert "not summed" in reply.reason


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"honest_sites": 1}, "honest-sites"),
        ({"honest_sites": None, "peers": None, "epsilon_alone": None}, "honest-sites"),
        ({"honest_sites": None, "mechanisms": ["dp-sgd"]}, "mechanisms = dp-sgd; the run asks"),
        ({"min_noise_multiplier": 2.5}, "min-noise-multiplier"),
        ({"peers": "nowhere.toml"}, "cannot be read"),
    ],
)
def test_a_stewards_rules_hold_before_a_key_is_made(rules: dict[str, Any], words: str, clinics: SumSite) -> None:
    clinics.rule(**rules)
    reply = clinics.key()
    assert isinstance(reply, Refusal)
    assert words in reply.reason
    assert not clinics.site.memory


def test_a_server_that_chooses_the_sites_which_need_not_be_honest_is_refused(clinics: SumSite) -> None:
    """With privacy.colluders = 0 of the server's, three sites of five would do; two of them need not be honest."""
    folder = clinics.site.ledger.parent
    more = {name: Identity.new().public for name in ("east", "west")}
    (folder / "peers.toml").write_text(Roster({**clinics.roster.keys, **more}).text())
    clinics.roster = Roster({**clinics.roster.keys, **more})
    clinics.site.settings |= {"privacy.honest-sites": 3, "privacy.colluders": 0}
    clinics.rule(honest_sites=3)
    clinics.refuse(clinics.task(), "of a sum of 3 sites, of which 2 need not be honest")
    clinics.site.settings |= {"privacy.honest-sites": 2, "privacy.colluders": 1}
    clinics.refuse(clinics.task(), "of a sum of 3 sites, of which 2 need not be honest")
    clinics.rule(honest_sites=4)
    assert clinics.train().words
    # The planted fault: a site that believes the run's colluders.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sums.Party, "check_size", lambda *own: None)
        clinics.rule(honest_sites=3)
        assert clinics.train(2).words, "the refusal is another's"


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"epsilon_alone": None}, "honest-sites lets"),
        ({"peers": None}, "honest-sites lets"),
        ({"peers_hash": None}, "peers-hash are needed"),
        ({"peers_hash": "ab12"}, "give all 64 digits"),
        ({"peers_hash": "Z" * 64}, "give all 64 digits"),
        ({"epsilon_alone": 0.0}, "epsilon-alone must be above 0"),
        ({"mechanisms": ["dp-sgd"]}, "mechanisms does not allow: add 'secure-sum'"),
    ],
)
def test_a_policy_that_lets_a_site_join_by_halves_is_none(rules: dict[str, Any], words: str, clinics: SumSite) -> None:
    from fedveil.client.policy import load_policy

    clinics.rule(**rules)
    with pytest.raises(ConfigError, match=words):
        load_policy(clinics.site.ledger.with_name("policy.toml"))


def test_a_site_whose_roster_is_another_has_no_part(clinics: SumSite) -> None:
    folder = clinics.site.ledger.parent
    others = {**clinics.roster.keys, "north": Identity.new().public}

    def agree_on(roster: Roster) -> None:
        (folder / "peers.toml").write_text(roster.text())
        clinics.rule(peers_hash=roster.digest)

    agree_on(Roster(others))
    task = clinics.task()
    clinics.refuse(task, "'north' is not signed by that site")
    agree_on(Roster({**others, "clinic": Identity.new().public}))
    assert "another signing key" in clinics.key().reason
    del others["clinic"]
    agree_on(Roster({**others, "west": Identity.new().public}))
    assert "does not have 'clinic'" in clinics.key().reason
    clinics.site.node.pop("identity")
    assert "needs 'identity'" in clinics.key().reason


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"privacy.honest-sites": 0}, "needs privacy.honest-sites"),
        ({"privacy.honest-sites": 1, "privacy.colluders": 1}, "ask for 2 sites in a sum, which needs 3"),
        ({"training.local-steps": 2}, "is one sum of clipped gradients"),
        ({"training.optimizer": "adam"}, "the server steps"),
        ({"training.weight-decay": 0.1}, "the server steps"),
        ({"privacy.mode": "dp-sgd"}, "no noise is shared"),
        ({"privacy.mode": "none"}, "no noise is shared"),
        (
            {"adapter.start": "probe", "adapter.name": "lora-metric"},
            "a release of its own.*nobody sees more than a sum",
        ),
        ({"adapter.start": "dp-gradient", "strategy": "fed-sb"}, "a release of its own.*nobody sees more"),
        ({"adapter.start": "nonprivate-gradient"}, "sends raw gradients of private records"),
    ],
)
def test_a_run_that_is_no_sum_of_clipped_gradients_is_refused(wrong: dict[str, Scalar], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        configure({**SUMMED, **wrong})


def test_the_promise_names_those_on_whom_it_rests() -> None:
    job = configure(SUMMED)
    promise = job.mechanism.promise
    assert "as long as 2 sites of each sum are honest (h = 2)" in promise(job.config.privacy)
    assert "whatever other sites do (h = 1)" in promise(replace(job.config.privacy, honest_sites=1))


def test_a_lying_server_is_refused_or_gets_no_sum_and_no_second_vector(summed: dict[str, Any]) -> None:
    """The lies of ``make faults`` in one process: in each the second attempt, which is honest, counts."""
    names = list(SERVER_LIES)

    class Lying(InProcessTransport):
        exchange = lying(InProcessTransport.exchange, lambda number: names[number - 1])  # type: ignore[assignment]

    folder = run_in_process({**summed, "rounds": len(names), "round-retries": 1}, 3, kind=Lying)
    lines, paid = read_lines(RoundLine, folder), Counter(n for rows in spent(folder).values() for n, _ in rows)
    for line, name in zip(lines, names, strict=True):
        told = SERVER_LIES[name]
        assert wrong_after_a_lie(told, line, paid[line.round_number]) == []
        assert wrong_after_a_lie(told, replace(line, attempts=3), paid[line.round_number])
        assert wrong_after_a_lie(told, line, 1)

"""A resumed simulation: a round that was cut off gets the replies that were kept, free; what is lost is paid again."""

from __future__ import annotations

import errno
import stat
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedveil.client.ledger.ledger import Ledger
from fedveil.common.messages.round import Refusal, Task, TrainResult, TrainTask
from fedveil.common.paths import REPLIES
from fedveil.common.run_lines import PrivacyLine, ResultFile, RoundLine, read_file, read_lines
from fedveil.experiments.in_process import InProcessTransport, run_in_process
from fedveil.server.sites import Exchange

pytestmark = pytest.mark.rough_prices

SITES = 2
CLIENT_LEVEL = {"privacy.mode": "client-level", "privacy.unit": "site", "privacy.cohort": 4, "privacy.site-rate": 1.0}


class Killed(BaseException):
    """What nothing catches: the server is gone."""


class Cut(InProcessTransport):
    """Whose server dies once it has all answers of round 2."""

    def exchange(self, tasks: Mapping[int, Task], timeout: float) -> Exchange:
        got = super().exchange(tasks, timeout)
        if next(iter(tasks.values())).round_number == 2:
            raise Killed
        return got


class Seen(InProcessTransport):
    """That keeps what sites sent in round 2."""

    def exchange(self, tasks: Mapping[int, Task], timeout: float) -> Exchange:
        got = super().exchange(tasks, timeout)
        SENT.update({(t.run, n): got.replies[n] for n, t in tasks.items() if t.round_number == 2})
        return got


SENT: dict[tuple[str, int], Any] = {}


def charged(folder: Path) -> list[list[int]]:
    """Return the rounds that each site's ledger was charged for."""
    rounds = []
    for path in sorted((folder / "ledgers").glob("*.sqlite")):
        with Ledger(path) as ledger:
            rounds.append([entry.round_number for entry in ledger.entries()])
    return rounds


def cut(settings: dict[str, Any], run: str = "cut", kind: type[InProcessTransport] = Cut) -> Path:
    with pytest.raises(Killed):
        run_in_process(settings, SITES, run, kind)
    return Path(settings["output"]) / f"ffa-lora-{run}"


@pytest.fixture
def whole_budget(toy_settings: dict[str, Any]) -> dict[str, Any]:
    """Four rounds, whose noise leaves nothing for a fifth."""
    return {**toy_settings, "rounds": 4}


def test_a_resumed_round_costs_no_site_its_last_one(whole_budget: dict[str, Any]) -> None:
    folder = cut(whole_budget)
    assert charged(folder) == SITES * [[1, 2]]
    run_in_process({**whole_budget, "resume": "cut"}, SITES)
    assert charged(folder) == SITES * [[1, 2, 3, 4]], "the ledgers are not those of a run that nobody cut off"
    lines = read_lines(RoundLine, folder)
    assert [line.participants for line in lines] == 4 * [["site-0", "site-1"]]
    assert read_file(ResultFile, folder).status == "completed"
    assert not (folder / REPLIES).exists(), "a run that is over keeps what single sites sent"


def test_the_repeated_task_gets_the_very_reply(whole_budget: dict[str, Any]) -> None:
    class Both(Cut, Seen):
        pass

    SENT.clear()
    cut(whole_budget, kind=Both)
    first = dict(SENT)
    SENT.clear()
    run_in_process({**whole_budget, "resume": "cut"}, SITES, kind=Seen)
    assert len(first) == SITES
    for key, reply in first.items():
        assert isinstance(reply, TrainResult)
        again = SENT[key]
        assert (again.site, again.spending) == (reply.site, reply.spending)
        for layer, factors in reply.contribution.items():
            assert all(tensor.equal(again.contribution[layer][name]) for name, tensor in factors.items())


@pytest.mark.parametrize("lost", ["gone", "cut short", "turned", "of another run"])
def test_a_reply_that_is_lost_is_trained_and_charged_again(lost: str, toy_settings: dict[str, Any]) -> None:
    settings = {**toy_settings, "rounds": 3, "privacy.noise-multiplier": 1.0, "privacy.epsilon": 50.0}
    folder = cut(settings)
    kept = folder / REPLIES / "site-0"
    content = kept.read_bytes()
    if lost == "gone":
        kept.unlink()
    elif lost == "cut short":
        kept.write_bytes(content[:-1])
    elif lost == "turned":
        kept.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    else:
        kept.write_bytes((cut(settings, "other") / REPLIES / "site-0").read_bytes())
    run_in_process({**settings, "resume": "cut"}, SITES)
    assert charged(folder) == [[1, 2, 2, 3], [1, 2, 3]]


def test_a_reply_is_kept_for_its_owner_alone_before_it_leaves(whole_budget: dict[str, Any]) -> None:
    asked = []

    class Looking(Cut):
        def deliver(self, node: int, task: Task, content: Any) -> Any:
            record = super().deliver(node, task, content)
            if isinstance(task, TrainTask):
                kept = Path(whole_budget["output"]) / "ffa-lora-cut" / REPLIES / f"site-{node}"
                asked.append((stat.S_IMODE(kept.stat().st_mode), stat.S_IMODE(kept.parent.stat().st_mode)))
                assert f'"round": {task.round_number}'.encode() in kept.read_bytes()
            return record

    cut(whole_budget, kind=Looking)
    assert asked == 2 * SITES * [(0o600, 0o700)]


def test_a_full_disk_costs_the_reply_that_is_kept_and_not_the_one_that_is_paid(
    toy_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**toy_settings, "rounds": 3, "privacy.noise-multiplier": 1.0, "privacy.epsilon": 50.0}

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("fedveil.client.memory.replace_file", full)
        folder = cut(settings)
    assert not list((folder / REPLIES).iterdir())
    run_in_process({**settings, "resume": "cut"}, SITES)
    assert charged(folder) == SITES * [[1, 2, 2, 3]]


@pytest.mark.parametrize("mode", [{"privacy.mode": "none"}, CLIENT_LEVEL])
def test_what_no_site_noises_by_itself_is_not_written(mode: dict[str, Any], toy_settings: dict[str, Any]) -> None:
    assert not (cut({**toy_settings, "rounds": 3, **mode}) / REPLIES).exists()


def without_replies(folder: Path, sites: int) -> None:
    for number in range(sites):
        (folder / REPLIES / f"site-{number}").unlink()


def ended(folder: Path) -> tuple[str, str, list[list[str]]]:
    result = read_file(ResultFile, folder)
    return result.status, result.reason, [x.participants for x in read_lines(RoundLine, folder) if x.complete]


def test_a_last_round_that_some_sites_cannot_pay_is_not_trained_by_the_others_alone(
    whole_budget: dict[str, Any],
) -> None:
    """Though ``min-sites`` is 1. It is known before the round, so nobody pays for it."""
    folder = cut(whole_budget)
    without_replies(folder, 1)
    run_in_process({**whole_budget, "resume": "cut"}, SITES)
    status, reason, participants = ended(folder)
    assert (status, participants) == ("stopped", 3 * [["site-0", "site-1"]])
    assert reason == (
        "site-0 paid twice for a round that was cut off, and cannot pay for round 4 of 4; the others do not train it "
        "alone: the last round is 3, of 2 sites"
    )
    assert charged(folder) == [[1, 2, 2, 3], [1, 2, 3]]


def test_a_refusal_that_nobody_foresaw_ends_the_run_before_the_round_too(
    whole_budget: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a ledger that holds what the server does not know; who answered has paid, and that stays in the report."""
    monkeypatch.setattr("fedveil.server.last_rounds.cannot_pay", lambda *_: [])
    folder = cut(whole_budget)
    without_replies(folder, 1)
    run_in_process({**whole_budget, "resume": "cut"}, SITES)
    status, reason, participants = ended(folder)
    assert (status, participants) == ("stopped", 3 * [["site-0", "site-1"]])
    assert "site-0 paid twice" in reason
    assert charged(folder) == [[1, 2, 2, 3], [1, 2, 3, 4]]
    paid = [(line.round_number, line.site) for line in read_lines(PrivacyLine, folder)]
    assert paid[-1] == (4, "site-1"), "what was paid for and does not count is left out"


def test_a_run_whose_last_round_anybody_may_train_is_found_out(
    whole_budget: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for planted in ("cannot_pay", "refused"):
        monkeypatch.setattr(f"fedveil.server.last_rounds.{planted}", lambda *_: [])
    with pytest.raises(AssertionError):
        test_a_last_round_that_some_sites_cannot_pay_is_not_trained_by_the_others_alone(whole_budget)
    assert ended(Path(whole_budget["output"]) / "ffa-lora-cut")[2][-1] == ["site-1"]


def test_a_site_that_lies_about_what_it_paid_ends_no_run_that_was_not_resumed(toy_settings: dict[str, Any]) -> None:
    class Lying(InProcessTransport):
        """Whose first site says that it paid for a thousand steps, and refuses round 3 of 5 for its budget."""

        def exchange(self, tasks: Mapping[int, Task], timeout: float) -> Exchange:
            got, task = super().exchange(tasks, timeout), tasks[0]
            reply = got.replies[0]
            if isinstance(reply, TrainResult) and reply.spending:
                lie: Any = replace(reply, spending=replace(reply.spending, steps_total=1000 + 2 * task.round_number))
                if task.round_number == 3:
                    lie = Refusal(task.run, 3, "site-0", "budget", "spent")
                return replace(got, replies={**got.replies, 0: lie})
            return got

    folder = run_in_process({**toy_settings, "rounds": 5, "privacy.noise-multiplier": 2.0}, SITES, kind=Lying)
    assert ended(folder)[0] == "completed"

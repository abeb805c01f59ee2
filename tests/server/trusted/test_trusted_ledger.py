"""The ledger of a trusted server: what it says, what it refuses, and what a kill leaves."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any
from unittest.mock import patch

import pytest
from site_runs import COHORT_SIZE, SITE, World, update

from audits.whole_sites import MadeUp
from fedveil.common.errors import BudgetExhausted, ConfigError, LedgerError, RunFailed
from fedveil.common.run_lines import PrivacyLine, ResultFile, RoundLine, read_file, read_lines
from fedveil.experiments.in_process import run_in_process
from fedveil.privacy.accounting import Release
from fedveil.privacy.events import sampled_gaussian
from fedveil.privacy.privacy_filter import promised
from fedveil.reports import report_of
from fedveil.server.collect.trusted import TrustedCollector
from fedveil.server.ledger import ServerLedger, with_ledger
from fedveil.server.records import RunFolder
from fedveil.strategies import ServerState

pytestmark = pytest.mark.one_length


# --- the ledger -------------------------------------------------------------------------------------------------------
def gaussian_delta(epsilon_: float, noise: float) -> float:
    """Return δ of one Gaussian release (Balle and Wang 2018, theorem 8)."""

    def phi(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    return phi(0.5 / noise - epsilon_ * noise) - math.exp(epsilon_) * phi(-0.5 / noise - epsilon_ * noise)


def test_the_ledger_says_what_independent_accounts_say(tmp_path: Path) -> None:
    whole, half = ServerLedger(tmp_path / "whole.json", "site"), ServerLedger(tmp_path / "part.json", "site")
    for number in range(1, 5):
        spent = whole.charge("1", number, sampled_gaussian(3.0, 1.0), 1e-4, 50.0)
        part = half.charge("1", number, sampled_gaussian(1.5, 0.2), 1e-4, 50.0)
    # Four Gaussian releases are one at half the noise.
    assert gaussian_delta(spent.epsilon_total, 1.5) <= 1e-4 <= gaussian_delta(spent.epsilon_total - 5e-3, 1.5)
    assert (spent.steps_round, spent.steps_total, spent.epsilon_budget) == (1, 4, 50.0)
    from dp_accounting.pld import common as pld_common
    from dp_accounting.pld import privacy_loss_distribution as pld

    assert pld_common is not None
    one = pld.from_gaussian_mechanism(1.5, sampling_prob=0.2, value_discretization_interval=1e-4)
    assert part.epsilon_total == pytest.approx(one.self_compose(4).get_epsilon_for_delta(0.9e-4), abs=5e-3)


def test_a_charge_that_would_pass_the_budget_is_refused_and_not_written(tmp_path: Path) -> None:
    ledger = ServerLedger(tmp_path / "sites.json", "site")
    first = ledger.charge("a", 1, sampled_gaussian(2.0, 1.0), 1e-3, 2.0)
    with pytest.raises(BudgetExhausted, match="the budget is 2 at delta"):
        ledger.charge("b", 1, sampled_gaussian(2.0, 1.0), 1e-3, 2.0)
    assert len(ledger.charges()) == 1
    assert 1 < first.epsilon_total < 2
    # All is composed at the smallest δ that any of it was charged at.
    later = ledger.charge("b", 1, sampled_gaussian(20.0, 1.0), 1e-2, 60.0)
    assert later.delta == 1e-3


def test_a_rounds_epsilon_is_what_it_adds_and_later_runs_are_held_to_the_smallest_delta(tmp_path: Path) -> None:
    ledger, before = ServerLedger(tmp_path / "sites.json", "site"), 0.0
    for number in range(1, 4):
        spent = ledger.charge("a", number, sampled_gaussian(6.0, 1.0), 1e-3, 60.0)
        assert spent.epsilon_round == pytest.approx(spent.epsilon_total - before, abs=1e-12)
        before = spent.epsilon_total
    ledger.charge("b", 1, sampled_gaussian(9.0, 1.0), 1e-4, 60.0)
    histories = [ledger.history(run) for run in "abc"]
    assert [history.delta for history in histories] == [1e-4] * 3
    assert [len(history.releases) for history in histories] == [0, 3, 4]


def test_a_ledger_that_has_lost_what_another_server_charged_is_refused_once_that_was_read(tmp_path: Path) -> None:
    path, event = tmp_path / "sites.json", sampled_gaussian(6.0, 1.0)
    reader, other = ServerLedger(path, "site"), ServerLedger(path, "site")
    other.charge("a", 1, event, 1e-3, 60.0)
    older = path.read_bytes()
    other.charge("a", 2, event, 1e-3, 60.0)
    assert len(reader.charges()) == 2
    path.write_bytes(older)
    with pytest.raises(LedgerError, match="has 1 charges, and had 2: put back the file"):
        reader.charge("b", 1, event, 1e-3, 60.0)
    assert path.read_bytes() == older


def test_servers_that_share_a_ledger_never_spend_the_same_remainder(tmp_path: Path) -> None:
    path, event, paid = tmp_path / "sites.json", sampled_gaussian(4.0, 1.0), list[float]()
    budget = promised([Release(event, 5)], 1e-3)[0]

    def spend(name: str) -> None:
        ledger = ServerLedger(path, "site")
        for number in range(1, 5):
            try:
                paid.append(ledger.charge(name, number, event, 1e-3, budget).epsilon_total)
            except BudgetExhausted:
                return

    threads = [Thread(target=spend, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paid) == 5 == len(set(paid))
    assert max(paid) == budget


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is damaged"),
        ('{"format": 1', "is damaged"),
        ('{"format": 2, "unit": "site", "charges": [{}], "first_plan": []}', "is damaged"),
        ('{"format": 2, "unit": "record", "charges": [], "first_plan": []}', "is of the unit 'record'"),
        ('{"format": 2, "unit": "site", "charges": []}', "is damaged .the ledger lacks the field 'first_plan'"),
        ('{"format": 1, "unit": "site", "charges": []}', "has format 1, .*install the FedVeil that wrote it"),
        ('{"format": true, "unit": "site", "charges": []}', "has format True"),
        (
            '{"format": 2, "unit": "site", "charges": [], "first_plan": [{"event": {"kind": "none"}, "count": 1}]}',
            "is damaged",
        ),
        ('{"format": 3, "unit": "site", "charges": [], "more": 1}', "has format 3"),
    ],
)
def test_a_ledger_that_cannot_be_read_as_it_was_written_is_refused(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "sites.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(LedgerError, match=words):
        ServerLedger(path, "site").charge("1", 1, sampled_gaussian(2.0, 1.0), 1e-3, 9.0)
    assert path.read_text(encoding="utf-8") == content


def test_a_ledger_that_is_put_back_to_an_older_state_is_refused(world: World) -> None:
    sites = world.sites(MadeUp(update, COHORT_SIZE))
    sites.collect(1, world.state)
    older = sites._ledger.path.read_bytes()
    done = replace(world.state, round_number=1)
    sites.collect(2, done)
    sites._ledger.path.write_bytes(older)
    with pytest.raises(LedgerError, match="has 1 charges, and had 2"):
        sites.collect(3, done)
    sites._ledger.path.unlink()
    with pytest.raises(LedgerError, match="has 0 rounds of run '1', which has done 1"):
        world.sites(MadeUp(update, COHORT_SIZE)).collect(2, done)


class Killed(BaseException):
    """What nothing catches: the process is gone."""


PLACES = ("before the charge", "after the charge", "after the noise", "before the checkpoint")


def killed(settings: dict[str, Any], place: str) -> tuple[Path, ServerLedger, int]:
    """Return the folder of a run whose server died in round 2, its ledger, and how many sums were noised by then."""
    noised: list[int] = []
    real_mean, real_charge, real_finished = TrustedCollector._mean, ServerLedger.charge, RunFolder.finished

    def mean(sites: TrustedCollector, results: Any, number: int, state: ServerState) -> Any:
        if (place, number) == ("after the charge", 2):
            raise Killed
        made = real_mean(sites, results, number, state)
        noised.append(number)
        if (place, number) == ("after the noise", 2):
            raise Killed
        return made

    def charge(ledger: ServerLedger, run: str, number: int, *rest: Any) -> Any:
        if (place, number) == ("before the charge", 2):
            raise Killed
        return real_charge(ledger, run, number, *rest)

    def finished(folder: RunFolder, outcome: Any, *rest: Any) -> None:
        if (place, outcome.round_number) == ("before the checkpoint", 2):
            raise Killed
        real_finished(folder, outcome, *rest)

    with ExitStack() as stack:
        stack.enter_context(patch.object(TrustedCollector, "_mean", mean))
        stack.enter_context(patch.object(ServerLedger, "charge", charge))
        stack.enter_context(patch.object(RunFolder, "finished", finished))
        stack.enter_context(pytest.raises(Killed))
        run_in_process(settings, 2, "1")
    folder = Path(settings["output"]) / "ffa-lora-1"
    return folder, ServerLedger(folder / "ledgers" / "server.json", "site"), len(noised)


@pytest.mark.parametrize("place", PLACES)
def test_a_server_that_is_killed_has_charged_for_all_that_it_noised(settings: dict[str, Any], place: str) -> None:
    """What is resumed is charged again, and the total is of every charge."""
    folder, ledger, noised = killed(settings, place)
    before = len(ledger.charges())
    assert before == (1 if place == "before the charge" else 2) >= noised
    run_in_process({**settings, "resume": str(folder)}, 2)
    charges = ledger.charges()
    assert [one.round_number for one in charges] == [1, 2, 2][: before + 1]
    lines = read_lines(PrivacyLine, folder)
    assert [line.round_number for line in lines] == [1, 2]
    total = promised([Release(one.event, 1) for one in charges], 1e-3)[0]
    assert lines[-1].spent is not None
    assert lines[-1].spent.epsilon_total == total
    assert report_of(folder).headline.epsilon == total


def test_a_ledger_that_is_written_after_the_noise_is_found(settings: dict[str, Any]) -> None:
    real, due = ServerLedger.charge, list[tuple[Any, ...]]()

    def late(ledger: ServerLedger, *asked: Any) -> Any:
        """Write a charge once the next one is asked for."""
        beside = ServerLedger(ledger.path.with_name("beside.json"), "site")
        for one in due:
            real(ledger, *one)
        due[:] = [asked]
        return real(beside, *asked)

    with patch.object(ServerLedger, "charge", late), patch.object(ServerLedger, "rounds_of", lambda *_: 9):
        _, ledger, noised = killed(settings, "after the noise")
    assert len(ledger.charges()) < noised


def test_a_run_ends_well_before_the_round_that_its_budget_does_not_pay(settings: dict[str, Any]) -> None:
    budget = promised([Release(sampled_gaussian(2.0, 1.0), 2)], 1e-3)[0] + 1e-6
    folder = run_in_process({**settings, "rounds": 4, "privacy.epsilon": budget}, 2)
    ended = read_file(ResultFile, folder)
    assert (ended.status, ended.reached and ended.reached.rounds) == ("stopped", 2)
    assert "the budget is" in ended.reason
    assert [line.complete for line in read_lines(RoundLine, folder)] == [True, True, False]


def test_runs_that_name_one_ledger_add_up(settings: dict[str, Any], tmp_path: Path) -> None:
    shared = {**settings, "rounds": 1, "privacy.ledger": str(tmp_path / "sites.json")}
    run_in_process(shared, 2, run="a")
    folder = run_in_process(shared, 2, run="b")
    (line,) = read_lines(PrivacyLine, folder)
    assert line.spent is not None
    assert line.spent.epsilon_total == promised([Release(sampled_gaussian(2.0, 1.0), 2)], 1e-3)[0]
    assert [site.agreement for site in report_of(folder).sites] == ["larger"]
    with pytest.raises(RunFailed, match="the budget is"):
        run_in_process({**shared, "privacy.epsilon": line.spent.epsilon_total}, 2, run="c")


def test_a_deployed_server_has_one_ledger_for_all_its_runs(tmp_path: Path) -> None:
    assert with_ledger(SITE, tmp_path)["privacy.ledger"] == str(tmp_path / "sites-ledger.json")
    assert with_ledger({**SITE, "privacy.ledger": "/x/y.json"}, tmp_path)["privacy.ledger"] == "/x/y.json"
    assert with_ledger(SITE) == SITE
    assert with_ledger({"privacy.mode": "dp-sgd"}, tmp_path) == {"privacy.mode": "dp-sgd"}


def test_a_resumed_run_keeps_its_cohort_rate_and_ledger(settings: dict[str, Any]) -> None:
    folder = run_in_process({**settings, "rounds": 1}, 2)
    (folder / "result.json").unlink()
    for key, value in (("privacy.cohort", 9), ("privacy.site-rate", 0.5), ("privacy.ledger", "x.json")):
        with pytest.raises(ConfigError, match=f"{key} is "):
            run_in_process({**settings, "rounds": 1, key: value, "resume": str(folder)}, 2)

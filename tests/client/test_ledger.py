"""The ledger of a site keeps every promise it made, through refusals, restarts, kills and company."""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import os
import random
import re
import signal
import sqlite3
import threading
import time
from contextlib import closing
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
from ledgers import DELTA, ROUND, WHISPER, charge, charge_for, cost_of, epsilon, texts

from fedveil.client.ledger.ledger import Ledger
from fedveil.client.ledger.rows import Charge, Receipt, of_all
from fedveil.common.errors import BudgetExhausted, ConfigError, LedgerError, PolicyRefusal
from fedveil.privacy.accountant import EVALUATION, Accountant
from fedveil.privacy.accounting import Release, gaussian_release

# fork: a child that has to import the libraries again takes seconds to make its first charge.
processes = multiprocessing.get_context("fork")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "site.sqlite"


def check_that_rounds_sum_to_one_run(ledger: Ledger) -> None:
    last = [charge(ledger, round_number) for round_number in range(1, 5)][-1]
    assert last.epsilon_after == cost_of(4)


def test_a_receipt_says_what_was_spent_and_what_is_left(path: Path) -> None:
    with Ledger(path) as ledger:
        first, second = charge(ledger, 1), charge(ledger, 2)
    assert first.epsilon_before == 0.0
    assert first.epsilon_after == first.epsilon_increment == cost_of(1)
    assert (second.epsilon_before, second.epsilon_after) == (cost_of(1), cost_of(2))
    assert cost_of(1) > second.epsilon_increment == cost_of(2) - cost_of(1)
    assert second.epsilon_remaining == 8.0 - cost_of(2)
    assert (second.steps_round, second.steps_total) == (5, 10)
    assert second.accountant.method == "pld"


def test_rounds_sum_to_one_run(path: Path) -> None:
    with Ledger(path) as ledger:
        check_that_rounds_sum_to_one_run(ledger)


def test_a_ledger_that_forgets_between_rounds_is_found_out(path: Path) -> None:
    class Forgetful(Ledger):
        def spent(self, dataset: str) -> list[Release]:
            return []

    with Forgetful(path) as ledger, pytest.raises(AssertionError):
        check_that_rounds_sum_to_one_run(ledger)


def test_what_was_charged_is_there_after_reopening_to_the_last_bit(path: Path) -> None:
    odd = gaussian_release(noise_multiplier=1 / 3, sample_rate=0.1 + 0.2, count=7, purpose="count", clip_norm=0.1)
    with Ledger(path) as ledger:
        charge(ledger, 3, odd, max_epsilon=1000.0)
    with Ledger(path) as ledger:
        assert ledger.spent("ward") == [odd]
        (entry,) = ledger.entries()
    assert (entry.run, entry.round_number, entry.purpose, entry.event.clip_norm) == ("run-1", 3, "count", 0.1)
    figures = (entry.event.noise_multiplier, entry.event.sample_rate, entry.count, entry.delta)
    assert figures == (1 / 3, 0.1 + 0.2, 7, DELTA)
    assert entry.charged_at.endswith("+00:00")


def test_a_budget_for_three_rounds_ends_after_three_and_stays_ended(path: Path) -> None:
    budget = cost_of(3)
    with Ledger(path) as ledger:
        for round_number in (1, 2, 3):
            last = charge(ledger, round_number, max_epsilon=budget)
        assert last.epsilon_remaining == 0.0
        with pytest.raises(BudgetExhausted):
            charge(ledger, 4, max_epsilon=budget)
    with Ledger(path) as ledger:
        with pytest.raises(BudgetExhausted):
            charge(ledger, 4, max_epsilon=budget)
        with pytest.raises(BudgetExhausted):
            charge(ledger, 1, max_epsilon=budget, run="another run")
        assert len(ledger.entries()) == 3
        assert ledger.epsilon("ward", DELTA) == budget


def test_a_budget_a_hair_short_of_three_rounds_ends_after_two(path: Path) -> None:
    budget = cost_of(3) - 1e-9
    with Ledger(path) as ledger:
        charge(ledger, 1, max_epsilon=budget)
        charge(ledger, 2, max_epsilon=budget)
        with pytest.raises(BudgetExhausted):
            charge(ledger, 3, max_epsilon=budget)


def test_a_refusal_is_one_line_with_every_figure_a_steward_asks_for(path: Path) -> None:
    with Ledger(path) as ledger:
        charge(ledger, 1)
        with pytest.raises(BudgetExhausted) as refusal:
            charge(ledger, 2, max_epsilon=2.5)
    line = str(refusal.value)
    assert "\n" not in line
    spent, wanted = (math.ceil(cost_of(rounds) * 1e4) / 1e4 for rounds in (1, 2))
    for part in ("'ward'", "round 2", "'run-1'", f"{spent:.4f} is spent", f"{wanted:.4f}", "2.5 at delta"):
        assert part in line
    assert f"{math.floor((2.5 - cost_of(1)) * 1e4) / 1e4:.4f} is left" in line
    assert f"fedveil ledger show {path}" in line


def test_a_cheaper_round_still_fits_after_a_dear_one_was_refused(path: Path) -> None:
    with Ledger(path) as ledger:
        charge(ledger, 1)
        cheaper = gaussian_release(ROUND.event.noise_multiplier, ROUND.event.sample_rate, count=1)
        budget = epsilon([ROUND, cheaper], DELTA)
        with pytest.raises(BudgetExhausted):
            charge(ledger, 2, max_epsilon=budget)
        assert charge(ledger, 2, cheaper, max_epsilon=budget).epsilon_before == cost_of(1)


def test_a_repeated_round_is_paid_for_again(path: Path) -> None:
    with Ledger(path) as ledger:
        charge(ledger, 1)
        assert charge(ledger, 1).epsilon_after == cost_of(2)
        assert len(ledger.entries()) == 2


def test_data_sets_have_accounts_of_their_own(path: Path) -> None:
    with Ledger(path) as ledger:
        charge(ledger, 1, dataset="ward")
        assert charge(ledger, 1, dataset="clinic").epsilon_before == 0.0
        assert ledger.epsilon("ward", DELTA) == ledger.epsilon("clinic", DELTA) == cost_of(1)
        assert ledger.epsilon("nobody's", DELTA) == 0.0


def test_a_noised_count_is_paid_for_and_is_not_a_step(path: Path) -> None:
    count = gaussian_release(5.0, 1.0, 1, purpose="count")
    with Ledger(path) as ledger:
        receipt = ledger.charge(Charge("ward", "r", 1, (ROUND, count), DELTA, 8.0))
        second = ledger.charge(Charge("ward", "r", 2, (ROUND, count), DELTA, 8.0))
    assert (receipt.steps_round, receipt.steps_total) == (5, 5)
    assert (second.steps_round, second.steps_total) == (5, 10)
    assert receipt.epsilon_after == epsilon([ROUND, count], DELTA) > cost_of(1)


def test_nothing_is_written_when_the_pricing_fails(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with Ledger(path) as ledger:
        with monkeypatch.context() as patch:
            patch.setattr("fedveil.client.ledger.ledger.price", fail)
            with pytest.raises(KeyboardInterrupt):
                charge(ledger, 1)
        assert ledger.entries() == []
        assert charge(ledger, 1).epsilon_after == cost_of(1)


def test_an_interrupt_under_the_lock_undoes_the_charge_and_frees_the_lock(path: Path) -> None:
    def interrupt(*_: int) -> None:
        raise KeyboardInterrupt

    with Ledger(path) as ledger:
        with pytest.raises(KeyboardInterrupt):
            charge(ledger, 1, allow=interrupt)
        assert ledger.entries() == []
        assert charge(ledger, 1).epsilon_after == cost_of(1)


def test_a_price_that_is_no_number_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "fedveil.client.ledger.rows.privacy_filter.price", lambda *_: (float("nan"), Accountant("pld", "0.6.0"))
    )
    with Ledger(path) as ledger, pytest.raises(BudgetExhausted):
        charge(ledger, 1)


@pytest.mark.parametrize(
    "terms",
    [{"delta": 0.0}, {"max_epsilon": 0.0}, {"round_number": -1}, {"run": ""}, {"dataset": ""}],
)
def test_a_charge_on_impossible_terms_is_refused(path: Path, terms: dict[str, Any]) -> None:
    with Ledger(path) as ledger:
        with pytest.raises(ConfigError):
            charge(ledger, **terms)
        with pytest.raises(ConfigError, match="at least one release"):
            charge(ledger, releases=())
        assert ledger.entries() == []


@pytest.mark.parametrize(
    "terms",
    [
        *({"unit": ""}, {"mask_key": bytes(32)}, {"max_alone": 0.0}, {"max_alone": math.nan}),
        *({"max_person": 0.0}, {"max_person": math.nan}),
    ],
)
def test_a_charge_that_nothing_could_be_held_to_is_none(terms: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Charge("ward", "run-1", 1, (WHISPER,), DELTA, 8.0, **terms)


def test_the_dearest_history_of_shared_records_is_said_whole() -> None:
    pld, rdp = Accountant("pld", "0.6.0"), Accountant("rdp", "0.6.0")
    own = Receipt(1.0, 2.0, 6.0, 1, 2, pld, 8.0, DELTA, alone_after=2.5)
    other = Receipt(3.0, 9.0, 0.0, 5, 7, rdp, math.inf, DELTA / 10, alone_after=2.0)
    dearer = dataclasses.replace(own, epsilon_before=3.0, epsilon_after=9.0, epsilon_remaining=0.0, accountant=rdp)
    assert of_all(own, [own, other]) == dearer
    cheaper = dataclasses.replace(other, epsilon_after=2.0, alone_after=4.0)
    assert of_all(own, [own, cheaper]) == dataclasses.replace(own, alone_after=4.0)


def hammer(path: Path, budget: float, start: Barrier, report: Connection) -> None:
    start.wait()
    paid = 0
    with Ledger(path) as ledger:
        try:
            while True:
                charge(ledger, 1, max_epsilon=budget)
                paid += 1
        except BudgetExhausted:
            report.send(paid)


def test_two_processes_at_once_never_pass_the_budget_together(path: Path) -> None:
    budget, start = cost_of(12) + 1e-6, processes.Barrier(2)
    ends = [processes.Pipe(duplex=False) for _ in range(2)]
    children = [processes.Process(target=hammer, args=(path, budget, start, sender)) for _, sender in ends]
    for child in children:
        child.start()
    assert all(receiver.poll(60) for receiver, _ in ends), "a process ended without a refusal"
    paid = [receiver.recv() for receiver, _ in ends]
    for child in children:
        child.join()
    with Ledger(path) as ledger:
        assert sum(paid) == len(ledger.entries()) == 12
        assert ledger.epsilon("ward", DELTA) <= budget


def test_threads_with_a_ledger_each_share_one_budget(path: Path) -> None:
    budget, refused = cost_of(6) + 1e-6, []

    def work() -> None:
        with Ledger(path) as ledger:
            try:
                for round_number in range(1, 10):
                    charge(ledger, round_number, max_epsilon=budget)
            except BudgetExhausted:
                refused.append(True)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 3
    with Ledger(path) as ledger:
        assert len(ledger.entries()) == 6


def test_a_ledger_of_another_thread_or_a_closed_one_says_so(path: Path) -> None:
    ledger = Ledger(path)
    ledger.close()
    ledger.close()
    with pytest.raises(LedgerError, match="before closing"):
        charge(ledger, 1)


def charge_until_killed(path: Path, report: Connection) -> None:
    with Ledger(path) as ledger:
        for round_number in range(1, 10_000):
            charge(ledger, round_number, WHISPER)
            report.send(round_number)


def test_a_killed_process_leaves_every_charge_it_reported_and_no_half_one(path: Path) -> None:
    moments, reported, kills = random.Random(7), 0, 20
    for _ in range(kills):
        receiver, sender = processes.Pipe(duplex=False)
        child = processes.Process(target=charge_until_killed, args=(path, sender))
        child.start()
        sender.close()
        receiver.poll(10)
        time.sleep(moments.uniform(0, 0.08))
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join()
        try:
            while True:
                receiver.recv()
                reported += 1
        except EOFError:
            receiver.close()
        with Ledger(path) as ledger:
            written = len(ledger.entries())
            # The kill may fall between the commit and the report: at most one charge per kill.
            assert reported <= written <= reported + kills
            assert ledger.epsilon("ward", DELTA) == epsilon([gaussian_release(20.0, 0.01, written)], DELTA)
    assert reported >= kills


def test_the_stored_budget_wins_over_whatever_two_runs_propose(path: Path) -> None:
    budget = cost_of(2)
    with Ledger(path) as ledger:
        ledger.set_budget("ward", budget, DELTA)
        first = charge(ledger, 1, run="a", max_epsilon=100.0)
        assert (first.max_epsilon, first.epsilon_remaining) == (budget, budget - cost_of(1))
        charge(ledger, 1, run="b", max_epsilon=50.0)
        with pytest.raises(BudgetExhausted):
            charge(ledger, 2, run="b", max_epsilon=50.0)
        assert ledger.epsilon("ward", DELTA) == budget


def test_a_stricter_proposal_wins_over_the_stored_budget(path: Path) -> None:
    with Ledger(path) as ledger:
        ledger.set_budget("ward", 100.0, DELTA)
        with pytest.raises(BudgetExhausted):
            charge(ledger, 1, max_epsilon=cost_of(1) / 2)


def test_a_policy_lowers_the_stored_budget_and_only_the_steward_raises_it(path: Path) -> None:
    with Ledger(path) as ledger:
        assert ledger.lower_budget("ward", math.inf, 1e-5).epsilon == math.inf
        for epsilon_, holds in ((5.0, 5.0), (3.0, 3.0), (8.0, 3.0), (3.0, 3.0)):
            assert ledger.lower_budget("ward", epsilon_, 1e-5).epsilon == holds
        before = ledger.set_budget("ward", 8.0, 1e-4)
        assert (before.epsilon, before.delta) == (3.0, 1e-5), "what held until then"
        assert ledger.terms("ward").epsilon == 8.0
        assert ledger.terms("ward").delta == 1e-5, "a delta that was promised once does not grow"
        assert [(b.epsilon, b.delta) for b in ledger.budgets()] == [(5.0, 1e-5), (3.0, 1e-5), (8.0, 1e-4)]
        ledger.set_budget("clinic", 1.0, 1e-5)
        assert [b.replaced for b in ledger.budgets()] == [None, 5.0, 3.0, None], "by data set"


@pytest.mark.parametrize("terms", [("ward", 0.0, 1e-5), ("ward", 1.0, 0.5), ("ward", math.inf, 1e-5), ("", 1.0, 1e-5)])
def test_an_impossible_budget_is_not_stored(path: Path, terms: tuple[str, float, float]) -> None:
    with Ledger(path) as ledger:
        with pytest.raises(ConfigError):
            ledger.set_budget(*terms)
        assert ledger.budgets() == []


def test_a_caller_that_looks_at_the_count_does_so_under_the_lock_and_can_refuse(path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def twice(rounds: int, steps: int) -> None:
        with (
            closing(sqlite3.connect(path, timeout=0)) as other,
            pytest.raises(sqlite3.OperationalError, match="locked"),
        ):
            other.execute("BEGIN IMMEDIATE")
        seen.append((rounds, steps))
        if rounds == 2:
            raise PolicyRefusal("two rounds are enough")

    with Ledger(path) as ledger:
        charge(ledger, 1, WHISPER, allow=twice)
        charge(ledger, 1, WHISPER, allow=twice)
        with pytest.raises(PolicyRefusal, match="enough"):
            charge(ledger, 1, WHISPER, allow=twice)
        assert len(ledger.entries()) == 2, "what was not allowed was charged"
    assert seen == [(0, 0), (1, 1), (2, 2)]


def test_several_deltas_compose_at_the_smallest(path: Path) -> None:
    with Ledger(path) as ledger:
        charge(ledger, 1, delta=1e-4)
        charge(ledger, 1, run="b", delta=1e-6, max_epsilon=50.0)
        last = charge(ledger, 2, delta=1e-4, max_epsilon=50.0)
    assert last.delta == 1e-6
    assert (
        last.epsilon_after
        == epsilon([gaussian_release(1.0, 0.1, 15)], 1e-6)
        > epsilon([gaussian_release(1.0, 0.1, 15)], 1e-4)
    )


def check_that_only_own_rounds_count(path: Path) -> None:
    charge_for(path, "clinic", texts(1, 2))
    charge_for(path, "ward", texts(2, 3), run="run-2")
    with Ledger(path) as ledger:
        assert [(entry.dataset, entry.caused_by) for entry in ledger.entries()] == [
            *(("clinic", None), ("ward", None), ("clinic", "ward")),
        ]
        assert (ledger.trained("clinic", "run-2"), ledger.trained("ward", "run-2")) == ((0, 0), (1, 1))
        assert sum(release.count for release in ledger.spent("clinic")) == 2


def test_what_another_name_trained_is_charged_and_is_no_round_of_this_one(path: Path) -> None:
    check_that_only_own_rounds_count(path)


def test_a_count_of_others_rounds_is_found_out(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def everyones(self: Ledger, dataset: str, run: str) -> tuple[int, int]:
        rows = [entry for entry in self.entries() if (entry.dataset, entry.run) == (dataset, run)]
        return len(rows), sum(entry.count for entry in rows)

    monkeypatch.setattr(Ledger, "trained", everyones)
    with pytest.raises(AssertionError):
        check_that_only_own_rounds_count(path)


def test_rounds_and_steps_of_a_run_are_counted(path: Path) -> None:
    with Ledger(path) as ledger:
        for round_number in (1, 2, 2):
            charge(ledger, round_number, WHISPER)
        charge(ledger, 1, WHISPER, run="another")
        charge(ledger, 3, gaussian_release(9.0, 1.0, 1, purpose=EVALUATION))
        assert ledger.trained("ward", "run-1") == (3, 3), "a round that is charged again counts again"
        assert ledger.trained("ward", "nobody's") == (0, 0)
        assert ledger.entries()[-1].event.clip_norm == 1.0, "a count is not clipped; its sensitivity is 1"


@pytest.mark.parametrize("steps", [3, 7, 12, 20])
def test_a_refusal_rounds_its_figures_against_the_site(tmp_path: Path, steps: int) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        terms = {"run": "r", "delta": 1e-5, "max_epsilon": 8.0}
        charge(ledger, 1, gaussian_release(0.9, 0.1, steps), dataset="clinic", **terms)
        spent = ledger.epsilon("clinic", 1e-5)
        with pytest.raises(BudgetExhausted) as refused:
            charge(ledger, 2, gaussian_release(0.5, 0.5, 10), dataset="clinic", **terms)
    shown = re.search(r"epsilon ([0-9.]+) is spent.* ([0-9.]+) is left", str(refused.value))
    assert shown is not None
    assert spent - 1e-9 <= float(shown[1]) < spent + 1e-4, "less is shown as spent than was"
    assert 8.0 - spent - 1e-4 < float(shown[2]) <= 8.0 - spent + 1e-9, "more is shown as left than is"

"""A price is made outside the lock, holds for the history that it is written on, and takes seconds at most."""

from __future__ import annotations

import math
import random
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from priced import during_prices

from audits.tiny_site import OneSite, clinic
from fedveil.client.ledger.ledger import PRICES, Ledger
from fedveil.client.ledger.rows import Charge, Receipt
from fedveil.common.config.sections import PrivacyConfig
from fedveil.common.errors import BudgetExhausted, ConfigError, LedgerError
from fedveil.privacy import accounting
from fedveil.privacy.accounting import MOST_WORK, Release, epsilon, epsilon_with_method, gaussian_release
from fedveil.privacy.plan import PrivacyPlan
from fedveil.privacy.privacy_filter import promised
from fedveil.strategies.resolve import resolve

DELTA = 1e-5
ROUND = gaussian_release(noise_multiplier=1.0, sample_rate=0.1, count=5)
TERMS: dict[str, Any] = {"run": "1", "round_number": 1, "delta": DELTA, "max_epsilon": 8.0}


@cache
def cost(rounds: int) -> float:
    return promised([gaussian_release(1.0, 0.1, 5 * rounds)], DELTA)[0]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "site.sqlite"


def charge(ledger: Ledger, release: Release = ROUND, **overrides: Any) -> Receipt:
    held = {"dataset": "ward", "releases": (release,), **TERMS}
    return ledger.charge(Charge(**{name: overrides.pop(name, value) for name, value in held.items()}), **overrides)


def check_that_nobody_waits_on_a_price(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def another() -> None:
        with closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")

    with Ledger(path) as ledger:
        during_prices(monkeypatch, another)
        charge(ledger)


def test_the_lock_is_free_while_a_price_is_made(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_that_nobody_waits_on_a_price(path, monkeypatch)


def test_a_price_under_the_lock_is_found_out(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def locked(ledger: Ledger, own: Charge, _: Any) -> Iterator[tuple[Any, dict[str, Receipt], list[Receipt]]]:
        with ledger._file.transaction() as db:
            prices = ledger._prices([own.dataset], own)
            yield db, prices, list(prices.values())

    monkeypatch.setattr(Ledger, "_offer", locked)
    with pytest.raises(LedgerError, match="in use"):
        check_that_nobody_waits_on_a_price(path, monkeypatch)


def check_that_a_price_is_made_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let another node charge while the first price is made: both together must not pass a budget of two rounds."""
    others = iter((1, 2))

    def another() -> None:
        if next(others, None) == 1:
            with Ledger(path) as other:
                charge(other, max_epsilon=cost(2))

    with Ledger(path) as ledger:
        during_prices(monkeypatch, another)
        receipt = charge(ledger, max_epsilon=cost(2))
        assert (receipt.epsilon_before, receipt.epsilon_after) == (cost(1), cost(2)), "priced on a history that is past"
        with pytest.raises(BudgetExhausted):
            charge(ledger, max_epsilon=cost(2))


def test_what_others_charge_meanwhile_is_in_the_price(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_that_a_price_is_made_again(path, monkeypatch)


def test_who_begins_to_share_records_meanwhile_is_charged_as_well(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others = iter((1, 2))

    def another() -> None:
        if next(others, None) == 1:
            with Ledger(path) as other:
                charge(other, dataset="clinic", records=[7, 8])

    with Ledger(path) as ledger:
        during_prices(monkeypatch, another)
        receipt = charge(ledger, records=[8, 9])
        assert (receipt.epsilon_before, receipt.epsilon_after) == (cost(1), cost(2))
        assert [entry.dataset for entry in ledger.entries()] == ["clinic", "ward", "clinic"]


def test_a_price_that_nobody_looks_at_again_is_found_out(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ledger, "_version", lambda _: 0)
    with pytest.raises(AssertionError, match="past"):
        check_that_a_price_is_made_again(path, monkeypatch)


def test_a_budget_that_is_lowered_meanwhile_holds(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lower() -> None:
        with Ledger(path) as other:
            other.lower_budget("ward", cost(1) / 2, DELTA)

    with Ledger(path) as ledger:
        during_prices(monkeypatch, lower)
        with pytest.raises(BudgetExhausted):
            charge(ledger)


def test_who_is_always_too_slow_is_priced_under_the_lock(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = count(1)

    def another() -> None:
        if next(made) <= PRICES + 1:
            with Ledger(path) as other:
                other.set_budget("another", 1.0, DELTA)

    with Ledger(path) as ledger:
        during_prices(monkeypatch, another)
        assert charge(ledger).epsilon_after == cost(1)
    assert next(made) == PRICES + 3, "one price for each time that others wrote, and one under the lock"


# What a server may ask.

ABSURD = [
    ({"sample_rate": 9e-7}, "sample-rate must be at least 1e-06"),
    ({"sample_rate": 1e-308}, "sample-rate"),
    ({"count": 10**6 + 1}, "at most 1,000,000 steps"),
    ({"noise_multiplier": 0.0099}, "noise-multiplier must be from 0.01"),
    ({"noise_multiplier": 1.1e5}, "noise-multiplier"),
]


@pytest.mark.parametrize(("figure", "words"), [*ABSURD, ({"delta": 9e-13}, "delta must be at least 1e-12")])
def test_figures_that_no_honest_job_has_are_refused_before_they_are_priced(
    path: Path, monkeypatch: pytest.MonkeyPatch, figure: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr("fedveil.client.ledger.ledger.price", lambda *_: pytest.fail("a price was made"))
    release = {"noise_multiplier": 1.0, "sample_rate": 0.1, "count": 5, **figure}
    delta = release.pop("delta", DELTA)
    with Ledger(path) as ledger, pytest.raises(ConfigError, match=words):
        charge(ledger, gaussian_release(**release), delta=delta)


@pytest.mark.parametrize(("figure", "words"), ABSURD)
def test_a_charge_refuses_them_in_what_its_run_is_to_release(figure: dict[str, Any], words: str) -> None:
    """The plan is priced with every later charge."""
    planned = gaussian_release(**{"noise_multiplier": 1.0, "sample_rate": 0.1, "count": 5, **figure})
    with pytest.raises(ConfigError, match=words):
        Charge("ward", releases=(ROUND,), planned=(planned,), **TERMS)


@pytest.mark.parametrize(("figure", "words"), ABSURD)
def test_a_plan_refuses_them_before_it_looks_for_a_noise(
    monkeypatch: pytest.MonkeyPatch, figure: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr("fedveil.privacy.plan.promised_noise", lambda *_: pytest.fail("a price was made"))
    before = gaussian_release(**{"noise_multiplier": 1.0, "sample_rate": 0.1, "count": 5, **figure})
    training = resolve({"training.sample-rate": 0.1}).config.training
    with pytest.raises(ConfigError, match=words):
        PrivacyPlan.for_run(PrivacyConfig(), training, 10, 100, [before])


@pytest.mark.parametrize(
    "asked",
    [
        {"training.sample-rate": 1e-7},
        {"privacy.delta": 1e-300},
        {"privacy.noise-multiplier": 0.001},
        {"training.local-steps": 10**7, "privacy.noise-multiplier": 0.0},
    ],
    ids=str,
)
def test_a_site_refuses_a_job_of_such_figures_uncharged(
    toy_settings: dict[str, Any], tmp_path: Path, asked: dict[str, Any]
) -> None:
    site = clinic(toy_settings, tmp_path)
    site.settings |= asked
    assert site.refuse(1).kind == "failed"
    assert site.charges() == []


def test_a_budget_at_such_a_delta_cannot_be_set(path: Path) -> None:
    with Ledger(path) as ledger, pytest.raises(ConfigError, match="at least 1e-12"):
        ledger.set_budget("ward", 1.0, 1e-13)


def test_a_policy_at_such_a_delta_is_an_error(toy_settings: dict[str, Any], tmp_path: Path) -> None:
    site: OneSite = clinic(toy_settings, tmp_path)
    site.rule(epsilon=1.0, delta=1e-13)
    assert "at least 1e-12" in site.refuse(1).reason


def test_a_ledger_that_was_charged_at_such_a_delta_once_still_opens_and_prices(path: Path) -> None:
    with Ledger(path) as ledger:
        ledger._file._connection.execute(
            "INSERT INTO charges (dataset, run, round, purpose, unit, kind, figures, count, delta, charged_at) "
            "VALUES ('ward', '0', 1, 'training', 'record', ?, ?, 5, 1e-20, '2026-01-02T03:04:05+00:00')",
            (ROUND.event.kind, ROUND.event.text()),
        )
        assert charge(ledger, max_epsilon=100.0).delta == 1e-20


# A history of very many different releases.


def many(number: int, seed: int = 3) -> list[Release]:
    """Return so many releases of which no two are alike."""
    draw = random.Random(seed)
    return [
        gaussian_release(draw.uniform(4.0, 9.0), draw.uniform(0.01, 0.02), draw.randint(1, 5)) for _ in range(number)
    ]


def work(releases: Sequence[Release]) -> float:
    return accounting._work(accounting._affordable(accounting.merge(releases))[0])


def check_that_work_is_bounded(releases: Sequence[Release]) -> None:
    assert work(releases) <= MOST_WORK, "a server can make a price as dear as it likes"


@pytest.mark.parametrize("number", [1, 90, 300, 5000])
def test_a_price_is_of_bounded_work(number: int) -> None:
    check_that_work_is_bounded(many(number))
    check_that_work_is_bounded([gaussian_release(0.1 + 0.001 * place, 1e-6, 1) for place in range(number)])


def test_a_price_without_that_bound_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "_affordable", lambda merged: (merged, 0))
    with pytest.raises(AssertionError, match="dear"):
        check_that_work_is_bounded(many(300))


def test_a_rounded_history_costs_more_and_little_more_and_its_words_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "MOST_WORK", 60.0)
    releases = many(30, seed=4)
    value, accountant = epsilon_with_method(releases, DELTA)
    exact, _, exact_detour = accounting._answer(accounting.merge(releases), DELTA, "pld")
    assert exact <= value <= 1.5 * exact
    assert "noise rounded down and rates up" in str(accountant)
    assert exact_detour.grid == 0
    assert epsilon(list(reversed(releases)), DELTA) == value


def flat(merged: accounting.Merged) -> list[tuple[float, float, int]]:
    return [(event.noise_multiplier, event.sample_rate, count) for event, count in merged]


def test_every_rounded_release_has_less_noise_and_a_higher_rate() -> None:
    for number in (140, 1000):
        whole = accounting.merge(many(number))
        merged, rounded = map(flat, (whole, accounting._affordable(whole)[0]))
        assert sum(n for _, _, n in rounded) == sum(n for _, _, n in merged), "a release is gone"
        # Sorted by noise, the worse history has at least as many releases below every noise, and above every rate.
        for noise, rate, _ in merged:
            assert sum(n for s, _, n in rounded if s <= noise) >= sum(n for s, _, n in merged if s <= noise)
            assert sum(n for _, q, n in rounded if q >= rate) >= sum(n for _, q, n in merged if q >= rate)
        assert all(0 < q <= 1 for _, q, _ in rounded)


def test_a_longer_history_never_costs_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "MOST_WORK", 30.0)
    releases = many(80, seed=5)
    figures = [epsilon(releases[:number], DELTA) for number in (8, 9, 10, 11, 14, 20, 40, 80)]
    assert figures == sorted(figures)
    assert math.isfinite(figures[-1])

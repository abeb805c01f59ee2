"""The rows of ``contrib`` with all others, as ``tests/strategies/test_contracts.py`` has those of the core.

Pairs are in ``make test``. The whole product, with the core's rows, is in ``make test-product``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
from contracts import Cell, Contracts, Covered, Pair, axes, broken, pairs_of, quickened, refused_by_tables

from fedveil.common.starts import STARTS
from fedveil.common.tasks import TASKS
from fedveil.contrib.adapters.lora_diagonal import LoRADiagonal
from fedveil.contrib.starts.dp_eva import DPEVA
from fedveil.contrib.starts.dp_lora_ga import DPLoRAGA
from fedveil.contrib.starts.eva import EVA
from fedveil.contrib.starts.nonprivate_eva import NonprivateEVA
from fedveil.strategies import ROWS
from fedveil.strategies.job import Job

pytestmark = [pytest.mark.slow, pytest.mark.rough_prices]


@pytest.fixture(scope="module")
def contracts(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[[str], str]) -> Iterator[Contracts]:
    with quickened(tmp_path_factory.mktemp("contracts"), model_folder) as made:
        yield made


@pytest.fixture(scope="module")
def covered(contracts: Contracts) -> Covered:
    return Covered(contracts, core=False)


def test_every_pair_is_accepted_somewhere_or_refused_everywhere(contracts: Contracts, covered: Covered) -> None:
    covered.check(contracts)


def test_what_tables_refuse_is_refused_in_one_sentence(contracts: Contracts, covered: Covered) -> None:
    covered.check_refused(contracts)


@pytest.mark.parametrize("start", STARTS)
def test_a_run_of_a_pair_begins(start: str, contracts: Contracts, covered: Covered) -> None:
    some = [cell for cell in covered.begun if cell.start == start]
    assert not broken(contracts.begun, some)


@pytest.mark.parametrize("task", TASKS)
def test_a_run_of_a_pair_takes_a_round_and_its_export_scores_as_it_did(
    task: str, contracts: Contracts, covered: Covered
) -> None:
    some = [cell for cell in covered.run if cell.task == task]
    assert some
    assert not broken(contracts.ran, some)


# Faults that these tests must find ------------------------------------------------------------------------------------


FROM_SEED = (EVA, DPEVA, NonprivateEVA, DPLoRAGA)
"""Starts whose statistic says where A begins, and nothing of B."""


def test_a_start_that_does_not_give_what_it_says_is_found(
    contracts: Contracts, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = Contracts(contracts.world)
    some = []
    for start, adapter in product(FROM_SEED, ("lora-diagonal", "lora-increments", "salt")):
        mode = "none record" if "without" in start.needs else "dp-sgd record"
        some.append(Cell("classification", adapter, start.name, "fedavg-lora", mode))
    assert not broken(fresh.begun, some[:2])
    for start in FROM_SEED:
        monkeypatch.setattr(start, "from_seed", ())
    found = broken(Contracts(contracts.world).begun, [cell for cell in some if cell.adapter != "salt"])
    assert len(found) == 8
    assert set(found.values()) == {"KeyError: 'B'"}
    # What an adapter takes none of is refused, since sites would pay for nothing.
    apart = Cell("classification", "lora-frozen-b", "dp-eva", "fedavg-lora", "dp-sgd record")
    assert broken(Contracts(contracts.world).begun, [apart]) == {apart: "KeyError: 'B'"}
    monkeypatch.undo()
    assert "begins with B alone, which is from the seed" in str(Contracts(contracts.world).verdict(apart))


def test_a_factor_that_fits_another_start_is_found(contracts: Contracts, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell("classification", "salt", "eva", "fedavg-lora", "dp-sgd record")
    assert not broken(contracts.begun, [cell])
    monkeypatch.setattr(Job, "_measured", lambda own, derived, held: {**derived, **own.origin.from_statistic(held, 3)})
    assert "C of" in broken(contracts.begun, [cell])[cell]


def test_an_export_that_is_another_model_is_found(contracts: Contracts, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell("classification", "lora-diagonal", "svd-of-weights", "fedavg-lora", "none record")
    assert isinstance(contracts.verdict(cell), Job)
    monkeypatch.setattr(LoRADiagonal, "as_lora", lambda own, factors: {"A": factors["A"], "B": factors["B"]})
    assert broken(contracts.ran, [cell])


# The whole product ----------------------------------------------------------------------------------------------------


@pytest.mark.product
@pytest.mark.parametrize("strategy", ROWS)
@pytest.mark.parametrize("task", TASKS)
def test_every_cell_is_a_run_or_refused_in_one_sentence(task: str, strategy: str, contracts: Contracts) -> None:
    """Of each adapter and start a run begins; of each adapter and mechanism one takes a round, starts taking turns."""
    refused: set[Pair] = refused_by_tables()
    accepted = list[Cell]()
    wrong: dict[Any, str] = {}
    rows = axes()
    for adapter, start, mechanism in product(rows["adapter"], rows["start"], rows["mechanism"]):
        cell = Cell(task, adapter, start, strategy, mechanism)
        wrong |= broken(contracts.asked, [cell])
        if isinstance(contracts.verdicts.get(cell), Job):
            accepted.append(cell)
            if not refused.isdisjoint(pairs_of(cell)):
                wrong[cell] = "accepted, and a table refuses a pair of it"
    begun: dict[tuple[str, str], Cell] = {(cell.adapter, cell.start): cell for cell in reversed(accepted)}
    wrong |= broken(contracts.begun, list(begun.values()))
    by_round = defaultdict[tuple[str, str], list[Cell]](list)
    for cell in accepted:
        by_round[cell.adapter, cell.mechanism].append(cell)
    turns = [some[number % len(some)] for number, some in enumerate(by_round.values())]
    wrong |= broken(contracts.ran, turns)
    contracts.verdicts.clear()
    assert not wrong
    assert accepted, "the strategy has no run of this task"

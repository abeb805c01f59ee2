"""Every task, adapter, start, strategy and mechanism with every other: a run, or a sentence on what to change.

Pairs are in ``make test``: every pair of rows of any two tables stands in a job that is accepted, or in none whatever
the rest is. Of some the run begins, of some it runs one tiny round. The whole product is in ``make test-product``.
"""

from __future__ import annotations

import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import Any, ClassVar

import pytest
from contracts import (
    BEGUN,
    BY_MODE,
    LIGHT,
    Cell,
    Contracts,
    Pair,
    World,
    all_pairs,
    axes,
    cells,
    cover,
    of_axes,
    one_unit,
    pairs_of,
    refused_by_tables,
    sentence,
)

from common.adapters import LoRADiagonal
from common.config.sections import DataConfig
from common.data.sources import load_dataset
from common.errors import ConfigError
from common.starts import STARTS, class_means
from common.starts.dp_eva import DPEVA
from common.starts.dp_lora_ga import DPLoRAGA
from common.starts.eva import EVA
from common.starts.nonprivate_eva import NonprivateEVA
from common.starts.orthonormal import Orthonormal
from common.tasks import TASKS
from common.tasks.examples import Example
from server import conduct
from strategies import ROWS, job
from strategies.job import Job


@pytest.fixture(scope="module")
def contracts(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[[str], str]) -> Iterator[Contracts]:
    folder = tmp_path_factory.mktemp("contracts")
    with pytest.MonkeyPatch.context() as patch:
        # Thousands of jobs are asked for, and the tables stay as they are; nobody reads the reports.
        patch.setattr(job, "declared_settings", lru_cache(None)(job.declared_settings))
        patch.setattr(conduct, "write_reports", lambda *_, **__: None)
        # A map of the tiny models' 16 features needs no more made-up texts, each of which is a pass of its own.
        patch.setattr(class_means, "MADE", 48)
        patch.setattr("common.starts.public_metric.MADE", 48)
        yield Contracts(World(folder, model_folder))
    shutil.rmtree(folder)


class Covered:
    """The cells that hold all pairs, in three parts by what is done with each."""

    def __init__(self, contracts: Contracts) -> None:
        self.by_tables = refused_by_tables()
        wanted = [pair for pair in all_pairs() if pair not in self.by_tables]
        among = list(cells(self.by_tables))

        def accepts(cell: Cell) -> bool:
            return isinstance(contracts.verdict(cell), Job)

        runs = [*of_axes(wanted, LIGHT), *(pair for pair in of_axes(wanted, BY_MODE) if one_unit(pair))]
        self.run, _ = cover(runs, among, accepts)
        self.begun, _ = cover(of_axes(wanted, BEGUN), among, accepts, self.run)
        self.rest, self.never = cover(wanted, among, accepts, [*self.run, *self.begun])


@pytest.fixture(scope="module")
def covered(contracts: Contracts) -> Covered:
    return Covered(contracts)


def broken(check: Callable[[Cell], None], some: list[Cell]) -> dict[Cell, str]:
    """Return the cells that do not hold what they promise, and what is wrong."""
    found = {}
    for cell in some:
        try:
            check(cell)
        except Exception as error:  # whatever a cell raises is what is to be found
            found[cell] = f"{type(error).__name__}: {error}"
    return found


def test_every_pair_is_accepted_somewhere_or_refused_everywhere(contracts: Contracts, covered: Covered) -> None:
    held = {pair for cell in (*covered.run, *covered.begun, *covered.rest) for pair in pairs_of(cell)}
    refused = covered.never | covered.by_tables
    assert held | refused == set(all_pairs())
    assert not held & refused
    assert all(isinstance(contracts.verdict(cell), Job) for cell in covered.rest)
    rows = {(axis, row) for axis, values in axes().items() for row in values}
    assert {item for pair in held for item in pair} == rows, "a row goes with nothing"
    kinds = Counter((pair[0][0], pair[1][0]) for pair in refused)
    print(
        "pairs that no run has:",
        *(f"{one} and {two}: {count}" for (one, two), count in sorted(kinds.items())),
        sep="\n",
    )


def test_what_tables_refuse_is_refused_in_one_sentence(contracts: Contracts, covered: Covered) -> None:
    plain = {"task": "classification", "start": "orthonormal", "strategy": "fedavg-lora", "mechanism": "none record"}
    for pair in covered.by_tables:
        cell = Cell(**{"adapter": "lora", **plain, **dict(pair)})
        if pair[0][0] == "start":  # of a mechanism: an adapter and a strategy that take any start
            cell = cell._replace(adapter="lora-metric" if STARTS[cell.start].gives[0] == "B" else "lora")
        assert isinstance(contracts.verdict(cell), str), f"{pair} is accepted"


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
    monkeypatch.setattr(
        Job,
        "_measured",
        lambda own, derived, held: own.adapter.begin({**derived, **own.origin.from_statistic(held, 3)}),
    )
    assert "C of" in broken(contracts.begun, [cell])[cell]


def test_an_export_that_is_another_model_is_found(contracts: Contracts, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell("classification", "lora-diagonal", "svd-of-weights", "fedavg-lora", "none record")
    assert isinstance(contracts.verdict(cell), Job)
    monkeypatch.setattr(LoRADiagonal, "as_lora", lambda own, factors: {"A": factors["A"], "B": factors["B"]})
    assert broken(contracts.ran, [cell])


@pytest.mark.parametrize("said", ["nothing is named here", "strategy is wrong\nand so on", "strategy is wrong. Stop"])
def test_a_refusal_that_helps_nobody_is_found(said: str) -> None:
    with pytest.raises(AssertionError):
        sentence(ConfigError(said))
    assert sentence(ConfigError("strategy is wrong: set it to 'ffa-lora'"))


def confused(examples: Sequence[Example], names: Sequence[str]) -> int:
    """Return how many records the ledger would take for another that is unlike them."""
    different: list[Example] = []
    for example in (replace(example, key="", person="") for example in examples):
        if example not in different:
            different.append(example)
    told = {one.canonical(None if one.label is None else names[one.label]) for one in different}
    return len(different) - len(told)


@pytest.mark.parametrize("task", TASKS)
def test_the_ledger_knows_a_tasks_records_apart(
    task: str, contracts: Contracts, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = contracts.world.of_task(task)
    data = load_dataset(DataConfig(name=own["data.name"], labels=own.get("data.labels", "")), task)
    assert len(data.examples) > 9
    assert confused(data.examples, data.label_names) == 0
    first = data.examples[0]
    assert not TASKS[task].labelled or first.canonical("good") != first.canonical("bad")
    monkeypatch.setattr(type(first), "canonical", lambda *_: "a record")
    assert confused(data.examples, data.label_names) > 0, "the fault is not found"


def test_a_row_that_comes_later_is_in_every_cell_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    class Later(Orthonormal):
        name: ClassVar[str] = "later"

    monkeypatch.setitem(STARTS, "later", Later)
    assert {cell.strategy for cell in cells(refused_by_tables()) if cell.start == "later"} == {*ROWS}


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

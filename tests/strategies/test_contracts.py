"""Every task, adapter, start, strategy and mechanism of the core with every other: a run, or a sentence on why not.

Every pair of rows of any two tables stands in a job that is accepted, or in none whatever the rest is. Of some the run
begins, of some it runs one tiny round. ``contrib/tests/test_contracts_beside.py`` has the other rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

import pytest
from contracts import (
    Contracts,
    Covered,
    broken,
    cells,
    quickened,
    refused_by_tables,
    sentence,
)

from fedveil.common.config.sections import DataConfig
from fedveil.common.data.sources import load_dataset
from fedveil.common.errors import ConfigError
from fedveil.common.starts import STARTS
from fedveil.common.starts.orthonormal import Orthonormal
from fedveil.common.tasks import TASKS
from fedveil.common.tasks.examples import Example
from fedveil.strategies import ROWS

pytestmark = [pytest.mark.slow, pytest.mark.rough_prices]


@pytest.fixture(scope="module")
def contracts(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[[str], str]) -> Iterator[Contracts]:
    with quickened(tmp_path_factory.mktemp("contracts"), model_folder) as made:
        yield made


@pytest.fixture(scope="module")
def covered(contracts: Contracts) -> Covered:
    return Covered(contracts, core=True)


def test_every_pair_is_accepted_somewhere_or_refused_everywhere(contracts: Contracts, covered: Covered) -> None:
    covered.check(contracts)


def test_what_tables_refuse_is_refused_in_one_sentence(contracts: Contracts, covered: Covered) -> None:
    covered.check_refused(contracts)


@pytest.mark.parametrize("start", STARTS.core)
def test_a_run_of_a_pair_begins(start: str, contracts: Contracts, covered: Covered) -> None:
    some = [cell for cell in covered.begun if cell.start == start]
    assert not broken(contracts.begun, some)


@pytest.mark.parametrize("task", TASKS.core)
def test_a_run_of_a_pair_takes_a_round_and_its_export_scores_as_it_did(
    task: str, contracts: Contracts, covered: Covered
) -> None:
    some = [cell for cell in covered.run if cell.task == task]
    assert some
    assert not broken(contracts.ran, some)


# Faults that these tests must find ------------------------------------------------------------------------------------


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
    told = {one.canonical(one.answer(names)) for one in different}
    return len(different) - len(told)


@pytest.mark.parametrize("task", TASKS.core)
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

"""The register of numbered invariants: each stands once, in one sentence, with its tests or why it has none."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
COUNTS = {"C": 9, "L": 4, "Y": 4, "N": 2, "T": 6, "K": 3, "I": 1, "D": 1, "W": 2, "J": 4, "P": 5, "Q": 5}
"""Of columns, and of what stands on them: how many there are of each letter, from 1 on."""
NUMBERS = (
    *(str(number) for number in range(1, 45)),
    *(f"{letter}{number}" for letter, count in COUNTS.items() for number in range(1, count + 1)),
    *("X6", "X7", "X8"),
)
SENTENCE = re.compile(r"[A-Z0-9][^.]*\.")
NUMBERED = re.compile(r"test_(?:invariants?_)?((?:[a-z]?\d+_)(?:and_\d+_)*)")
"""The name of a test that begins with the numbers of what it holds."""
Register = Mapping[str, Mapping[str, Any]]


def register() -> Register:
    """Return the rows by their numbers; a number that is there twice is no TOML."""
    return tomllib.loads((HERE / "invariants.toml").read_text(encoding="utf-8"))


@lru_cache
def written_in(file: str) -> frozenset[str]:
    """Return the names of a file's tests, without running it."""
    path = HERE / file
    if not path.is_file():
        return frozenset()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return frozenset(
        node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    )


def faults(rows: Register) -> Iterator[str]:
    """Yield what is wrong with a register."""
    for number in sorted(set(NUMBERS) ^ set(rows)):
        yield f"{number} is missing" if number in NUMBERS else f"{number} is no invariant"
    for number, row in rows.items():
        if set(row) not in ({"holds", "tests"}, {"holds", "absent"}):
            yield f"{number} has {', '.join(row)}: give it 'holds', and 'tests' or 'absent'"
            continue
        for key in ("holds", "absent"):
            if key in row and not SENTENCE.fullmatch(row[key]):
                yield f"{number}.{key} is not one sentence: {row[key]}"
        if "tests" in row and not row["tests"]:
            yield f"{number} names no test"
        for test in row.get("tests", ()):
            file, _, name = test.partition("::")
            if name not in written_in(file):
                yield f"{number} names {test}, which is not there"


def unlisted(rows: Register) -> Iterator[str]:
    """Yield tests whose names begin with the number of an invariant that does not list them."""
    for path in sorted(HERE.glob("test_*.py")):
        if not NUMBERED.search(path.read_text(encoding="utf-8")):
            continue
        for name in written_in(path.name):
            match = NUMBERED.match(name)
            for number in re.findall(r"[a-z]?\d+", match[1]) if match else ():
                listed = rows.get(number.upper(), {}).get("tests", ())
                if number.upper() in NUMBERS and f"{path.name}::{name}" not in listed:
                    yield f"{path.name}::{name}"


def test_every_invariant_is_there_once_with_its_tests_or_why_it_has_none() -> None:
    assert len(NUMBERS) == 93
    assert not list(faults(register()))


def test_a_test_that_is_named_by_a_number_stands_in_its_row() -> None:
    assert not list(unlisted(register()))


@pytest.mark.parametrize(
    ("number", "row", "said"),
    [
        ("17", None, "17 is missing"),
        ("45", {"holds": "It holds.", "tests": ["test_invariants.py::test_a"]}, "45 is no invariant"),
        ("17", {"holds": "It holds.", "tests": ["test_invariants.py::test_a"]}, "which is not there"),
        ("17", {"holds": "It holds.", "tests": ["test_nowhere.py::test_a"]}, "which is not there"),
        ("17", {"holds": "It holds.", "tests": []}, "17 names no test"),
        ("17", {"holds": "It holds. It does.", "absent": "It is not built."}, "17.holds is not one sentence"),
        ("17", {"holds": "It holds.", "absent": ""}, "17.absent is not one sentence"),
        ("17", {"holds": "It holds."}, "give it 'holds', and 'tests' or 'absent'"),
    ],
)
def test_a_planted_fault_of_the_register_is_found(number: str, row: dict[str, Any] | None, said: str) -> None:
    rows = {key: value for key, value in register().items() if key != number}
    found = list(faults(rows if row is None else {**rows, number: row}))
    assert any(said in fault for fault in found), found


def test_a_numbered_test_that_no_row_lists_is_found() -> None:
    rows = {**register(), "C6": {"holds": "It holds.", "tests": []}}
    assert any("::test_c6_" in test for test in unlisted(rows))

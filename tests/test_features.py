"""The table of features: every yes of ours has a test or a command that is there, and every row an answer for each."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import app

ROOT = Path(__file__).resolve().parent.parent
OTHERS = ("yes", "partly", "no")


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("|---")][1:]


def faults(row: list[str]) -> list[str]:
    """Return what is wrong with a row."""
    feature, *others, ours, proof = row
    found = [f"{cell!r} is no answer" for cell in others if cell not in OTHERS]
    if ours == "no":
        return [*found, *(["a no has a proof"] if proof else [])]
    named = re.fullmatch(r"`(.+)`", proof)
    if not named:
        return [*found, f"{feature} is said to be there, and nothing shows it"]
    return [*found, *missing(named[1])]


def missing(proof: str) -> list[str]:
    """Return why a proof is none: a test that is not there, or a command."""
    program, _, rest = proof.partition(" ")
    if program == "make":
        there = re.search(rf"^{rest}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)
        return [] if there else [f"make has no target {rest}"]
    if program == "fedveil":
        return [f"there is no {proof}"] * (CliRunner().invoke(app, [*rest.split(), "--help"]).exit_code != 0)
    file, _, test = proof.partition("::")
    path = ROOT / "tests" / file
    if not path.is_file() or (test and f"def {test}(" not in path.read_text(encoding="utf-8")):
        return [f"{proof} is not there"]
    return []


def test_every_yes_has_a_test_or_a_command_that_is_there() -> None:
    table = rows((ROOT / "docs" / "features.md").read_text(encoding="utf-8"))
    assert len(table) >= 25
    assert {len(row) for row in table} == {8}
    assert [(row[0], fault) for row in table for fault in faults(row)] == []


@pytest.mark.parametrize(
    "row",
    [
        "| a | yes | no | no | no | no | yes | |",
        "| a | yes | no | no | no | no | yes | `test_chat.py::test_nothing` |",
        "| a | yes | no | no | no | no | yes | `test_nothing.py` |",
        "| a | yes | no | no | no | no | yes | `make nothing` |",
        "| a | yes | no | no | no | no | yes | `fedveil nothing` |",
        "| a | maybe | no | no | no | no | no | |",
        "| a | yes | no | no | no | no | no | `test_chat.py` |",
    ],
)
def test_a_yes_without_a_proof_is_found(row: str) -> None:
    (cells,) = rows(f"| head |\n{row}")
    assert faults(cells)

"""The table of features: every yes of ours has a test or a command that is there, and every row an answer for each."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import app

ROOT = Path(__file__).resolve().parent.parent
OTHERS = ("yes", "partly", "no")


FEATURES = (
    "one command from nothing",
    "examples and presets to fetch",
    "settings from a file, laid over each other; an unknown one is named with the nearest",
    "chat templates, several turns, loss on the assistant's turns",
    "data in TRL's and LLaMA-Factory's layouts",
    "packing",
    "preference training (DPO and others)",
    "8-bit and 4-bit base models, with gradients of each record",
    "gradient checkpointing, with gradients of each record",
    "fused kernels (Liger)",
    "several GPUs at one site",
    "experiment trackers",
    "a page that follows a run",
    "a form in the browser to start a run",
    "go on with a run, to the same bits",
    "a model card",
    "push to a hub",
    "merge an adapter into its base model",
    "ask the result",
    "served by stock libraries",
    "a server for the result, with an API",
    "a GGUF adapter for llama.cpp",
    "scored by lm-evaluation-harness",
    "your own training script or Trainer",
    "a dry run that forecasts cost",
    "a check of the machine",
    "search of settings",
    "many runs in one table",
    "records stay at sites",
    "sums of which nobody sees the parts",
    "per-record privacy with a claim that names unit, neighbours and adversary",
    "a whole site as the unit, with a trusted server that noises the sum and keeps a ledger",
    "a steward's policy and a ledger at every site",
    "what ε means for attackers and for a person with several records",
    "a signed report that others can check",
    "a report that states TLS, certificate, keys and the server's own check of this run",
    "a record for the registry of deployments",
    "an annex on GDPR, AI Act and HIPAA",
)
"""What people of the five look for, by the table's own words: no row may go because its answer is a no."""


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
    assert tuple(row[0] for row in table) == FEATURES
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

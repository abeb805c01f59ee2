"""Commands on a site's ledger: what is left, a budget that is changed, an export."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from made_run import DELTA
from report_forms import fedveil

from fedveil.client.ledger.ledger import Ledger
from fedveil.client.ledger.rows import Charge
from fedveil.common.errors import BudgetExhausted
from fedveil.privacy.accounting import gaussian_release
from fedveil.privacy.figures import epsilon_text
from fedveil.privacy.privacy_filter import promised


@pytest.fixture
def ledger_file(tmp_path: Path) -> Path:
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        ledger.set_budget("clinic", 3.0, DELTA)
        terms: dict[str, Any] = {"run": "7", "delta": DELTA, "max_epsilon": 3.0}
        ledger.charge(Charge("clinic", round_number=1, releases=(gaussian_release(1.2, 0.05, 5),), **terms))
        ledger.charge(Charge("clinic", round_number=2, releases=(gaussian_release(1.2, 0.05, 5),), **terms))
    return path


def test_the_steward_sees_what_is_left(ledger_file: Path) -> None:
    spent = promised([gaussian_release(1.2, 0.05, 10)], DELTA)[0]
    code, words = fedveil("ledger", "remaining", ledger_file, "--dataset", "clinic")
    assert code == 0
    assert float(re.findall(r"ε ([\d.]+)", words)[0]) == pytest.approx(3.0 - spent, abs=1e-4)
    assert float(re.findall(r"ε ([\d.]+)", words)[0]) <= 3.0 - spent
    code, words = fedveil("ledger", "remaining", ledger_file, "--dataset", "clinic", "--epsilon", "100")
    assert "of 3 is left" in words, "a larger budget than the ledger's own counted"
    code, words = fedveil("ledger", "remaining", ledger_file, "--dataset", "clinic", "--epsilon", "0.01")
    assert "refuses every further round" in words


def test_a_steward_raises_and_lowers_a_budget_on_the_record(ledger_file: Path) -> None:
    spent = promised([gaussian_release(1.2, 0.05, 10)], DELTA)[0]
    code, words = fedveil("ledger", "budget", ledger_file, "--dataset", "clinic", "--epsilon", "5")
    assert code == 0
    assert "budget ε 5 at δ 1e-05 (was 3)" in words
    assert f"{math.ceil(spent * 1e4) / 1e4:.4f} is spent" in words
    assert "policy" in words, "a stricter policy takes a raise back, and nobody said so"
    code, words = fedveil("ledger", "budget", ledger_file, "--dataset", "clinic", "--epsilon", spent / 2)
    assert code == 0
    assert "refuses every further round" in words, "a budget below what is spent was set without a word"
    terms: dict[str, Any] = {"run": "7", "delta": DELTA, "max_epsilon": 100.0}
    with Ledger(ledger_file) as ledger, pytest.raises(BudgetExhausted):
        ledger.charge(Charge("clinic", round_number=3, releases=(gaussian_release(1.2, 0.05, 5),), **terms))
    shown = fedveil("ledger", "show", ledger_file)[1].splitlines()
    assert [line.split("  ")[-1] for line in shown if "budget set" in line] == [
        "budget set to ε 3, at δ 1e-05",
        "budget set to ε 5, was 3, at δ 1e-05",
        f"budget set to ε {spent / 2:g}, was 5, at δ 1e-05",
    ]
    assert all(re.match(r"  \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", line) for line in shown[1:]), "an event without its time"
    budgets = json.loads(fedveil("ledger", "export", ledger_file)[1])["budgets"]
    assert [(b["replaced"], b["epsilon"]) for b in budgets] == [(None, 3.0), (3.0, 5.0), (5.0, spent / 2)]
    assert all(b["set_at"] for b in budgets)


def test_a_smaller_delta_holds_from_then_on_and_a_larger_one_never(ledger_file: Path) -> None:
    words = fedveil("ledger", "budget", ledger_file, "--dataset", "clinic", "--epsilon", "5", "--delta", "1e-3")[1]
    assert "δ 1e-05 holds instead of 0.001" in words
    words = fedveil("ledger", "budget", ledger_file, "--dataset", "clinic", "--epsilon", "5", "--delta", "1e-7")[1]
    spent = promised([gaussian_release(1.2, 0.05, 10)], 1e-7)[0]
    assert f"at δ 1e-07 (was 5); {epsilon_text(spent, decimals=4)} is spent" in words


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--dataset", "clinic", "--epsilon", "0"), "epsilon must be above 0"),
        (("--dataset", "clinic", "--epsilon", "-1"), "epsilon must be above 0"),
        (("--dataset", "clinic", "--epsilon", "nan"), "epsilon must be above 0"),
        (("--dataset", "clinic", "--epsilon", "inf"), "epsilon must be above 0"),
        (("--dataset", "clinic", "--epsilon", "3", "--delta", "0.5"), "delta must be below 0.5"),
        (("--dataset", "clinic", "--epsilon", "3", "--delta", "0"), "delta must be above 0"),
        (("--dataset", "clnic", "--epsilon", "3"), "did you mean 'clinic'?"),
    ],
    ids=lambda value: " ".join(value[1::2]) if isinstance(value, tuple) else "",
)
def test_a_nonsensical_budget_is_refused_in_one_line(ledger_file: Path, options: tuple[str, ...], said: str) -> None:
    before = ledger_file.read_bytes()
    code, words = fedveil("ledger", "budget", ledger_file, *options)
    assert (code, said in words, words.count("\n")) == (1, True, 1), words
    assert ledger_file.read_bytes() == before


def test_an_unknown_data_set_or_ledger_is_said_in_one_line(ledger_file: Path, tmp_path: Path) -> None:
    code, words = fedveil("ledger", "remaining", ledger_file, "--dataset", "clnic")
    assert (code, "did you mean 'clinic'?" in words, words.count("\n")) == (1, True, 1)
    of_one = ("--dataset", "x")
    for command in (("show",), ("export",), ("remaining", *of_one), ("budget", *of_one, "--epsilon", 3)):
        code, words = fedveil("ledger", command[0], tmp_path / "none.sqlite", *command[1:])
        assert (code, words.count("\n")) == (1, 1), f"fedveil ledger {command[0]}: {words}"
    assert not (tmp_path / "none.sqlite").exists(), "looking made a ledger"


def test_a_ledger_is_exported_whole(ledger_file: Path, tmp_path: Path) -> None:
    words = fedveil("ledger", "export", ledger_file)[1]
    value = json.loads(words)
    assert [charge["count"] for charge in value["charges"]] == [5, 5]
    assert value["budgets"][0]["epsilon"] == 3.0
    target = tmp_path / "ledger.csv"
    assert fedveil("ledger", "export", ledger_file, "--format", "csv", "-o", target)[0] == 0
    rows = target.read_text().splitlines()
    assert len(rows) == 3
    assert rows[0].startswith("id,dataset,run,round_number,purpose,unit,event,clip_norm,noise_multiplier")
    assert fedveil("ledger", "export", ledger_file, "--format", "xml")[0] == 1
    assert fedveil("ledger", "export", ledger_file, "-o", tmp_path / "no" / "where")[0] == 1


def test_the_ledger_shows_charges_and_budget(ledger_file: Path) -> None:
    code, words = fedveil("ledger", "show", ledger_file)
    assert code == 0
    assert "of 3 at δ 1e-05" in words
    step = "5 × sampled-gaussian (clip norm 1, noise multiplier 1.2, sample rate 0.05)"
    assert words.count(f"training: {step}") == 2
    assert words.count(f"first plan, by which all is priced: {step}") == 1

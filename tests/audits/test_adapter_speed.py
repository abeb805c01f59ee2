"""The table of ``benchmarks/adapters.py``: a row for every adapter, its ratio held to the limit. Nothing is timed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fedveil.common.adapters import ADAPTERS

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "adapters.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_of_adapters", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def asked(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark as it is called without arguments, with nothing loaded and nothing measured."""
    monkeypatch.setattr(sys, "argv", ["adapters.py"])
    monkeypatch.setattr(benchmark, "train_and_test", lambda *_: (None, None))
    monkeypatch.setattr(benchmark, "load_base_model", lambda *_: None)
    return benchmark


def test_one_command_has_a_row_for_every_adapter_and_says_which_keeps_the_limit(
    asked: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = {name: [(1.1, 1.0), (9.0, 1.0), (1.0, 1.0)] for name in ADAPTERS}
    monkeypatch.setattr(asked, "measured", lambda name, *_: pairs[name])
    assert asked.main() == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == list(ADAPTERS)
    assert all("| 1.10 (1.00 to 9.00) | 1.15 | yes |" in row for row in rows)

    pairs["dora"] = [(1.2, 1.0)] * 3
    assert asked.main() == 1, "a row above the limit fails nothing"
    above = [row for row in capsys.readouterr().out.splitlines() if row.endswith("| no |")]
    assert [row.split("`")[1] for row in above] == ["dora"]

"""The examples in docstrings run, and what they say comes out."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ">>> "


def with_examples() -> list[str]:
    """Return the modules of this project's packages that have examples, by their names."""
    files = (path for package in ROOT.glob("*/__init__.py") for path in package.parent.rglob("*.py"))
    found = (path.relative_to(ROOT) for path in files if EXAMPLE in path.read_text(encoding="utf-8"))
    names = (".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in found)
    return sorted(name if name.split(".")[0] in ("audits", "docs", "faults") else f"fedveil.{name}" for name in names)


@pytest.mark.parametrize("name", with_examples())
def test_the_examples_of_a_module_run(name: str) -> None:
    done = doctest.testmod(importlib.import_module(name))
    assert done.attempted, f"{name} has examples that are in no docstring"
    assert not done.failed


def test_examples_are_found_in_every_package_and_a_wrong_one_fails(capsys: pytest.CaptureFixture[str]) -> None:
    found = {name.split(".")[1] for name in with_examples()}
    assert {"common", "privacy", "client", "server", "strategies"} <= found
    wrong = ModuleType("wrong", f"{EXAMPLE}1 + 1\n3")
    assert doctest.testmod(wrong).failed == 1
    assert "Expected:\n    3\nGot:\n    2" in capsys.readouterr().out

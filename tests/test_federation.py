"""A whole federation in one process, from settings to the files it leaves."""

from __future__ import annotations

from typing import Any

from experiments.in_process import run_in_process


def test_smoke(toy_settings: dict[str, Any]) -> None:
    folder = run_in_process(toy_settings, 3)
    print((folder / "report.md").read_text())


def test_smoke_generation(toy_generation: dict[str, Any]) -> None:
    folder = run_in_process(toy_generation, 3)
    print((folder / "report.md").read_text())

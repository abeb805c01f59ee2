"""The seam of private randomness: tests alone reach it, deployed programs refuse it, and a report names it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from product import PRODUCT

from fedveil.client import worker
from fedveil.common.errors import MechanismError
from fedveil.deploy.server_folder import make_server
from fedveil.deploy.start import start_server
from fedveil.experiments.in_process import run_in_process
from fedveil.privacy.entropy import entropy_is_replaced, private_words, rehearsal_entropy, replaced_entropy
from fedveil.reports import markdown_report
from fedveil.reports.claim import SEEDED
from fedveil.reports.folder import read_run

ROOT = Path(__file__).resolve().parents[2]


def zeros(count: int) -> np.ndarray:
    return np.zeros(count, dtype=np.uint64)


def test_a_replaced_source_serves_all_but_rehearsals() -> None:
    with replaced_entropy(zeros):
        assert entropy_is_replaced()
        assert not private_words(4).any()
        with rehearsal_entropy():
            assert private_words(4).all()
        assert not private_words(4).any()


def test_no_file_of_the_product_replaces_the_source() -> None:
    files = [path for room in PRODUCT for path in (ROOT / room).rglob("*.py")]
    assert len(files) > 300
    naming = [path.relative_to(ROOT).as_posix() for path in files if "replace" in path.read_text(encoding="utf-8")]
    naming = [name for name in naming if re.search(r"\breplaced_entropy\b|\b_replacement\b", (ROOT / name).read_text())]
    assert naming == ["privacy/entropy.py"]


def test_deployed_programs_refuse_a_replaced_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_server(tmp_path / "server", ["localhost"])
    none = str(tmp_path / "none")
    words = ("--port", "1", "--secret", none, "--node", "{}", "--authority", none, "--key", none)
    monkeypatch.setattr("sys.argv", ["worker", *words])
    with replaced_entropy(zeros):
        with pytest.raises(MechanismError, match="protects nobody"):
            start_server(folder, print)
        with pytest.raises(MechanismError, match="protects nobody"):
            worker.main()


def test_a_report_names_a_replaced_source(toy_settings: dict[str, Any]) -> None:
    assert entropy_is_replaced(), "the tests' own draws"
    folder = run_in_process({**toy_settings, "rounds": 1}, 2)
    files = read_run(folder)
    assert files.server is not None
    assert not files.server.starts[0].system_entropy
    assert SEEDED in markdown_report(folder)

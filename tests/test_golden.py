"""What small federations end with, as first computed: no algorithm, charge or message changes unnoticed.

    PYTHONPATH=.:tests .venv/bin/python tests/test_golden.py           # print the digest of every case's exact bits
    PYTHONPATH=.:tests .venv/bin/python tests/test_golden.py --write   # store the results anew

Digests are not stored, because they hold for one machine only.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_runs import CASES, OF_ONE_MACHINE, SUMMED, differences, figures, furthest, nearly, run_case

import fedveil.client.app

GOLDEN = Path(__file__).with_name("golden")
RELATIVE = 1e-5
"""Of a tensor's norm: what a figure may differ by from the stored one."""
SCORE = re.compile(r"\.(accuracy|confusion|headline\.(accuracy|macro_f1)_after|rounds\[\d+\]\.(accuracy|loss))\b")
"""What of a report follows from the final tensors."""


def file_of(name: str) -> Path:
    return GOLDEN / f"{name.replace(', ', '-').replace(' ', '-')}.json"


def stored(name: str) -> dict[str, Any]:
    kept: dict[str, Any] = json.loads(file_of(name).read_text(encoding="utf-8"))
    return kept


@pytest.mark.parametrize("name", CASES)
def test_a_small_federation_ends_as_stored(name: str, tmp_path: Path) -> None:
    left, wanted = run_case(name, tmp_path), stored(name)
    assert left.ledger == wanted["ledger"]
    assert left.sent == wanted["sent"]
    gap = 0.0 if name in OF_ONE_MACHINE else furthest(figures(left.tensors), wanted["tensors"])
    assert gap < RELATIVE, f"{name}: the final adapter is {gap:.1e} of its norm from the stored one"
    found = differences(left.report, wanted.get("report"), nearly)
    assert [line for line in found if name not in OF_ONE_MACHINE or not SCORE.match(line)] == []


def test_a_planted_change_of_a_run_is_seen(tmp_path: Path) -> None:
    left = run_case("ffa-lora, open average", tmp_path)
    before = figures(left.tensors)
    name = max(left.tensors, key=lambda name: left.tensors[name].numel())
    assert furthest(figures({**left.tensors, name: left.tensors[name] * (1 + 3e-5)}), before) > RELATIVE
    for case in ("private average", "private adam", "open adam"):
        assert furthest(stored(f"ffa-lora, {case}")["tensors"], before) > 100 * RELATIVE
    report = stored("head alone")["report"]
    assert differences({**report, "status": "failed"}, report, nearly)


def test_a_rehearsal_leaves_no_draw_behind(tmp_path: Path) -> None:
    """A process that has rehearsed the model, and one that has not, end with the same adapter, bit for bit."""
    ends = []
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        if not number:
            fedveil.client.app.process.rehearsals.forget()
        ends.append(run_case("ffa-lora, private average", tmp_path / str(number)).digest())
    assert ends[0] == ends[1]


def test_every_case_has_a_file_and_every_file_a_case() -> None:
    assert {path.name for path in GOLDEN.glob("*.json")} == {file_of(name).name for name in CASES}
    assert SUMMED["privacy.mode"] == stored("secure sum")["report"]["claim"]["privacy_mode"]


def main(write: bool) -> None:
    """Run every case; print digests, and store the results if asked to."""
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            left = run_case(name, Path(folder))
        print(f"{left.digest()}  {name}", flush=True)
        if write:
            file_of(name).write_text(json.dumps(left.stored(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main("--write" in sys.argv[1:])

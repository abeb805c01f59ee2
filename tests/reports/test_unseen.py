"""Charges that a run's files cannot tell: each site that may have some is named, and no other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from made_run import MadeRun

from fedveil.common.run_lines import ConfigFile, read_file
from fedveil.reports.folder import read_run
from fedveil.reports.unseen import THEN, unseen_charges

pytestmark = pytest.mark.rough_prices

SITES = {"north": 2000, "south": 1500}


def made(folder: Path, *absent: tuple[int, str], rounds: int = 3) -> MadeRun:
    """Return a run of which south was absent in rounds, each with the kind."""
    run, kinds = MadeRun(folder, {"rounds": rounds}, SITES).start(), dict(absent)
    for number in range(1, rounds + 1):
        run.round(number, 0.7, refusals={"south": (kinds[number], "why")} if number in kinds else {})
    return run


def gaps(run: MadeRun) -> list[str]:
    return unseen_charges(read_run(run.folder))


def resumed(run: MadeRun, *after: int) -> MadeRun:
    config = read_file(ConfigFile, run.folder)
    times = ["2026-11-24T11:00:00+00:00"] * len(after)
    run.write(ConfigFile(config.run, config.started, config.settings, {}, [], times, list(after)))
    return run


@pytest.mark.parametrize(
    ("kind", "words"), [("late", "was late"), ("failed", "failed"), ("reply", "sent a reply that was refused")]
)
def test_a_site_whose_last_answer_was_lost_is_named(kind: str, words: str, tmp_path: Path) -> None:
    assert gaps(made(tmp_path, (3, kind))) == [f"south: {words} in round 3 and {THEN}"]


@pytest.mark.parametrize("kind", ["budget", "policy", "task", "tensors"])
def test_a_site_that_refused_before_any_charge_is_not(kind: str, tmp_path: Path) -> None:
    assert gaps(made(tmp_path, (3, kind))) == []


def test_a_later_total_counts_what_was_lost(tmp_path: Path) -> None:
    assert gaps(made(tmp_path, (2, "late"))) == []


def test_an_attempt_before_the_one_that_counts_is_in_its_total(tmp_path: Path) -> None:
    run = made(tmp_path)
    failed = {"round": 3, "attempt": 1, "site": "south", "kind": "late", "reason": "why"}
    add(run, failures=[failed])
    assert gaps(run) == []
    add(run, participants=["north"], refusals=[failed])
    assert gaps(run) == [f"south: was late in round 3 and {THEN}"]


def add(run: MadeRun, **changes: Any) -> None:
    """Change the last round's line."""
    lines = run.lines("rounds.jsonl")
    lines[-1] |= changes
    (run.folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_reply_that_does_not_count_but_told_its_price_is_known(tmp_path: Path) -> None:
    run = made(tmp_path)
    refused = {"round": 3, "attempt": 1, "site": "south", "kind": "reply", "reason": "too long"}
    add(run, participants=["north"], refusals=[refused], failures=[refused])
    assert gaps(run) == []


def test_sites_that_told_nothing_after_a_resume_are_named_together(tmp_path: Path) -> None:
    run = resumed(made(tmp_path), 3)
    assert gaps(run) == [f"north, south: took part until the run was resumed after round 3 and {THEN}"]


def test_who_told_a_charge_after_the_resume_or_had_left_long_before_is_not(tmp_path: Path) -> None:
    assert gaps(resumed(made(tmp_path), 2)) == []
    left = made(tmp_path / "left", (2, "budget"), (3, "budget"))
    assert gaps(resumed(left, 2)) == []
    assert gaps(resumed(left, 1)) == [f"south: took part until the run was resumed after round 1 and {THEN}"]

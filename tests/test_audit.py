"""The audits of ``make audit``, small: the code as it is passes, and a fault built in is found."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_run import MadeRun
from one_site import OneSite

from audits import concurrent
from audits.bounds import free_bound, gaussian_bound, gaussian_epsilon
from audits.canary import FAULTS, SOUND, probe
from audits.finding import Finding, as_json
from audits.forked import Send
from audits.kills import PHASES, kill_rounds, play_round
from common.messages import TrainTask
from common.privacy.accounting import Release, epsilon
from common.privacy.ledger import Ledger
from server.report import markdown_report

DELTA = 1e-5


def fresh(work: Callable[..., Any], *args: Any) -> Any:
    """Return what ``work`` returns in a process of its own that has no threads yet: it forks."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *args).result(timeout=300)


def charge_late(site: OneSite, task: TrainTask, send: Send) -> None:
    """The fault: what was trained leaves the site before its charge is in the ledger."""
    aside = site.ledger.with_suffix(".aside")
    if site.ledger.exists():
        shutil.copy(site.ledger, aside)
    play_round(replace(site, node={**site.node, "ledger": str(aside)}), task, send)
    time.sleep(30)
    aside.replace(site.ledger)


def few_kills(folder: Path) -> tuple[Finding, Finding]:
    """Kill ten rounds of the site as it is, and ten with the fault built in, late enough to be after the release."""
    findings = []
    for name, play, span in (("sound", play_round, 1.1), ("late", charge_late, 4.0)):
        (folder / name).mkdir()
        findings.append(kill_rounds(folder / name, 10, play, span))
    return findings[0], findings[1]


def test_no_kill_loses_the_charge_of_a_release_and_a_late_charge_is_found(tmp_path: Path) -> None:
    sound, late = fresh(few_kills, tmp_path)
    assert sound.passed, sound.figures
    assert sum(sound.figures[phase] for phase in PHASES) == sound.figures["kills"] == 10
    assert not late.passed, f"ten kills did not find a charge that comes after the release: {late.figures}"
    assert "not charged" in late.figures["first violation"]


def two_at_once(folder: Path, fault: bool) -> Finding:
    if fault:
        priced = Ledger.charge

        def unlocked(ledger: Ledger, dataset: str, releases: list[Release], **terms: Any) -> Any:
            """Decide by what was read before the lock, as a ledger without a transaction would."""
            spent, budget = ledger.spent(dataset), terms["max_epsilon"]
            time.sleep(0.02)
            if epsilon([*spent, *releases], terms["delta"]) > budget:
                return priced(ledger, dataset, releases, **terms)
            return priced(ledger, dataset, releases, **{**terms, "max_epsilon": 1e6})

        Ledger.charge = unlocked  # type: ignore[method-assign,assignment]
    return concurrent.charge_at_once(folder, bouts=3, rounds=6)


@pytest.mark.parametrize("fault", [False, True], ids=["as it is", "decided before the lock"])
def test_two_processes_at_once_stay_within_the_budget_or_are_found(tmp_path: Path, fault: bool) -> None:
    found = fresh(two_at_once, tmp_path, fault)
    assert found.passed != fault, found.figures
    assert fault or found.figures["charges paid"] == 18


@pytest.mark.parametrize("fault", [SOUND, FAULTS[0], FAULTS[2]], ids=lambda fault: fault.name)
def test_canaries_are_silent_about_the_code_and_speak_of_faults(tmp_path: Path, fault: Any) -> None:
    found = probe(tmp_path, fault, canaries=3000)
    assert found.passed, found.figures


def test_the_gaussian_epsilon_is_that_of_the_accountant() -> None:
    exact, priced = gaussian_epsilon(0.5, DELTA), epsilon([Release(2.0, 1.0, 1)], DELTA)
    assert exact <= priced <= exact + 1e-3
    assert gaussian_epsilon(0.0, DELTA) == gaussian_epsilon(-1.0, DELTA) == 0.0


def test_bounds_lie_below_the_truth_and_near_it_when_scores_are_many() -> None:
    draw = np.random.default_rng(5)
    present = draw.random(40_000) < 0.5
    scores = present + draw.normal(0.0, 1.0, present.shape)
    truth = gaussian_epsilon(1.0, DELTA)
    assert 0.85 * truth < gaussian_bound(scores, present, DELTA) < truth
    assert 0.3 * truth < free_bound(scores, present, DELTA) < truth
    for bound in (gaussian_bound, free_bound):
        assert bound(draw.normal(0.5, 1.0, present.shape), present, DELTA) < 0.1, "scores that say nothing"


def test_an_audit_in_a_runs_folder_is_in_its_report(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "run", {"rounds": 1}).start().round(1, 0.7).end()
    findings = [Finding("kills", "as it is", True, {"kills": 10}), Finding("canaries", "as it is", False, {})]
    content = as_json(findings, "2026-01-02T03:04:05+00:00", {"fedveil": "1"})
    assert not content["passed"], "one failed audit fails the whole"
    made.write("audit.json", content)
    assert json.loads((made.folder / "audit.json").read_text())["findings"][0]["figures"] == {"kills": 10}
    assert "audit.json" in markdown_report(made.folder)

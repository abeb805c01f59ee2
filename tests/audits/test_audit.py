"""The audits of ``make audit``, small: the code as it is passes, and a fault built in is found."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_run import MadeRun
from rich.console import Console

from audits import shown_rounds, summed, vectors, whole_sites
from audits.__main__ import FAMILIES, world_of
from audits.bounds import free_bound, gaussian_bound, gaussian_epsilon
from audits.canary import probe
from audits.concurrent import UNLOCKED, charge_at_once
from audits.dirac import Dirac
from audits.faults import DOUBLED, FLOAT_SUM, FLOATING, HALVED, SHARED_SEED, SHUFFLED, SOUND, TOKEN_MEAN, Fault
from audits.finding import audit_file, judged, show
from audits.kills import PHASES, charge_late, forget_keys, kill_rounds
from audits.noise_law import audit_noise
from audits.sensitivity import audit_sensitivity
from audits.simulated_site import axes_of, text_of
from audits.site_rounds import audit_sites
from audits.step_canaries import audit_steps, audited, model_for
from audits.worlds import flat
from fedveil.common.findings import Finding
from fedveil.common.tasks.text import TextExample
from fedveil.privacy.accounting import epsilon, gaussian_release
from fedveil.reports import markdown_report
from fedveil.strategies import STRATEGIES

pytestmark = pytest.mark.slow

DELTA = 1e-5


def canaries(folder: Path, fault: Fault) -> Finding:
    return probe(folder, fault, canaries=3000)


def noise_of_two_sites(folder: Path, fault: Fault) -> Finding:
    return audit_noise(world_of(folder / "bert", *FAMILIES[0]), fault)


def moved_by_a_record(folder: Path, fault: Fault) -> Finding:
    return audit_sensitivity(world_of(folder / "llama", *FAMILIES[2]), fault)


SMALL: dict[Callable[[Path, Fault], Finding], tuple[Fault, ...]] = {
    canaries: (HALVED, DOUBLED),
    noise_of_two_sites: (SHARED_SEED, FLOATING),
    moved_by_a_record: (TOKEN_MEAN, DOUBLED, FLOAT_SUM),
    shown_rounds.draws_stay_hidden: shown_rounds.FAULTS,
}
"""Audits that ``make audit`` does with more canaries and models, and the faults that they must find."""
FEWER: dict[Callable[..., Finding], int] = {whole_sites.sites_tell: 1000, whole_sites.noise_of_rounds: 400}
"""Sites, of 1,600, that show each of their faults."""


@pytest.fixture(scope="module")
def fresh() -> Callable[..., Any]:
    """Return a function that has work done in a process of its own that has no threads yet: it forks.

    All these processes are forks of one that has loaded the audits and what they import.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(
        ["audits.kills", "audits.concurrent", "peft", "transformers.models.bert.modeling_bert"]
    )

    def done(work: Callable[..., Any], *args: Any) -> Any:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(work, *args).result(timeout=300)

    return done


def few_kills(folder: Path) -> tuple[Finding, Finding]:
    """Kill twelve rounds of the site as it is, and ten with the fault, late enough to be after the release."""
    for name in ("sound", "late"):
        (folder / name).mkdir()
    return kill_rounds(folder / "sound", 12), kill_rounds(folder / "late", 10, charge_late, span=4.0)


def test_no_kill_loses_the_charge_of_a_release_and_a_late_charge_is_found(
    fresh: Callable[..., Any], tmp_path: Path
) -> None:
    sound, late = fresh(few_kills, tmp_path)
    assert sound.passed, sound.figures
    assert sum(sound.figures[phase] for phase in PHASES) == sound.figures["kills"] == 12
    assert sound.figures["inside a transaction"] > 0, "no kill fell between BEGIN and COMMIT"
    assert late.passed, f"ten kills did not find a charge that comes after the release: {late.figures}"
    assert "not charged" in late.figures["first violation"]


def few_kills_of_a_sum(folder: Path) -> tuple[Finding, Finding]:
    """Kill six rounds of a site of a sum as it is, and ten with the fault: one in four is before the charge."""
    for name in ("sound", "forgetful"):
        (folder / name).mkdir()
    return (
        kill_rounds(folder / "sound", 6, summed=True),
        kill_rounds(folder / "forgetful", 10, forget_keys, span=4.0, summed=True),
    )


def test_no_kill_of_a_sites_part_in_a_sum_lets_a_second_vector_out_and_a_site_that_forgets_keys_is_found(
    fresh: Callable[..., Any], tmp_path: Path
) -> None:
    sound, forgetful = fresh(few_kills_of_a_sum, tmp_path)
    assert sound.passed, sound.figures
    assert sum(sound.figures[phase] for phase in PHASES) == sound.figures["kills"] == 6
    assert forgetful.passed, f"ten kills did not find a second vector under one key: {forgetful.figures}"
    assert "a second vector under one key" in forgetful.figures["first violation"]


@pytest.mark.parametrize(("fault", "fit"), [(SOUND, 6), (UNLOCKED, 1)], ids=["as it is", UNLOCKED.name])
def test_two_processes_at_once_stay_within_the_budget_or_are_found(
    fresh: Callable[..., Any], tmp_path: Path, fault: Fault, fit: int
) -> None:
    found = fresh(charge_at_once, tmp_path, 5, fit, fault)
    assert found.passed, found.figures
    assert fault is UNLOCKED or found.figures["charges paid"] == 30


@pytest.mark.parametrize(
    ("audit", "fault"),
    [
        (audit, fault)
        for audit, faults in (SMALL | summed.CASES | vectors.CASES | whole_sites.CASES).items()
        for fault in (SOUND, *faults)
    ],
    ids=lambda case: case.name or "as it is" if isinstance(case, Fault) else case.__name__,
)
def test_the_code_as_it_is_passes_and_a_fault_is_found(
    audit: Callable[..., Finding], fault: Fault, tmp_path: Path
) -> None:
    found = audit(tmp_path, fault, FEWER[audit]) if audit in FEWER else audit(tmp_path, fault)
    assert found.passed, found.figures


# One strategy of those that train the factors of an adapter: their steps are the same.
@pytest.mark.parametrize("strategy", {STRATEGIES[name].adapters.default: name for name in audited()}.values())
def test_steps_on_what_a_strategy_trains_give_away_what_was_charged_and_no_more(strategy: str, tmp_path: Path) -> None:
    for fault in (SOUND, HALVED):
        found = audit_steps(strategy, tmp_path, fault)
        assert found.passed, found.figures
    assert found.figures["is at least"] / found.figures["epsilon claimed"] > 0.5, "canaries say next to nothing"


def test_a_canarys_gradient_lies_along_its_axis_and_no_other(tmp_path: Path) -> None:
    module = model_for("fedavg-lora", tmp_path).module
    canaries = Dirac(module, 3.0)
    assert canaries.size == sum(p.numel() for p in canaries.parameters)
    for axis in (0, 17, canaries.size - 1):  # the last one is the head's bias
        gradient = flat(list(torch.autograd.grad(canaries(torch.tensor([axis])).sum(), canaries.parameters)))
        assert gradient[axis] == -3.0
        assert gradient.abs().sum() == 3.0


@pytest.mark.parametrize("fault", [SOUND, SHUFFLED, SHARED_SEED], ids=lambda fault: fault.name or "as it is")
def test_rounds_of_two_sites_are_poisson_and_share_nothing_or_are_found(
    toy_settings: dict[str, Any], tmp_path: Path, fault: Fault
) -> None:
    found = audit_sites(toy_settings, tmp_path, fault)
    assert found.passed, found.figures


def test_every_text_of_a_canary_spells_its_axis(tmp_path: Path) -> None:
    model = model_for("ffa-lora", tmp_path)
    axes = [0, 1, 11, 12, 3999, 20735]
    records = model.prepare([TextExample(text=text_of(axis), label=0) for axis in axes])
    assert axes_of(model, model.batch(records)).tolist() == axes


def test_a_missed_fault_and_a_failed_audit_are_told_from_found_and_passed() -> None:
    findings = [
        judged("one", "", False, {}),
        judged("one", "halved", False, {}),
        judged("two", "halved", True, {}),
        judged("two", "", True, {"worst": 1.5}),
    ]
    assert [finding.passed for finding in findings] == [True, False, True, False]
    console = Console(width=120, record=True, file=io.StringIO())
    show(console, findings)
    text = console.export_text()
    for words in ("passed", "FAILED", "MISSED", "found", "worst: 1.5", "Which audit found which fault"):
        assert words in text
    row = next(line for line in text.splitlines() if line.startswith("│ halved"))
    assert [cell.strip() for cell in row.split("│")[1:-1]] == ["halved", "two", "one"], "found by two, missed by one"


def test_the_gaussian_epsilon_is_that_of_the_accountant() -> None:
    exact, priced = gaussian_epsilon(0.5, DELTA), epsilon([gaussian_release(2.0, 1.0, 1)], DELTA)
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
    findings = [judged("kills", "", False, {"kills": 10}), judged("canaries", "", True, {})]
    content = audit_file(findings, "2026-01-02T03:04:05+00:00", {"fedveil": "1"})
    assert not content.passed, "one failed audit fails the whole"
    made.audited("audit.json", content)
    assert json.loads((made.folder / "audit.json").read_text())["findings"][0]["figures"] == {"kills": 10}
    assert "audit.json" in markdown_report(made.folder)

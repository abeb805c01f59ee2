"""A start that is paid for: what part of a site's budget it takes, and what is scored before and after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from probes import ask, settings
from wards import clinic as ward

from audits.tiny_site import OneSite, clinic
from fedveil.client import budget
from fedveil.client.ledger.ledger import Ledger
from fedveil.client.policy import Policy
from fedveil.client.site import Site
from fedveil.common.errors import ProtocolError
from fedveil.common.messages.round import Refusal, Spending, TrainResult, TrainTask
from fedveil.common.run_lines import BaselineFile, read_file
from fedveil.experiments.in_process import run_in_process
from fedveil.privacy.plan import PrivacyPlan
from fedveil.privacy.privacy_filter import promised, promised_noise
from fedveil.privacy.steps import nothing
from fedveil.reports import report_of
from fedveil.strategies.job import Job, configure

pytestmark = [pytest.mark.rough_prices, pytest.mark.one_length]

STEPS = 5
"""Of the probe in these settings."""
PAID = {"recipe": "plain", "strategy": "ffa-lora", "adapter.start": "dp-eva", "privacy.delta": 1e-5}


def pay(site: Site, job: Job, number: int) -> tuple[PrivacyPlan, Spending]:
    return budget.pay_round(site, job, TrainTask("run", number, {}, {}, "", "", ""), nothing)


def strict(toy_settings: dict[str, Any], folder: Path, noise: float = 0.0) -> OneSite:
    """Return a site with a tenth of the run's budget, for a probe of a share of it or of this noise."""
    own = settings(toy_settings, privacy__epsilon=30.0)
    own |= {"start.noise-multiplier": noise} if noise else {"start.share": 0.25}
    if not noise:
        del own["start.noise-multiplier"]
    site = clinic(own, folder)
    site.rule(epsilon=3.0, delta=1e-3)
    return site


def spent_by(site: OneSite) -> Spending:
    answer = ask(site)
    assert isinstance(answer, TrainResult), f"the site refuses: {answer}"
    assert answer.spending is not None
    return answer.spending


def check_part(site: OneSite) -> None:
    """Let a site answer round 0, and hold what it cost to the part that it may take of a quarter's noise."""
    spending = spent_by(site)
    whole = promised_noise(spending.event, 3.0, 1e-3, STEPS)
    assert spending.event.noise_multiplier == pytest.approx(2 * whole, rel=2e-3), "another part of the site's budget"
    assert spending.epsilon_remaining > 1.0


def test_a_site_with_a_stricter_budget_takes_the_same_part_of_its_own(
    toy_settings: dict[str, Any], tmp_path: Path
) -> None:
    check_part(strict(toy_settings, tmp_path))


def test_a_start_that_takes_the_runs_noise_whatever_the_sites_budget_is_found(
    toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "_least_start_noise", lambda job, site, epsilon, delta: 0.0)
    with pytest.raises(AssertionError):
        check_part(strict(toy_settings, tmp_path))


def test_noise_that_is_set_by_hand_grows_alike(toy_settings: dict[str, Any], tmp_path: Path) -> None:
    spending = spent_by(strict(toy_settings, tmp_path, noise=4.0))
    ratio = promised_noise(spending.event, 3.0, 1e-3, STEPS) / promised_noise(spending.event, 30.0, 1e-3, STEPS)
    assert spending.event.noise_multiplier == pytest.approx(4.0 * ratio, rel=2e-3)


@pytest.mark.parametrize("own", [{"epsilon": 2.0, "delta": 1e-5}, {"epsilon": 8.0, "delta": 1e-9}])
def test_a_start_has_more_noise_where_either_figure_of_the_budget_is_stricter(
    own: dict[str, float], tmp_path: Path
) -> None:
    site, job = ward(tmp_path, Policy(**own)), configure({**PAID, "privacy.epsilon": 8.0, "rounds": 4})
    asked = job.origin.release()
    assert asked is not None
    noise = pay(site, job, 0)[1].event.noise_multiplier
    whole = [promised_noise(asked.event, e, d, 1) for e, d in ((own["epsilon"], own["delta"]), (8.0, 1e-5))]
    assert noise == pytest.approx(asked.event.noise_multiplier * whole[0] / whole[1])
    assert noise > 1.2 * asked.event.noise_multiplier


def test_a_site_that_comes_after_round_0_has_the_start_in_its_plan_all_the_same(tmp_path: Path) -> None:
    """A server may ask for it afterwards."""
    site, job = ward(tmp_path), configure({**PAID, "privacy.epsilon": 8.0, "rounds": 4})
    pay(site, job, 1)
    total = pay(site, job, 0)[1].epsilon_total
    with Ledger(site.ledger_path) as ledger:
        plan, spent = ledger.plans.of("ward"), ledger.spent("ward")
    assert plan is not None
    assert job.origin.release() in plan.releases
    assert total == promised(spent, 1e-5)[0], "the start departs from the plan of its own run"


def test_a_start_that_no_release_is_made_for_is_no_round_0(tmp_path: Path) -> None:
    site, job = ward(tmp_path), configure({"recipe": "plain", "privacy.delta": 1e-5})
    assert job.origin.release() is None
    with pytest.raises(ProtocolError, match="no release is made for the start 'orthonormal'"):
        pay(site, job, 0)
    with Ledger(site.ledger_path) as ledger:
        assert ledger.entries() == []


@pytest.mark.parametrize("least", [0.0, 300.0])
def test_a_start_is_made_with_the_noise_that_it_is_charged_for(least: float, tmp_path: Path) -> None:
    """At a site whose budget is stricter than the run's, and that asks for more noise than that takes."""
    site = ward(tmp_path, Policy(epsilon=2.0, delta=1e-5, min_noise_multiplier=least))
    job = configure({**PAID, "privacy.epsilon": 8.0, "rounds": 4})
    asked = job.origin.release()
    assert asked is not None
    plan, spending = pay(site, job, 0)
    assert plan.event == spending.event
    if least:
        assert plan.event.noise_multiplier == least
    else:
        assert plan.event.noise_multiplier > 1.5 * asked.event.noise_multiplier


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"start.sample-rate": 1e-9}, "sample-rate must be"),
        ({"start.noise-multiplier": 1e9}, "noise-multiplier must be from"),
        ({"privacy.delta": 1e-14}, "delta must be"),
    ],
)
def test_figures_of_a_start_that_no_honest_run_has_are_refused_before_they_are_priced(
    asked: dict[str, Any], words: str, toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = strict(toy_settings, tmp_path, noise=4.0)
    site.settings |= asked

    def priced(*_: Any) -> float:
        pytest.fail("a server's figures are priced unasked")

    monkeypatch.setattr(budget, "promised_noise", priced)
    answer = ask(site)
    assert isinstance(answer, Refusal)
    assert words in answer.reason


def test_before_is_before_the_paid_round_and_its_own_score_is_beside(toy_settings: dict[str, Any]) -> None:
    private = {"rounds": 1, "privacy.noise-multiplier": 2.0, "privacy.epsilon": 60.0}
    folder = run_in_process({**settings(toy_settings), **private}, 2, "probed")
    plain = run_in_process({**toy_settings, "rounds": 1, "privacy.mode": "none"}, 2, "plain")
    probed, begun = (read_file(BaselineFile, run) for run in (folder, plain))
    assert probed.loss == pytest.approx(begun.loss, rel=1e-5), "the probe is in what was scored before it"
    assert begun.begun_loss is None
    assert probed.begun_loss is not None
    assert abs(probed.begun_loss - probed.loss) > 1e-4
    report = report_of(folder)
    assert report.headline.accuracy_before == probed.accuracy
    assert (report.rounds[0].round_number, report.rounds[0].loss) == (0, probed.begun_loss)

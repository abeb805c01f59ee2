"""A record or a person at several sites of one sum: what it costs, what is said of it, what a ledger refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scipy.optimize import brentq
from scipy.stats import norm
from summed_runs import SUMMED

from audits.sum_site import SumSite
from audits.tiny_models import write_reviews
from audits.tiny_site import OneSite, clinic
from fedveil.client.app import answer
from fedveil.client.ledger.ledger import Ledger
from fedveil.client.ledger.rows import Charge
from fedveil.client.ledger.sums import Sums
from fedveil.common.errors import BudgetExhausted
from fedveil.common.messages.round import KeyReply, KeyTask, Refusal, TrainResult
from fedveil.common.messages.wire import encode_task
from fedveil.privacy import MECHANISMS
from fedveil.privacy.accounting import Release, composable, epsilon, gaussian_release
from fedveil.privacy.claim import Claim
from fedveil.privacy.events import Event
from fedveil.privacy.meaning import _of_several, meaning_of
from fedveil.privacy.units import PERSON, RECORD

NOISE = 1.3908
"""One sum with it, at rate 1, is (3, 1e-5)-private."""


def exact(clips: int, delta: float) -> float:
    """Return ε of one Gaussian that is moved by so many clips (Balle and Wang 2018, arXiv 1805.06530, theorem 8)."""
    mu = clips / NOISE

    def excess(e: float) -> float:
        return float(norm.cdf(mu / 2 - e / mu) - math.exp(e) * norm.cdf(-mu / 2 - e / mu)) - delta

    return float(brentq(excess, 0.0, 60.0))


# --- what it costs ----------------------------------------------------------------------------------------------------


def test_two_records_of_one_sum_cost_more_than_two_noises_and_than_twice_one() -> None:
    release = gaussian_release(NOISE, 1.0, 1)
    assert exact(1, 1e-5) == pytest.approx(3.0, abs=0.002)
    merged = composable([release])
    assert merged is not None
    for clips, delta in ((2, 1e-5), (2, 2e-5)):
        found = _of_several(merged, clips, delta)
        assert found is not None
        assert exact(clips, delta) <= found < 1.01 * exact(clips, delta)
    # What is true of plain uploads, and was said of sums: both are below what is true here.
    assert exact(2, 2e-5) > 6.46
    assert 2 * exact(1, 1e-5) < 6.01
    assert epsilon([release, release], 1e-5) < 4.47 < exact(2, 1e-5)


# --- what is said -----------------------------------------------------------------------------------------------------


def wrongly_said(claim: Claim) -> list[str]:
    """Return what in a claim of a sum is true where each site has noise of its own, and there alone."""
    return [
        text
        for text in (claim.across, *claim.leaves_out)
        if "the sum of what these have spent" in text or text.endswith("what these have spent adds up")
    ]


@pytest.mark.parametrize("unit", ["record", "person"])
def test_a_claim_of_sums_says_that_several_sites_cost_as_several_units(unit: str) -> None:
    claim = MECHANISMS["secure-sum"].of_unit(unit).claim
    assert not wrongly_said(claim)
    assert f"{unit}s of that sum" in claim.across
    assert any(f"the ε of k {unit}s" in text for text in claim.leaves_out)
    plain = MECHANISMS["dp-sgd"].of_unit(unit).claim
    assert "of that sum" not in plain.across
    assert plain.across == {"record": RECORD, "person": PERSON}[unit].across
    # The planted fault: a sum's claim in the words of plain uploads.
    if unit == "person":
        assert len(wrongly_said(PERSON.said(MECHANISMS["secure-sum"].claim, summed=False))) == 2


# --- what a ledger refuses --------------------------------------------------------------------------------------------


@pytest.fixture
def clinics(toy_settings: dict[str, Any], tmp_path: Path) -> SumSite:
    return SumSite(clinic({**toy_settings, **SUMMED, "privacy.delta": 1e-3}, tmp_path))


def twin_of(clinics: SumSite, folder: Path, **node: Any) -> OneSite:
    """Return the steward's other site, north of the same roster: the clinic's file, ledger and policy."""
    (folder / "north.key").write_bytes(clinics.peers["north"].pem())
    own = {**clinics.site.node, "site": "north", "identity": str(folder / "north.key")}
    return OneSite(clinics.site.settings, own | {key.replace("_", "-"): value for key, value in node.items()})


def ask_both(clinics: SumSite, twin: OneSite) -> tuple[Any, Any]:
    """Ask both sites for their vectors of one attempt, and return what they answer."""
    key = answer(encode_task(KeyTask("1", 1, 0)), twin.node, twin.settings, "1", twin.memory)
    assert isinstance(key, KeyReply), key
    task = clinics.task()
    offers = tuple(key.offer if offer.site == "north" else offer for offer in task.offers)
    task = replace(task, offers=offers)
    return clinics.site.ask(task), twin.ask(task)


@pytest.mark.parametrize("dataset", ["ward", "clinic"])
def test_one_ledger_lets_no_record_into_a_sum_twice(
    dataset: str, clinics: SumSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under two data sets that share rows, and under one."""
    twin = twin_of(clinics, tmp_path, dataset_id=dataset)
    first, second = ask_both(clinics, twin)
    assert isinstance(first, TrainResult), first
    assert isinstance(second, Refusal)
    assert second.kind == "policy"
    assert "in one sum a record is at one site" in second.reason
    assert "\n" not in second.reason
    assert len(clinics.site.charges()) == 1
    # It gives no second key for that round either, and the site that was first repeats the round.
    again = answer(encode_task(KeyTask("1", 1, 1)), twin.node, twin.settings, "1", twin.memory)
    assert isinstance(again, Refusal)
    assert isinstance(clinics.site.ask(clinics.task(1, attempt=1)), TrainResult)
    # The planted fault: two charges of independent noises, below what two records of that sum cost.
    monkeypatch.setattr(Sums, "hold_apart", lambda *own: None)
    first, second = ask_both(clinics, twin_of(clinics, tmp_path, dataset_id=dataset, ledger=str(tmp_path / "b.sqlite")))
    assert isinstance(second, TrainResult), second
    with Ledger(tmp_path / "b.sqlite") as ledger:
        (once,) = ledger.spent(dataset)
        bounds = meaning_of([once], 1e-3)
        assert bounds is not None
        assert epsilon([once, once], 1e-3) < bounds.several[0].epsilon


def test_two_sites_of_one_ledger_that_share_no_record_are_in_one_sum(clinics: SumSite, tmp_path: Path) -> None:
    data = write_reviews(tmp_path / "ward.csv", 40, 1)
    rows = data.read_text().splitlines()
    # A text that both files have by chance would be a record of both.
    data.write_text("\n".join([rows[0], *(f"north {row}" for row in rows[1:])]) + "\n")
    twin = twin_of(clinics, tmp_path, dataset_id="ward", data=str(data))
    first, second = ask_both(clinics, twin)
    assert isinstance(first, TrainResult), first
    assert isinstance(second, TrainResult), second
    with Ledger(clinics.site.ledger) as ledger:
        assert {entry.dataset: entry.caused_by for entry in ledger.entries()} == {"clinic": None, "ward": None}


def test_the_ceiling_of_the_price_alone_is_on_what_another_name_of_the_records_has_spent(tmp_path: Path) -> None:
    figures = {**gaussian_release(3.0, 0.1, 1).event.figures, "honest_sites": 4}
    shared, plain = Release(Event("summed-gaussian", figures), 5), gaussian_release(3.0, 0.1, 1)
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        first = ledger.charge(Charge("lab", "run", 1, (shared,), 1e-5, 50.0), records={1})
        other = ledger.epsilon_alone("lab", 1e-5)
        assert first.alone_after == other > 1.5 * first.epsilon_after
        own = Charge("ward", "run", 1, (plain,), 1e-5, 50.0, max_alone=other)
        assert ledger.charge(own, records={2}).alone_after < 0.5 * other
        with pytest.raises(BudgetExhausted, match="more than the policy's epsilon-alone"):
            ledger.charge(own, records={1})
        made = ledger.charge(replace(own, max_alone=50.0), records={1})
        assert made.alone_after == ledger.epsilon_alone("lab", 1e-5) > other

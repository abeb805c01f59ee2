"""The noise of a site's vector in a sum, and both of its prices."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from summed_runs import no_noise, uneven

from audits.bands import out_of_band, related
from audits.faults import DOUBLED, SOUND, Fault
from audits.sum_site import SumSite
from audits.summed import noise_again
from fedveil.client import sums
from fedveil.client.cache import RecordCache
from fedveil.client.ledger.ledger import Ledger
from fedveil.client.ledger.sums import Sums
from fedveil.client.rehearsals import Rehearsals
from fedveil.common.errors import MechanismError
from fedveil.common.messages.round import Refusal, TrainResult, TrainTask
from fedveil.common.model.federated import FederatedModel
from fedveil.privacy import dpsgd, randomness
from fedveil.privacy.accounting import alone
from fedveil.privacy.events import Event, sampled_gaussian
from fedveil.privacy.grid import noise_grid
from fedveil.privacy.plan import PrivacyPlan
from fedveil.privacy.privacy_filter import promised
from fedveil.privacy.secure_sum import AttemptName, Identity, Roster, SiteAttempt, noise_share, rounding, total
from fedveil.privacy.shared_noise import SecureSumPlan
from fedveil.strategies.job import configure

pytestmark = [pytest.mark.rough_prices, pytest.mark.one_length]


def own_noise(clinics: SumSite) -> torch.Tensor:
    """Return what a site adds to a sum into which it draws no record, over its share of the noise."""
    clinics.site.settings["training.sample-rate"] = 1e-6
    task = clinics.task()
    reply = clinics.site.ask(task)
    assert isinstance(reply, TrainResult), reply
    assert reply.spending is not None
    assert reply.contribution == {}
    return unmasked(clinics, task, reply)


def unmasked(clinics: SumSite, task: TrainTask, reply: TrainResult, clip: float = 1.0) -> torch.Tensor:
    """Return a site's vector without its masks, which the other sites of the attempt take off, over its share."""
    job, model = configure(clinics.site.settings), clinics.site.model()
    vectors = [np.frombuffer(reply.words, dtype="<u4").astype(np.uint32)]
    for other in clinics.others.values():
        other.agree(task.offers, clinics.roster, sums.terms_of(job, 50), sums._hashes(task, job, model))
        vectors.append(other.masked(np.zeros(len(vectors[0]), dtype=np.uint32)))
    share = noise_share(2.0, clip, 2)
    return total(vectors, share) / share


def test_a_sites_vector_has_its_share_of_noise(clinics: SumSite, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong() -> bool:
        # Of four vectors: in one alone, 562 numbers, one site more is missed in one run of twenty.
        noise = torch.cat([own_noise(clinics) for _ in range(4)])
        return out_of_band(float(noise.square().sum()), noise.numel())

    assert not wrong()
    # The planted fault: a share for one site more than is counted on.
    monkeypatch.setattr(SecureSumPlan, "noise_std", noise_share(2.0, 1.0, 3))
    assert wrong()


def test_a_margin_on_the_noise_is_on_a_sites_share_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """By one part in a hundred, as where rounding was never compared: of a million numbers that shows."""
    event = Event("summed-gaussian", {**sampled_gaussian(2.0, 0.25).figures, "honest_sites": 2})
    plan = SecureSumPlan(event, 10.0, 1e-3, 40.0)

    def beyond() -> bool:
        module = torch.nn.Linear(1000, 1000, bias=False)
        steps = plan.stepping()(module, torch.optim.SGD(module.parameters()), plan, noise_margin=1.01)
        steps.order = (module.weight,)
        with steps:
            steps.step([], lambda _: torch.zeros(0))
        assert steps.words is not None
        drawn = total([steps.words], plan.noise_std) / (1.01 * plan.noise_std)
        return out_of_band(float(drawn.square().sum()), drawn.numel())

    assert not beyond()

    def without(own: Any, plan: PrivacyPlan, margin: float) -> None:
        own.share, own.margin = plan.noise_std, 1.0

    monkeypatch.setattr(dpsgd.ClipAndShare, "read", without)
    assert beyond(), "the check is blind"


def test_a_round_of_a_sum_makes_no_second_sum_and_keeps_the_words_of_the_first() -> None:
    event = Event("summed-gaussian", {**sampled_gaussian(2.0, 0.25).figures, "honest_sites": 2})
    plan, module = SecureSumPlan(event, 10.0, 1e-3, 40.0), torch.nn.Linear(3, 2, bias=False)
    with plan.stepping()(module, torch.optim.SGD(module.parameters()), plan) as steps:
        steps.order = (module.weight,)
        steps.step([], lambda _: torch.zeros(0))
        first = steps.words
        with pytest.raises(MechanismError, match="a second sum was not paid for"):
            steps.step([], lambda _: torch.zeros(0))
        assert steps.words is first is not None
    assert "words" not in vars(module.weight), "a vector without its masks is left on the model"


def prices_at_first_use(clinics: SumSite, number: int, monkeypatch: pytest.MonkeyPatch) -> tuple[float, float]:
    """Return both prices that the ledger has as the first records of a round reach the model, made-up ones apart."""
    seen, losses, rehearse = list[tuple[float, float]](), FederatedModel.losses, Rehearsals.forecasts
    rehearsing = False

    def spy(model: FederatedModel, batch: Any) -> torch.Tensor:
        if not rehearsing and not seen:
            with Ledger(clinics.site.ledger) as ledger:
                seen.append((ledger.epsilon("clinic", 1e-3), ledger.epsilon_alone("clinic", 1e-3)))
        return losses(model, batch)

    def apart(*own: Any) -> Any:
        nonlocal rehearsing
        rehearsing = True
        forecasts = rehearse(*own)
        rehearsing = False
        return forecasts

    with monkeypatch.context() as patched:
        patched.setattr(FederatedModel, "losses", spy)
        patched.setattr(Rehearsals, "forecasts", apart)
        patched.setattr(randomness, "private_poisson_sample", lambda size, rate: torch.arange(size))
        clinics.train(number)
    return seen[0]


def test_both_prices_are_written_before_a_record_is_used(clinics: SumSite, monkeypatch: pytest.MonkeyPatch) -> None:
    clinics.rule(epsilon=50.0, delta=1e-3)
    found = [prices_at_first_use(clinics, number, monkeypatch) for number in (1, 2)]
    with Ledger(clinics.site.ledger) as ledger:
        spent = ledger.spent("clinic")
        for number, prices in enumerate(found, start=1):
            paid = [dataclasses.replace(release, count=number) for release in spent]
            assert prices == (promised(paid, 1e-3)[0], promised(alone(paid), 1e-3)[0]), (
                "a record was used before it was paid"
            )
        assert {release.event.figures["honest_sites"] for release in spent} == {2.0}
        assert ledger.epsilon("clinic", 1e-3) == promised(spent, 1e-3)[0]
        assert ledger.epsilon_alone("clinic", 1e-3) == promised(alone(spent), 1e-3)[0] > 1.3 * promised(spent, 1e-3)[0]
    # The planted fault: the charge is written down elsewhere, and not here before the reply has left.
    charged = Ledger.charge

    def late(ledger: Ledger, *own: Any, **terms: Any) -> Any:
        with Ledger(ledger.path.with_name("late.sqlite")) as aside:
            return charged(aside, *own, **terms)

    monkeypatch.setattr(Ledger, "charge", late)
    assert prices_at_first_use(clinics, 3, monkeypatch) == found[1], "the check is blind"


def test_the_price_alone_has_a_ceiling_that_plain_rounds_count_to_as_well(clinics: SumSite) -> None:
    clinics.train(1)
    with Ledger(clinics.site.ledger) as ledger:
        once = ledger.epsilon_alone("clinic", 1e-3)
    clinics.rule(epsilon_alone=1.01 * once)
    reply = clinics.key(2)
    assert isinstance(reply, Refusal)
    assert (reply.kind, "epsilon-alone" in reply.reason) == ("budget", True)
    clinics.site.settings |= {"privacy.mode": "dp-sgd", "privacy.honest-sites": 0}
    assert "epsilon-alone" in clinics.site.refuse(2).reason
    clinics.rule(epsilon_alone=100.0)
    clinics.site.train(2)
    with Ledger(clinics.site.ledger) as ledger:
        kinds = {release.event.kind for release in ledger.spent("clinic")}
        assert kinds == {"summed-gaussian", "sampled-gaussian"}
        assert ledger.epsilon_alone("clinic", 1e-3) > 1.1 * once


def test_a_sum_that_no_longer_fits_the_budget_says_on_how_many_sites_its_price_counts(clinics: SumSite) -> None:
    clinics.train(1)
    with Ledger(clinics.site.ledger) as ledger:
        once, honest = ledger.epsilon("clinic", 1e-3), ledger.honest_sites("clinic")
    clinics.rule(epsilon=1.01 * once, delta=1e-3)
    reply = clinics.key(2)
    assert isinstance(reply, Refusal)
    assert re.search(rf"this would make it [\d.]+ \(h = {honest}\), the budget is", reply.reason), reply.reason


def test_the_price_alone_is_never_of_more_noise_than_a_site_draws() -> None:
    for honest in (1, 2, 3, 7, 50):
        for noise in (0.37, 1.9492, 2.0, 4.6164):
            event = Event("summed-gaussian", {**sampled_gaussian(noise, 0.3, 0.7).figures, "honest_sites": honest})
            assert event.alone().noise_multiplier * 0.7 <= noise_share(noise, 0.7, honest)
            assert event.alone().noise_multiplier == pytest.approx(noise / honest**0.5)
    assert sampled_gaussian(2.0, 0.3).alone() == sampled_gaussian(2.0, 0.3)


def test_the_price_of_more_honest_sites_is_never_of_more_noise_than_they_draw() -> None:
    for honest in (1, 2, 3, 7):
        for noise in (0.37, 1.9492, 2.0, 4.6164):
            event = Event("summed-gaussian", {**sampled_gaussian(noise, 0.3).figures, "honest_sites": honest})
            for sites in (1, 2, 5, 12):
                priced = event.of_honest(sites)
                drawn = sites * Fraction(noise_share(noise, 1.0, honest)) ** 2
                assert Fraction(priced.noise_multiplier) ** 2 <= drawn
                assert priced.noise_multiplier == pytest.approx(noise * (sites / honest) ** 0.5)
                assert priced.figures["honest_sites"] == sites


@pytest.mark.parametrize("fault", [SOUND, DOUBLED], ids=lambda fault: fault.name or "as it is")
def test_a_sum_without_one_record_is_nearer_than_a_clip_and_one_rounding_or_is_found(
    fault: Fault, clinics: SumSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deployed vector without noise and masks: of all records, and of all but one that is longer than a clip."""
    clip, records_of = 0.05, RecordCache.prepare
    clinics.site.settings["privacy.clip-norm"] = clip
    monkeypatch.setattr(rounding, "add_private_noise", no_noise)
    monkeypatch.setattr(randomness, "private_poisson_sample", lambda size, rate: torch.arange(size))

    def vector(number: int, left_out: int | None = None) -> torch.Tensor:
        def some(*own: Any) -> Any:
            records = records_of(*own)
            return [record for i, record in enumerate(records) if i != left_out]

        with monkeypatch.context() as patched:
            patched.setattr(RecordCache, "prepare", some)
            task = clinics.task(number)
            reply = clinics.site.ask(task)
        assert isinstance(reply, TrainResult), reply
        return unmasked(clinics, task, reply, clip) * noise_share(2.0, clip, 2)

    with fault.plant():
        whole = vector(1)
        moved = [float((whole - vector(2 + i, i)).norm()) / clip for i in range(3)]
    most = 1.0 + noise_grid(noise_share(2.0, clip, 2)) / clip * whole.numel() ** 0.5
    assert most < 1.2
    assert max(moved) > 0.9, "no record that is left out was longer than a clip"
    assert (max(moved) > most) == bool(fault.name), moved


def test_one_key_has_one_vector_whatever_is_lost(clinics: SumSite) -> None:
    task = clinics.task()
    kept = dict(clinics.site.memory)
    first = clinics.site.ask(task)
    assert isinstance(first, TrainResult)
    again = clinics.site.ask(task)
    assert isinstance(again, TrainResult)
    assert again.words == first.words, "the same task is answered with another vector"
    assert len(clinics.site.charges()) == 1
    # The node died after it had answered, and came up with what it had kept before.
    clinics.site.memory.clear()
    clinics.site.memory.update(kept)
    clinics.refuse(task, "was charged under this key of its masks before")
    clinics.site.memory.clear()
    clinics.refuse(task, "has no key for that attempt")


def test_a_key_of_the_memory_that_the_ledger_forgets_is_found(
    clinics: SumSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted fault: without the ledger's word a second vector leaves under one key."""
    monkeypatch.setattr(Sums, "use_key", lambda *own: None)
    task = clinics.task()
    kept = dict(clinics.site.memory)
    vectors = []
    for _ in range(2):
        clinics.site.memory.clear()
        clinics.site.memory.update(kept)
        reply = clinics.site.ask(task)
        assert isinstance(reply, TrainResult)
        vectors.append(np.frombuffer(reply.words, dtype="<u4").astype(np.uint32))
    bare = (vectors[0] - vectors[1]).view(np.int32).astype(np.float64) * noise_grid(noise_share(2.0, 1.0, 2))
    assert np.abs(bare).max() < 50, "the difference of two vectors under one mask is not bare"


def test_a_task_of_another_attempt_than_the_key_is_refused(clinics: SumSite) -> None:
    task = clinics.task()
    clinics.refuse(replace(task, attempt=1), "has no key for that attempt")
    clinics.refuse(replace(task, offers=()), "keys of a secure sum, or lacks them")
    clinics.refuse(replace(task, offers=task.offers[:2]), "need 3")
    assert isinstance(clinics.site.ask(task), TrainResult)


def test_lies_about_an_attempt_are_refused_and_cost_nothing(clinics: SumSite) -> None:
    early = clinics.task(1, attempt=0)
    stale = {offer.site: offer for offer in early.offers}
    task = clinics.task(1, attempt=1)
    clinics.refuse(early, "has no key for that attempt")
    clinics.refuse(replace(task, round_number=2), "has no key for that attempt")
    own, north, south = task.offers
    mole = SiteAttempt(AttemptName("1", 1, 1, clinics.roster.digest), "mole", Identity.new()).offer
    for offers, words in (
        ((own, stale["north"], south), "'north' is not signed by that site for this attempt"),
        ((stale["clinic"], north, south), "'clinic' is not signed by that site for this attempt"),
        ((own, north, replace(south, public=north.public)), "'south' is there twice"),
        ((own, north, replace(south, public=bytes(32))), "'south' is not signed"),
        ((own, north, south, mole), "'mole' is not in the roster"),
        ((north, south), "own key is not among those"),
    ):
        clinics.refuse(replace(task, offers=offers), words)
    assert clinics.site.ask(task).words, "a lie has taken the key away"  # type: ignore[union-attr]


def test_a_round_asked_again_with_other_sites_has_another_noise_and_another_charge(clinics: SumSite) -> None:
    """Without their masks: masked vectors differ whatever is below the masks."""
    clinics.site.settings["training.sample-rate"] = 1e-6  # no record, so that what is left is the site's noise
    folder = clinics.site.ledger.parent
    clinics.peers["east"] = Identity.new()
    clinics.roster = Roster({**clinics.roster.keys, "east": clinics.peers["east"].public})
    (folder / "peers.toml").write_text(clinics.roster.text())
    clinics.rule(honest_sites=4)
    everyone, vectors, noises = dict(clinics.peers), [], list[torch.Tensor]()

    def ask(attempt: int, left_out: str) -> None:
        clinics.peers = {name: peer for name, peer in everyone.items() if name != left_out}
        task = clinics.task(1, attempt=attempt)
        reply = clinics.site.ask(task)
        assert isinstance(reply, TrainResult), reply
        vectors.append(np.frombuffer(reply.words, dtype="<u4").astype(np.uint32))
        noises.append(unmasked(clinics, task, reply))
        assert len(clinics.site.charges()) == attempt + 1

    ask(0, "east")
    ask(1, "south")
    assert not uneven(vectors[0] - vectors[1]), "the difference of two attempts is no uniform words"
    assert uneven(vectors[0] - vectors[0]), "the check is blind"
    for noise in noises:
        assert not out_of_band(float(noise.square().sum()), noise.numel())
    assert not related(*noises), "the noise of one attempt is in the next one, too"
    with noise_again():  # the planted fault
        ask(2, "east")
        ask(3, "south")
    assert not uneven(vectors[2] - vectors[3]), "the masks alone make two vectors another"
    assert related(*noises[2:]), "the check is blind"

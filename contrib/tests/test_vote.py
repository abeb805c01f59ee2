"""A private vote: what a site releases of its records' votes, that it costs one clip, and what a policy says of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from audits.faults import SOUND, Fault
from audits.tiny_site import tiny_site
from audits.votes import ALTERNATIVES, BY_NEIGHBOURS, COUNTED_TWICE, OfDraws, audit_votes, drawn
from audits.worlds import World, fresh_world
from fedveil.client.policy import Policy
from fedveil.client.policy_file import parse_policy
from fedveil.client.rehearsal import rehearse_initial
from fedveil.common.errors import ConfigError, PolicyRefusal
from fedveil.common.messages.tensors import weighted_sum
from fedveil.common.model.federated import FederatedModel
from fedveil.common.starts import STARTS
from fedveil.common.tasks import Record
from fedveil.common.tasks.base import OWNER
from fedveil.contrib.starts import vote
from fedveil.contrib.starts.vote import SPOILT, VOTES, Vote, of_least_loss
from fedveil.privacy import dpsgd
from fedveil.privacy.accounting import epsilon
from fedveil.privacy.plan import PrivacyPlan, gaussian_plan
from fedveil.strategies.job import configure

Folder = Callable[[str], str]
FAMILIES = (("bert", "lora", "trained"), ("llama", "lora-frozen-a", "frozen"))


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: str(family[0]))
def world(request: pytest.FixtureRequest, model_folder: Folder) -> World:
    family, adapter, head = request.param
    return fresh_world(model_folder(family), family, adapter, head)


def plan_of(divisor: float, noise: float = 1.0) -> PrivacyPlan:
    return gaussian_plan(1.0, noise, 1.0, divisor, 1e-5, 50.0)


def without_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dpsgd, "add_private_noise", lambda total, std: total.double())


def votes_alone(world: World) -> list[int]:
    """Return the votes the slow way: every record by itself, in float32, without padding to a shape."""
    found = []
    for record in world.records:
        losses = []
        for state in drawn(world.model):
            world.model.write(state)
            losses.append(float(world.model.losses(world.batch([record])).detach()))
        found.append(losses.index(min(losses)))
    return found


def test_two_unequal_sites_sum_up_to_all_votes_and_leave_the_model_as_it_was(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_noise(monkeypatch)
    wanted, start = votes_alone(world), OfDraws()
    before = {name: p.requires_grad for name, p in world.model.module.named_parameters()}
    parts = [
        start.privatise(world.model, records, plan_of(n))
        for records, n in ((world.records[:2], 3.0), (world.records[2:], 6.0))
    ]
    counts = 9 * weighted_sum([3 / 9, 6 / 9], parts)[VOTES]["counts"]
    assert counts.tolist() == pytest.approx([wanted.count(i) for i in range(ALTERNATIVES)], abs=1e-6)
    assert len(set(wanted)) > 1, "all records vote alike, which shows nothing"
    assert {name: p.requires_grad for name, p in world.model.module.named_parameters()} == before
    assert parts[0][VOTES]["counts"].shape == start.layout(world.model)[VOTES]["counts"]


def test_a_record_votes_the_same_alone_and_among_any_others(world: World) -> None:
    states = drawn(world.model)
    among = of_least_loss(world.model, world.records, states, lambda: None)
    reverse = of_least_loss(world.model, world.records[::-1], states, lambda: None)
    alone = [of_least_loss(world.model, [record], states, lambda: None)[0] for record in world.records]
    assert among == alone == reverse[::-1]


def test_of_equal_alternatives_the_first_gets_the_vote_and_of_what_is_not_finite_none(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    states = drawn(world.model)
    assert of_least_loss(world.model, world.records, [states[1]] * 3, lambda: None) == [0] * len(world.records)
    losses, mark = world.model.losses, world.mark

    def failing(batch: Any) -> torch.Tensor:
        if bool((batch["input_ids"] == mark).any()):
            raise RuntimeError("no such record")
        return losses(batch) * torch.nan if batch["input_ids"].shape[1] > 16 else losses(batch)

    usual = of_least_loss(world.model, world.records, states, lambda: None)
    monkeypatch.setattr(world.model, "losses", failing)
    found = of_least_loss(world.model, world.records, states, lambda: None)
    sizes = [world.model.shapes.length_of(world.model.collator.size(record)) for record in world.records]
    lost = [number for number, size in enumerate(sizes) if size > 16 or number == len(sizes) - 1]
    assert [number for number, v in enumerate(found) if v == SPOILT] == lost
    assert 1 < len(lost) < len(sizes)
    assert all(now in (before, SPOILT) for now, before in zip(found, usual, strict=True))
    assert "votes for nothing" in caplog.text
    caplog.clear()
    cast = vote.ballots(world.records, found, ALTERNATIVES)
    assert [float(ballot["features"].sum()) for ballot in cast] == [0.0 if v == SPOILT else 1.0 for v in found]


@pytest.mark.parametrize("fault", [SOUND, COUNTED_TWICE, BY_NEIGHBOURS], ids=lambda fault: fault.name or "sound")
def test_the_audit_of_votes_passes_on_the_code_as_it_is_and_finds_every_fault(fault: Fault, world: World) -> None:
    finding = audit_votes(world, fault)
    assert finding.passed
    if not fault.name:
        assert finding.figures["clips moved by one record, at most"] == pytest.approx(1.0, abs=1e-6)


def test_all_votes_of_a_person_are_one_vector_of_at_most_a_clip(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedveil.privacy.units import PERSON

    without_noise(monkeypatch)
    start, records = OfDraws(), [{**record, OWNER: 0} for record in world.records]
    plan = gaussian_plan(1.0, 1.0, 1.0, 1.0, 1e-5, 50.0)
    object.__setattr__(plan, "unit", PERSON)
    counts = start.privatise(world.model, records, plan)[VOTES]["counts"]
    own = torch.tensor([float(votes_alone(world).count(i)) for i in range(ALTERNATIVES)])
    assert torch.allclose(counts, own / own.norm(), atol=1e-5)


def test_losses_are_rehearsed_before_a_vote(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    timing = rehearse_initial(world.model, OfDraws())
    assert timing.passes
    assert OfDraws().passes == ALTERNATIVES
    own = world.model.task.sums

    def mixed(module: Any, batch: Any) -> Any:
        sums = own(module, batch)
        object.__setattr__(sums, "loss", sums.loss + 1e-2 * sums.loss.mean())
        return sums

    monkeypatch.setattr(type(world.model.task), "sums", lambda self, module, batch: mixed(module, batch))
    with pytest.raises(Exception, match="loss depends on the records beside it"):
        rehearse_initial(world.model, OfDraws())


# --- the choice under noise -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Given(OfDraws):
    """A vote whose votes the records hold."""

    name: ClassVar[str] = "given"

    def choose(self, model: FederatedModel, records: Sequence[Record], before_pass: Callable[[], None]) -> list[int]:
        del model, before_pass
        return [record["labels"] for record in records]


@pytest.mark.parametrize(("margin", "least"), [(40, 97), (70, 100)])
def test_of_four_sites_at_noise_4_the_planted_best_is_chosen(margin: int, least: int, model_folder: Folder) -> None:
    model = fresh_world(model_folder("bert"), "bert", "lora", "trained").model
    start, others = Given(), 5
    site = [{"labels": 2}] * (others + margin // 4) + [{"labels": i} for i in (0, 1, 3) for _ in range(others)]
    site += [{"labels": 2}] * (margin % 4 // 2)  # of 70 a quarter is 17.5: two sites would have one more
    right = 0
    for _ in range(100):
        parts = [start.privatise(model, site, plan_of(1.0, noise=4.0)) for _ in range(4)]
        right += int(sum(part[VOTES]["counts"] for part in parts).argmax()) == 2
    assert right >= least


def test_one_release_at_noise_4_is_priced_as_written_down() -> None:
    release = OfDraws(noise_multiplier=4.0).release()
    assert (release.count, release.event.sample_rate, release.event.clip_norm) == (1, 1.0, 1.0)
    assert epsilon([release], 1e-5) == pytest.approx(0.93, abs=0.01)


# --- what a steward says ----------------------------------------------------------------------------------------------


def test_no_record_votes_unless_the_sites_policy_names_the_vote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STARTS, OfDraws.name, OfDraws)
    site = tiny_site(tmp_path, **{"adapter.start": OfDraws.name, "strategy": "ffa-lora"})
    refusal = site.refuse(0)
    assert (refusal.kind, refusal.reason) == (
        "policy",
        "the site's policy has votes = none; the run asks for a vote: adapter.start = 'of-draws'",
    )
    site.rule(votes=["of-draws"])
    result = site.train(0)
    assert result.contribution[VOTES]["counts"].shape == (ALTERNATIVES,)
    assert [(run, number) for run, number, _ in site.charges()] == [("1", 0)]
    with pytest.raises(ConfigError, match="by which no record votes"):
        parse_policy('votes = ["orthonormal"]', "policy.toml")
    job = configure(site.settings)
    with pytest.raises(PolicyRefusal):
        Policy().check_job(job, private=True)


def test_a_vote_is_paid_for_by_dp_sgd_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STARTS, OfDraws.name, OfDraws)
    for mode, words in (
        ({"privacy.mode": "none"}, "is a vote, a release that"),
        ({"privacy.mode": "secure-sum", "privacy.honest-sites": 2}, "nobody sees more than a sum"),
    ):
        with pytest.raises(ConfigError, match=words):
            configure({"adapter.start": OfDraws.name, "strategy": "ffa-lora", **mode})
    assert issubclass(OfDraws, Vote)

"""Mechanisms: one table, rows that do what they are priced for, and nobody else who asks whether a run is private."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
import torch
from torch import Tensor

from audits.account import PUBLIC, spying
from audits.faults import (
    ROW_COUNT,
    ROW_DIVISOR,
    ROW_PRICE,
    ROW_QUIET,
    ROW_RATE,
    Fault,
    faulty_row,
    zero_noise,
)
from audits.site_rounds import sampler_faults
from audits.sum_site import SumSite
from audits.tiny_site import OneSite, tiny_site
from audits.worlds import World, flat, fresh_world, norm
from fedveil.client.ledger.ledger import Ledger
from fedveil.client.policy import Policy
from fedveil.client.site import check_job
from fedveil.client.timing import Timing
from fedveil.common.config.flat import Scalar
from fedveil.common.config.sections import PrivacyConfig, TrainingConfig
from fedveil.common.errors import ConfigError, MechanismError, PolicyRefusal
from fedveil.common.messages.round import Refusal
from fedveil.common.messages.state import AdapterState
from fedveil.common.messages.tensors import apply, entries, subtract
from fedveil.common.model import plain
from fedveil.common.model.federated import FederatedModel
from fedveil.common.run_lines import PrivacyLine, read_lines
from fedveil.common.starts import STARTS, PaidStart
from fedveil.common.tasks import Record
from fedveil.experiments.in_process import run_in_process
from fedveil.privacy import MECHANISMS, Mechanism, dpsgd
from fedveil.privacy.accountant import TRAINING
from fedveil.privacy.accounting import Release, epsilon
from fedveil.privacy.claim import Claim
from fedveil.privacy.events import Event
from fedveil.privacy.grid import noise_grid, sum_grid
from fedveil.privacy.no_privacy import NoPrivacy
from fedveil.privacy.plan import PrivacyPlan
from fedveil.privacy.randomness import add_private_noise
from fedveil.privacy.record_level import DPSGD
from fedveil.privacy.secure_sum import rounding
from fedveil.privacy.steps import nothing
from fedveil.reports import markdown_report, report_of
from fedveil.server.terms import least_plan
from fedveil.strategies.job import configure

CHARGED = [name for name, row in MECHANISMS.items() if row.charged]
each_row = pytest.mark.parametrize("name", MECHANISMS)
each_charged = pytest.mark.parametrize("name", CHARGED)
RECORDS = 40


OWN: dict[str, dict[str, Any]] = {
    "secure-sum": {"privacy.honest-sites": 2},
    "client-level": {"privacy.unit": "site", "privacy.cohort": 3},
}
"""Settings without which a row is refused."""


def settings_of(name: str) -> dict[str, Any]:
    return {"privacy.mode": name, **OWN.get(name, {})}


def figures_of(name: str, noise: float = 2.0) -> tuple[PrivacyConfig, TrainingConfig]:
    """Return settings of a run with the row, as it fills them in."""
    config = configure({**settings_of(name), "privacy.noise-multiplier": noise, "privacy.epsilon": 50.0}).config
    return dataclasses.replace(config.privacy, delta=1e-3), config.training


def plan_for(name: str, noise: float = 2.0) -> PrivacyPlan:
    privacy, training = figures_of(name, noise)
    return MECHANISMS[name].plan(privacy, training, 3, PUBLIC)


def plans_of(name: str) -> list[PrivacyPlan]:
    """Return all plans by which a site acts: of its steps, and of the release that each start of the row is made of."""
    plan, listed = plan_for(name), MECHANISMS[name].starts
    paid = [start() for start in STARTS.values() if issubclass(start, PaidStart) and start.needs in listed]
    return [plan, *(start.plan(plan, PUBLIC) for start in paid)]


# --- the table --------------------------------------------------------------------------------------------------------


@each_row
def test_a_row_is_called_by_its_own_name_and_does_not_contradict_itself(name: str) -> None:
    row = MECHANISMS[name]
    assert row.name == name
    row.check_row()
    assert all((row.claim.unit, row.claim.adjacency, row.claim.adversary, row.claim.sampler))
    job = configure(settings_of(name))
    assert job.mechanism is row
    assert configure(job.settings()) == job
    assert row.promise(job.config.privacy)


@each_row
@pytest.mark.parametrize("key", ["privacy.honest-sites", "privacy.drop-outs"])
def test_a_row_without_a_sum_refuses_what_is_of_sums(name: str, key: str) -> None:
    """It would have no effect, and whoever set it would take the noise for shared."""
    settings = {**settings_of(name), "privacy.honest-sites": 3, key: 3}
    if MECHANISMS[name].summed:
        configure(settings)
    else:
        with pytest.raises(ConfigError, match=rf"needs {re.escape(key)} 0, because only in 'secure-sum'"):
            configure({**settings_of(name), key: 3})


@each_row
def test_a_row_has_either_a_plan_that_pays_or_one_that_exposes(name: str) -> None:
    row, (privacy, training) = MECHANISMS[name], figures_of(name)
    if row.central:  # the server's plan pays, the site's exposes
        assert row.plan(privacy, training, 3, PUBLIC).release(3).purpose == TRAINING
        row.exposing_plan(privacy, training)
    elif row.charged:
        assert row.plan(privacy, training, 3, PUBLIC).release(3).purpose == TRAINING
        with pytest.raises(ConfigError, match="every round is charged"):
            row.exposing_plan(privacy, training)
    else:
        row.exposing_plan(privacy, training)
        with pytest.raises(ConfigError, match="nothing to plan"):
            row.plan(privacy, training, 3, PUBLIC)


class Promising(DPSGD):
    """Promises, and is not charged."""

    charged: ClassVar[bool] = False


class Silent(DPSGD):
    """Adds its noise nowhere."""

    noised: ClassVar[Any] = "nowhere"


class Planless(DPSGD):
    plans: ClassVar[Any] = None


class Telling(DPSGD):
    conceals: ClassVar[bool] = False


class Free(DPSGD):
    starts: ClassVar[frozenset[str]] = frozenset({"nothing", "records, without privacy"})


class Unpaid(NoPrivacy):
    """Has a start that is made of a release, and no plan that makes one."""

    starts: ClassVar[frozenset[str]] = NoPrivacy.starts | {"paid release"}


class Unnamed(DPSGD):
    claim: ClassVar[Claim] = dataclasses.replace(DPSGD.claim, per="")


@pytest.mark.parametrize("row", [Promising, Silent, Planless, Telling, Free, Unpaid, Unnamed])
def test_a_row_that_contradicts_itself_is_refused_when_a_run_is_configured(
    row: type[Mechanism], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MECHANISMS, row.name, row())
    with pytest.raises(MechanismError, match=rf"'{row.name}' (must|has)"):
        configure({"privacy.mode": row.name})


# --- what a row does is what it is priced for -------------------------------------------------------------------------


def check_that_it_samples_as_it_is_priced(name: str) -> None:
    size, draws = 60, 400
    for plan in plans_of(name):
        table = torch.zeros(draws, size, dtype=torch.float64)
        for row in table:
            row[plan.sample(size)] = 1.0
        rate = plan.event.sample_rate
        if rate == 1:
            assert bool(table.all()), "a record is left out of what is priced without sampling"
        else:
            assert sampler_faults(table, rate) == set(), "it samples otherwise than it is priced"


@each_charged
def test_what_is_sampled_is_what_is_priced(name: str) -> None:
    check_that_it_samples_as_it_is_priced(name)


def test_a_row_that_samples_at_another_rate_is_found() -> None:
    with ROW_RATE.plant(), pytest.raises(AssertionError, match="samples otherwise"):
        check_that_it_samples_as_it_is_priced("dp-sgd")


class WholePlan(PrivacyPlan):
    """Takes every record, and is priced so in its steps, which a start's release is not."""

    @classmethod
    def event_of(cls, privacy: PrivacyConfig, training: TrainingConfig, noise_multiplier: float) -> Event:
        return super().event_of(privacy, training, noise_multiplier).having(sample_rate=1.0)

    def sample(self, size: int) -> list[int]:
        return list(range(size))


class Whole(DPSGD):
    plans: ClassVar[type[PrivacyPlan]] = WholePlan


def test_a_row_that_lists_a_start_which_it_samples_otherwise_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MECHANISMS, "dp-sgd", Whole())
    with pytest.raises(AssertionError, match="samples otherwise"):
        check_that_it_samples_as_it_is_priced("dp-sgd")
    monkeypatch.setattr(Whole, "starts", DPSGD.starts - {"paid release"})
    check_that_it_samples_as_it_is_priced("dp-sgd")


@pytest.fixture(scope="module")
def world(model_folder: Callable[[str], str]) -> World:
    return fresh_world(model_folder("bert"), "bert", "lora", "trained")


def sums(plan: PrivacyPlan, world: World, records: Sequence[Record], times: int = 1) -> list[list[Tensor]]:
    """Return noised sums, times the divisor taken back, of steps on the records."""
    optimizer = torch.optim.SGD(world.trained, lr=0.0)
    with plan.steps(world.model, optimizer) as steps:
        losses = world.marked_times(1000.0)
        found = [steps.release(plan.parts(world.model, records), losses) for _ in range(times)]
    return [[gradient.double() * plan.expected_batch_size for gradient in one] for one in found]


def check_that_noise_is_what_is_priced(name: str, world: World) -> None:
    for plan in plans_of(name):
        drawn = torch.cat([flat(one) for one in sums(plan, world, [], times=8)])
        wanted = plan.noise_std
        shared = plan.event.noise_multiplier / plan.event.alone().noise_multiplier
        assert wanted == pytest.approx(plan.event.noise_multiplier * plan.event.clip_norm / shared)
        assert abs(float(drawn.square().mean().sqrt()) / wanted - 1) < 0.05, "the noise is another than is paid for"


@each_charged
def test_steps_on_no_record_carry_the_noise_of_the_event(name: str, world: World) -> None:
    check_that_noise_is_what_is_priced(name, world)


def test_a_row_that_forgets_its_noise_is_found(world: World) -> None:
    with ROW_QUIET.plant(), pytest.raises(AssertionError, match="paid for"):
        check_that_noise_is_what_is_priced("dp-sgd", world)


def rounded_alone(sums: Tensor, std: float, step: float) -> Tensor:
    """Round to the grid without noise."""
    return (sums / step).round() * step


def check_that_a_record_is_at_most_its_clip(name: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dpsgd, "add_private_noise", zero_noise)
    monkeypatch.setattr(rounding, "add_private_noise", rounded_alone)
    for plan in plans_of(name):
        (marked,) = sums(plan, world, world.records[-1:])
        clip = plan.event.clip_norm
        # Where what is sent is rounded, to whole steps, that moves it, too; a finer grid shortens what is added.
        step = noise_grid(plan.noise_std) if MECHANISMS[name].summed else sum_grid(clip, plan.noise_std)
        slack = 1e-5 * clip + step * sum(part.numel() for part in marked) ** 0.5
        assert norm(marked) == pytest.approx(clip, abs=slack), "a record counts more or less than its clip"


@each_charged
def test_no_record_is_more_than_its_clip(name: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    check_that_a_record_is_at_most_its_clip(name, world, monkeypatch)


class _Lax(dpsgd.ClipAndNoise):
    def clip_and_accumulate(self) -> None:
        self.max_grad_norm *= 2
        super().clip_and_accumulate()
        self.max_grad_norm /= 2


class _LaxSteps(dpsgd.PrivateSteps):
    clipping = _Lax


def test_a_row_that_clips_at_another_bound_is_found(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with faulty_row(stepping=lambda _: _LaxSteps), pytest.raises(AssertionError, match="its clip"):
        check_that_a_record_is_at_most_its_clip("dp-sgd", world, monkeypatch)


def check_the_account(name: str, folder: Path) -> None:
    """Hold two rounds of a site against its ledger: steps, noise, clip, divisor, and that it paid before."""
    summed = MECHANISMS[name].summed
    steps = 1 if summed else 3
    own = {"training.optimizer": "sgd"} if summed else {}
    site = tiny_site(
        folder,
        RECORDS,
        **{**settings_of(name), "training.local-steps": steps, "training.sample-rate": "auto", **own},
    )
    asked = SumSite(site) if summed else site
    paid: list[int] = []
    sample = PrivacyPlan.batches

    def watched(plan: PrivacyPlan, *rest: Any) -> Iterator[list[int]]:
        paid.append(len(site.charges()))
        return sample(plan, *rest)

    with spying() as spy, pytest.MonkeyPatch.context() as patch:
        patch.setattr(PrivacyPlan, "batches", watched)
        results = [asked.train(number) for number in (1, 2)]
    with Ledger(site.ledger) as ledger:
        rows = ledger.entries()
        assert results[-1].spending is not None
        assert results[-1].spending.epsilon_total == ledger.epsilon("clinic", 1e-3) > 0
    assert paid == [1, 2], "records were used before they were paid for"
    assert sum(row.count for row in rows) == len(spy.draws) == 2 * steps, "other steps are charged than are taken"
    assert {(row.event.noise_multiplier, row.event.clip_norm) for row in rows} == {
        (draw.noise, draw.clip) for draw in spy.draws
    }, "other noise or clip is charged"
    divisors = {draw.divisor for draw in spy.draws}
    assert divisors == {rows[0].event.sample_rate * PUBLIC}, "the divisor is no public constant"
    least = least_plan(configure(site.settings), results[0])
    assert cast(PrivacyPlan, least).event.kind == rows[0].event.kind


@each_charged
def test_as_many_steps_are_charged_as_are_taken_and_before_a_record_is_used(name: str, tmp_path: Path) -> None:
    check_the_account(name, tmp_path)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (ROW_QUIET, "other steps are charged"),
        (ROW_COUNT, "other steps are charged"),
        (ROW_PRICE, "other noise or clip"),
        (ROW_DIVISOR, "no public constant"),
    ],
    ids=lambda value: value.name if isinstance(value, Fault) else "",
)
def test_a_row_that_is_charged_for_something_else_is_found(fault: Fault, words: str, tmp_path: Path) -> None:
    with fault.plant(), pytest.raises(AssertionError, match=words):
        check_the_account("dp-sgd", tmp_path)


@pytest.mark.usefixtures("rough_prices")
@each_row
def test_a_run_and_its_report_say_what_the_row_claims(name: str, toy_settings: dict[str, Any]) -> None:
    settings = {**toy_settings, **settings_of(name), "training.sample-rate": "auto", "privacy.epsilon": 30.0}
    if MECHANISMS[name].summed:
        settings |= {"training.local-steps": 1, "training.optimizer": "sgd"}
    folder, row = run_in_process(settings, 3), MECHANISMS[name]
    report = report_of(folder)
    assert {line.unit for line in read_lines(PrivacyLine, folder)} == {row.claim.unit}
    assert (report.claim.made, report.claim.off) == (row.claims, not row.claims)
    assert (report.headline.epsilon is not None) == row.claims
    if row.claims:
        assert (report.claim.unit, report.claim.sampler) == (row.claim.unit, row.claim.sampler)
        assert row.claim.unit in report.claim.sentence
        assert set(row.claim.leaves_out) <= set(report.claim.not_covered)
        assert row.claim.sampler in markdown_report(folder)
        assert [site.agreement for site in report.sites] == ["agrees"] * (1 if row.central else 3)


# --- a row that is otherwise in everything: the unit is a whole site --------------------------------------------------


class _EmptySteps(plain.PlainSteps):
    """Plain steps that leave the model alone where there is no record."""

    def step(self, batches: Any, losses: Any) -> None:
        parts = list(batches)
        if parts:
            super().step(parts, losses)


class WholeSitePlan(PrivacyPlan):
    """Plain steps in shuffled batches; the round's whole change is clipped and noised, once."""

    def batches(self, model: FederatedModel, records: Sequence[Record], public: Any, first: int) -> Iterator[list[int]]:
        draw = random.SystemRandom()
        while True:
            yield draw.sample(range(len(records)), len(records) // 2)

    def parts(self, model: FederatedModel, records: Sequence[Record]) -> Any:
        return model.length_batches(records, 256)

    @contextmanager
    def steps(self, model: FederatedModel, optimizer: Any, before_pass: Any = nothing) -> Iterator[Any]:
        yield _EmptySteps(model, optimizer)

    def outgoing(self, contribution: AdapterState, received: AdapterState) -> AdapterState:
        held = {layer: {n: received[layer][n] for n in factors} for layer, factors in contribution.items()}
        change = subtract(contribution, held)
        whole = float(torch.cat([tensor.double().flatten() for _, _, tensor in entries(change)]).norm())
        clip, noise = self.event.clip_norm, self.event.noise_multiplier * self.event.clip_norm
        factor = min(1.0, clip / whole) if whole else 0.0
        return apply(
            lambda old, moved: (old.double() + add_private_noise(factor * moved.double(), noise)).float(), held, change
        )

    @classmethod
    def event_of(cls, privacy: PrivacyConfig, training: TrainingConfig, noise_multiplier: float) -> Event:
        return super().event_of(privacy, training, noise_multiplier).having(sample_rate=1.0)

    def release(self, steps: int) -> Release:
        return Release(self.event, 1)


class WholeSite(DPSGD):
    """Of DP-SGD it keeps that it is charged and conceals failures."""

    name: ClassVar[str] = "whole-site"
    claim: ClassVar[Claim] = Claim(
        unit="all records of one site together",
        adjacency="add or remove one site",
        adversary="the server and whoever sees the model, as far as one site's presence goes",
        sampler="none: a site is in every round that it joins",
        per="site",
    )
    starts: ClassVar[frozenset[str]] = frozenset({"nothing", "weights"})
    counted: ClassVar[bool] = False
    rehearsed: ClassVar[bool] = False
    plans: ClassVar[type[PrivacyPlan]] = WholeSitePlan


@pytest.fixture
def whole_site(toy_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return settings of a run with a row that no file of the product knows."""
    monkeypatch.setitem(MECHANISMS, "whole-site", WholeSite())
    own = {"privacy.mode": "whole-site", "privacy.noise-multiplier": 3.0, "privacy.clip-norm": 0.01}
    # One site less among few: a site's size has no part in the noise.
    return {**toy_settings, **own, "training.local-steps": 2, "server.optimizer": "none", "privacy.epsilon": 40.0}


def test_another_unit_sampler_and_noise_is_one_file_and_one_row(whole_site: dict[str, Any], tmp_path: Path) -> None:
    folder = run_in_process(whole_site, 3)
    for number in range(3):
        with Ledger(folder / "ledgers" / f"site-{number}.sqlite") as ledger:
            rows = ledger.entries()
            assert [(row.purpose, row.count, row.event.sample_rate) for row in rows] == [(TRAINING, 1, 1.0)] * 2
            assert rows[0].event.noise_multiplier == 3.0
    report = report_of(folder)
    assert report.claim.made
    assert report.claim.unit == "all records of one site together"
    assert "differentially private for all records of one site together" in report.claim.sentence
    assert report.claim.per == "site"
    text = markdown_report(folder)
    assert "none: a site is in every round that it joins" in text
    assert "one training record" not in text
    assert all(site.rounds_joined == 2 for site in report.sites), report.refusals


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_an_update_that_is_noised_whole_is_not_taken_for_a_lie(whole_site: dict[str, Any], optimizer: str) -> None:
    """The noise of a whole round is longer than steps on clipped averages, and than any step of Adam."""
    own = {"privacy.clip-norm": 1.0, "training.optimizer": optimizer, "training.learning-rate": 0.01}
    report = report_of(run_in_process({**whole_site, **own}, 3))
    assert [site.rounds_joined for site in report.sites] == [2, 2, 2], report.refusals


def test_its_noise_is_on_what_leaves_the_site(whole_site: dict[str, Any], tmp_path: Path) -> None:
    site = tiny_site(tmp_path, 1, **whole_site)
    sent = site.train(1)
    start = site.task().state
    moved = [
        (tensor - start[layer][name]).double().flatten()
        for layer, name, tensor in entries(sent.contribution)
        if name in start.get(layer, {})
    ]
    std = float(torch.cat(moved).square().mean().sqrt())
    assert sent.spending is not None
    paid = sent.spending.event
    assert std == pytest.approx(paid.noise_multiplier * paid.clip_norm, rel=0.2), "it is not noised as it was paid for"
    assert sent.spending.epsilon_total == epsilon([Release(sent.spending.event, 1)], sent.spending.delta)


def test_a_policy_counts_steps_also_where_a_round_is_one_release(whole_site: dict[str, Any], tmp_path: Path) -> None:
    site = tiny_site(tmp_path, **whole_site)
    site.rule(max_steps=5)  # two rounds of two steps
    site.train(1)
    site.train(2)
    assert "6 steps so far, this round's included" in site.refuse(3).reason


def test_no_count_is_priced_for_a_unit_that_moves_it_by_more_than_one(
    whole_site: dict[str, Any], tmp_path: Path
) -> None:
    site = tiny_site(tmp_path, **whole_site)
    site.rule(send_noised_metrics=True, metrics_noise=30.0)
    assert site.train(1).noised_correct is None
    assert [purpose for _, _, purpose in site.charges()] == [TRAINING]


def test_a_site_that_answers_at_a_fixed_time_refuses_a_row_without_a_rehearsal(
    whole_site: dict[str, Any], tmp_path: Path
) -> None:
    site = tiny_site(tmp_path, **whole_site)
    site.rule(reply_after=60.0)
    assert "how long a round of this run takes is not known" in site.refuse(1).reason


def test_records_that_paid_for_one_unit_are_refused_to_another(whole_site: dict[str, Any], tmp_path: Path) -> None:
    site = tiny_site(tmp_path, **whole_site)
    site.train(1)
    site.settings["privacy.mode"] = "dp-sgd"
    site.rule()
    assert "charged for another unit than one record" in site.refuse(1, run="later").reason


def test_a_round_is_held_to_the_time_of_what_its_plan_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that names a small rate for a row which takes every record must not get a late answer by it."""
    monkeypatch.setattr(Whole, "starts", DPSGD.starts - {"paid release"})
    monkeypatch.setitem(MECHANISMS, "dp-sgd", Whole())
    held: list[float] = []
    worst = Timing.worst

    def noting(own: Timing, steps: int, batch: float, *others: Any) -> float:
        held.append(batch)
        return worst(own, steps, batch, *others)

    monkeypatch.setattr(Timing, "worst", noting)
    site = tiny_site(tmp_path, RECORDS, **{"training.sample-rate": 0.1})
    site.train(1)
    assert held == [PUBLIC], "the time of another batch than the plan draws"


def test_a_start_that_a_row_does_not_list_is_refused(whole_site: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"'dp-gradient' is a release that privacy\.mode 'dp-sgd' alone pays for"):
        configure({**whole_site, "strategy": "fed-sb", "adapter.start": "dp-gradient"})
    with pytest.raises(ConfigError, match=r"'public-gradient' needs public records, of which this privacy.mode"):
        configure({**whole_site, "adapter.start": "public-gradient", "start.data": "a.csv"})


def check_that_a_row_is_let_in_by_name_alone(site: OneSite) -> None:
    """Check that ``whole-site`` is refused under a policy that does not name it, and only then."""
    without: list[dict[str, Any]] = [{"mechanisms": None}, {"mechanisms": ["dp-sgd"], "allow_no_privacy": True}]
    for rules in without:
        site.rule(**rules)
        reply = site.ask(site.task(1, run="unnamed"))
        assert isinstance(reply, Refusal), "a mechanism that no steward named is let in"
        assert reply.kind == "policy"
        assert "mechanisms = dp-sgd; the run asks for privacy.mode = 'whole-site'" in reply.reason
        assert site.charges() == []
    site.rule(mechanisms=["dp-sgd", "whole-site"])
    site.train(1)


def test_a_policy_lets_a_row_in_that_it_names_and_none_that_exposes(
    whole_site: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tiny_site(tmp_path, **whole_site)
    check_that_a_row_is_let_in_by_name_alone(site)
    site.settings["privacy.mode"] = "none"
    reply = site.ask(site.task(1, run="open"))
    assert isinstance(reply, Refusal)
    assert "allow-no-privacy" in reply.reason
    # Planted fault: whatever charges is let in.
    site.settings["privacy.mode"] = "whole-site"
    monkeypatch.setattr(Policy, "allowed_mechanisms", tuple(MECHANISMS))
    with pytest.raises(AssertionError, match="no steward named is let in"):
        check_that_a_row_is_let_in_by_name_alone(site)


def test_a_site_without_records_and_policy_joins_runs_of_every_row_that_needs_no_roster(
    whole_site: dict[str, Any],
) -> None:
    node: dict[str, Scalar] = {"partition-id": 0, "num-partitions": 2}
    for mode in MECHANISMS:
        # It plays a part of a data set that FedVeil names.
        settings = {key: value for key, value in whole_site.items() if not key.startswith(("data.", "model."))}
        settings |= {**settings_of(mode), "training.local-steps": 1, "training.optimizer": "sgd"}
        with pytest.raises(PolicyRefusal, match="honest-sites = 0") if MECHANISMS[mode].summed else nullcontext():
            check_job(node, configure(settings), simulated=False)

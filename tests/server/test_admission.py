"""Whose result counts: an honest site's whatever its policy, nobody's who takes a name or tells absurd figures."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from admitted import DEAR_START, NUMBERS, SIZE, STATE, answer, plan
from made_run import told

from fedveil.client.policy import Policy
from fedveil.common.config.sections import PrivacyConfig, TrainingConfig
from fedveil.common.messages.round import NoisedCount, TrainResult
from fedveil.common.messages.state import HEAD
from fedveil.common.run_lines import Absence
from fedveil.privacy.accountant import INITIALISATION
from fedveil.privacy.events import EVENTS, Event, SampledGaussian
from fedveil.privacy.plan import PrivacyPlan
from fedveil.privacy.record_level import DPSGD
from fedveil.server.admission import Admission
from fedveil.server.collect.base import Collected
from fedveil.server.collect.door import shown_of
from fedveil.server.observers import RoundOutcome
from fedveil.server.plausible import held_by, honest_norm, implausible, largest_norm, oversized
from fedveil.server.terminal import epsilon_words, round_line
from fedveil.server.terms import least_plan
from fedveil.strategies import ServerState
from fedveil.strategies.job import Job, configure

PLAIN: dict[str, Any] = {"recipe": "plain"}


@pytest.mark.parametrize(
    ("policy", "settings"),
    [
        (Policy(max_rounds=3), {}),
        (Policy(max_rounds=1), {}),
        (Policy(max_steps=2), {}),
        (Policy(min_noise_multiplier=0.9), DEAR_START),
    ],
    ids=["three rounds", "one round", "two steps", "a start with more noise than asked"],
)
def test_a_site_counts_with_the_noise_of_the_rounds_that_its_policy_allows(
    policy: Policy, settings: dict[str, Any]
) -> None:
    job = configure(settings)
    own, everyone = plan(job, policy), plan(job)
    assert own.event.noise_multiplier < 0.99 * everyone.event.noise_multiplier, "the policy asks for no less noise"
    assert Admission(job, {}).judge({1: answer(job, own)}, STATE, [1]) == {}


def test_noise_that_the_run_sets_holds_for_every_site() -> None:
    job = configure({"privacy.noise-multiplier": 2.0})
    own = plan(job, Policy(max_rounds=1))
    assert Admission(job, {}).judge({1: answer(job, own)}, STATE, [1]) == {}
    assert "noise multiplier" in Admission(job, {}).judge({1: answer(job, own, noise_multiplier=1.9)}, STATE, [1])[1]


def test_an_event_that_a_report_could_not_price_is_dropped() -> None:
    job = configure({"training.sample-rate": 1.0, "privacy.epsilon": 50.0})
    own = plan(job)
    assert Admission(job, {}).judge({1: answer(job, own)}, STATE, [1]) == {}
    told = answer(job, own, sample_rate=1.0 + 5e-10)
    assert "sample-rate must be above 0 and at most 1" in Admission(job, {}).judge({1: told}, STATE, [1])[1]


class Truncated(SampledGaussian):
    """Noise that is cut off, at a figure of its own."""

    name: ClassVar[str] = "truncated"
    figures: ClassVar[tuple[str, ...]] = (*SampledGaussian.figures, "cut")


class TruncatedPlan(PrivacyPlan):
    kind: ClassVar[str] = "truncated"

    @classmethod
    def event_of(cls, privacy: PrivacyConfig, training: TrainingConfig, noise_multiplier: float) -> Event:
        return super().event_of(privacy, training, noise_multiplier).having(cut=4.0)


def test_a_figure_that_only_its_kind_knows_is_the_runs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EVENTS, "truncated", Truncated())
    monkeypatch.setattr(DPSGD, "plans", TruncatedPlan)
    job = configure({"privacy.noise-multiplier": 2.0})
    own = plan(job)
    assert own.event.figures["cut"] == 4.0
    assert plan(configure(PLAIN)).event.figures["cut"] == 4.0, "noise is calibrated with the kind's own figures"
    assert Admission(job, {}).judge({1: answer(job, own)}, STATE, [1]) == {}
    for cut in (3.0, 5.0):
        reason = Admission(job, {}).judge({1: answer(job, own, cut=cut)}, STATE, [1])[1]
        assert reason == f"the spending's cut {cut:g} is another than 4, the run's"


def test_noise_with_which_not_even_one_round_fits_the_budget_is_dropped() -> None:
    job = configure(PLAIN)
    own = plan(job, Policy(max_rounds=1))
    told = answer(job, own, noise_multiplier=0.9 * own.event.noise_multiplier)
    assert "noise multiplier" in Admission(job, {}).judge({1: told}, STATE, [1])[1]


@pytest.mark.parametrize(
    ("size", "policy"),
    [
        (200, Policy(epsilon=0.2, delta=1e-5)),
        (100, Policy(min_noise_multiplier=12.0)),
    ],
    ids=["a small budget at a small site", "a policy's least noise"],
)
def test_a_strict_site_is_not_implausible_by_the_noise_that_it_adds(size: int, policy: Policy) -> None:
    job = configure(PLAIN)
    own = plan(job, policy, size)
    assert own.event.noise_multiplier > 10 * plan(job).event.noise_multiplier, "the site is not strict"
    little = {"epsilon_total": 0.05, "epsilon_round": 0.05, "epsilon_remaining": 0.05}
    honest = answer(job, own, size, **little)
    assert Admission(job, {}).judge({1: honest}, STATE, [1]) == {}
    assert honest.spending is not None
    quiet = replace(honest, spending=told(honest.spending, noise_multiplier=plan(job).event.noise_multiplier))
    assert "norm" in Admission(job, {}).judge({1: quiet}, STATE, [1])[1], "the bound does not follow the noise"


def test_an_update_is_measured_from_where_it_began() -> None:
    job = configure(PLAIN)
    far = ServerState(0, {"layer": {"B": torch.full((NUMBERS,), 1e3)}}, ("B",))
    honest = answer(job, plan(job))
    moved = replace(
        honest, contribution={"layer": {"B": far.adapter["layer"]["B"] + honest.contribution["layer"]["B"]}}
    )
    assert Admission(job, {}).judge({1: moved}, far, [1]) == {}
    assert "norm" in Admission(job, {}).judge({1: honest}, far, [1])[1]
    assert held_by(job, replace(honest, round_number=0), far) == {}, "round 0 brings no change of the adapter"


WITH_HEAD: dict[str, Any] = {
    **PLAIN,
    "rounds": 4,
    "server.optimizer": "none",
    "training.local-steps": 2,
    "training.learning-rate": 0.01,
    "schedule": "linear",
    "head-rate": 3.0,
}
CLIP, NOISE = 2.0, 4.0
RATES = 0.0075 + 0.00625
"""Of the two steps of round 2."""
AS_MANY = 100 + 3**2 * 20
"""Numbers that move as far as 100 of the adapter and 20 of the head, which moves three times as far."""


@pytest.mark.parametrize(
    ("settings", "step"),
    [
        ({"training.optimizer": "adamw", "training.weight-decay": 0.5}, 50 * AS_MANY**0.5 + 0.5 * 3 * 120**0.5),
        ({"training.optimizer": "adam", "momentum": 0.99}, AS_MANY**0.5),
        ({"training.optimizer": "sgd"}, 3 * CLIP + CLIP * NOISE * AS_MANY**0.5 / 200),
        ({"training.optimizer": "momentum"}, (3 * CLIP + CLIP * NOISE * AS_MANY**0.5 / 200) / (1 - 0.5)),
        ({"training.optimizer": "sgd", "privacy.mode": "none"}, math.inf),
    ],
    ids=["adamw", "adam, whose first moment is slower", "sgd", "momentum", "without a clip"],
)
def test_how_far_an_honest_update_lies_follows_from_the_settings(
    settings: dict[str, Any], step: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dict(settings)
    monkeypatch.setattr(TrainingConfig, "momentum", settings.pop("momentum", 0.5))
    monkeypatch.setattr(TrainingConfig, "beta2", 0.9999)
    private = {"privacy.clip-norm": CLIP, "privacy.noise-multiplier": 1.0, "training.sample-rate": 0.1}
    job = configure({**WITH_HEAD, **private, **settings})
    state = ServerState(1, {"layer": {"B": torch.ones(100)}, HEAD: {"weight": torch.ones(20)}}, ("B",))
    own = plan(configure({**WITH_HEAD, **private}))
    told = answer(job, own, noise_multiplier=NOISE)
    result = replace(told, round_number=2, contribution=state.adapter)
    assert honest_norm(job, least_plan(job, result), result, state) == pytest.approx(RATES * step)
    elsewhere = replace(result, contribution={"layer": {"other": torch.ones(100)}})
    assert honest_norm(job, least_plan(job, result), elsewhere, state) == math.inf, "what it is a change of is unknown"


def test_the_rounds_middle_bounds_where_three_answered_and_nothing_else_does() -> None:
    usual = {1: 1.0, 2: 1.0}
    assert implausible({**usual, 3: 99.0}, dict.fromkeys((1, 2, 3), math.inf)) == {}
    assert list(implausible({**usual, 3: 101.0}, dict.fromkeys((1, 2, 3), math.inf))) == [3]
    assert implausible({**usual, 3: 101.0}, dict.fromkeys((1, 2, 3), 200.0)) == {}, "the settings alone bound it"
    (reason,) = implausible({1: 0.0, 2: 0.0, 3: 1.0}, dict.fromkeys((1, 2, 3), math.inf)).values()
    assert reason.endswith("above 100 times the round's median 0"), "no change is usual in the first round"
    assert list(implausible({1: math.nan}, {1: 1.0})) == [1]
    sizes = {"ward": 10, "lab": 17}
    assert oversized(sizes, 1.2) == {}, "two have no middle"
    assert list(oversized({**sizes, "clinic": 10}, 1.2)) == ["lab"]
    assert oversized({"ward": 10, "lab": 12, "clinic": 10}, 1.2) == {}, "as large as is allowed"
    assert list(oversized({"ward": 10, "lab": 40, "clinic": 10}, 3.0)) == ["lab"], "a slip moves what it is measured by"
    assert implausible({1: 1.0, 2: 1.0}, {1: 1.0, 2: math.inf}) == {}, "as long as is allowed"
    assert list(implausible({1: 1.0, 2: math.nan}, {1: 1.0, 2: math.inf})) == [2]


def test_a_head_that_moves_slower_or_not_at_all_adds_nothing_to_the_others_way() -> None:
    private = {"privacy.clip-norm": CLIP, "privacy.noise-multiplier": NOISE, "training.sample-rate": 0.1}
    state = ServerState(1, {"layer": {"B": torch.ones(100)}, HEAD: {"weight": torch.ones(20)}}, ("B",))
    for rate, sent, numbers in (
        (0.5, state.adapter, 105),  # a quarter of the head's 20 beside the others' 100
        (3.0, {"layer": state.adapter["layer"]}, 100),
    ):
        job = configure({**WITH_HEAD, **private, "training.optimizer": "sgd", "head-rate": rate})
        result = replace(answer(job, plan(job)), round_number=2, contribution=sent)
        step = CLIP + CLIP * NOISE * numbers**0.5 / 200
        assert honest_norm(job, least_plan(job, result), result, state) == pytest.approx(RATES * step), rate


def test_an_update_may_be_ten_times_as_long_as_is_honest_or_as_long_as_is_set_whichever_is_less() -> None:
    job = configure(PLAIN)
    result = answer(job, plan(job))
    least = least_plan(job, result)
    honest = honest_norm(job, least, result, STATE)
    for most, wanted in ((0.0, 10 * honest), (1e3 * honest, 10 * honest), (2 * honest, 2 * honest)):
        assert largest_norm(configure({**PLAIN, "max-update-norm": most}), least, result, STATE) == pytest.approx(
            wanted
        )
    free = {**PLAIN, "training.optimizer": "sgd", "privacy.mode": "none", "server.optimizer": "none"}
    for most, wanted in ((0.0, math.inf), (5.0, 5.0)):
        bounded = configure({**free, "max-update-norm": most})
        assert largest_norm(bounded, least_plan(bounded, result), result, STATE) == wanted


def test_what_several_steps_of_a_start_bring_may_be_as_long_as_these() -> None:
    job = configure({**PLAIN, "adapter.start": "probe", "adapter.name": "lora-metric"})
    first = replace(answer(job, plan(job)), round_number=0)
    one = least_plan(job, first).longest_gradient(NUMBERS, first.spending and first.spending.event)
    assert job.origin.way > 1
    assert honest_norm(job, least_plan(job, first), first, STATE) == pytest.approx(one * job.origin.way)


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        ({"purpose": INITIALISATION}, "of kind 'initialisation', this round is 'training'"),
        ({"steps_total": 0}, "went back"),
        ({"epsilon_total": 0.198}, "went back"),
        ({"clip_norm": 0.0}, "must all be above 0"),
        ({"sample_rate": 1e-7}, "sample rate is below 1e-06"),
        ({"delta": 1e-13}, "delta below 1e-12"),
        ({"noise_multiplier": 1.996}, "noise multiplier 1.996 is below 2"),
        ({"clip_norm": 1.001}, "clip norm 1.001 is above 1"),
        ({"sample_rate": 2e-6}, "sample rate 2e-06 is below"),
        ({"clip_norm": 0.99}, "clip norm 0.99 is below 1, the run's least"),
        ({"delta": 1.001e-5}, "delta 1.001e-05 is above 1e-05"),
        ({"epsilon_budget": 8.01}, "budget 8.01 is above 8"),
        ({"epsilon_round": 0.21}, "price of the round 0.21 is above 0.2"),
    ],
    ids=lambda told: next(iter(told)) if isinstance(told, dict) else "",
)
def test_a_figure_that_no_honest_site_states_is_dropped(figures: dict[str, Any], words: str) -> None:
    job = configure({**PLAIN, "privacy.noise-multiplier": 2.0, "privacy.clip-norm": 1.0})
    admission, own = Admission(job, {}), plan(job)
    admission.enrol({1: answer(job, own)})
    assert admission.judge({1: answer(job, own, noise_multiplier=1.999)}, STATE, [1]) == {}, "a version's rounding"
    assert words in admission.judge({1: answer(job, own, **figures)}, STATE, [1])[1]


def test_a_release_of_another_kind_than_the_runs_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EVENTS, "truncated", Truncated())
    job = configure({"privacy.noise-multiplier": 2.0})
    honest = answer(job, plan(job))
    assert honest.spending is not None
    event = Event("truncated", {**honest.spending.event.figures, "cut": 4.0})
    told = replace(honest, spending=replace(honest.spending, event=event))
    assert Admission(job, {}).judge({1: told}, STATE, [1]) == {
        1: "the spending's releases are 'truncated', the run's are 'sampled-gaussian'"
    }


def test_round_0_counts_no_steps() -> None:
    job = configure({**PLAIN, **DEAR_START})
    honest = answer(job, job.origin.plan(plan(job), SIZE), purpose=INITIALISATION, steps_round=0)  # type: ignore[attr-defined]
    first = replace(honest, round_number=0, contribution={"layer": {"B": torch.zeros(NUMBERS)}})
    assert Admission(job, {}).judge({1: first}, STATE, [1]) == {}
    told = replace(first, spending=first.spending and replace(first.spending, steps_round=1))
    assert "for 1 steps, not 0" in Admission(job, {}).judge({1: told}, STATE, [1])[1]


def test_what_an_impostor_declares_is_no_size_of_the_site_whose_name_it_takes() -> None:
    job = configure({**PLAIN, "max-size-ratio": 10.0})
    usual, huge = answer(job, plan(job)), replace(answer(job, plan(job, size=20 * SIZE), 20 * SIZE))
    admission = Admission(job, {})
    admission.enrol({1: usual, 2: replace(usual, site="lab"), 3: replace(usual, site="clinic")})
    later = {"epsilon_total": 0.3, "steps_total": 2}
    reasons = admission.judge({1: answer(job, plan(job), **later), 4: huge}, STATE, [1, 2, 3, 4])
    assert list(reasons) == [4]
    assert "another node" in reasons[4]


def test_a_total_of_shared_records_may_be_above_the_budget_and_the_terminal_says_why() -> None:
    job = configure(PLAIN)
    told = answer(job, plan(job), epsilon_total=9.5, epsilon_remaining=0.0)
    admission = Admission(job, {})
    assert admission.judge({1: told}, STATE, [1]) == {}
    admission.enrol({1: told})
    words = epsilon_words((member.spending for member in admission.members.values()), "record")
    assert words.startswith("ε 9.500 of 8 "), words
    assert "charged under other names too" in words


def test_a_size_is_measured_against_those_of_earlier_rounds_where_two_answer() -> None:
    job = configure({"max-size-ratio": 10.0})
    usual = answer(job, plan(job))
    huge = replace(answer(job, plan(job, size=20 * SIZE), 20 * SIZE), site="lab")
    admission = Admission(job, {})
    assert admission.judge({1: usual, 3: huge}, STATE, [1, 3]) == {}, "two sizes have no middle"
    admission.enrol({1: usual, 2: replace(usual, site="clinic")})
    reasons = admission.judge({1: replace(usual, round_number=2), 3: replace(huge, round_number=2)}, STATE, [1, 3])
    assert list(reasons) == [3]
    assert "max-size-ratio" in reasons[3]


def test_terms_that_allow_no_count_drop_the_reply_and_not_the_run() -> None:
    job = configure({**PLAIN, "privacy.noise-multiplier": 50.0, "privacy.epsilon": 1e-6, "privacy.delta": 1e-12})
    told = answer(job, plan(configure({**PLAIN, "privacy.noise-multiplier": 50.0})))
    counted = replace(told, noised_correct=NoisedCount(10.0, 5.0))
    assert "1e-06" in Admission(job, {}).judge({1: counted}, STATE, [1])[1]


# Names: ward is node 1, another hospital's node 2 answers as ward


def round_of(job: Job, node: int, **told: Any) -> dict[int, TrainResult]:
    return {node: answer(job, plan(job), **told)}


def enrolled(job: Job) -> Admission:
    """Return the admission after a round in which ward counted."""
    admission = Admission(job, {})
    admission.enrol(round_of(job, 1))
    return admission


def test_nobody_takes_the_name_of_a_site_that_is_late() -> None:
    job = configure(PLAIN)
    admission = enrolled(job)
    assert "another node" in admission.judge(round_of(job, 2, steps_total=4_000_000), STATE, [1, 2])[2]
    assert admission.judge(round_of(job, 1, epsilon_total=0.3, steps_total=2), STATE, [1, 2]) == {}


def test_a_site_that_comes_back_gets_its_name_back_and_is_judged_by_its_own_past() -> None:
    job = configure(PLAIN)
    admission = enrolled(job)
    namesake = round_of(job, 2, epsilon_total=8.0, steps_total=4_000_000)
    assert admission.judge(namesake, STATE, [2]) == {}, "a site that was started again as another node is kept out"
    admission.enrol(namesake)
    both = round_of(job, 1, epsilon_total=0.3, steps_total=2) | namesake
    assert list(admission.judge(both, STATE, [1, 2])) == [2]


def test_a_site_that_was_started_again_as_another_node_is_judged_by_its_past() -> None:
    job = configure(PLAIN)
    admission = enrolled(job)
    assert "went back" in admission.judge(round_of(job, 2, epsilon_total=0.1, epsilon_round=0.1), STATE, [2])[2]
    admission.enrol(round_of(job, 2, epsilon_total=0.4, steps_total=2))
    assert "went back" in admission.judge(round_of(job, 3, epsilon_total=0.3, steps_total=3), STATE, [3])[3]


def test_the_round_line_tells_what_the_federation_has_spent_also_if_the_worst_site_is_absent() -> None:
    job = configure(PLAIN)
    admission = Admission(job, {})
    ward = answer(job, plan(job), epsilon_total=7.5)
    clinic = replace(ward, site="clinic", spending=replace(ward.spending, epsilon_total=3.0, delta=1e-6))
    admission.enrol({1: ward, 2: clinic})
    later = replace(clinic, round_number=2, spending=replace(clinic.spending, epsilon_total=4.0))
    admission.enrol({2: later})
    line = round_line(shown_of(job), RoundOutcome(2, Collected({1: later}), None, 1.0), admission.members)
    assert "ε 7.500 of 8 (δ 1e-05, record-level, worst site)  1 site" in line


def test_the_round_line_is_short_where_a_thousand_sites_refuse_each_in_its_own_words() -> None:
    job = configure(PLAIN)
    refused = {i: Absence(2, 1, f"site-{i}", "budget", f"data set 'site-{i}' has spent {i}") for i in range(1000)}
    line = round_line(shown_of(job), RoundOutcome(2, Collected(refusals=refused), None, 1.0), {})
    assert len(line.splitlines()) == 2
    assert "\n  site-0 … site-999 (1,000 sites) did not take part (budget): data set 'site-0' has spent 0" in line
    assert line.endswith("(and 999 other reasons)")
    few = Collected(refusals={i: refused[i] for i in (9, 10, 1)})
    line = round_line(shown_of(job), RoundOutcome(2, few, None, 1.0), {})
    names = [told.split()[0] for told in line.splitlines()[1:]]
    assert names == ["site-1", "site-9", "site-10"]

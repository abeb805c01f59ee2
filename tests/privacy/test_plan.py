"""The plan of a run: one set of figures for the mechanism and for the accountant."""

from __future__ import annotations

import dataclasses

import pytest

from fedveil.common.config.sections import PrivacyConfig
from fedveil.common.errors import ConfigError, MechanismError, PrivacyError
from fedveil.privacy import MECHANISMS
from fedveil.privacy.accounting import Release, epsilon
from fedveil.privacy.events import Event, sampled_gaussian
from fedveil.privacy.plan import PrivacyPlan, gaussian_plan
from fedveil.strategies.resolve import resolve

TRAINING = resolve({"training.local-steps": 5, "training.sample-rate": 0.1}).config.training


def test_every_step_of_the_run_fits_the_budget_and_hardly_more() -> None:
    plan = PrivacyPlan.for_run(PrivacyConfig(epsilon=3.0), TRAINING, total_steps=30, public_size=500)
    assert 2.97 < epsilon([plan.release(30)], plan.delta) <= 3.0
    assert plan.max_epsilon == 3.0


def test_rounds_of_the_plan_sum_to_the_run() -> None:
    plan = PrivacyPlan.for_run(PrivacyConfig(epsilon=3.0), TRAINING, total_steps=30, public_size=500)
    assert epsilon([plan.release(5)] * 6, plan.delta) == epsilon([plan.release(30)], plan.delta) <= 3.0


def test_a_fixed_noise_multiplier_is_used_as_it_is() -> None:
    privacy = PrivacyConfig(epsilon=3.0, noise_multiplier=0.3)
    plan = PrivacyPlan.for_run(privacy, TRAINING, total_steps=1000, public_size=500)
    assert plan.event.noise_multiplier == 0.3
    assert epsilon([plan.release(1000)], plan.delta) > plan.max_epsilon


def test_the_divisor_is_made_of_public_figures() -> None:
    plan = PrivacyPlan.for_run(
        PrivacyConfig(noise_multiplier=2.0, clip_norm=0.5), TRAINING, total_steps=5, public_size=500
    )
    assert plan.expected_batch_size == pytest.approx(50.0)
    assert plan.gradient_noise_std == pytest.approx(2.0 * 0.5 / 50.0)


def test_the_release_carries_the_mechanisms_own_figures() -> None:
    plan = gaussian_plan(0.5, 1.5, 0.1, 50.0, 1e-5, 3.0)
    assert plan.release(7) == Release(sampled_gaussian(1.5, 0.1, clip_norm=0.5), 7, "training")


def test_a_delta_that_would_let_a_record_out_is_refused_with_both_figures() -> None:
    with pytest.raises(PrivacyError, match=r"0\.01.*500.*0\.002") as refusal:
        PrivacyPlan.for_run(PrivacyConfig(delta=0.01), TRAINING, total_steps=5, public_size=500)
    assert "\n" not in str(refusal.value)


def test_a_delta_of_exactly_one_over_the_size_is_accepted() -> None:
    privacy = PrivacyConfig(delta=1 / 500, noise_multiplier=1.0)
    assert PrivacyPlan.for_run(privacy, TRAINING, total_steps=5, public_size=500).delta == 1 / 500


def test_a_run_without_privacy_has_no_plan() -> None:
    with pytest.raises(ConfigError, match=r"privacy\.mode"):
        MECHANISMS["none"].plan(PrivacyConfig(mode="none"), TRAINING, total_steps=5, public_size=500)


@pytest.mark.parametrize(("total_steps", "public_size"), [(0, 500), (5, 0)])
def test_no_steps_or_no_records_are_refused(total_steps: int, public_size: int) -> None:
    with pytest.raises(ConfigError, match="above 0"):
        PrivacyPlan.for_run(PrivacyConfig(), TRAINING, total_steps=total_steps, public_size=public_size)


def spoilt(plan: PrivacyPlan, field: str) -> PrivacyPlan:
    """Return the plan with a figure of 0, its own or its event's."""
    if field in plan.event.figures:
        return dataclasses.replace(plan, event=plan.event.having(**{field: 0.0}))
    return dataclasses.replace(plan, **{field: 0.0})


@pytest.mark.parametrize("field", ["clip_norm", "noise_multiplier", "sample_rate", "expected_batch_size", "delta"])
def test_a_plan_with_a_zero_in_it_is_refused_by_name(field: str) -> None:
    plan = gaussian_plan(0.5, 1.5, 0.1, 50.0, 1e-5, 3.0)
    with pytest.raises(ConfigError, match=field.replace("_", "-")):
        spoilt(plan, field)


def test_a_plan_cannot_be_changed_once_made() -> None:
    plan = gaussian_plan(0.5, 1.5, 0.1, 50.0, 1e-5, 3.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.delta = 0.1  # type: ignore[misc]
    with pytest.raises(TypeError, match="never change"):
        plan.event.figures["noise_multiplier"] = 0.1


def test_a_plan_is_priced_as_what_it_does() -> None:
    other = Event("plain-gaussian", sampled_gaussian(1.5, 0.1).figures)
    with pytest.raises(MechanismError, match="priced as 'sampled-gaussian', not 'plain-gaussian'"):
        PrivacyPlan(other, 1.0, 1e-5, 1.0)

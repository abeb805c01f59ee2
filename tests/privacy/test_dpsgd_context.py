"""The context of DP-SGD: what it refuses, and what it leaves behind of the records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from dpsgd_worlds import FAMILIES, WorldOf, deviation, unchanged, values
from torch import Tensor, nn
from torch.optim import SGD

from audits.noise_law import NOISY
from audits.worlds import Losses, Recorder, World, fresh_world, plan, released
from fedveil.common.errors import MechanismError
from fedveil.common.model.shapes import FixedBatch
from fedveil.common.tasks import Batch
from fedveil.privacy.dpsgd import PrivateSteps


# --- the guard --------------------------------------------------------------------------------------------------------
class Toy(nn.Module):
    """One used and one unused layer."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

    def losses(self, batch: Tensor) -> Tensor:
        output: Tensor = self.used(batch)
        return output.sum(1)


@pytest.fixture
def toy() -> Toy:
    toy = Toy()
    toy.unused.requires_grad_(False)
    return toy


def used(toy: nn.Module) -> list[nn.Parameter]:
    return [p for p in toy.parameters() if p.requires_grad]


BATCH = torch.tensor([[1.0, 2.0, 3.0], [0.5, -1.0, 2.0]])


def test_a_raw_gradient_cannot_be_stepped_with_inside_the_context(toy: Toy) -> None:
    optimizer = SGD(used(toy), lr=1.0)
    before = values(toy)
    with PrivateSteps(toy, optimizer, plan()):
        toy.losses(BATCH).sum().backward()
        with pytest.raises(MechanismError, match="did not pass clip and noise"):
            optimizer.step()
    assert unchanged(toy, before)


def test_a_released_gradient_cannot_be_used_twice(toy: Toy) -> None:
    optimizer = SGD(used(toy), lr=1.0)
    with PrivateSteps(toy, optimizer, plan()) as steps:
        steps.step([BATCH], toy.losses)
        before = values(toy)
        with pytest.raises(MechanismError):
            optimizer.step()
        assert unchanged(toy, before)


@pytest.mark.parametrize("when", ["before the context", "after the context"])
def test_a_raw_gradient_cannot_be_stepped_with_outside_the_context(toy: Toy, when: str) -> None:
    optimizer = SGD(used(toy), lr=1.0)
    steps = PrivateSteps(toy, optimizer, plan())
    if when == "after the context":
        with steps:
            steps.step([BATCH], toy.losses)
    toy.losses(BATCH).sum().backward()
    with pytest.raises(MechanismError):
        optimizer.step()


def test_a_step_outside_the_context_is_refused_before_anything_moves(toy: Toy) -> None:
    before = values(toy)
    steps = PrivateSteps(toy, SGD(used(toy), lr=1.0), plan())
    with pytest.raises(MechanismError, match="no gradient of its own"):
        steps.step([BATCH], toy.losses)
    assert unchanged(toy, before)


@pytest.mark.parametrize("fixed", [False, True], ids=["a batch", "of a fixed shape"])
def test_each_pass_of_a_step_is_asked_for_first_and_a_refusal_ends_the_step(toy: Toy, fixed: bool) -> None:
    part: Any = FixedBatch({"x": BATCH}, 2) if fixed else BATCH
    passed: list[int] = []

    def ask() -> None:
        passed.append(len(passed))
        if len(passed) == 3:
            raise TimeoutError

    before = values(toy)
    with PrivateSteps(toy, SGD(used(toy), lr=1.0), plan(), before_pass=ask) as steps, pytest.raises(TimeoutError):
        steps.step([part] * 4, lambda batch: toy.losses(batch["x"] if fixed else batch))
    assert passed == [0, 1, 2]
    assert unchanged(toy, before)


@pytest.mark.parametrize("change", ["in place", "replaced"])
def test_a_gradient_changed_after_its_release_is_refused(toy: Toy, change: str) -> None:
    optimizer = SGD(used(toy), lr=1.0)

    def tamper(*_: Any) -> None:
        if change == "in place":
            toy.used.weight.grad.mul_(2.0)  # type: ignore[union-attr]
        else:
            toy.used.weight.grad = torch.ones_like(toy.used.weight)

    optimizer.register_step_pre_hook(tamper)
    before = values(toy)
    with PrivateSteps(toy, optimizer, plan()) as steps, pytest.raises(MechanismError):
        steps.step([BATCH], toy.losses)
    assert unchanged(toy, before)


@pytest.mark.parametrize("covered", ["one too few", "one too many", "another"])
def test_an_optimiser_over_other_tensors_than_the_trained_is_refused(toy: Toy, covered: str) -> None:
    parameters = {
        "one too few": used(toy)[:-1],
        "one too many": [*used(toy), toy.unused.weight],
        "another": [*used(toy)[:-1], toy.unused.weight],
    }[covered]
    with pytest.raises(MechanismError, match="every trained tensor, and no other"):
        PrivateSteps(toy, SGD(parameters, lr=1.0), plan())


def test_a_tensor_slipped_into_the_optimiser_later_stops_the_step(toy: Toy) -> None:
    optimizer = SGD(used(toy), lr=1.0)
    before = values(toy)
    with PrivateSteps(toy, optimizer, plan()) as steps:
        extra = nn.Parameter(torch.zeros(2))
        extra.grad = torch.ones(2)
        optimizer.add_param_group({"params": [extra]})
        with pytest.raises((MechanismError, ValueError), match=r"(?i)gradient"):
            steps.step([BATCH], toy.losses)
    assert unchanged(toy, before)
    assert (extra == 0).all()


def test_a_trained_layer_that_the_model_does_not_use_is_refused() -> None:
    toy = Toy()
    before = values(toy)
    with (
        PrivateSteps(toy, SGD(toy.parameters(), lr=1.0), plan()) as steps,
        pytest.raises(MechanismError, match="does not use it"),
    ):
        steps.step([BATCH], toy.losses)
    assert unchanged(toy, before)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(3), nn.SyncBatchNorm(3)], ids=["one device", "many"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_a_model_that_normalises_by_its_batch_is_refused(norm: nn.Module, frozen: bool) -> None:
    def steps_of(norm: nn.Module) -> PrivateSteps:
        model = nn.Sequential(nn.Sequential(norm.requires_grad_(not frozen)), nn.Linear(3, 2))
        return PrivateSteps(model, SGD(used(model), lr=1.0), plan())

    with pytest.raises(MechanismError, match=r"'0\.0' is a .*BatchNorm"):
        steps_of(norm)
    steps_of(nn.LayerNorm(3))


def test_a_loss_that_is_not_one_per_record_is_refused_without_a_word_on_how_many_there_were(toy: Toy) -> None:
    words = set()
    for records in (BATCH[:1], BATCH, BATCH.repeat(3, 1)):
        with (
            PrivateSteps(toy, SGD(used(toy), lr=1.0), plan()) as steps,
            pytest.raises(MechanismError, match="each record") as caught,
        ):
            steps.step([records], lambda batch: toy.losses(batch).mean().repeat(len(batch) + 1))
        words.add(str(caught.value))
    assert len(words) == 1, f"the refusal tells batches apart: {words}"


# --- what stays behind ------------------------------------------------------------------------------------------------
def traces(module: nn.Module) -> set[str]:
    """Return what of records or of the mechanism is on the model."""
    left = set()
    for parameter in module.parameters():
        left.update(name for name in ("grad_sample", "summed_grad", "_current_grad_sample") if hasattr(parameter, name))
        left.update({"grad"} if parameter.grad is not None else set())
    for child in module.modules():
        left.update({"hooks"} if child._forward_hooks or child._backward_hooks else set())
        left.update({"activations"} if getattr(child, "activations", None) else set())
        left.update({"max_batch_len"} if hasattr(child, "max_batch_len") else set())
        left.update({"forward"} if "forward" in vars(child) else set())
    return left


class OfAnotherType(nn.Linear):
    """A layer that has hooks."""


@pytest.mark.parametrize("layer", [nn.Linear, OfAnotherType])
def test_traces_are_seen_inside_the_context(toy: Toy, layer: type[nn.Linear]) -> None:
    toy.used = layer(3, 2)
    with PrivateSteps(toy, SGD(used(toy), lr=1.0), plan()):
        losses = toy.losses(BATCH)
        assert ({"forward"} if layer is nn.Linear else {"hooks", "activations"}) <= traces(toy)
        losses.sum().backward()
        assert {"grad_sample", "summed_grad"} <= traces(toy)
    assert traces(toy) == set()


def test_leaving_the_context_leaves_nothing_of_the_records_behind(world_of: WorldOf) -> None:
    world = world_of("bert")
    with PrivateSteps(world.model.module, Recorder(world.trained), plan()) as steps:
        steps.step([world.batch()], world.model.losses)
        steps.step([], world.model.losses)
    assert traces(world.model.module) == set()


def _broken(moment: str, world: World) -> Losses:
    """Return losses that fail on a part of one record, before or after its forward pass or in its backward pass."""

    class Burst(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, losses: Tensor) -> Tensor:
            return losses.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
            raise RuntimeError("out of memory")

    def losses(batch: Batch) -> Tensor:
        fails = len(batch["input_ids"]) == 1
        if fails and moment == "before the forward pass":
            raise RuntimeError("out of memory")
        values = world.model.losses(batch)
        if fails and moment == "after the forward pass":
            raise RuntimeError("out of memory")
        result: Tensor = Burst.apply(values) if fails else values
        return result

    return losses


MOMENTS = [
    "before the forward pass",
    "after the forward pass",
    "in the backward pass",
]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_failure_in_the_middle_leaves_nothing_of_the_records_behind(
    moment: str, model_folder: Callable[[str], str]
) -> None:
    world = fresh_world(model_folder("bert"), "bert", "lora", "trained")
    optimizer = Recorder(world.trained)
    with (
        pytest.raises(RuntimeError, match="out of memory"),
        PrivateSteps(world.model.module, optimizer, plan()) as steps,
    ):
        steps.step([world.batch(), world.batch(world.records[:1])], _broken(moment, world))
    assert optimizer.given == []
    assert traces(world.model.module) == set()


@pytest.mark.parametrize("moment", MOMENTS)
def test_after_a_failure_the_same_model_steps_as_if_nothing_had_been(
    moment: str, model_folder: Callable[[str], str]
) -> None:
    world = fresh_world(model_folder("bert"), "bert", "lora", "trained")
    parts = [world.records[:4], world.records[4:6], world.records[6:]]
    want = released(world, parts)
    with pytest.raises(RuntimeError, match="out of memory"):
        released(world, [world.records[:3], world.records[:1]], losses=_broken(moment, world))
    assert deviation(released(world, parts), want) < 1e-5


# --- no chance but the mechanism's ------------------------------------------------------------------------------------
@pytest.mark.parametrize(("family", "adapter", "head"), FAMILIES)
@pytest.mark.usefixtures("silence")
def test_two_noiseless_steps_on_the_same_records_are_identical(
    family: str, adapter: str, head: str, world_of: WorldOf
) -> None:
    world = world_of(family, adapter, head)
    assert world.model.module.training
    first, second = released(world, [world.records]), released(world, [world.records])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "something in the model is random"
    dropouts = [child for child in world.model.module.modules() if isinstance(child, nn.Dropout)]
    if dropouts:
        dropouts[0].p = 0.5
        shaken = released(world, [world.records])
        dropouts[0].p = 0.0
        assert deviation(shaken, first) > 1e-3, "dropout went unnoticed"


def test_the_world_is_left_as_it_was(world_of: WorldOf) -> None:
    world = world_of("bert")
    before = values(world.model.module)
    released(world, [world.records], replace(NOISY, event=NOISY.event.having(noise_multiplier=50.0)))
    assert unchanged(world.model.module, before)

"""A record's shape follows from its own length; its gradient is the same bits in every row and beside any others."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.optim import SGD

from audits.hostile_state import MOST, NEIGHBOURS, audit_state, clips_moved, default_model, install
from audits.worlds import World, fresh_world, minus, norm, plan, released
from fedveil.common.model.shapes import FixedBatch, Shapes
from fedveil.common.tasks import Record
from fedveil.common.tasks.text import TextExample
from fedveil.privacy.dpsgd import PrivateSteps

pytestmark = pytest.mark.slow

FAMILIES = [("bert", "lora", "trained"), ("gpt2", "lora", "frozen"), ("llama", "lora-frozen-a", "frozen")]
SHAPES = st.builds(Shapes, st.integers(1, 3000), st.integers(1, 5000), st.integers(1, 64))


@given(SHAPES, st.lists(st.integers(1, 3000), max_size=80))
def test_every_record_has_the_shape_of_its_length_alone(shapes: Shapes, tokens: list[int]) -> None:
    tokens = [min(count, shapes.longest) for count in tokens]
    groups = list(shapes.groups(tokens))
    assert sorted(i for _, group in groups for i in group) == list(range(len(tokens)))
    for length, group in groups:
        assert 1 <= len(group) <= shapes.rows_of(length)
        for position in group:
            ((own, _),) = shapes.groups([tokens[position]])
            assert own == length, "a record's shape depends on who is beside it"


@given(SHAPES)
def test_the_grid_ends_beyond_the_longest_and_its_steps_are_small(shapes: Shapes) -> None:
    grid = shapes.lengths
    assert shapes.longest < grid[-1] <= shapes.longest + 8
    assert all(length % 8 == 0 for length in grid)
    assert all(8 <= after - before <= max(24, before / 4 + 8) for before, after in pairwise((0, *grid)))
    assert all(shapes.rows_of(length) * length <= max(shapes.tokens, length) for length in grid)


def test_filler_is_no_record(model_folder: Callable[[str], str]) -> None:
    for family, adapter, head in FAMILIES:
        world = fresh_world(model_folder(family), family, adapter, head)
        (batch,) = [b for b in world.model.fixed_batches(world.records) if b.records < b.rows][:1]
        assert len(world.model.losses(batch)) == batch.records
        with PrivateSteps(world.model.module, SGD(world.trained, lr=0.0), plan()) as steps:
            assert {len(sample) for sample in steps.samples(batch, world.model.losses)} == {batch.records}


@pytest.mark.parametrize(("family", "adapter", "head"), FAMILIES)
def test_fixed_shapes_give_the_same_step_as_any_other_cut(
    family: str, adapter: str, head: str, model_folder: Callable[[str], str]
) -> None:
    world = fresh_world(model_folder(family), family, adapter, head)
    want = released(world, [[record] for record in world.records], plan(0.5))
    got = fixed_release(world, world.records)
    assert norm(minus(got, want)) < 1e-5 * norm(want)


def fixed_release(world: World, records: list[Record], clip: float = 0.5) -> list[Tensor]:
    with PrivateSteps(world.model.module, SGD(world.trained, lr=0.0), plan(clip)) as steps:
        return [gradient.double() for gradient in steps.release(world.model.fixed_batches(records), world.model.losses)]


def test_no_mask_of_a_private_batch_is_all_ones(model_folder: Callable[[str], str]) -> None:
    model = fresh_world(model_folder("bert"), "bert", "lora", "trained", "bfloat16").model
    world = World(model, model.prepare([TextExample(text="the film was " * 20, label=0)] * 40))
    assert all(len(record["input_ids"]) == model.max_length for record in world.records)
    for batch in model.fixed_batches(world.records):
        assert not batch["attention_mask"].bool().all(), "the model drops the mask, and rounds otherwise than with it"


def invent(world: World, length: int, number: int) -> Record:
    draw = random.Random(f"{length}/{number}")
    tokens = draw.choices(range(4, len(world.model.base.processor)), k=length)
    return world.model.task.made_up(world.records[0], tokens, number % 2)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "adapter", "head"), FAMILIES)
def test_a_gradient_is_equal_to_the_last_bit_in_every_row_and_beside_any_others(
    family: str, adapter: str, head: str, precision: str, model_folder: Callable[[str], str]
) -> None:
    world = fresh_world(model_folder(family), family, adapter, head, precision)
    model = world.model
    with PrivateSteps(model.module, SGD(world.trained, lr=0.0), plan()) as steps:

        def gradients(records: list[Record], length: int) -> list[Tensor]:
            return steps.samples(model.fixed_batch(records, length, model.shapes.rows_of(length)), model.losses)

        for length in model.shapes.lengths:
            rows = model.shapes.rows_of(length)
            full = [invent(world, length - 1, i) for i in range(rows)]
            partial = [invent(world, 1 + i % (length - 1), i) for i in range(rows)]
            for own in (length - 1, max(1, length - 4)):
                record = invent(world, own, 100)
                alone = [sample[0].clone() for sample in gradients([record], length)]
                # The record is in every second row of a pass, and in the rows between of the next.
                for others, first in product((full, partial), (0, 1)):
                    mine = range(first, rows, 2)
                    found = gradients([record if row in mine else others[row] for row in range(rows)], length)
                    for row in mine:
                        same = all(torch.equal(sample[row], bits) for sample, bits in zip(found, alone, strict=True))
                        assert same, f"{own} tokens, row {row} of {rows}: other bits"


# --- a hostile state --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "precision"), [(0.3, "float32"), (3.0, "bfloat16"), (30.0, "float32")])
@pytest.mark.parametrize(("family", "adapter", "head"), FAMILIES)
def test_a_hostile_state_lets_no_record_move_another(
    family: str, adapter: str, head: str, size: float, precision: str, model_folder: Callable[[str], str]
) -> None:
    world = fresh_world(model_folder(family), family, adapter, head, precision)
    install(world.model, {"": size})
    records = [invent(world, 2 + 5 * i % 21, i) for i in range(20)]
    assert clips_moved(world.model, records, range(0, 20, 3)) <= MOST


def test_the_default_model_in_a_hostile_state_is_moved_by_one_clip_and_shapes_by_neighbours_are_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # It takes most of the time, and is tested by itself.
    monkeypatch.setattr("audits.hostile_state.rehearse", lambda _: None)
    model, records = default_model("float32")
    assert audit_state(model, records).passed
    assert audit_state(model, records, NEIGHBOURS).passed, "shapes that follow from the neighbours went unnoticed"


# --- what cannot be computed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_record_that_cannot_be_computed_contributes_zero_and_the_others_count(
    where: str, model_folder: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = fresh_world(model_folder("bert"), "bert", "lora", "trained")
    others, losses, passes = [r for r in world.records if world.mark not in r["input_ids"]], world.model.losses, []
    assert len(others) == len(world.records) - 1

    def failing(batch: FixedBatch) -> Tensor:
        passes.append(batch.records)
        values = losses(batch)
        if not (batch["input_ids"] == world.mark).any():
            return values
        if where == "forward":
            raise IndexError("index out of range in self")
        values.register_hook(lambda _: 1 / 0)
        return values

    want = fixed_release(world, others)
    monkeypatch.setattr(world.model, "losses", failing)
    got = fixed_release(world, world.records)
    assert norm(minus(got, want)) < 1e-8 * norm(want)
    assert 1 in passes, "no record passed alone: the test tests nothing"


# --- lowered weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "adapter", "head"), [*FAMILIES, ("bert", "lora", "frozen")])
def test_lowered_weights_give_the_same_bits_and_are_put_back(
    family: str, adapter: str, head: str, model_folder: Callable[[str], str]
) -> None:
    model = fresh_world(model_folder(family), family, adapter, head, "bfloat16").model
    world = World(model, fresh_world(model_folder(family), family, adapter, head).records)
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    (batch, *_) = model.fixed_batches(world.records)

    def gradients() -> list[Tensor]:
        with PrivateSteps(model.module, SGD(world.trained, lr=0.0), plan()) as steps:
            return [sample.clone() for sample in steps.samples(batch, model.losses)]

    want = gradients()
    with model.many_passes():
        low = [name for name, p in model.module.named_parameters() if p.dtype == torch.bfloat16]
        got = gradients()
    assert all(map(torch.equal, got, want))
    # GPT-2's layers are no linear ones: they stay as they are.
    assert bool(low) == (family != "gpt2")
    trained = {name for name, p in model.module.named_parameters() if p.requires_grad}
    assert not trained & set(low)
    assert not any(name.startswith("head") for name in low)
    after = model.module.state_dict()
    assert all(
        after[name].dtype == tensor.dtype and torch.equal(after[name], tensor) for name, tensor in before.items()
    )

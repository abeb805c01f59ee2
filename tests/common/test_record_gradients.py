"""Gradients of single records where a strategy lets a part of the adapter take one, in four families of base models.

Columns of B that rest (those that train by columns), a rank for each record (DyLoRA), and factors that take turns
(RoLoRA). GPT-2 stores its weights transposed, Llama has fewer key and value heads than query heads, and a vision
transformer takes no tokens. Each record is held against a pass of its own through the whole model without hooks, in
float64. Of directions that answer most, ``test_flylora`` says the same.
"""

from __future__ import annotations

import pytest
import torch
from adapter_models import Folder
from gradient_worlds import RECORDS, World, each_family, largest, world_of

from fedveil.common.adapters.base import parameters_of
from fedveil.common.adapters.layers import layers_of
from fedveil.common.adapters.split import SplitColumns, split_columns

# --- columns that are trained, and columns that rest ------------------------------------------------------------------


def furthest_of_columns(world: World) -> float:
    """Return the largest gap of a record's gradient of the chosen columns from that part of the whole B's."""
    wanted, layers = world.alone(), list(layers_of(world.model))
    # Another choice in each layer; the last one rests.
    choices = [torch.tensor(columns) for columns in ([1], [0, 2], [1, 2])]
    chosen = {layer: {"B": choices[i % len(choices)]} for i, layer in enumerate(layers)}
    chosen[layers[-1]] = {"B": torch.tensor([]).long()}
    with split_columns(world.adapter, world.model, chosen):
        moving = {
            id(module.weight): (layer, module.columns)
            for layer, adapted in layers_of(world.model).items()
            for module in adapted.modules()
            if isinstance(module, SplitColumns)
        }
        assert len(moving) == len(layers) - 1
        found = [(*moving[id(p)], sample) for p, sample in world.together()]
    assert len(found) == len(moving), "a column that rests takes a gradient"
    gaps = [
        float((sample[i] - wanted[i][layer][:, columns]).abs().max())
        for layer, columns, sample in found
        for i in range(RECORDS)
    ]
    return max(gaps) / largest(wanted)


@each_family
def test_chosen_columns_have_their_part_of_each_records_gradient(model_folder: Folder, family: str) -> None:
    assert furthest_of_columns(world_of(model_folder, family)) < 1e-12


def test_a_split_that_gives_columns_to_another_slice_is_found(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = SplitColumns.forward
    monkeypatch.setattr(SplitColumns, "forward", lambda split, projected: right(split, projected.roll(1, -1)))
    assert furthest_of_columns(world_of(model_folder, "llama")) > 1e-3


# --- factors that take turns ------------------------------------------------------------------------------------------


@each_family
@pytest.mark.parametrize("name", ["lora", "lora-merged"])
def test_a_factor_whose_turn_it_is_has_the_gradient_that_it_has_beside_the_other(
    model_folder: Folder, family: str, name: str
) -> None:
    world = world_of(model_folder, family, name)
    places = parameters_of(world.adapter, world.model)
    for turn, resting in (("A", "B"), ("B", "A")):
        wanted = world.alone(turn)
        for factors in places.values():
            factors[resting].requires_grad_(False)
        found = {id(p): sample for p, sample in world.together()}
        assert set(found) == {id(factors[turn]) for factors in places.values()}
        gaps = [
            float((found[id(factors[turn])][i] - wanted[i][layer]).abs().max())
            for layer, factors in places.items()
            for i in range(RECORDS)
        ]
        assert max(gaps) < 1e-12 * largest(wanted)
        for factors in places.values():
            factors[resting].requires_grad_(True)

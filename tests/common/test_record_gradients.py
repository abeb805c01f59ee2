"""Gradients of single records where a strategy lets a part of the adapter take one, in four families of base models.

Columns of B that rest (those that train by columns), a rank for each record (DyLoRA), and factors that take turns
(RoLoRA). GPT-2 stores its weights transposed, Llama has fewer key and value heads than query heads, and a vision
transformer takes no tokens. Each record is held against a pass of its own through the whole model without hooks, in
float64. Of directions that answer most, ``test_flylora`` says the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import pytest
import torch
from digits import tiny_vit
from test_adapters import ALPHA, FAMILIES, RANK, Folder, as_trained, float64_model, losses
from torch import Tensor, nn

from audits.tiny_models import with_biases
from fedveil.common.adapters import ADAPTERS, Adapter
from fedveil.common.adapters.attach import attach, read_factors, write_factors
from fedveil.common.adapters.base import parameters_of
from fedveil.common.adapters.layers import layers_of
from fedveil.common.adapters.split import SplitColumns, split_columns
from fedveil.common.starts import STARTS
from fedveil.privacy.dpsgd import PrivateSteps
from fedveil.privacy.plan import gaussian_plan
from fedveil.privacy.randomness import stream

RECORDS = 4
each_family = pytest.mark.parametrize("family", [*FAMILIES, "vit"])
ByLayer = dict[str, Tensor]


@dataclass(frozen=True)
class World:
    """An adapted model in float64 whose factors are nowhere zero, and records for it."""

    adapter: Adapter
    model: nn.Module
    records: Tensor
    losses: Callable[[Tensor], Tensor]

    def alone(self, factor: str = "B") -> list[ByLayer]:
        """Return each record's gradient of a factor as the model is, by layer: a pass of its own, without hooks."""
        places = {layer: factors[factor] for layer, factors in parameters_of(self.adapter, self.model).items()}
        passes = (self.losses(self.records[i : i + 1]).sum() for i in range(len(self.records)))
        return [dict(zip(places, torch.autograd.grad(one, list(places.values())), strict=True)) for one in passes]

    def together(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Return each trained tensor with its gradients of all records in one pass, as a private step takes them."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        plan = gaussian_plan(1.0, 1.0, sample_rate=0.5, expected_batch_size=2.0, delta=1e-3, max_epsilon=9.0)
        with PrivateSteps(self.model, torch.optim.SGD(trained, 0.0), plan) as steps:
            return list(zip(trained, steps.samples(self.records, self.losses), strict=True))


def world_of(model_folder: Folder, family: str, name: str = "lora-frozen-a") -> World:
    if family != "vit":
        adapter, model = float64_model(model_folder(family), name, family)
        tokens = torch.randint(4, 20, (RECORDS, 7), generator=stream(1, "tokens"))
        return World(adapter, model.train(), tokens, lambda batch: losses(model, batch))
    with torch.random.fork_rng():
        torch.manual_seed(7)
        base = with_biases(tiny_vit("vit")).eval()
    # The first linear map of the feed-forward part is not square.
    adapter = ADAPTERS[name](RANK, ALPHA, ("q_proj", "fc1"), STARTS["orthonormal"]())
    images = attach(adapter, base, 1)
    write_factors(adapter, images, as_trained(read_factors(adapter, images), adapter.trained))
    side = images.config.image_size
    draw = torch.Generator().manual_seed(5)
    pixels = torch.randn(RECORDS, 3, side, side, generator=draw, dtype=torch.float64)
    weights = torch.randn((side // images.config.patch_size) ** 2 + 1, 16, generator=draw, dtype=torch.float64)
    images.double().train()

    def of_images(batch: Tensor) -> Tensor:
        return cast(Tensor, (images(pixel_values=batch).last_hidden_state * weights).sum((1, 2)).sin())

    return World(adapter, images, pixels, of_images)


def largest(gradients: list[ByLayer]) -> float:
    return max(float(g.abs().max()) for one in gradients for g in one.values())


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

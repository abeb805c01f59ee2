"""A rank for each record: its gradient is that of a model of this rank, whatever stands beside it."""

from __future__ import annotations

import pytest
import torch
from adapter_models import RANK, Folder
from gradient_worlds import RECORDS, ByLayer, World, each_family, largest, world_of
from torch import Tensor

from fedveil.common.adapters.base import parameters_of
from fedveil.contrib.adapters import lora_nested
from fedveil.contrib.adapters.lora_nested import Nested, ranks_of


def depths_of(world: World) -> list[int]:
    """Return the rank of each of a world's records."""
    named = {} if world.records.is_floating_point() else {"input_ids": world.records}
    return list(map(int, ranks_of((world.records,), named, RANK)))


def of_own_ranks(world: World, depths: list[int]) -> list[ByLayer]:
    """Return each record's gradient in a model without a choice, whose B ends at the record's rank."""
    places = {layer: factors["B"] for layer, factors in parameters_of(world.adapter, world.model).items()}
    whole, found = {layer: B.detach().clone() for layer, B in places.items()}, []
    for i, depth in enumerate(depths):
        inside = (torch.arange(RANK) < depth).double()
        with torch.no_grad():
            for layer, B in places.items():
                B.copy_(whole[layer] * inside)
        found.append({layer: gradient * inside for layer, gradient in world.alone()[i].items()})
    return found


def furthest(world: World, wanted: list[ByLayer]) -> float:
    """Return the largest gap of a record's gradient from the one wanted, over the largest of these."""
    found = {id(p): sample for p, sample in world.together()}
    places = {layer: factors["B"] for layer, factors in parameters_of(world.adapter, world.model).items()}
    gaps = [
        float((found[id(B)][i] - wanted[i][layer]).abs().max()) for layer, B in places.items() for i in range(RECORDS)
    ]
    return max(gaps) / largest(wanted)


@each_family
def test_a_record_has_the_gradient_of_a_model_of_its_own_rank(model_folder: Folder, family: str) -> None:
    world = world_of(model_folder, family, "lora-nested")
    depths = depths_of(world)
    wanted = of_own_ranks(world_of(model_folder, family), depths)
    assert furthest(world, wanted) < 1e-12
    whole = of_own_ranks(world_of(model_folder, family), [RANK] * RECORDS)
    assert furthest(world, whole) > 1e-3, f"no record has a rank below {RANK}: {depths}"


def test_ranks_of_other_records_and_no_ranks_are_found(model_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    world = world_of(model_folder, "gpt2", "lora-nested")
    wanted = of_own_ranks(world_of(model_folder, "gpt2"), depths_of(world))
    with monkeypatch.context() as patch:
        patch.setattr(lora_nested, "ranks_of", lambda *given: ranks_of(*given).roll(1))
        assert furthest(world, wanted) > 1e-3, "another record's rank is not found"
    monkeypatch.setattr(Nested, "forward", lambda _, projected: projected)
    assert furthest(world, wanted) > 1e-3, "a missing rank is not found"


def test_a_rank_follows_from_a_records_own_tokens_and_every_rank_occurs() -> None:
    tokens = torch.randint(1, 500, (400, 9), generator=torch.Generator().manual_seed(1))
    ranks = ranks_of((), {"input_ids": tokens}, 6)
    shares = torch.bincount(ranks, minlength=7)[1:] / len(ranks)
    assert float((shares - 1 / 6).abs().max()) < 0.08
    order = torch.randperm(400, generator=torch.Generator().manual_seed(2))
    assert torch.equal(ranks_of((), {"input_ids": tokens[order]}, 6), ranks[order])
    for left, right in ((0, 4), (3, 0)):  # padding on either side, and whatever stands in it
        padded = torch.cat([tokens.new_full((400, left), 7), tokens, tokens.new_full((400, right), 9)], 1)
        mask = torch.cat([tokens.new_zeros(400, left), torch.ones_like(tokens), tokens.new_zeros(400, right)], 1)
        assert torch.equal(ranks_of((), {"input_ids": padded, "attention_mask": mask}, 6), ranks)


def test_of_images_as_well() -> None:
    pixels = torch.randn(60, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    ranks: Tensor = ranks_of((), {"pixel_values": pixels}, 4)
    assert set(ranks.tolist()) == {1, 2, 3, 4}
    assert torch.equal(ranks_of((), {"pixel_values": pixels[:7]}, 4), ranks[:7])

"""Tiny models in float64, and the gradients of their records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import pytest
import torch
from adapter_models import ALPHA, FAMILIES, RANK, Folder, as_trained, float64_model, losses
from digits import tiny_vit
from torch import Tensor, nn

from audits.tiny_models import with_biases
from fedveil.common.adapters import ADAPTERS, Adapter
from fedveil.common.adapters.attach import attach, read_factors, write_factors
from fedveil.common.adapters.base import parameters_of
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

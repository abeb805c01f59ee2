"""Gradient checkpointing: layers are computed twice, and each record's gradient is what it is without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD

from audits.worlds import Gradient, World, fresh_world, norm, plan
from common.errors import ConfigError
from common.model.device import checkpoint_layers
from common.privacy.dpsgd import PrivateSteps
from experiments.in_process import run_in_process
from reports import report_of

CASES = [("bert", "lora", "trained"), ("gpt2", "lora", "frozen"), ("llama", "lora-frozen-a", "frozen")]


def passes_and_samples(world: World) -> tuple[int, list[Tensor]]:
    """Return how often a layer is computed in a pass, and the per-record gradients, float64."""
    layer = next(m for name, m in world.model.base.module.named_modules() if name.endswith(".0"))
    passes: list[bool] = []
    hook = layer.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    with PrivateSteps(world.model.module, SGD(world.trained, lr=1.0), plan(1.0)) as steps:
        samples = [sample.clone() for sample in steps.samples(world.batch(), world.model.losses)]
    hook.remove()
    return len(passes), samples


def double(world: World) -> World:
    world.model.module.double()
    return world


@pytest.mark.parametrize(("family", "adapter", "head"), CASES)
def test_per_record_gradients_are_those_without_it(
    family: str, adapter: str, head: str, model_folder: Callable[[str], str]
) -> None:
    world = double(fresh_world(model_folder(family), family, adapter, head))
    once, kept = passes_and_samples(world)
    checkpoint_layers(world.model.base.module, family)
    twice, recomputed = passes_and_samples(world)
    assert (once, twice) == (1, 2), "nothing was computed again"
    want: Gradient = list(kept)
    assert norm(want) > 0
    for here, there in zip(kept, recomputed, strict=True):
        assert torch.equal(here, there), f"a gradient is off by {float((here - there).abs().max()):.1e}"


def test_layers_that_hooks_see_in_both_passes_are_found_out(
    model_folder: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault: the way that is not reentrant, in which the first pass has a gradient and hooks look twice."""
    world = double(fresh_world(model_folder("bert"), "bert", "lora", "trained"))
    _, kept = passes_and_samples(world)
    enable = world.model.base.module.gradient_checkpointing_enable
    monkeypatch.setattr(
        world.model.base.module, "gradient_checkpointing_enable", lambda _: enable({"use_reentrant": False})
    )
    checkpoint_layers(world.model.base.module, "bert")
    try:
        _, other = passes_and_samples(world)
    except Exception:  # of a hook that finds what it did not put there
        return
    assert any(not torch.equal(a, b) for a, b in zip(kept, other, strict=True))


def test_a_model_that_cannot_is_refused_in_a_line() -> None:
    class Old(torch.nn.Module):
        def gradient_checkpointing_enable(self, options: dict[str, Any]) -> None:
            raise ValueError("Old does not support gradient checkpointing.")

    with pytest.raises(ConfigError, match=r"which a base model of the kind of 'old' cannot do: set it to false"):
        checkpoint_layers(Old(), "old")


def test_a_private_run_with_it_keeps_its_claim(toy_settings: dict[str, Any]) -> None:
    run = run_in_process({**toy_settings, "model.gradient-checkpointing": True, "rounds": 1}, 2)
    data = report_of(run)
    assert data.status == "completed"
    assert data.claim.made
    assert data.headline.sites == 2

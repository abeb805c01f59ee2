"""Full fine-tuning of square layers: A of as many shards as the layer is wide is the identity, and B is the change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fedveil.common.adapters import ADAPTERS
from fedveil.common.adapters.layers import layers_of
from fedveil.common.config.sections import HeadConfig
from fedveil.common.config.text import parse_settings
from fedveil.common.model.base import BaseModel, load_base_model
from fedveil.common.model.device import choose_attention
from fedveil.common.model.federated import FederatedModel
from fedveil.common.starts import STARTS
from fedveil.common.tasks import TASKS
from fedveil.strategies.job import configure

CONFIG = Path(__file__).resolve().parents[2] / "experiments" / "configs" / "systems" / "full-square.toml"
TASK = TASKS["classification"]


def base_of(model_folder: Callable[[str], str]) -> BaseModel:
    return load_base_model(model_folder("bert"), "classification")


def square(model_folder: Callable[[str], str], scale: float = 1.0) -> FederatedModel:
    """Return tiny BERT with the row's adapter at its own width, at a scale, which is 1 in the row."""
    base, job = base_of(model_folder), configure(parse_settings([str(CONFIG)]))
    assert (job.config.adapter.alpha, job.origin) == (job.config.adapter.rank, STARTS["shards"]())
    rank = base.hidden_size
    adapter = ADAPTERS["lora-frozen-a"](rank, scale * rank, job.adapter.target_modules, job.origin)
    head = HeadConfig(policy="frozen", start="random")
    two = {"label_names": ("bad", "good"), "device": "cpu", "precision": "float32", "max_length": 24}
    return FederatedModel(base, adapter, TASK, head, seed=1, **two)  # type: ignore[arg-type]


def plain(model_folder: Callable[[str], str], like: FederatedModel) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """Return the same model without an adapter, and the weights that it trains in place of one."""
    base = base_of(model_folder)
    choose_attention(base.module, like.device)
    module = TASK.module(base.module, base, 2, 0.0)
    assert module.head is not None
    assert like.module.head is not None
    module.head.load_state_dict(like.module.head.state_dict())
    module.head.requires_grad_(False)
    weights = dict(base.module.named_parameters())
    trained = {name: weights[f"{name}.weight"] for name in layers_of(like.peft_model)}
    for weight in trained.values():
        weight.requires_grad_(True)
    return module, trained


def batch() -> dict[str, Tensor]:
    tokens = torch.randint(5, 20, (6, 9), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": torch.arange(6) % 2}


def factors(model: FederatedModel) -> dict[str, nn.Parameter]:
    return {name: held["B"] for name, held in model.trained().items()}


def gaps(model_folder: Callable[[str], str], model: FederatedModel) -> list[bool]:
    """Return for each layer whether the gradient of B is another than that of the weight itself."""
    module, weights = plain(model_folder, model)
    for one in (model.module, module):
        TASK.sums(one, batch()).losses.mean().backward()
    return [not torch.equal(B.grad, weights[name].grad) for name, B in factors(model).items()]  # type: ignore[arg-type]


def test_the_gradient_is_the_weights_own_to_the_bit_and_at_another_scale_is_not(
    model_folder: Callable[[str], str],
) -> None:
    assert gaps(model_folder, square(model_folder)) == [False] * 8, "four layers in each of two blocks"
    assert gaps(model_folder, square(model_folder, scale=0.75)) == [True] * 8


@pytest.mark.parametrize(("optimizer", "rate"), [(torch.optim.Adam, 0.01), (torch.optim.SGD, 1.0)])
def test_the_merged_weight_is_that_of_plain_training_of_these_layers(
    model_folder: Callable[[str], str],
    optimizer: Callable[..., torch.optim.Optimizer],
    rate: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In float64, for the sums of a step are rounded in another order where W0 and B are apart."""
    model = square(model_folder)
    module, weights = plain(model_folder, model)
    begun = {name: weight.detach().double().clone() for name, weight in weights.items()}
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    for one in (model.module, module):
        one.double()
        own = [parameter for parameter in one.parameters() if parameter.requires_grad]
        rule = optimizer(own, lr=rate)
        for _ in range(5):
            rule.zero_grad()
            TASK.sums(one, batch()).losses.mean().backward()
            rule.step()
    for name, layer in layers_of(model.peft_model).items():
        merged = begun[name] + layer.get_delta_weight("default")
        assert (merged - weights[name]).abs().max() < 1e-12
    moved = [float((weights[name].detach() - begun[name]).abs().max()) for name in weights]
    assert max(moved) > 1e-2, "nothing was trained"

"""Tiny models of three families with an adapter."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Collection
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

from audits.tiny_models import TARGETS, with_biases
from fedveil.common.adapters import ADAPTERS, Adapter
from fedveil.common.adapters.attach import attach, read_factors, write_factors
from fedveil.common.adapters.layer import AdaptedLinear
from fedveil.common.messages.state import AdapterState
from fedveil.common.starts import STARTS
from fedveil.privacy.dpsgd import PrivateSteps
from fedveil.privacy.plan import gaussian_plan
from fedveil.privacy.randomness import stream

RANK, ALPHA = 3, 12.0

FAMILIES = ("bert", "gpt2", "llama")

WITH_FACTORS = [name for name, adapter in ADAPTERS.items() if adapter.trained]
"""All but the one without factors, which ``test_head_only`` holds to what it promises."""

Folder = Callable[[str], str]


@functools.cache
def _read(folder: str, family: str) -> Any:
    loader = AutoModel if family == "bert" else AutoModelForCausalLM
    options = {"add_pooling_layer": False} if family == "bert" else {}
    return with_biases(loader.from_pretrained(folder, **options).float().eval())


def stock(folder: str, family: str) -> Any:
    """Return the folder's model with biases of its own; a copy of one that is read from disk once."""
    return copy.deepcopy(_read(folder, family))


def build(name: str, family: str, init: str = "orthonormal") -> Adapter:
    return ADAPTERS[name](RANK, ALPHA, tuple(TARGETS[family].split(",")), STARTS[init]())


def attached(folder: str, name: str, family: str, seed: int = 1) -> tuple[Adapter, PeftModel]:
    adapter = build(name, family)
    return adapter, attach(adapter, stock(folder, family), seed).eval()


def random_values(state: AdapterState, seed: int = 5) -> AdapterState:
    """Return random, non-zero factors of the same shapes; one number alone is a scale, and around 1."""
    generator = torch.Generator().manual_seed(seed)
    return {
        layer: {
            factor: torch.randn(tensor.shape, generator=generator) * 0.2 + (tensor.numel() == 1)
            for factor, tensor in factors.items()
        }
        for layer, factors in state.items()
    }


def as_trained(state: AdapterState, trained: Collection[str]) -> AdapterState:
    """Return the state with random values in what is trained, or is 0; what else is frozen stays as a run has it."""
    drawn = random_values(state)
    return {
        layer: {name: drawn[layer][name] if name in trained or not t.any() else t for name, t in held.items()}
        for layer, held in state.items()
    }


def bias_forgotten(layer: AdaptedLinear, x: Tensor) -> Tensor:
    """The fault: what the base layer returns is taken for W0 x, with its bias."""
    result = layer.base_layer(x)
    return cast(Tensor, result + layer.lora_branch(result, x))


def float64_model(folder: str, name: str, family: str) -> tuple[Adapter, PeftModel]:
    """Return an adapted model in float64, with factors that are nowhere zero, and its own dropout off."""
    adapter, model = attached(folder, name, family)
    write_factors(adapter, model, as_trained(read_factors(adapter, model), adapter.trained))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return adapter, model.double()


def losses(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return a loss of each record that weighs all its outputs, shape (records,)."""
    out = model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    hidden = out.logits if "logits" in out else out.last_hidden_state
    weights = torch.randn(hidden.shape[1:], generator=stream(1, "weights"), dtype=torch.float64)
    return cast(Tensor, (hidden * weights).sum((1, 2)).sin())


def furthest_from_alone(model: nn.Module) -> float:
    """Return the largest gap of any record's hooked gradient from that of a batch of one, over the largest gradient."""
    tokens = torch.randint(4, 20, (4, 7), generator=stream(1, "tokens"))
    trained = [p for p in model.parameters() if p.requires_grad]
    model.train()
    alone = [torch.autograd.grad(losses(model, tokens[i : i + 1]).sum(), trained) for i in range(len(tokens))]
    figures = gaussian_plan(1.0, 1.0, sample_rate=0.5, expected_batch_size=2.0, delta=1e-3, max_epsilon=9.0)
    with PrivateSteps(model, torch.optim.SGD(trained, 0.0), figures) as steps:
        samples = steps.samples(tokens, lambda batch: losses(model, batch))
    largest = max(float(g.abs().max()) for gradients in alone for g in gradients)
    gaps = [
        float((sample[i] - wanted).abs().max())
        for i, gradients in enumerate(alone)
        for sample, wanted in zip(samples, gradients, strict=True)
    ]
    assert all(float(g.abs().max()) > 1e-6 * largest for gradients in alone for g in gradients), "a factor has none"
    return max(gaps) / largest

"""FFA-LoRA: exact, one shared A, and alpha as a learning rate in disguise (F1, F2, F3)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from private_problem import IN, OUT, RANK, gap, problem, train_privately
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

from audits.tiny_models import TARGETS
from fedveil.common.adapters import LoRAFrozenA
from fedveil.common.adapters.attach import attach, read_factors
from fedveil.common.config.sections import HeadConfig
from fedveil.common.messages.tensors import start_fingerprint
from fedveil.common.model.base import load_base_model
from fedveil.common.model.federated import FederatedModel
from fedveil.common.starts import STARTS
from fedveil.common.tasks import TASKS
from fedveil.privacy import dpsgd
from fedveil.privacy.dpsgd import PrivateSteps
from fedveil.privacy.plan import gaussian_plan
from fedveil.privacy.randomness import stream
from fedveil.strategies.ffa_lora import FFALoRA
from fedveil.strategies.state import Contribution

fast = settings(max_examples=25, deadline=None)


@fast
@given(st.integers(1, 5), st.integers(0, 2**32), st.floats(0.5, 64))
def test_the_mean_of_the_products_is_the_product_of_the_mean(count: int, seed: int, alpha: float) -> None:
    generator, adapter = torch.Generator().manual_seed(seed), LoRAFrozenA(RANK, alpha, ("l",))
    A = torch.randn(RANK, IN, generator=generator, dtype=torch.float64)
    sites = [
        Contribution(
            str(k), 3.0 * k + 1, {"l": {"B": torch.randn(OUT, RANK, generator=generator, dtype=torch.float64)}}
        )
        for k in range(count)
    ]
    total = sum(c.weight for c in sites)
    wanted = torch.zeros(OUT, IN, dtype=torch.float64)
    for c in sites:
        wanted += c.weight / total * adapter.delta({"A": A, "B": c.state["l"]["B"]})
    start = {"l": {"A": A, "B": torch.zeros(OUT, RANK, dtype=torch.float64)}}
    new = FFALoRA().server_update(FFALoRA().start(start, ("B",)), sites).adapter["l"]
    assert torch.equal(new["A"], A), "A moved"
    assert float((adapter.delta(new) - wanted).abs().max()) < 1e-12 * max(1.0, alpha)


def start_of(folder: str, init: str, seed: int) -> str:
    adapter = LoRAFrozenA(3, 6.0, ("query", "dense"), STARTS[init]())
    model = attach(adapter, load_base_model(folder, "classification").module, seed)
    return start_fingerprint(read_factors(adapter, model))


@pytest.mark.parametrize("init", ["kaiming", "orthonormal"])
def test_the_shared_a_follows_from_the_seed_alone(model_folder: Callable[[str], str], init: str) -> None:
    folder = model_folder("bert")
    torch.manual_seed(1)
    first = start_of(folder, init, 1)
    torch.manual_seed(2)
    assert start_of(folder, init, 1) == first, "A depends on torch's global random state"
    assert start_of(folder, init, 2) != first, "A does not depend on the seed"


# F2: DP-SGD on one linear layer whose frozen weight is W0 = 0, with squared loss.


@fast
@given(st.integers(0, 2**32), st.floats(0.2, 5))
def test_scaling_alpha_equals_scaling_rate_and_clip_under_dp_sgd(seed: int, c: float) -> None:
    A, x, y, noise = problem(seed)
    clip = 0.6
    plain, share = train_privately(LoRAFrozenA(RANK, 6.0, ("l",)), A, x, y, noise, 0.05, clip)
    scaled, _ = train_privately(LoRAFrozenA(RANK, c * 6.0, ("l",)), A, x, y, noise, 0.05 / c**2, c * clip)
    assert share > 0.2, "clipping is not active, so the example proves nothing"
    assert gap(plain, scaled) < 1e-12, "(s, eta, C) and (c s, eta / c^2, c C) train differently"


@fast
@given(st.integers(0, 2**32), st.floats(0.2, 5))
def test_scaling_a_equals_scaling_alpha_under_dp_sgd(seed: int, c: float) -> None:
    A, x, y, noise = problem(seed)
    by_a, _ = train_privately(LoRAFrozenA(RANK, 6.0, ("l",)), c * A, x, y, noise, 0.05, 0.6)
    by_alpha, _ = train_privately(LoRAFrozenA(RANK, c * 6.0, ("l",)), A, x, y, noise, 0.05, 0.6)
    assert gap(by_a, by_alpha) < 1e-12


@pytest.mark.parametrize(
    ("rate", "clip"), [(0.05, 1.2), (0.0125, 0.6), (0.025, 1.2)], ids=["rate kept", "clip kept", "rate over c"]
)
def test_another_rule_of_scaling_trains_another_model(rate: float, clip: float) -> None:
    A, x, y, noise = problem(4)
    plain, _ = train_privately(LoRAFrozenA(RANK, 6.0, ("l",)), A, x, y, noise, 0.05, 0.6)
    scaled, _ = train_privately(LoRAFrozenA(RANK, 12.0, ("l",)), A, x, y, noise, rate, clip)
    assert gap(plain, scaled) > 1e-3


class OneLayer(nn.Module):
    """``scaling * B A x``, with B trained: what the mechanism sees of one adapted layer."""

    def __init__(self, A: Tensor, scaling: float) -> None:
        super().__init__()
        self.A, self.scaling = A, scaling
        self.B = nn.Linear(RANK, OUT, bias=False)
        nn.init.zeros_(self.B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.scaling * self.B(x @ self.A.T)


def test_fedveils_own_mechanism_scales_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    A, x, y, noise = problem(4)

    def train(c: float, rate: float, clip: float) -> Tensor:
        draws = iter(noise)
        monkeypatch.setattr(dpsgd, "add_private_noise", lambda total, std: total + next(draws) * std)
        model = OneLayer(A.float(), 2.0 * c)
        plan = gaussian_plan(clip, 1.0, 1.0, float(len(x)), 1e-3, 8.0)
        with PrivateSteps(model, torch.optim.SGD(model.B.parameters(), rate), plan) as steps:
            for _ in noise:
                steps.step([x.float()], lambda batch: (model(batch) - y.float()).pow(2).sum(1) / 2)
        return (model.scaling * model.B.weight @ model.A).detach()

    slow, _ = train_privately(LoRAFrozenA(RANK, 6.0, ("l",)), A, x, y, noise, 0.05, 0.6)
    assert gap([train(1.0, 0.05, 0.6)], [slow[-1].float()]) < 1e-5, "the mechanism differs from the slow reference"
    assert gap([train(1.0, 0.05, 0.6)], [train(3.0, 0.05 / 9, 1.8)]) < 1e-5
    assert gap([train(1.0, 0.05, 0.6)], [train(3.0, 0.05, 1.8)]) > 1e-3


# F3


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    return out.logits if "logits" in out else out.last_hidden_state


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_before_round_1_the_global_model_is_the_base_model_bit_for_bit(
    model_folder: Callable[[str], str], family: str
) -> None:
    folder, task = model_folder(family), "classification" if family == "bert" else "causal-lm"
    stock = (AutoModel if family == "bert" else AutoModelForCausalLM).from_pretrained(folder).eval()
    adapter = LoRAFrozenA(3, 6.0, tuple(TARGETS[family].split(",")), STARTS["kaiming"]())
    model = FederatedModel(
        load_base_model(folder, task),
        adapter,
        TASKS[task],
        HeadConfig(start="zeros"),
        seed=1,
        label_names=("no", "yes"),
        device="cpu",
        precision="float32",
    )
    # Another attention kernel rounds otherwise; which one is used is not the adapter's doing.
    stock.set_attn_implementation(model.base.module.config._attn_implementation)
    start = model.read()
    state = FFALoRA().start(start, ("B",))
    model.write(FFALoRA().install(start, FFALoRA().downlink(state)))
    tokens = torch.randint(4, 20, (3, 7), generator=stream(1, "tokens"))
    model.module.eval()
    assert torch.equal(logits(model.peft_model, tokens), logits(stock, tokens)), "the start is not the base model"
    layer = next(layer for layer in start if layer != "head")
    model.write({layer: {"B": start[layer]["B"] + 0.1}})
    assert not torch.equal(logits(model.peft_model, tokens), logits(stock, tokens)), "the adapter changes nothing"

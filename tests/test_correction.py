"""A strategy's rule on gradients: what it changes, and that under privacy nothing reaches it without noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from client import local_training
from client.local_training import train_round
from client.site import Site
from common.data.sources import train_and_test
from common.errors import ProtocolError
from common.messages.round import TrainResult, TrainTask
from common.messages.state import HEAD, AdapterState
from common.messages.tensors import apply, entries, start_fingerprint
from common.model.federated import FederatedModel
from common.privacy import dpsgd
from strategies import STRATEGIES
from strategies.ffa_lora import FFALoRA
from strategies.job import Job, configure

Call = tuple[AdapterState, AdapterState, AdapterState]
STEPS, RATE, MU = 3, 0.5, 0.4


@dataclass(frozen=True)
class Proximal(FFALoRA):
    """FedProx: the gradient of mu/2 ‖w − w_received‖² is added to the gradient."""

    name: ClassVar[str] = "proximal"
    mu: float = MU

    def correct(self, gradients: AdapterState, weights: AdapterState, received: AdapterState) -> AdapterState:
        held = {layer: {name: received[layer][name] for name in factors} for layer, factors in gradients.items()}
        return apply(lambda g, w, w0: g + self.mu * (w - w0), gradients, weights, held)


@dataclass(frozen=True)
class Listening(FFALoRA):
    """Keeps what the rule is given."""

    name: ClassVar[str] = "listening"
    calls: ClassVar[list[Call]] = []

    def correct(self, gradients: AdapterState, weights: AdapterState, received: AdapterState) -> AdapterState:
        self.calls.append((gradients, weights, received))
        return gradients


@dataclass(frozen=True)
class Misshapen(FFALoRA):
    """Returns less than it was given."""

    name: ClassVar[str] = "misshapen"

    def correct(self, gradients: AdapterState, weights: AdapterState, received: AdapterState) -> AdapterState:
        return {layer: factors for layer, factors in gradients.items() if layer != HEAD}


@pytest.fixture(autouse=True)
def _rows(monkeypatch: pytest.MonkeyPatch) -> None:
    for strategy in (Proximal, Listening, Misshapen):
        monkeypatch.setitem(STRATEGIES, strategy.name, strategy)
    Listening.calls.clear()


def job_of(settings: dict[str, Any], strategy: str, mode: str, **changes: Any) -> Job:
    training = {"local-steps": STEPS, "optimizer": "sgd", "learning-rate": RATE, "sample-rate": 1.0}
    own = {**{f"training.{key}": value for key, value in training.items()}, "schedule": "constant", "head-rate": 1.0}
    budget = {"privacy.noise-multiplier": 2.0, "privacy.epsilon": 500.0}
    return configure({**settings, **own, **budget, "strategy": strategy, "privacy.mode": mode, **changes})


def one_round(job: Job, folder: Path, first: int = 0) -> tuple[FederatedModel, TrainResult]:
    """Return the model and what a site sends that holds 30 records from the given one on."""
    config = job.config
    data = train_and_test(config.data, config.model.task)[0]
    data = replace(data, examples=data.examples[first : first + 30])
    model = job.model(data.label_names, data.label_phrases)
    start = start_fingerprint(model.start)
    task = TrainTask("1", 1, job.strategy.downlink(job.start(model.start)), {}, "", model.base.fingerprint, start)
    folder.mkdir()
    site = Site("only", data, "only", 30, folder / "ledger.sqlite")
    return model, train_round(site, job, model, model.prepare(data.examples), task)


def fixed_noise(monkeypatch: pytest.MonkeyPatch, *, over: bool) -> None:
    """Let the noise follow from a seed; with ``over`` it takes the place of the sum, so nothing of a record is left."""
    draw = torch.Generator().manual_seed(4)

    def noised(total: Tensor, std: float) -> Tensor:
        noise = std * torch.randn(total.shape, generator=draw, dtype=torch.float64)
        return noise if over else total.double() + noise

    monkeypatch.setattr(dpsgd, "add_private_noise", noised)


def flat(state: AdapterState) -> Tensor:
    return torch.cat([tensor.flatten().double() for _, _, tensor in entries(state)])


@pytest.mark.parametrize("mode", ["none", "dp-sgd"])
def test_a_proximal_term_makes_the_steps_that_its_formula_says(
    mode: str, toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where the gradient is a constant g, w_t - w_0 = -η g (1 + (1 - η μ) + ... + (1 - η μ)^(t-1)).
    if mode == "dp-sgd":
        fixed = {}

        def same(total: Tensor, std: float) -> Tensor:
            shape = tuple(total.shape)
            return fixed.setdefault(shape, torch.randn(shape, dtype=torch.float64))

        monkeypatch.setattr(dpsgd, "add_private_noise", same)
    else:
        monkeypatch.setattr(FederatedModel, "losses", linear_losses)
    model, plain = one_round(job_of(toy_settings, "ffa-lora", mode), tmp_path / "plain")
    start = {layer: {n: model.start[layer][n] for n in f} for layer, f in plain.contribution.items()}
    _, pulled = one_round(job_of(toy_settings, "proximal", mode), tmp_path / "pulled")
    without = flat(plain.contribution) - flat(start)
    with_term = flat(pulled.contribution) - flat(start)
    wanted = without / STEPS * sum((1 - RATE * MU) ** t for t in range(STEPS))
    assert float(without.norm()) > 1e-2
    assert float((with_term - wanted).norm()) < 1e-5 * float(without.norm())
    assert float((with_term - without).norm()) > 0.1 * float(without.norm()), "the term changes nothing"


def linear_losses(self: FederatedModel, batch: Any) -> Tensor:
    """A loss whose gradient is 0.01 in every trained number, whatever the record."""
    trained = [p for p in self.module.parameters() if p.requires_grad]
    return 0.01 * sum((p.sum() for p in trained), torch.zeros(())) * torch.ones(len(batch["labels"]))


def test_without_a_rule_a_round_is_what_it_was_bit_for_bit(
    toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for mode in ("none", "dp-sgd"):
        sent = []
        for strategy in ("ffa-lora", "listening", "proximal"):
            changes = {"proximal.mu": 0.0} if strategy == "proximal" else {}
            fixed_noise(monkeypatch, over=False)
            job = job_of(toy_settings, strategy, mode, **changes)
            sent.append(flat(one_round(job, tmp_path / f"{mode}-{strategy}")[1].contribution))
        assert torch.equal(sent[0], sent[1])
        assert torch.equal(sent[0], sent[2])


def test_the_rule_sees_the_batchs_mean_gradient_the_weights_and_what_was_received(
    toy_settings: dict[str, Any], tmp_path: Path
) -> None:
    model, sent = one_round(job_of(toy_settings, "listening", "none"), tmp_path / "one")
    assert len(Listening.calls) == STEPS
    trained = {layer: set(factors) for layer, factors in sent.contribution.items()}
    for gradients, weights, received in Listening.calls:
        assert {layer: set(f) for layer, f in gradients.items()} == trained
        assert {layer: set(f) for layer, f in weights.items()} == trained
        assert torch.equal(flat(received), flat(model.start)), "the rule got another start than the round's"
    for before, after in zip(Listening.calls, [*Listening.calls[1:], (None, sent.contribution, None)], strict=True):
        step = flat(before[1]) - flat(after[1])
        assert float((step - RATE * flat(before[0])).norm()) < 1e-6, "the step is not the one of this gradient"


def heard(
    settings: dict[str, Any], folder: Path, first: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Tensor], list[Call]]:
    """Return all that a rule is told in one private round whose noise hides the records wholly."""
    Listening.calls.clear()
    fixed_noise(monkeypatch, over=True)
    one_round(job_of(settings, "listening", "dp-sgd"), folder, first)
    return [flat(state) for call in Listening.calls for state in call], list(Listening.calls)


def differ(settings: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Return whether a rule could tell two sites with wholly different records apart by more than the noised sums."""
    (left, _), (right, _) = (heard(settings, folder / f"{first}", first, monkeypatch) for first in (0, 100))
    assert len(left) == len(right) == 3 * STEPS
    return any(not torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_under_privacy_nothing_reaches_the_rule_but_noised_sums_and_what_follows_from_them(
    toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "honest").mkdir()
    assert not differ(toy_settings, tmp_path / "honest", monkeypatch)
    _, calls = heard(toy_settings, tmp_path / "attributes", 0, monkeypatch)
    for call in calls:
        for state in call:
            for layer, name, tensor in entries(state):
                assert not set(vars(tensor)) & set(dpsgd.TRACES), f"{layer}.{name} brings a record's traces"
                assert not isinstance(tensor, torch.nn.Parameter), f"{layer}.{name} is the live parameter"
                assert tensor.grad_fn is None


def unnoised(self: Any, batches: Any, losses: Any) -> None:
    """The fault: the rule gets the clipped sum, and the noise comes after it."""
    seen: list[Tensor] = []
    real = dpsgd.add_private_noise

    def noised(total: Tensor, std: float) -> Tensor:
        seen.append(total.float())
        return real(total, std)

    dpsgd.add_private_noise = noised
    try:
        self._privatise(batches, losses)
    finally:
        dpsgd.add_private_noise = real
    for parameter, gradient in zip(self._trained, self._correct(seen), strict=True):
        parameter.grad = parameter.grad + 0 * gradient
    self._released = [(p.grad, p.grad._version) for p in self._trained]
    self._optimizer.step()


def raw_state(real: Callable[..., Any]) -> Callable[..., Any]:
    """The fault: something of the records is left where the rule can read it, in what was received."""

    def correction(strategy: Any, model: FederatedModel, received: AdapterState) -> Any:
        def corrected(gradients: Any) -> Any:
            left = sum(float(p.summed_grad.sum()) for p in model.module.parameters() if p.requires_grad)
            spoilt = {layer: {n: t + left for n, t in f.items()} for layer, f in received.items()}
            return real(strategy, model, spoilt)(gradients)

        return corrected

    return correction


def test_a_rule_that_is_called_before_the_noise_is_found(
    toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dpsgd.PrivateSteps, "step", unnoised)
    assert differ(toy_settings, tmp_path, monkeypatch), "the rule saw clipped sums without noise, and nobody noticed"


def test_when_the_rule_is_called_no_sum_without_noise_is_left_on_the_model(
    toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_training, "correction", raw_state(local_training.correction))
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'sum'"):
        heard(toy_settings, tmp_path / "gone", 0, monkeypatch)


@pytest.mark.parametrize("mode", ["none", "dp-sgd"])
def test_a_rule_that_returns_other_tensors_than_it_got_is_refused(
    mode: str, toy_settings: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ProtocolError, match=r"'misshapen' corrects gradients to other layers"):
        one_round(job_of(toy_settings, "misshapen", mode), tmp_path / "one")

"""Layers' own gradients of records: to the last bit those of Opacus' hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from opacus.grad_sample import GradSampleHooks
from torch import Tensor, nn

from audits.worlds import fresh_world, plan
from fedveil.privacy import dpsgd
from fedveil.privacy.dpsgd import PrivateSteps
from fedveil.privacy.linear_samples import SampleHooks

RECORDS = 5


class Net(nn.Module):
    """An embedding, which keeps its hooks, and linear layers: one called twice, one without bias, one frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.words = nn.Embedding(11, 8)
        self.below, self.twice = nn.Linear(8, 8), nn.Linear(8, 8)
        self.narrow = nn.Linear(8, 3, bias=False)
        self.frozen = nn.Linear(3, 8).requires_grad_(False)
        self.biased, self.head = nn.Linear(8, 8), nn.Linear(8, 2)
        self.biased.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(torch.tanh(self.twice(self.below(x if x.is_floating_point() else self.words(x)))))
        x = self.biased(self.frozen(self.narrow(x)))
        return self.head(x.flatten(1, -2).mean(1) if x.dim() > 2 else x)  # type: ignore[no-any-return]


class Opacus(GradSampleHooks):
    """The hooks that a step had before."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, loss_reduction="sum")
        self.hooked = list(module.modules())


def found(net: nn.Module, x: Tensor, lowered: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Return the gradients of each record, and the clipped sums."""

    def losses(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=lowered):
            return net(x).float().square().sum(1)  # type: ignore[no-any-return]

    trained = [p for p in net.parameters() if p.requires_grad]
    with PrivateSteps(net, torch.optim.SGD(trained, 0.0), plan()) as steps:
        return steps.samples(x, losses), steps.whole_sums(x, losses)  # type: ignore[arg-type]


BATCHES = {
    "tokens": torch.randint(11, (RECORDS, 7), generator=torch.Generator().manual_seed(1)),
    "rows": torch.randn(RECORDS, 8, generator=torch.Generator().manual_seed(1)),
    "a grid": torch.randn(RECORDS, 4, 3, 8, generator=torch.Generator().manual_seed(1)),
}


@pytest.mark.parametrize("lowered", [False, True])
@pytest.mark.parametrize("batch", BATCHES)
def test_gradients_are_those_of_opacus_to_the_last_bit(batch: str, lowered: bool, monkeypatch: Any) -> None:
    net = Net()
    net.words.requires_grad_(batch == "tokens")
    mine = found(net, BATCHES[batch], lowered)
    monkeypatch.setattr(dpsgd, "SampleHooks", Opacus)
    theirs = found(net, BATCHES[batch], lowered)
    for some, others in zip(mine, theirs, strict=True):
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(some, others, strict=True))
    assert all(bool(sample.any()) for sample in mine[0])


@pytest.mark.parametrize("lowered", [False, True])
@pytest.mark.parametrize("adapter", ["lora-metric", "dora", "lora-merged"])
def test_maps_that_state_their_gradients_need_no_hooks(
    model_folder: Callable[[str], str], adapter: str, lowered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = fresh_world(model_folder("bert"), "bert", adapter, "trained")
    model, batch = world.model, next(iter(world.model.fixed_batches(world.records)))
    model.precision = torch.bfloat16 if lowered else torch.float32
    with torch.no_grad():
        for parameter in world.trained:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    both = []
    for hooks in (SampleHooks, Opacus):
        monkeypatch.setattr(dpsgd, "SampleHooks", hooks)
        with model.many_passes(), PrivateSteps(model.module, torch.optim.SGD(world.trained, 0.0), plan()) as steps:
            both.append(steps.samples(batch, model.losses))
            assert bool(steps._hooked) == (hooks is Opacus)
    assert all(torch.equal(mine, theirs) and mine.any() for mine, theirs in zip(*both, strict=True))


def test_a_weight_that_another_layer_uses_too_keeps_its_hooks() -> None:
    net = Net()
    net.tied = nn.Linear(8, 11, bias=False)  # type: ignore[assignment]
    net.tied.weight = net.words.weight
    hooks = SampleHooks(net)
    assert net.tied in hooks.hooked
    assert net.below not in hooks.hooked
    assert "forward" in vars(net.below)
    hooks.cleanup()
    assert "forward" not in vars(net.below)


class Mixing(nn.Module):
    """Calls a layer with the records, and with one row, which it adds to all of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.layer(x[:1])  # type: ignore[no-any-return]


def test_what_records_share_counts_where_opacus_counts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is wrong there for all of them, so that the rehearsal refuses the model by the layer's name."""
    net = Mixing()
    mine = found(net, BATCHES["rows"], lowered=False)
    monkeypatch.setattr(dpsgd, "SampleHooks", Opacus)
    theirs = found(net, BATCHES["rows"], lowered=False)
    assert all(map(torch.equal, mine[0], theirs[0]))
    assert all(map(torch.equal, mine[1], theirs[1]))

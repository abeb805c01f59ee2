"""EVA from public text: A spans the principal directions of what reaches a layer.

Paischer, Hauzenberger et al.: Parameter Efficient Fine-tuning via Explained Variance Adaptation. Theirs takes them from
the training records, without clip or noise; this one from public text at the server, so that it costs nothing. Moments
are not centred unless ``start.centred`` is set: the mean input is a direction that gradients use (``experiments/log``,
2026-11-26). Every layer has the run's rank: the paper's other half, ranks that are spread over layers by explained
variance, is not built. Rows of A are as long as others', and gradients through them longer: ``adapter.alpha = 0``
brings these to what they are with random rows.

What reaches a layer differs in its last bits from device to device, so A travels once. Layers that share an input
share A.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from fedveil.common.adapters import Place
from fedveil.common.adapters.layers import layers_of
from fedveil.common.config.run import RunConfig
from fedveil.common.messages.state import AdapterState, Factors
from fedveil.common.model.federated import FederatedModel
from fedveil.common.starts.base import Labels, seeded
from fedveil.common.starts.directions import leading_rows
from fedveil.common.starts.from_text import FromText
from fedveil.common.tasks import Record


@dataclass(frozen=True)
class EVA(FromText):
    """The rows of A are the leading eigenvectors of a layer's second moment of inputs; B is random, from the seed."""

    name: ClassVar[str] = "eva"
    from_seed: ClassVar[tuple[str, ...]] = ("B",)

    centred: bool = False
    """Whether the mean input is taken out, as in the paper."""

    def factors(self, place: Place, wanted: Collection[str]) -> Factors:
        """Return orthonormal directions, which hold until the moments are there."""
        return seeded(place, wanted)

    def from_public(self, model: FederatedModel, config: RunConfig, labels: Labels) -> AdapterState:
        """Return the moments of the text's tokens, each text passed by itself."""
        del config, labels
        return input_moments(model, self.texts(model))

    def from_statistic(self, statistic: Factors, rank: int) -> Factors:
        """Return A from an eigendecomposition in float64, signs fixed."""
        moment, mean = statistic["M"], statistic["m"]
        covariance = moment - torch.outer(mean, mean) if self.centred else moment
        return {"A": leading_rows(covariance, rank).float()}


@torch.no_grad()
def input_moments(model: FederatedModel, records: list[Record]) -> AdapterState:
    """Return the moments of each adapted layer's inputs over all tokens of ``records``, each passed by itself.

    ``M``, shape (in, in), is the mean of x xᵀ and ``m``, shape (in,), that of x; float64, on the CPU.
    """
    layers = layers_of(model.peft_model)
    totals: dict[str, tuple[Tensor, Tensor, int]] = {}
    seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            given = inputs[0]
            if id(given) not in seen:  # which other layers may take too; kept, so that no other tensor gets its id
                tokens = given.detach().flatten(0, -2).cpu().double()
                seen[id(given)] = (given, tokens.T @ tokens, tokens.sum(0))
            own, count = seen[id(given)][1:], given.shape[:-1].numel()
            before = totals.get(name, (torch.zeros_like(own[0]), torch.zeros_like(own[1]), 0))
            totals[name] = (before[0] + own[0], before[1] + own[1], before[2] + count)

        return add

    hooks = [cast(nn.Module, layer).register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    was_training = model.module.training
    model.module.eval()
    try:
        for record in records:
            model.losses(model.batch([record]))
            seen.clear()
    finally:
        model.module.train(was_training)
        for hook in hooks:
            hook.remove()
    return {name: {"M": moment / count, "m": total / count} for name, (moment, total, count) in totals.items()}

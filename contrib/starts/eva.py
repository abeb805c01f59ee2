"""EVA from public text: A spans the principal directions of what reaches a layer.

Paischer, Hauzenberger et al.: Parameter Efficient Fine-tuning via Explained Variance Adaptation. Theirs takes them from
the training records, without clip or noise; this one from public text at the server, so that it costs nothing. Moments
are not centred unless ``start.centred`` is set: the mean input is a direction that gradients use (``experiments/log``,
2026-11-26). Rows of A are as long as others', and gradients through them longer: ``adapter.alpha = 0`` brings these to
what they are with random rows.

The paper's other half spreads ranks: of all layers' directions those are taken that explain the largest shares of
their layers' variance, ``start.mean-rank`` a layer on average and ``adapter.rank`` at most (the paper's r and ρ r). A
has rows of 0 in place of the others, so that these change no weight; ``strategy = "eva-ranks"`` does not train them.

What reaches a layer differs in its last bits from device to device, so A travels once. Layers that share an input
share A.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from fedveil.common.adapters import Adapter, Place
from fedveil.common.adapters.layers import layers_of
from fedveil.common.check import NOT_NEGATIVE
from fedveil.common.config.fields import Unit
from fedveil.common.config.run import RunConfig
from fedveil.common.errors import ConfigError
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
    mean_rank: Annotated[int, NOT_NEGATIVE, Unit("directions")] = 0
    """How many directions a layer has on average, spread over layers by explained variance, of which none gets more
    than ``adapter.rank``; 0: every layer has ``adapter.rank``."""

    def check(self, config: RunConfig, adapter: type[Adapter]) -> None:
        """Refuse a mean rank above the largest one, and directions that are trained, which would leave 0 again."""
        super().check(config, adapter)
        if self.mean_rank > config.adapter.rank:
            raise ConfigError(
                f"start.mean-rank is {self.mean_rank}, and no layer has more than adapter.rank, {config.adapter.rank}: "
                "raise adapter.rank, as to twice the mean"
            )
        if self.mean_rank and "A" in adapter.trained:
            raise ConfigError(
                f"start.mean-rank leaves rows of A at 0, and the adapter {adapter.name!r} trains A: set adapter.name "
                "to 'lora-frozen-a', or start.mean-rank to 0"
            )

    def factors(self, place: Place, wanted: Collection[str]) -> Factors:
        """Return orthonormal directions, which hold until the moments are there."""
        return seeded(place, wanted)

    def from_public(self, model: FederatedModel, config: RunConfig, labels: Labels) -> AdapterState:
        """Return the moments of the text's tokens, each text passed by itself."""
        del labels
        moments = input_moments(model, self.texts(model))
        if not self.mean_rank:
            return moments
        variances = {layer: torch.linalg.eigvalsh(self._covariance(held)).flip(0) for layer, held in moments.items()}
        ranks = spread_ranks(variances, self.mean_rank, config.adapter.rank)
        return {layer: {**held, "rank": torch.tensor([float(ranks[layer])])} for layer, held in moments.items()}

    def from_statistic(self, statistic: Factors, rank: int) -> Factors:
        """Return A from an eigendecomposition in float64, signs fixed, with rows of 0 from the layer's rank on."""
        A = leading_rows(self._covariance(statistic), rank).float()
        own = int(statistic["rank"]) if "rank" in statistic else rank
        return {"A": A * (torch.arange(rank) < own)[:, None]}

    def _covariance(self, moments: Factors) -> Tensor:
        return moments["M"] - torch.outer(moments["m"], moments["m"]) if self.centred else moments["M"]


def spread_ranks(variances: Mapping[str, Tensor], mean: int, most: int) -> dict[str, int]:
    """Return how many directions each layer gets: those of the largest shares of their layer's variance, over all.

    Args:
        variances: of each layer along its directions, the largest first.
        mean: directions of a layer on average.
        most: of one layer.

    >>> spread_ranks({"one": torch.tensor([8.0, 1, 1]), "other": torch.tensor([4.0, 3, 3])}, 1, 2)
    {'one': 1, 'other': 1}
    """
    shares = {layer: (values / values.sum())[:most].tolist() for layer, values in variances.items()}
    every = [(-share, layer) for layer, own in shares.items() for share in own]
    ranks = dict.fromkeys(variances, 0)
    for _, layer in sorted(every)[: mean * len(variances)]:
        ranks[layer] += 1
    return ranks


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

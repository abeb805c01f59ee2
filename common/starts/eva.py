"""EVA from public text: A spans the principal directions of what reaches a layer.

Paischer, Hauzenberger et al.: Parameter Efficient Fine-tuning via Explained Variance Adaptation. Theirs takes them from
the training records, without clip or noise; this one from public text at the server, so that it costs nothing. Moments
are not centred unless that is asked for: the mean input is a direction that gradients use (``experiments/LOG.md``,
2026-11-26). Rows of A are as long as others', and gradients
through them longer: ``adapter.alpha = 0`` brings these to what they are with random rows.

What reaches a layer differs in its last bits from device to device, so A travels once. Layers that share an input
share A.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from common.adapters import Adapter, Place
from common.check import POSITIVE, Digits
from common.config.fields import Unit
from common.config.sections import RunConfig
from common.errors import ConfigError
from common.messages.state import AdapterState, Factors
from common.model.federated import FederatedModel
from common.starts.base import Needs, Start, seeded
from common.starts.directions import leading_rows
from common.starts.public_text import PACKAGED, packaged_sha256, read_text
from common.tasks import TASKS, Record


@dataclass(frozen=True)
class EVA(Start):
    """The rows of A are the leading eigenvectors of a layer's second moment of inputs; B is random, from the seed."""

    name: ClassVar[str] = "eva"
    needs: ClassVar[Needs] = "public records"

    text: str = PACKAGED
    """The public text: ``phrases``, which come with FedVeil, or a file of the server's, one text a line."""
    text_sha256: Annotated[str, Digits(64, "sha256sum")] = ""
    """SHA-256 of that text's bytes. Empty: of the packaged phrases."""
    records: Annotated[int, POSITIVE, Unit("records")] = 256
    """How many texts are used, from the first on."""
    centred: bool = False
    """Whether the mean input is taken out, as in the paper."""

    def check(self, config: RunConfig, adapter: type[Adapter]) -> None:
        """Refuse a file without its fingerprint, and records that hold no words."""
        super().check(config, adapter)
        if self.text != PACKAGED and not self.text_sha256:
            raise ConfigError(
                f"start.text {self.text!r} is a file of the server's: set start.text-sha256 to what sha256sum prints "
                "for it, so that every site knows which text the run starts from"
            )
        if not TASKS[config.model.task].worded:
            raise ConfigError(f"adapter.start 'eva' is made from text, and model.task {config.model.task!r} has none")

    def resolved(self) -> Self:
        """Return the start with the fingerprint of its text, which of a file has to be given."""
        if self.text_sha256 or self.text != PACKAGED:
            return self
        return dataclasses.replace(self, text_sha256=packaged_sha256())

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the public text."""
        return self.resolved().text_sha256

    def factors(self, place: Place, wanted: Collection[str]) -> Factors:
        """Return orthonormal directions, which hold until the moments are there."""
        return seeded(place, wanted)

    def from_public(self, model: FederatedModel, config: RunConfig, label_names: tuple[str, ...]) -> AdapterState:
        """Return the moments of the text's tokens, each text passed by itself."""
        del config, label_names
        texts = read_text(self.text, self.fingerprint)[: self.records]
        return input_moments(model, model.prepare([model.task.of_phrase(text) for text in texts]))

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
    layers = model.adapter.layers(model.peft_model)
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

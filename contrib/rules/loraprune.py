"""LoRAPrune's scores of outputs and inputs, from changes that the server has anyway; no step changes by them.

Zhang, Chen et al.: LoRAPrune: Structured Pruning Meets Low-Rank Parameter-Efficient Fine-Tuning, Findings of ACL 2024.
A weight matters by how much the loss would change without it, |∂L/∂W ∘ W|, and the gradient is replaced by a
step of s B A of rate 1: ``s (g_B A + B g_A - g_B g_A) = s (B A - (B - g_B)(A - g_A))``, made of LoRA's gradients alone.
With one plain step at the sites the averaged change over their rate is these gradients, noised: so the criterion is
post-processing, and free. A choice by gradients or activations of private records would be a release of its own.

The paper takes absolute values. Here they are squares, because of these the noise is known: on gradients with noise of
variance τ² a number adds τ² (W_ij)² s² ‖A_j‖² under a frozen A. Where A is trained as well it adds what depends on the
gradients without noise, s² (W_ij)² τ² (‖(A - g_A)_j‖² + ‖(B - g_B)_i‖² + r τ²). Of the noised gradients each of these
lengths is longer by r τ² in the mean, so ‖(A - g_A)_j‖² + ‖(B - g_B)_i‖² - r τ² of them estimates it without bias.
That is taken off. Scores are over the length of all scores of a layer, and a running mean over rounds, as in the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedveil.common.adapters import Adapter
from fedveil.common.adapters.layers import base_weight, layers_of
from fedveil.common.config.run import RunConfig
from fedveil.common.errors import ConfigError
from fedveil.common.messages.state import OWN, AdapterState, Factors
from fedveil.common.model.federated import FederatedModel
from fedveil.common.requirements import Requirement, one_plain_step
from fedveil.strategies.base import Strategy, chooses
from fedveil.strategies.rules import NoRule
from fedveil.strategies.state import ServerState

DECAY = 0.9
"""How much of a score a round keeps of those before it."""
ROWS, COLUMNS = "important rows", "important columns"
"""What a server's memory calls the scores of a layer's outputs, shape (out,), and inputs, shape (in,)."""


@dataclass(frozen=True)
class LoRAPrune(NoRule):
    """The step as it is; the server keeps a score of every output and input of an adapted layer, to prune by."""

    name: ClassVar[str] = "loraprune"
    paper: ClassVar[str] = "Zhang et al. 2024 (LoRAPrune)"
    requires: ClassVar[tuple[Requirement, ...]] = one_plain_step("a score is made of gradients")

    def check(self, config: RunConfig, strategy: Strategy, adapter: Adapter) -> None:
        """Raise ConfigError unless an averaged change is a noised gradient of A and B."""
        if not config.privacy.mechanism.charged:
            raise ConfigError(
                f"server.rule {self.name!r} with privacy.mode {config.privacy.mode!r} would score gradients without "
                "noise of their sites: a base model that is pruned by them tells of records. Set server.rule to "
                "'none', or privacy.mode to 'dp-sgd'"
            )
        if chooses(type(strategy)) or adapter.name not in ("lora", "lora-frozen-a", "lora-frozen-b"):
            raise ConfigError(
                f"server.rule {self.name!r} scores by changes of all of A or B, which strategy {strategy.name!r} with "
                f"the adapter {adapter.name!r} does not send in every round: set server.rule to 'none'"
            )

    def remember(
        self,
        before: ServerState,
        averaged: ServerState,
        model: FederatedModel,
        config: RunConfig,
        noise: Callable[[], float],
    ) -> AdapterState:
        """Return every layer's running scores, if the round trains the adapter."""
        number, layers = before.round_number + 1, layers_of(model.peft_model)
        rate = config.site_rate(number, 0)  # of the one plain step that sites take
        scores: AdapterState = {}
        for layer, factors in before.adapter.items() if config.timeline.trains_adapter(number) else ():
            if layer in OWN:
                continue
            gradients = {
                name: (tensor.double() - averaged.adapter[layer][name].double()) / rate
                for name, tensor in factors.items()
                if before.trains(layer, name)
            }
            weight = base_weight(layers[layer]).cpu()
            now = importance(weight, factors, gradients, model.adapter.scaling, (noise() / rate) ** 2)
            earlier = before.memory.get(layer, {})
            scores[layer] = running({name: earlier[name] for name in (ROWS, COLUMNS) if name in earlier}, now)
        return scores


def importance(
    weight: Tensor, held: Mapping[str, Tensor], gradients: Mapping[str, Tensor], scaling: float, variance: float
) -> Factors:
    """Return the scores of one layer's outputs and inputs in one round, float64; about 0 where there is noise alone.

    Args:
        weight: W0, shape (out, in).
        held: A, shape (rank, in), and B, shape (out, rank), before the round.
        gradients: ``(before - averaged) / rate`` of those that are trained.
        scaling: s.
        variance: of the noise on one number of the gradients.
    """
    A, B = held["A"].double(), held["B"].double()
    a = gradients["A"].double() if "A" in gradients else torch.zeros_like(A)
    b = gradients["B"].double() if "B" in gradients else torch.zeros_like(B)
    whole = (weight.double() + scaling * B @ A).square()
    step = scaling * (b @ A + B @ a - b @ a)
    spread = (A - a).square().sum(0)[None] if "B" in gradients else 0
    spread = spread + ((B - b).square().sum(1)[:, None] if "A" in gradients else 0)
    both = len(A) * variance if {"A", "B"} <= set(gradients) else 0.0
    net = whole * (step.square() - scaling**2 * variance * (spread - both))
    length = net.square().sum().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    return {ROWS: net.sum(1) / length, COLUMNS: net.sum(0) / length}


def running(before: Mapping[str, Tensor], now: Factors) -> Factors:
    """Return the running mean of a layer's scores; the first round's are scores as they are."""
    return {name: DECAY * before[name] + (1 - DECAY) * t if name in before else t for name, t in now.items()}

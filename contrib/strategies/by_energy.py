"""The interface of a strategy that chooses layers by what the sites' changes of a round have in common.

The statistic is the cross-site energy ``Σ_{j≠k} p_j p_k ⟨D_j, D_k⟩`` of a layer's trained columns over its standard
deviation under noise alone (``contrib.nulls``). Its mean is 0 where there is noise and nothing else, however much, so a
layer above ``least_score`` learns. It is a function of what was sent, which was noised: a choice by it costs no
privacy, and other records change it through nothing else.

One site cannot buy a choice by the length of what it sends: in the score no change is longer than the middle one
(``contrib.nulls.evened``), so that what it makes up is to the others' noise as noise is. What remains: it can hold a
layer back by sending the opposite of what the others have in common, or nothing, and speak for a layer in which their
records move, as far as its share of the average goes.

The papers' own scores need gradients of the weights, or a validation set of private records: both would be paid for.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedveil.common.config.run import RunConfig
from fedveil.common.errors import ConfigError
from fedveil.common.messages.columns import FACTOR, narrowed
from fedveil.common.messages.state import OWN, AdapterState
from fedveil.common.messages.tensors import merge, select
from fedveil.contrib.nulls import cross_site_energy, evened, least_score
from fedveil.contrib.strategies.columns import MASK, Columns
from fedveil.strategies.state import Contribution, ServerState

SCORE = "z"
"""How far a layer's score of the last round is above the least of one that learns, shape (1,): above 0 it learns."""
NONE = -1e9
"""In place of it where there is no score."""


@dataclass(frozen=True)
class ByEnergy(Columns):
    """Sites train the columns that the server's masks have, and it makes the next masks by the layers' scores."""

    def check(self, config: RunConfig) -> None:
        """Refuse a run in which the noise of a site's change does not follow from what is public."""
        super().check(config)
        training = config.training
        if not config.privacy.mechanism.charged:
            return
        if training.local_steps > 1 or training.optimizer != "sgd" or training.weight_decay:
            raise ConfigError(
                f"strategy {self.name!r} chooses by the noise that is known of one plain step: set "
                "training.local-steps to 1, training.optimizer to 'sgd' and training.weight-decay to 0"
            )

    @abstractmethod
    def begin_with(self, rank: int) -> int:
        """Return how many columns of each layer are trained in round 1."""

    @abstractmethod
    def choose(self, state: ServerState, scores: dict[str, float]) -> ServerState:
        """Return the state with the masks that follow from this round's scores, by layer: above 0 a layer learns."""

    def start(self, adapter: AdapterState, trained: tuple[str, ...]) -> ServerState:
        """Return the state in which the first columns of every layer are trained."""
        memory: AdapterState = {}
        for layer, factors in adapter.items():
            if layer not in OWN:
                rank = factors[FACTOR].shape[1]
                memory[layer] = {MASK: first_columns(rank, self.begin_with(rank)), SCORE: torch.tensor([NONE])}
        return ServerState(0, adapter, trained, memory)

    def combine(self, state: ServerState, contributions: Sequence[Contribution]) -> ServerState:
        """Return B with the mean of the increments added, and every layer's score in the memory."""
        found: AdapterState = {
            layer: {SCORE: torch.tensor([score])} for layer, score in self._scores(state, contributions).items()
        }
        none: AdapterState = {layer: {SCORE: torch.tensor([NONE])} for layer in state.memory}
        combined = super().combine(state, contributions)
        return replace(combined, memory=merge(merge(state.memory, none), found))

    def settle(self, state: ServerState) -> ServerState:
        """Return the state with the masks of the next round."""
        memory = select(state.memory, (SCORE,))
        scores = {layer: float(factors[SCORE]) for layer, factors in memory.items() if factors[SCORE] > NONE}
        return self.choose(state, scores) if scores else state

    def _scores(self, state: ServerState, contributions: Sequence[Contribution]) -> dict[str, float]:
        """Return how far every trained layer's score is above the least; nothing of one site, or of unknown noise.

        Without noise it is the changes' mean cosine, and the least is 0. A change that was shortened to nothing has no
        noise any more, and nothing follows from it.
        """
        noises = [one.noise for one in contributions]
        known = [noise for noise in noises if noise]
        if len(contributions) < 2 or None in noises or 0 < len(known) < len(noises):
            return {}
        total = sum(one.weight for one in contributions)
        shares = [one.weight / total for one in contributions]
        before = narrowed(state.adapter, self.trained_columns(self.downlink(state), state.round_number + 1, 0))
        scores, layers = {}, sorted(set(contributions[0].state) - set(OWN))
        for layer in layers:
            changes = [_change(one.state[layer][FACTOR], before[layer][FACTOR]) for one in contributions]
            energy = cross_site_energy(shares, evened(changes, known or None), known or None)
            if energy is not None:
                scores[layer] = energy.agreement if energy.score is None else energy.score - least_score(len(layers))
        return scores


def first_columns(rank: int, columns: int) -> Tensor:
    """Return the mask of the first columns, float32, shape (rank,).

    >>> first_columns(4, 2).tolist()
    [1.0, 1.0, 0.0, 0.0]
    """
    return (torch.arange(rank) < columns).float()


def _change(sent: Tensor, before: Tensor) -> Tensor:
    return (sent.double() - before.double()).flatten()

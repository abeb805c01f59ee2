"""AlignGuard's shift at the server: what public text is sensitive to is pulled back to the base model.

Das et al.: AlignGuard-LoRA. Its loss has a Fisher term, l ‖F^(1/2) P ΔW‖², on the part of the change in the leading
eigenvectors of the Fisher matrix F of alignment text; another on the rest; and two that penalise where the parts
collide. No code of the authors holds all of them. Here:

* F is of **public** text, from one gradient a record of the trained factors, at the server: no site takes part, and
  nothing is charged. One of private records would be a release.
* The term is a function of B alone, A being frozen, so it is no part of a record's loss, where it would be clipped
  with it. It acts on the averaged step: with one plain local step that is the same as at the sites.
* It acts as its proximal map, b ← b - Σ_j c_j / (1 + c_j) u_j ⟨u_j, b⟩, which is stable for any strength and only
  ever shortens. c_j is ``strength`` λ_j / λ_1.
* The collision terms are left out. With an orthogonal projector the geodesic one, ⟨P ΔW, (I - P) ΔW⟩², is zero for
  every ΔW; with a mask of coordinates both are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from fedveil.common.adapters import Adapter
from fedveil.common.check import POSITIVE, Digits
from fedveil.common.config.fields import RATIO, Unit
from fedveil.common.config.run import RunConfig
from fedveil.common.errors import ConfigError, ModelError
from fedveil.common.messages.state import AdapterState
from fedveil.common.messages.tensors import entries
from fedveil.common.model.federated import FederatedModel
from fedveil.common.starts.public_text import MADE_UP, PACKAGED, check_apart, check_named, known_sha256, read_text
from fedveil.common.tasks import TASKS, wording_of
from fedveil.strategies.base import Strategy, chooses
from fedveil.strategies.rules.base import Known, ServerRule


@dataclass(frozen=True)
class AlignGuard(ServerRule):
    """The change's part in leading eigenvectors of a public Fisher matrix is shortened each round, towards the base."""

    name: ClassVar[str] = "align-guard"
    paper: ClassVar[str] = "Das et al. 2025"
    noise: ClassVar[str] = "at most that without a rule: in direction u_j 1 / (1 + c_j) of it"

    text: str = PACKAGED
    """The public text whose answers are to stay: as ``start.text``, but for ``made-up`` words."""
    text_sha256: Annotated[str, Digits(64, "sha256sum")] = ""
    """SHA-256 of a file's bytes."""
    records: Annotated[int, POSITIVE, Unit("records")] = 64
    """How many texts are used, from the first on."""
    directions: Annotated[int, POSITIVE, Unit("directions")] = 16
    """How many leading eigenvectors are guarded, over all layers together."""
    strength: Annotated[float, POSITIVE, RATIO] = 1.0
    """Of the pull: in every round the first direction keeps 1 / (1 + strength) of its length."""

    def check(self, config: RunConfig, strategy: Strategy, adapter: Adapter) -> None:
        """Refuse an adapter or a strategy under which a direction does not stay, and text that is not public."""
        if not adapter.traits.linear or set(adapter.trained) not in ({"B"}, {"R"}):
            raise ConfigError(
                f"server.rule {self.name!r} guards directions of one factor that is trained from 0, and the adapter "
                f"{adapter.name!r} trains {' and '.join(adapter.trained) or 'none'}: set adapter.name to "
                "'lora-frozen-a' or 'lora-sb'"
            )
        if strategy.facts.moves_frozen:
            raise ConfigError(
                f"server.rule {self.name!r} guards directions in the run's first coordinates, which strategy "
                f"{strategy.name!r} turns: set strategy to 'ffa-lora'"
            )
        if chooses(type(strategy)):
            raise ConfigError(
                f"server.rule {self.name!r} pulls all of B in every round, and columns that strategy {strategy.name!r} "
                "lets rest are to stay: set strategy to 'ffa-lora'"
            )
        task = TASKS[config.model.task]
        if task.labelled or not task.wording:
            raise ConfigError(
                f"server.rule {self.name!r} guards what a language model answers, and model.task {task.name!r} "
                "answers labels: set server.rule to 'none'"
            )
        if self.text == MADE_UP:
            raise ConfigError("align-guard.text is 'made-up', and drawn words complete nothing: name a text")
        known = known_sha256(self.text)
        if known and self.text_sha256 not in ("", known):
            raise ConfigError(f"align-guard.text-sha256 is {self.text_sha256}, that of {self.text!r} is {known}")
        check_named(self.text, self.text_sha256 or known, config.data)

    def measure(self, model: FederatedModel, config: RunConfig) -> AdapterState:
        """Return √(c / (1 + c)) u of every guarded direction, shape (directions, *factor's) for each trained factor."""
        texts = read_text(self.text, self.text_sha256 or known_sha256(self.text))[: self.records]
        check_apart(self.text, texts, config.data, config.model.task)
        records = model.prepare([wording_of(model.task).text(text) for text in texts])
        places = model.trained()
        order = [(layer, name, p) for layer, name, p in entries(places)]  # type: ignore[arg-type]
        was_training = model.module.training
        model.module.eval()
        rows = []
        for record in records:
            loss = model.losses(model.batch([record])).sum()
            found = torch.autograd.grad(loss, [p for _, _, p in order])
            rows.append(torch.cat([g.detach().double().cpu().flatten() for g in found]))
        model.module.train(was_training)
        pulls = guarded(torch.stack(rows), self.directions, self.strength)
        split = pulls.split([p.numel() for _, _, p in order], dim=1)
        made: AdapterState = {}
        for (layer, name, p), part in zip(order, split, strict=True):
            made.setdefault(layer, {})[name] = part.reshape(-1, *p.shape)
        return made

    def step(self, before: AdapterState, after: AdapterState, measured: AdapterState, known: Known) -> AdapterState:
        """Return b - Σ v ⟨v, b⟩ over the measured v, all layers together."""
        del before, known
        trained = {layer: {n: t for n, t in f.items() if n in measured.get(layer, {})} for layer, f in after.items()}
        lengths = sum(
            (measured[layer][name].flatten(1) @ t.double().flatten() for layer, name, t in entries(trained)),
            start=torch.zeros((), dtype=torch.float64),
        )
        moved = {layer: dict(factors) for layer, factors in after.items()}
        for layer, name, t in entries(trained):
            moved[layer][name] = t - torch.tensordot(lengths, measured[layer][name], dims=1)
        return moved


def guarded(gradients: Tensor, directions: int, strength: float) -> Tensor:
    """Return √(c / (1 + c)) u for the leading eigenvectors u of the Fisher matrix, shape (directions, numbers).

    Args:
        gradients: one record's a row, shape (records, numbers), float64.
        directions: how many at most.
        strength: c of the first; that of the others is less by their eigenvalue over the first one's.

    Raises:
        ModelError: no record has a gradient.
    """
    _, S, Vt = torch.linalg.svd(gradients, full_matrices=False)
    if not float(S[0]) > 0:
        raise ModelError("the text of align-guard has no gradient here: name another as align-guard.text")
    c = strength * (S[:directions] / S[0]).square()
    return (c / (1 + c)).sqrt()[:, None] * Vt[:directions]

"""A probe of the frozen base model: the sites fit the head alone, for a price, and the public metric follows from it.

Where labels live in a layer depends on the head. One that is made of words knows little of the records, and its
first errors are the same for most of them: an adapter that trains against it spends its first rounds on an offset. So
the sites take many cheap private steps on the head first, on features that each record has once, whitened by made-up
words. What they release is linear in what they saw, so its mean is exact. The server puts the mean into the head, and
makes B and V from public text around that: what it does with a release costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch

from fedveil.common.adapters import Adapter, Place
from fedveil.common.check import POSITIVE
from fedveil.common.config.fields import RATIO, Unit
from fedveil.common.config.run import RunConfig
from fedveil.common.config.schedule import learning_rate
from fedveil.common.errors import ConfigError
from fedveil.common.messages.blocks import Layout
from fedveil.common.messages.state import HEAD, METRIC, AdapterState, Factors
from fedveil.common.model.alone import head_alone
from fedveil.common.model.federated import FederatedModel
from fedveil.common.starts.base import Labels, Needs
from fedveil.common.starts.paid import PaidByShare
from fedveil.common.starts.public_metric import PublicMetric
from fedveil.common.tasks import TASKS, Record
from fedveil.common.tasks.module import Metric
from fedveil.privacy.accounting import Release
from fedveil.privacy.plan import PrivacyPlan


@dataclass(frozen=True)
class Probe(PaidByShare, PublicMetric):
    """The head that the sites fitted, and around it B and V as in ``public-metric``; A begins at 0."""

    name: ClassVar[str] = "probe"
    needs: ClassVar[Needs] = "paid release"
    gives: ClassVar[tuple[str, ...]] = ("B", "V", METRIC)
    on_features: ClassVar[bool] = True

    head_clip_share: Annotated[float, POSITIVE, RATIO] = 0.3
    """As ``clip-share``, of the head's gradients by made-up words: what their features are scaled to."""
    steps: Annotated[int, POSITIVE, Unit("steps")] = 40
    """Steps of the sites on the head alone, in one round; each is a release."""
    rate: Annotated[float, POSITIVE, Unit("learning rate")] = 4.0
    """Learning rate of the first of them, which falls in a line to zero."""

    def check(self, config: RunConfig, adapter: type[Adapter]) -> None:
        """Refuse a head that no site may move, and a run without an adapter."""
        super().check(config, adapter)
        if not adapter.trained:
            raise ConfigError(
                f"adapter.start {self.name!r} fits the head before an adapter, and adapter.name {adapter.name!r} has "
                "no factors: set adapter.start to 'public-metric', or adapter.name to 'lora-metric'"
            )
        if not TASKS[config.model.task].labelled:
            raise ConfigError(
                f"adapter.start {self.name!r} fits the head, and model.task {config.model.task!r} has none: set "
                "adapter.start to 'public-metric'"
            )
        if config.head.policy != "trained":
            raise ConfigError(
                f"adapter.start {self.name!r} fits the head, and head.policy {config.head.policy!r} sends none: set "
                "head.policy to 'trained', or adapter.start to 'public-metric'"
            )

    @property
    def unfit(self) -> str:
        """Name the start that other runs have."""
        return "is a release that privacy.mode 'dp-sgd' alone pays for: use 'public-metric'"

    @property
    def way(self) -> float:
        """The sum of the steps' learning rates."""
        return sum(learning_rate("linear", self.rate, step, self.steps) for step in range(self.steps))

    def release(self, least_noise: float = 0.0) -> Release:
        """Return one release for each step."""
        return replace(super().release(least_noise), count=self.steps)

    def factors(self, place: Place, wanted: Collection[str]) -> Factors:
        """Return orthonormal columns B, which hold until the head is there."""
        return PublicMetric.factors(self, place, wanted)

    def layout(self, model: FederatedModel) -> Layout:
        """Return ``weight``, shape (classes, width), and ``bias``, shape (classes,), of the head."""
        return {HEAD: {name: tuple(p.shape) for name, p in model.head.items()}}

    def opened(self, model: FederatedModel) -> AbstractContextManager[Any]:
        """Return the context in which the head alone takes a gradient."""
        return head_alone(model)

    def privatise(
        self,
        model: FederatedModel,
        records: Sequence[Record],
        plan: PrivacyPlan,
        before_pass: Callable[[], None] = lambda: None,
    ) -> AdapterState:
        """Return by how much ``steps`` private steps move the head behind the map."""
        with head_alone(model), self._whitened(model):
            begun = {name: p.detach().clone() for name, p in model.head.items()}
            # Copies: the rounds after this one read the records as they were.
            vectors = model.featurise([dict(record) for record in records], before_pass)
            optimizer = torch.optim.SGD(model.head.values(), lr=0.0)
            draws = plan.draws(vectors)
            with plan.steps(model, optimizer, before_pass) as steps:
                for step in range(self.steps):
                    before_pass()
                    for group in optimizer.param_groups:
                        group["lr"] = learning_rate("linear", self.rate, step, self.steps)
                    steps.step(plan.parts(model, [vectors[i] for i in next(draws)]), model.losses)
            return {HEAD: {name: (p.detach() - begun[name]).float().cpu() for name, p in model.head.items()}}

    def complete(
        self, model: FederatedModel, config: RunConfig, labels: Labels, statistic: AdapterState
    ) -> AdapterState:
        """Return the head with the sites' mean step, and B and V around it."""
        with self._whitened(model) as made, torch.no_grad():
            for name, step in statistic[HEAD].items():
                model.head[name].add_(step.to(model.device))
            behind = {name: p.detach().float().cpu().clone() for name, p in model.head.items()}
            folded = {name: p.float().cpu() for name, p in model.folded_head.items()}
        head: AdapterState = {HEAD: folded}
        if model.module.metric is not None:
            head = {HEAD: behind, METRIC: made}
        model.write(head)
        return {**self.around(model, config, labels), **head}

    @contextmanager
    def _whitened(self, model: FederatedModel) -> Iterator[Factors]:
        """Put the public map of made-up words before the head, and take it away again; the head is as it was then.

        Every party makes it up alone: it follows from the base model. The clip of every site is the run's, so a map
        that differs in its last bits moves what a step means by as much, and no bound.

        Yields:
            Centre and map.
        """
        metric = Metric(model.module.width).to(model.device)
        made = self.of_head(model, self.of_made_up().texts(model), self.clip_norm / self.head_clip_share)
        head = {name: p.detach().clone() for name, p in model.head.items()}
        before, model.module.metric = model.module.metric, metric
        try:
            with torch.no_grad():
                for layer, tensors in made.items():
                    places = dict(metric.named_parameters()) if layer == METRIC else model.head
                    for name, tensor in tensors.items():
                        places[name].copy_(tensor)
            yield made[METRIC]
        finally:
            model.module.metric = before
            with torch.no_grad():
                for name, p in model.head.items():
                    p.copy_(head[name])

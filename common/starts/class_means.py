"""Class means: one paid release of sums and counts of frozen features, for a head that no words can start.

A record adds its features and ``COUNT`` to the sums of its label, or of each of its labels: one vector, clipped as a
whole, so that adding or removing a record moves all sums and counts together by one clip norm at most, however many
labels it has. One that has a label for each word adds the mean of what its words would. It is also the gradient of a
linear map of the features, so a site clips, sums and noises it by the steps that it trains by. Sums and counts add up,
so the sites' mean is that of all their records. A trap in the price: dividing noised sums by exact counts would release
the counts for nothing, so these are in the clip and in the noise.

What the server makes of it costs nothing more. The mean of all features is the centre of the head's map
(``head.metric``): of one kind of images it is most of a feature's length, and would have most of every later clip. The
row of a label points from there to the label's own mean. After many cheap steps on the head its rows are worth little
(``experiments/log``), and the centre much; so ``sums = "all"`` takes the centre alone, with less noise.

Features are taken behind the public map of made-up records, scaled to the clip: noise of one size acts there as
records differ. The rows are those of a nearest class mean classifier (Mensink et al. 2013); the centre of what is to be
clipped, released before: Tramèr and Boneh 2021 (arXiv 2011.11660), who normalise features by private statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from fedveil.common.adapters import Adapter, Place
from fedveil.common.check import POSITIVE, OneOf
from fedveil.common.config.fields import RATIO
from fedveil.common.config.run import RunConfig
from fedveil.common.errors import ConfigError
from fedveil.common.later import nn, torch
from fedveil.common.messages.state import HEAD, METRIC, AdapterState, Factors
from fedveil.common.starts.base import Labels, seeded
from fedveil.common.starts.paid import PaidByShare
from fedveil.common.starts.public_metric import MADE, PublicMetric
from fedveil.common.starts.public_text import MADE_UP
from fedveil.common.tasks import TASKS, Batch, Record
from fedveil.common.tasks.base import IGNORED, own_logits
from fedveil.common.tasks.featured import FEATURES
from fedveil.privacy.plan import PrivacyPlan

if TYPE_CHECKING:
    from torch import Tensor

    from fedveil.common.messages.blocks import Layout
    from fedveil.common.model.federated import FederatedModel

COUNT = 0.25
"""What a record adds to its label's count, over the clip norm: little, so that it uses up little of that."""
FEWEST = 0.1
"""Part of the records that public sizes tell, below which a noised count of all is taken for that; and of an even share
of all, a label's."""


@dataclass(frozen=True)
class ClassMeans(PaidByShare):
    """The head's rows and the centre of its map by the sites' noised class means; A and B are random, from the seed."""

    name: ClassVar[str] = "class-means"
    gives: ClassVar[tuple[str, ...]] = ("A", "B", METRIC)
    on_features: ClassVar[bool] = True

    sums: Annotated[str, OneOf(("labels", "all"))] = "labels"
    """``labels``: of each label one, which give the head's rows. ``all``: one of all records, which gives the centre
    alone; the head begins where ``head.start`` says."""
    clip_share: Annotated[float, POSITIVE, RATIO] = 0.3
    """Of the head's gradients by made-up records behind the map, in the rounds after this one: the clip norm over the
    root mean square of their norms."""
    ridge: Annotated[float, POSITIVE, RATIO] = 0.3
    """Of the head's features: what is added to their public covariance, in units of its mean eigenvalue."""

    def check(self, config: RunConfig, adapter: type[Adapter]) -> None:
        """Refuse a run without a head, or with one that stays where it is."""
        super().check(config, adapter)
        if not TASKS[config.model.task].labelled:
            raise ConfigError(
                f"adapter.start {self.name!r} is of labels, and model.task {config.model.task!r} has none: set "
                "adapter.start to another, such as 'orthonormal'"
            )
        if config.head.policy != "trained":
            raise ConfigError(
                f"adapter.start {self.name!r} moves the head, and head.policy {config.head.policy!r} sends none: set "
                "head.policy to 'trained', or adapter.start to another"
            )
        if self.sums == "all" and config.head.metric != "public":
            raise ConfigError(
                "start.sums 'all' gives the centre of the head's map alone, and head.metric 'none' has no map: set "
                "head.metric to 'public', or start.sums to 'labels'"
            )

    @property
    def unfit(self) -> str:
        """Name the start that other runs have."""
        return "is a release that privacy.mode 'dp-sgd' alone pays for: use 'public-metric'"

    def factors(self, place: Place, wanted: Collection[str]) -> Factors:
        """Return orthonormal directions, which stay."""
        return seeded(place, wanted)

    def layout(self, model: FederatedModel) -> Layout:
        """Return ``sums``, shape (labels, width), and ``counts``, shape (labels,); of ``all`` with one row."""
        rows = model.classes if self.sums == "labels" else 1
        return {HEAD: {"sums": (rows, model.module.width), "counts": (rows,)}}

    def opened(self, model: FederatedModel) -> AbstractContextManager[Any]:
        """Return the context in which the head alone takes a gradient: as long as the sums, and in vectors."""
        from fedveil.common.model.alone import head_alone

        return head_alone(model)

    def privatise(
        self,
        model: FederatedModel,
        records: Sequence[Record],
        plan: PrivacyPlan,
        before_pass: Callable[[], None] = lambda: None,
    ) -> AdapterState:
        """Return sums and counts of one sample, clipped, noised, over a public divisor."""
        from fedveil.common.model.shapes import FixedBatch

        public, count = self._map(model), COUNT * self.clip_norm
        with self.opened(model), _summing(model, *self.layout(model)[HEAD]["sums"]) as sums:
            # Copies: the rounds after this one read the records as they were.
            vectors = model.featurise([dict(record) for record in records], before_pass)
            chosen = [vectors[i] for i in next(plan.draws(vectors))]

            def votes(batch: Batch) -> Tensor:
                """Return what has each record's features, and ``count``, as its gradient in the row of each label."""
                seen = (batch[FEATURES] - public["centre"]) @ public["map"]
                labels = batch["labels"]
                if model.task.by_token:
                    said = count * _of_words(
                        sums(seen / count), labels if self.sums == "labels" else labels.clamp(max=0)
                    )
                else:
                    labels = labels if self.sums == "labels" else labels.new_zeros(len(labels))
                    said = count * own_logits(sums(seen / count), labels)
                return said[: batch.records] if isinstance(batch, FixedBatch) else said

            optimizer = torch.optim.SGD(sums.parameters(), lr=0.0)
            with plan.steps(model, optimizer, before_pass) as steps:
                gradients = dict(zip(steps.trained, steps.release(plan.parts(model, chosen), votes), strict=True))
            released = {name: gradients[p].detach().float().cpu().clone() for name, p in sums.named_parameters()}
            return {HEAD: {"sums": released["weight"], "counts": released["bias"]}}

    def complete(
        self, model: FederatedModel, config: RunConfig, labels: Labels, statistic: AdapterState
    ) -> AdapterState:
        """Return the head's rows, and the public map around the records' own centre."""
        del labels
        public = {name: tensor.double().cpu() for name, tensor in self._map(model).items()}
        sums = statistic[HEAD]["sums"].double()
        counts = statistic[HEAD]["counts"].double() / (COUNT * self.clip_norm)
        everyone = max(float(counts.sum()), FEWEST)
        mean = sums.sum(0) / everyone
        # As of ``public-metric``: so long that the made-up records' gradients are clip norm over clip share.
        longer = config.privacy.clip_norm / model.module.error / (self.clip_share * self.clip_norm)
        metric = {
            "centre": (public["centre"] + torch.linalg.solve(public["map"].T, mean)).float(),
            "map": (longer * public["map"]).float(),
        }
        head = {name: p.detach().float().cpu().clone() for name, p in model.head.items()}
        if self.sums == "labels":
            least = FEWEST * everyone / len(counts)
            rows = longer * (sums / counts.clamp(min=least)[:, None] - mean)
            lead = rows.square().sum(1).mean() * len(rows) / max(1, len(rows) - 1)
            head = {
                "weight": (rows * (config.head.margin / lead.clamp(min=1e-12))).float(),
                "bias": self._offsets(counts.clamp(min=least), several=model.task.scored.several),
            }
        if model.module.metric is not None:
            return {HEAD: head, METRIC: metric}
        weight = head["weight"].double() @ metric["map"].double().T
        return {HEAD: {"weight": weight.float(), "bias": (-weight @ metric["centre"].double()).float()}}

    @staticmethod
    def _offsets(shares: Tensor, *, several: bool) -> Tensor:
        """Return the offsets of the head's rows: of several labels a record, what gives each its noised share."""
        return torch.logit(shares.clamp(max=0.5)).float() if several else torch.zeros(len(shares))

    def _map(self, model: FederatedModel) -> Factors:
        """Return centre and map of made-up records, which the map makes as long as the clip norm, on the device.

        Every party makes it up alone, as in a probe: it follows from the base model, and the clip comes after it.
        """
        public = PublicMetric(text=MADE_UP, records=MADE, ridge=self.ridge)
        made = public.of_head(model, public.texts(model), self.clip_norm * model.module.error)[METRIC]
        return {name: tensor.to(model.device) for name, tensor in made.items()}


def _of_words(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean over a record's labelled words of what each one's label has, shape (records,)."""
    own = labels != IGNORED
    found = logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * own
    return found.sum(1) / own.sum(1).clamp(min=1)


@contextmanager
def _summing(model: FederatedModel, rows: int, width: int) -> Iterator[nn.Linear]:
    """Let one more linear layer of the features take a gradient, and nothing else; put all back afterwards."""
    head = model.head.values()
    before = [p.requires_grad for p in head]
    sums = nn.Linear(width, rows, device=model.device)
    for parameter in head:
        parameter.requires_grad_(False)
    model.module.add_module("sums", sums)
    try:
        yield sums
    finally:
        del model.module.sums
        for parameter, wanted in zip(head, before, strict=True):
            parameter.requires_grad_(wanted)

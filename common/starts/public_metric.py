"""The public metric: where labels live among a layer's outputs, and what all its inputs have in common.

B takes the leading directions of the outputs' gradients on public phrases about the labels. No phrase is a pair, and
language models have no labels: there B takes those of the public texts, each with the next one as a pair under a drawn
label, or its second half as the completion of the first. V shrinks the few input directions that hold nearly all of any
public text's gradient, and say nothing about the label, to the length of those after them. The server makes both of
public text alone, or around a head that was paid for, so they cost nothing, and sends them once. B is scaled so that
the gradients of public text fit the clip, equally long in each layer and each column.

DP-KFC (Molina Van den Bosch et al. 2026, arXiv 2605.13418) preconditions DP-SGD likewise by Kronecker factors of a
layer's inputs and outputs, from made-up records.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Self

from fedveil.common.adapters import Adapter, Place
from fedveil.common.adapters.layers import layers_of, stored_transposed
from fedveil.common.adapters.lora_metric import shrunk
from fedveil.common.check import POSITIVE, OneOf
from fedveil.common.config.fields import RATIO
from fedveil.common.config.run import RunConfig
from fedveil.common.data.sources import is_paired
from fedveil.common.errors import ConfigError, ModelError
from fedveil.common.later import torch
from fedveil.common.messages.state import HEAD, METRIC, AdapterState, Factors
from fedveil.common.starts.base import Labels, seeded
from fedveil.common.starts.directions import leading_rows, with_fixed_signs
from fedveil.common.starts.from_text import FromText
from fedveil.common.starts.gradient import record_gradients
from fedveil.common.starts.public_text import MADE_UP
from fedveil.common.tasks import TASKS, Record, wording_of
from fedveil.common.tasks.featured import labelled_rows
from fedveil.privacy.randomness import stream

if TYPE_CHECKING:
    from torch import Tensor

    from fedveil.common.model.federated import FederatedModel

FAINT = 0.05
"""Length of a column's gradients, over the longest column's, below which it is taken for that."""
TELLING = 64
"""Public texts that B's directions are taken from, where no phrases are: each costs a product of matrices a layer."""
MADE = 512
"""Made-up records that the head's features are whitened by, where another text tells the rest."""
MOMENTS = 2**30
"""Bytes of the inputs' moments that are held at a time; one layer with 3072 inputs and 8 columns takes 0.6 GB."""


@dataclass(frozen=True)
class PublicMetric(FromText):
    """B spans the public outputs' directions, V shrinks the inputs' common ones; A begins at 0."""

    name: ClassVar[str] = "public-metric"
    suits: ClassVar[str] = MADE_UP
    gives: ClassVar[tuple[str, ...]] = ("B", "V", METRIC)
    opens_weights: ClassVar[bool] = True

    outputs: Annotated[str, OneOf(("public", "random"))] = "public"
    """Where B points: ``public`` (the phrases' gradients) or ``random`` (from the seed)."""
    clip_share: Annotated[float, POSITIVE, RATIO] = 0.3
    """The clip norm over the root mean square of the public gradients' norms, to which B is scaled."""
    ridge: Annotated[float, POSITIVE, RATIO] = 0.3
    """Of the head's features: what is added to their public covariance, in units of its mean eigenvalue."""

    def check(self, config: RunConfig, adapter: type[Adapter]) -> None:
        """Refuse an adapter that would not begin in B."""
        super().check(config, adapter)
        if not adapter.directions and self.asked == "server" and config.head.metric != "public":
            raise ConfigError(
                f"adapter.start {self.name!r} asks the server where factors and the head begin, and the adapter "
                f"{adapter.name!r} has no factors for it: set head.metric to 'public', or leave adapter.start at "
                "'orthonormal'"
            )
        if "A" in adapter.directions:
            raise ConfigError(
                f"adapter.start {self.name!r} gives no A, which the adapter {adapter.name!r} begins with: "
                "set adapter.name to 'lora-metric' or 'lora-frozen-b'"
            )

    def check_public(self, config: RunConfig) -> str:
        """Refuse and say as for any text, and say where B points if not where phrases about labels do."""
        lines = [super().check_public(config), self._columns_from(config) if config.adapter.name != "none" else ""]
        return "\n".join(line for line in lines if line)

    def _columns_from(self, config: RunConfig) -> str:
        if self._pointless(TASKS[config.model.task].labelled):
            return "made-up text completes nothing, so B's columns are random, from the seed: name a text in start.text"
        if self.outputs == "public" and is_paired(config.data, config.model.task):
            return "no phrase about a label is a pair, so B's columns are of public texts in pairs, under drawn labels"
        if self.outputs == "public" and not TASKS[config.model.task].wording:
            return "records hold no words, so B's columns are those of made-up ones, of drawn labels"
        return ""

    def _pointless(self, labelled: bool) -> bool:
        """Whether no text tells where B is to point: words drawn at random have no completion that a model expects."""
        return self.outputs == "public" and not labelled and self.resolved().text == MADE_UP

    def factors(self, place: Place, wanted: Collection[str]) -> Factors:
        """Return orthonormal columns B, which hold until the gradients are there."""
        return seeded(place, wanted)

    def from_public(self, model: FederatedModel, config: RunConfig, labels: Labels) -> AdapterState:
        """Return B and V of every adapted layer, B scaled.

        Where the head has rounds of its own first, they are made again after these. Made now, they show what is wrong
        with the text before a site has paid; a drawn head replaces one that is the same for all labels.
        """
        model.write(model.start)
        waits = config.timeline.adapter_waits
        if waits and bool(((weight := model.head["weight"].detach()) == weight[0]).all()):
            drawn = torch.randn(weight.shape, generator=stream(config.seed, self.name, "head"))
            model.write({HEAD: {"weight": drawn}})
            self.around(model, config, labels)
            model.write(model.start)
            state: AdapterState = {}
        else:
            state = self.around(model, config, labels)
        if model.module.metric is not None:
            # A head of its own rounds learns better behind made-up words.
            start = self.of_made_up() if waits else self
            texts = start._wording(model, config, labels)
            state.update(self.of_head(model, texts, config.privacy.clip_norm / self.clip_share))
        return state

    def around_head(self, model: FederatedModel, config: RunConfig, labels: Labels) -> AdapterState:
        """Return ``around``, where there is an adapter."""
        return self.around(model, config, labels) if model.adapter.directions else {}

    def around(self, model: FederatedModel, config: RunConfig, labels: Labels) -> AdapterState:
        """Return the same by the model as it is, whose head decides where labels live."""
        texts = self._wording(model, config, labels)
        paired = is_paired(config.data, config.model.task)
        state: AdapterState = {}
        without_phrases = paired or not labels.names or not model.task.wording
        telling = texts[:TELLING] if without_phrases else _labelled(model, labels)
        columns = self._columns(model, telling) if model.adapter.directions else {}
        scaling = model.adapter.scaling
        for layer, B, by_column in _moments(model, texts, columns):
            lengths = _traces(by_column).sqrt()
            if not float(lengths.max()) > 0:
                raise ModelError(
                    f"no public text has a gradient in {layer}: set head.start to 'label-words' or 'random'"
                )
            # A column without a gradient is not blown up to one.
            lengths = lengths.clamp(min=FAINT * float(lengths.max()))
            V = torch.zeros(1, by_column.shape[-1], dtype=torch.float64)
            if "V" in model.adapter.directions:
                V = shrinking((by_column / lengths.square()[:, None, None]).sum(0))
            left = torch.eye(V.shape[1], dtype=torch.float64) - V.T @ V
            # Root mean square of s bᵀ G (I - Vᵀ V) over the texts, by column b of B.
            after = scaling * _traces(left @ by_column @ left).sqrt()
            if not float(after.max()) > FAINT**2 * scaling * float(lengths.max()):
                raise ModelError(
                    f"the public texts' gradients in {layer} lie in the directions that are shrunk alone: set "
                    "start.records to more of them"
                )
            after = after.clamp(min=FAINT * float(after.max()))
            wanted = config.privacy.clip_norm / self.clip_share / (len(columns) * len(after)) ** 0.5
            state[layer] = {"B": (B * (wanted / after)).float(), "V": V.float()}
        return state

    def of_made_up(self) -> Self:
        """Return the start whose texts are ``MADE`` made-up ones, which follow from the base model."""
        return replace(self, text=MADE_UP, text_sha256="", records=MADE)

    def _wording(self, model: FederatedModel, config: RunConfig, labels: Labels) -> list[Record]:
        """Return the public texts as records of the run's task."""
        if not labels.names:
            return self.completions(model)
        drawn = self.drawn_labels(len(labels.names), config.seed)
        return self.pairs(model, drawn) if is_paired(config.data, config.model.task) else self.texts(model, drawn)

    def of_head(self, model: FederatedModel, texts: Sequence[Record], length: float) -> AdapterState:
        """Return the features' centre and map, and the head as it is behind them.

        With covariance S of the texts' features and m its mean eigenvalue, the map is c (S + λ m I)^(-1/2), λ the
        ``ridge``; c makes the texts' gradients of the head's weight have the root mean square ``length``, at the
        error that the task's losses have about (``TaskModule.error``).
        """
        from fedveil.common.model.public_features import with_features

        seen = torch.cat([labelled_rows(record) for record in with_features(model, texts)]).double()
        centre = seen.mean(0)
        covariance = (seen - centre).T @ (seen - centre) / len(seen)
        values, vectors = torch.linalg.eigh(covariance)
        values = values.clamp(min=0)
        roots = (values + self.ridge * values.mean()).rsqrt()
        whitening = vectors * roots @ vectors.T
        c = length / (model.module.error * float((values * roots.square()).sum().sqrt()))
        head = {name: p.detach().double().cpu() for name, p in model.head.items()}
        unmapped = vectors / roots @ vectors.T / c
        return {
            METRIC: {"centre": centre.float(), "map": (c * whitening).float()},
            HEAD: {
                "weight": (head["weight"] @ unmapped).float(),
                "bias": (head["bias"] + head["weight"] @ centre).float(),
            },
        }

    def from_statistic(self, statistic: Factors, rank: int) -> Factors:
        """Return the statistic, which B and V are already."""
        del rank
        return dict(statistic)

    def drawn_labels(self, classes: int, seed: int) -> list[int]:
        """Return a label for each text: its gradient has a direction for every one, of which one is drawn."""
        return torch.randint(classes, (self.records,), generator=stream(seed, self.name)).tolist()

    def _columns(self, model: FederatedModel, telling: Sequence[Record]) -> dict[str, Tensor]:
        """Return B's orthonormal columns of every layer, shape (out, rank), float64."""
        if self.outputs == "random" or self._pointless(model.task.labelled):
            return {layer: model.start[layer]["B"].double() for layer in layers_of(model.peft_model)}
        grams: dict[str, Tensor] = {}
        for gradients in record_gradients(model, telling):
            for layer, (left, right) in gradients.items():
                for one, other in zip(left.cpu().double(), right.cpu().double(), strict=True):
                    gram = one.T @ (other @ other.T) @ one  # of G = oneᵀ other, whose squared length is its trace
                    if length := float(gram.trace()):
                        grams[layer] = grams.get(layer, 0) + gram / length
        if not grams:
            raise ModelError("no public text has a gradient: set head.start to 'label-words' or 'random'")
        return {layer: leading_rows(gram, model.adapter.rank).T for layer, gram in grams.items()}


def _labelled(model: FederatedModel, labels: Labels) -> list[Record]:
    """Return the phrases about each label as records of it."""
    examples = [
        replace(wording_of(model.task).phrase(text), label=label)
        for label, texts in enumerate(labels.phrases)
        for text in texts
    ]
    return model.prepare(examples)


def _moments(
    model: FederatedModel, records: Sequence[Record], columns: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield each layer with its B and the mean of (bᵀ G)ᵀ (bᵀ G) over records for each column b, shape (rank, in, in).

    As many layers at a time as have room in ``MOMENTS``: the records pass again for the next ones.
    """
    for layers in _in_turn(model, columns):
        moments: dict[str, Tensor] = {}
        for gradients in record_gradients(model, records, layers):
            for layer, (left, right) in gradients.items():
                # bᵀ G of each record, shape (rank, records, in).
                seen = ((left.cpu().double() @ columns[layer]).mT @ right.cpu().double()).transpose(0, 1)
                moments[layer] = moments.get(layer, 0) + seen.mT @ seen / len(records)
        for layer in layers:
            yield layer, columns[layer], moments.pop(layer)


def _in_turn(model: FederatedModel, columns: dict[str, Tensor]) -> Iterator[list[str]]:
    """Yield the layers in groups whose moments together take at most ``MOMENTS`` bytes; one that takes more, alone."""
    places, group, room = layers_of(model.peft_model), list[str](), MOMENTS
    for layer, B in columns.items():
        weight = places[layer].weight
        width = weight.shape[0 if stored_transposed(places[layer]) else 1]
        needed = 8 * B.shape[1] * width * width
        if group and needed > room:
            yield group
            group, room = [], MOMENTS
        group.append(layer)
        room -= needed
    if group:
        yield group


def _traces(matrices: Tensor) -> Tensor:
    """Return the trace of each of the matrices, at least 0."""
    return matrices.diagonal(dim1=1, dim2=2).sum(1).clamp(min=0)


def shrinking(moment: Tensor) -> Tensor:
    """Return V, shape (k, in), with which I - Vᵀ V takes the k leading eigenvalues down to that after them.

    A direction of eigenvalue λ keeps √(λ₊ / λ) of its length, λ₊ the one after them, and V has the root of the rest.
    """
    values, vectors = torch.linalg.eigh(moment)
    count = shrunk(len(values))
    leading, level = values[-count:].flip(0).clamp(min=0), values[max(0, len(values) - count - 1)].clamp(min=0)
    lengths = torch.where(leading > level, (level / leading).sqrt(), torch.ones_like(leading))
    return (1 - lengths).sqrt()[:, None] * with_fixed_signs(vectors[:, -count:].flip(1).T)

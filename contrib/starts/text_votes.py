"""A private vote for public texts: each record votes for the text nearest to it, and a transfer keeps the clear ones.

The classifier by which Trans-LoRA chooses among texts learns from records, and would pay for each of its steps. One
vote does its work for one release of M noised counts, M being ``start.records``: sensitivity 1 whatever M is
(``contrib.starts.vote``). Near is the cosine of the frozen base model's features; of equally near texts the one of the
lowest number is voted for. Sites need not have the file: the server shows the texts with the task of round 0, as bytes
in UTF-8, cut to ``LONGEST``. The counts lie in ``votes.json`` of the run's folder (``fedveil transfer --votes``).

The adapter begins where it would without a vote. A run that is for the vote alone has one round and a small ε.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from fedveil.common.adapters import Adapter, Place
from fedveil.common.config.run import RunConfig
from fedveil.common.errors import ConfigError, DataError, ProtocolError
from fedveil.common.log import place_of
from fedveil.common.messages.blocks import Layout
from fedveil.common.messages.state import AdapterState, Factors
from fedveil.common.model.federated import FederatedModel
from fedveil.common.model.shapes import FixedBatch
from fedveil.common.starts.base import Labels, Needs, seeded
from fedveil.common.starts.from_text import FromText
from fedveil.common.starts.public_text import MADE_UP, read_text
from fedveil.common.tasks import TASKS, Record, wording_of
from fedveil.contrib.nulls import least_score
from fedveil.contrib.starts.vote import SPOILT, VOTES, Vote

log = logging.getLogger("fedveil.site")
LONGEST = 256
"""Bytes of a text that a site is shown."""
SHOWN = 3
"""Texts that a line names."""


@dataclass(frozen=True)
class TextVotes(Vote, FromText):
    """Records vote for public texts; the factors are random, from the seed."""

    name: ClassVar[str] = "text-votes"
    needs: ClassVar[Needs] = "paid release"
    suits: ClassVar[str] = "prose"

    def check(self, config: RunConfig, adapter: type[Adapter]) -> None:
        """Refuse made-up texts, and records without a head whose features could be near a text's."""
        super().check(config, adapter)
        task = TASKS[config.model.task]
        if self.resolved().text == MADE_UP:
            raise ConfigError("adapter.start 'text-votes' needs texts to vote for: set start.text to a file or a set")
        if not task.labelled or task.by_token:
            raise ConfigError(
                f"adapter.start 'text-votes' compares the features below a head, and model.task {task.name!r} has none "
                "of a whole record: choose another start"
            )

    def resolved(self) -> Self:
        """Return the start by which every record votes, with its text and the fingerprint of that."""
        return FromText.resolved(Vote.resolved(self))

    @property
    def passes(self) -> int:
        """One of the records, and what the texts take beside it."""
        return 2

    @property
    def alternatives(self) -> tuple[str, ...]:
        """Return the numbers of the texts, from 0."""
        return tuple(map(str, range(self.records)))

    def factors(self, place: Place, wanted: Collection[str]) -> Factors:
        """Return orthonormal directions."""
        return seeded(place, wanted)

    def shown_layout(self, began: AdapterState) -> Layout:
        """Return that of the texts' bytes, shape (texts, ``LONGEST``)."""
        del began
        return {VOTES: {"texts": (self.records, LONGEST)}}

    def shown(self, adapter: Adapter, began: AdapterState) -> AdapterState:
        """Return the texts as bytes, float32, 0 behind each.

        Raises:
            DataError: they cannot be read, are others, or fewer than ``start.records``.
        """
        del adapter, began
        texts = read_text(self.resolved().text, self.fingerprint)
        if len(texts) < self.records:
            raise DataError(f"start.text has {len(texts)} texts, and start.records is {self.records}: lower it")
        return {VOTES: {"texts": torch.stack([_bytes(text) for text in texts[: self.records]])}}

    def complete(
        self, model: FederatedModel, config: RunConfig, labels: Labels, statistic: AdapterState
    ) -> AdapterState:
        """Return nothing: votes are about texts, and the factors stay where they began."""
        del model, config, labels, statistic
        return {}

    def choose(self, model: FederatedModel, records: Sequence[Record], before_pass: Callable[[], None]) -> list[int]:
        """Return for each record the number of the text whose features have the largest cosine with its own."""
        shown = (model.shown or {}).get(VOTES, {}).get("texts")
        if shown is None:
            raise ProtocolError("the server shows no texts to vote for")
        words = [_text(row) for row in shown]
        texts = model.prepare([replace(wording_of(model.task).phrase(text), label=0) for text in words])
        model.write(model.start)
        return nearest(features_of(model, records, before_pass), features_of(model, texts, before_pass))

    def found(self, statistic: AdapterState, rank: int, noise: float) -> str:
        """Return how many texts have clear counts, and the most voted for."""
        del rank
        shares = statistic[VOTES]["counts"].double()
        kept = clear_texts(shares.tolist(), noise)
        most = ", ".join(f"{shares[i]:.1%} for text {i}" for i in kept[:SHOWN])
        return f"{len(kept)} of {len(shares)} texts have more votes than noise alone gives{f': {most}' if most else ''}"


def features_of(model: FederatedModel, records: Sequence[Record], before_pass: Callable[[], None]) -> Tensor:
    """Return features, float64, of length 1, each of a pass in the shape that follows from the record alone.

    Shape (records, width). One that cannot be computed has NaN.
    """
    found = torch.full((len(records), model.module.width), math.nan, dtype=torch.float64)
    model.module.train()
    with model.many_passes():
        for batch, group in model.fixed_groups(records):
            found[torch.tensor(group)] = _features(model, batch, before_pass)
    return found


def _features(model: FederatedModel, batch: FixedBatch, before_pass: Callable[[], None]) -> Tensor:
    """Return the features of a batch; if the pass fails, each record passes alone in it, and may fail again."""
    before_pass()
    try:
        return F.normalize(model.features(batch).double().cpu(), dim=-1)
    except Exception as error:
        if batch.records == 1:
            log.warning("a record could not be computed and votes for nothing: %s", place_of(error))
            return torch.full((1, model.module.width), math.nan, dtype=torch.float64)
        return torch.cat([_features(model, batch.alone(row), before_pass) for row in range(batch.records)])


def nearest(own: Tensor, texts: Tensor) -> list[int]:
    """Return the number of the text of the largest cosine, of equal ones the lowest; ``SPOILT`` of what has none.

    Args:
        own: of records, shape (records, width), rows of length 1, or NaN.
        texts: shape (texts, width), likewise.

    >>> nearest(torch.eye(2), torch.tensor([[0.6, 0.8], [0.6, 0.8]]))
    [0, 0]
    """
    votes = []
    for row in own:  # one by one: a product of several rows may round otherwise beside others
        cosines = (texts * row).sum(1).nan_to_num(-math.inf).tolist()
        best = max(cosines, default=-math.inf)
        votes.append(cosines.index(best) if math.isfinite(best) else SPOILT)
    return votes


def clear_texts(shares: Sequence[float], noise: float) -> list[int]:
    """Return the numbers of the texts whose votes noise alone would hardly give one of all, the most voted for first.

    Args:
        shares: of the votes, noised.
        noise: standard deviation of each.
    """
    least = noise * least_score(len(shares))
    return sorted((i for i, share in enumerate(shares) if share > least), key=lambda i: (-shares[i], i))


def _bytes(text: str) -> Tensor:
    content = text.encode()[:LONGEST]
    return F.pad(torch.tensor(list(content), dtype=torch.float32), (0, LONGEST - len(content)))


def _text(row: Tensor) -> str:
    """Return a shown text; a character that was cut is left out, as is what is no text."""
    return bytes(int(value) for value in row.clamp(0, 255).tolist()).rstrip(b"\0").decode("utf-8", "ignore")

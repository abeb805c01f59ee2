"""The interface of a kind of task: its columns, its base model, its records, what is on top, and a score.

Whatever depends on the kind of records is decided here: nothing outside ``common.tasks`` asks which task it has.
A row of the table is one file with one class. Settings are checked before anything large is loaded, so a
task's file imports torch and transformers inside the methods that need them.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from fedveil.common.errors import ConfigError
from fedveil.common.tasks.examples import Example
from fedveil.common.tasks.finished import Export, Questions
from fedveil.common.tasks.roles import TEMPLATE, Role

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fedveil.common.config.run import RunConfig
    from fedveil.common.model.base import BaseModel
    from fedveil.common.model.federated import FederatedModel
    from fedveil.common.model.shapes import Shapes
    from fedveil.common.tasks.module import TaskModule
    from fedveil.common.tasks.tables import Table

Record: TypeAlias = dict[str, Any]
"""One record as a batch is made of it: lists of numbers, or tensors, by the names of the batch's tensors."""
IGNORED = -100
"""In place of the label of a token that has none."""
OWNER = "owner"
"""Key of a record for the number, in this process alone, of the person it belongs to. It is in no batch, and a record
that belongs to no one has none."""
WEIGHT = "row weight"
"""Key of a row of an unfolded record, and of its batch, for the constant that its loss is multiplied by, float64."""
KEPT = "kept"
"""Key of a record for what its task has computed of it once, by the frozen base model alone. It is in no batch."""
UNBATCHED = frozenset({OWNER, WEIGHT, KEPT})
"""Keys of a record that no task's ``collate`` sees."""
Coins: TypeAlias = "Callable[[int], Tensor]"
"""Draws so many fresh uniform numbers from 0 up to below 1: float64, shape (count,)."""
Batch: TypeAlias = "dict[str, Tensor]"
"""Tensors whose first dimension is the records'; none depends on several of them."""
Inventor: TypeAlias = Callable[[int, int, int], Record]
"""Makes up a record: takes its size, a number that picks what it holds, and its label."""


@dataclass(frozen=True)
class Sums:
    """Per-record sums that scores are made of, each of shape (records,), float32."""

    loss: Tensor
    correct: Tensor
    weight: Tensor
    """Units that loss and correct are over: 1 a record, the completion's tokens, or the labels of an answer."""
    predicted: Tensor | None = None
    """The label that the model gives each record, int64; None where records have none, or several."""
    parts: Callable[[], Tensor] | None = None
    """Counts the parts of each answer by kind (``Scored.kinds``): right ones, those there are, those that the model
    gives, shape (records, 3, kinds), int64. A score alone calls it. None: an answer has no parts."""
    beside: Mapping[str, Tensor] = field(default_factory=dict)
    """Named shares of each record, shape (records,), float32, from 0 to 1: their means are figures of the score."""
    ratios: Callable[[], Mapping[str, tuple[Tensor, Tensor]]] | None = None
    """Names what each record has of what it could have, both of shape (records,), float32: the sum of the first over
    that of the second is a figure of the score. A score alone calls it. None: there is none."""

    @property
    def losses(self) -> Tensor:
        """One loss per record, shape (records,), float32: what each site minimises."""
        return self.loss / self.weight

    @property
    def whole(self) -> Tensor:
        """Whether the whole answer of each record is right, shape (records,), bool."""
        return self.correct >= self.weight


@dataclass(frozen=True)
class Scored:
    """What a task's score on public records has beside share of right answers and loss."""

    headline: str = "accuracy"
    """The figure that a run is judged by: ``accuracy``, or one that ``Sums`` gives by parts, beside or as ratios."""
    kinds: Callable[[Sequence[str]], Sequence[str]] = tuple
    """Takes the labels, and names the kinds of parts that ``Sums.parts`` counts, in its order."""
    options: Callable[[BaseModel, Record], list[Record]] | None = None
    """Makes a record for each option of one, the right one first; of one that has no options, none. None: none has."""
    several: bool = False
    """Whether an answer has several labels. Then losses follow from each logit, not from differences alone."""
    record: str = ""
    """What hangs on one record, in a report's words, where it is more than the record itself; empty: nothing."""
    stays: str = ""
    """What a claim covers for that, in a report's words: what of it a site sends, and what it never does."""


def owner_of(record: Record) -> Record:
    """Return whose a record is, alone, to be put into what is made of it; empty if it belongs to no one."""
    return {OWNER: record[OWNER]} if OWNER in record else {}


def _no_pairs(first: str, second: str) -> Example:
    raise ConfigError("this task's records are no pairs: leave data.text-pair empty")


@dataclass(frozen=True)
class Wording:
    """How public words become examples of a task, for a head or an adapter that starts from them."""

    phrase: Callable[[str], Example]
    """Takes a phrase, about a label or not (``head.start``, ``start.text``)."""
    text: Callable[[str], Example]
    """Takes a text that shows what records do."""
    pair: Callable[[str, str], Example] = _no_pairs
    """Takes two texts, for data whose records are pairs; ConfigError where they never are."""


class Task(ABC):
    """A kind of task; no state, so one instance serves every model.

    One with options is a frozen dataclass and a ``config.fields.Section``: its fields are settings of its ``prefix``.
    """

    name: ClassVar[str]
    """Its value of ``model.task``."""
    roles: ClassVar[tuple[Role, ...]]
    """The columns that it reads. With labels in one of them a head is on top of the base model; without, the base
    model's own output is scored."""
    example: ClassVar[type[Example]]
    """What a row of a table becomes: its fields are those of ``roles``."""
    counted: ClassVar[bool] = False
    """Whether a record as a whole is right or wrong (``Sums.whole``). Then one record changes the count of right ones
    by 1 at most, and the count may be sent with noise for that."""
    scored: ClassVar[Scored] = Scored()
    """What its score has in first place and beside."""
    too_long: ClassVar[str] = "'long-steps' is for language models"
    """Why that recipe does not suit it, as the end of a sentence; empty: it does. A speech model had no right word."""
    by_token: ClassVar[bool] = False
    """Whether a head reads each token of a record, so that its features are (tokens, width), and its labels a list."""
    wording: ClassVar[Wording | None] = None
    """How public words become examples; None: its records hold no words."""
    questions: ClassVar[Questions | None] = None
    """How its finished model answers words; None: it does not."""
    export: ClassVar[Export] = Export()
    """How stock libraries load its finished model."""

    @property
    def labelled(self) -> bool:
        """Whether its records have labels."""
        return any(role.labels for role in self.roles)

    def check(self, config: RunConfig) -> None:
        """Raise ConfigError, naming the setting, unless a run of this task can have this configuration."""
        self.with_pool(config.head.pool)
        if config.data.columns[TEMPLATE.setting] and not (self.questions and self.questions.continued):
            raise ConfigError(f"data.template is for model.task 'causal-lm', not {self.name!r}: leave it empty")
        if config.data.slice and not self.counted:
            raise ConfigError(
                f"data.slice is {config.data.slice!r}, and of model.task {self.name!r} no record as a whole is "
                "right or wrong: leave it empty"
            )
        if not self.labelled:
            if config.head.policy != "frozen":
                raise ConfigError(f"model.task {self.name!r} has no classification head: set head.policy to 'frozen'")
            return
        if config.head.start == "label-words":
            wording_of(self)
        if (config.head.policy, config.head.start) == ("frozen", "zeros"):
            others = "'label-words' or 'random'" if self.wording else "'random'"
            raise ConfigError(
                "head.policy 'frozen' keeps head.start 'zeros', through which no adapter gets a gradient: "
                f"set head.start to {others}, or head.policy to 'trained'"
            )

    def with_pool(self, pool: str) -> Task:
        """Return the task as its head reads features by ``head.pool``.

        Raises:
            ConfigError: the task has no such reading.
        """
        if pool != "mean":
            raise ConfigError(f"head.pool is {pool!r}, which model.task {self.name!r} does not have: set it to 'mean'")
        return self

    def read_source(self, source: Path) -> Table | None:
        """Return the table of an existing file or folder, if it is of a kind that this task reads by itself.

        None: it is read as ``common.tasks.tables`` reads it.

        Raises:
            UnreadableFile: its rows cannot be separated.
            DataError: it cannot be opened.
        """
        return None

    # --- the base model ---

    @abstractmethod
    def load(self, name: str) -> tuple[nn.Module, Any]:
        """Return the stock transformers model and its processor (tokenizer, image processor) by a folder or hub id.

        Code that comes with a model must not run: pass ``common.tasks.loading.OWN_CODE`` to every loader. Any exception
        is reported as a model that cannot be loaded.
        """

    def check_model(self, module: nn.Module, name: str) -> None:
        """Raise ModelNotLoaded if the task cannot take a model that was loaded, in float32."""
        del module, name

    @abstractmethod
    def processor_parts(self, processor: Any) -> Mapping[str, Any]:
        """Return all that decides what the processor makes of a record, for the base model's fingerprint."""

    @abstractmethod
    def limit(self, base: BaseModel, max_length: int) -> int:
        """Return what ``prepare`` is to cut records to: ``max_length``, or less where the model has no room for that.

        Raises:
            ConfigError: the model can take no record that short or long.
        """

    # --- records and batches ---

    @abstractmethod
    def prepare(self, base: BaseModel, examples: Sequence[Example], limit: int) -> list[Record]:
        """Return one record per example, each made of its example alone, cut to ``limit``.

        Raises:
            DataError: an example lacks what the task needs.
        """

    @abstractmethod
    def size(self, record: Record) -> int:
        """Return the size of a record in tokens (positions of the base model): what batches are filled by."""

    @abstractmethod
    def fits(self, base: BaseModel, record: Record, limit: int) -> bool:
        """Return whether the model can take a record; a site leaves out any other, which is to contribute zero."""

    def shapes(self, base: BaseModel, limit: int, tokens: int, most: int = sys.maxsize) -> Shapes:
        """Return the shapes of private batches for records cut to ``limit``; see ``common.model.shapes``."""
        from fedveil.common.model.shapes import Shapes

        return Shapes(limit, tokens, most)

    @abstractmethod
    def collate(self, base: BaseModel, records: Sequence[Record], size: int = 0) -> Batch:
        """Return records as tensors, filled up to the largest of them, or to ``size`` tokens."""

    @abstractmethod
    def filler(self, base: BaseModel, like: Record) -> Record:
        """Return a record that is no one's, as small as can be and with the fields of ``like``, to fill up a batch."""

    @abstractmethod
    def inventor(self, base: BaseModel, limit: int, *, lifelike: bool = False) -> Inventor:
        """Return what makes up records that are no one's: before a first round a model rehearses on them.

        Different numbers give different records. A task whose records are all of one size may ignore the size.

        Args:
            base: the base model.
            limit: what ``prepare`` cuts records to.
            lifelike: whether records resemble real ones as far as is known how, for a start that is measured on them.
        """

    def unfold(self, model: FederatedModel, record: Record, coins: Coins) -> list[Record]:
        """Return the rows that a step takes in place of a record; their gradients are added and clipped once.

        It runs at the site for each record that a step draws, without gradient. Rows follow from this record, the model
        as the site received it, and coins: passes hold nothing of another record and have shapes of the record's own.

        Args:
            model: as it is before the step; ``model.losses`` of a batch of rows without ``WEIGHT`` are their own.
            record: of ``prepare``. What the frozen base model says of it may be kept in it, under ``KEPT``.
            coins: from the operating system's entropy under privacy.

        Returns:
            Rows, each with ``WEIGHT``, no larger than the record and with the same fields; none contributes zero. What
            fails here contributes zero where failures are hidden.
        """
        del model, coins
        return [record]

    # --- the model and its loss ---

    @abstractmethod
    def module(self, encoder: nn.Module, base: BaseModel, classes: int, feature_scale: float) -> TaskModule:
        """Return the module that sites train: ``encoder`` as this task reads it, with a head if there are labels.

        Args:
            encoder: the base model with the adapter in it.
            base: the base model as it was loaded.
            classes: number of labels; 0: there are none.
            feature_scale: length that the features below the head are brought to; 0 leaves them as they are.
        """

    @abstractmethod
    def sums(self, module: nn.Module, batch: Batch) -> Sums:
        """Run the model and return per-record sums; records never see each other."""


def unfolds(task: Task) -> bool:
    """Return whether steps of a task take rows in place of its records (``Task.unfold``)."""
    return type(task).unfold is not Task.unfold


def wording_of(task: Task) -> Wording:
    """Return how public words become examples of a task.

    Raises:
        ConfigError: its records hold no words.
    """
    if task.wording is None:
        raise ConfigError(
            f"the records of model.task {task.name!r} hold no words: set head.start to 'random' or 'zeros'"
        )
    return task.wording


def targets_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Return 1 for each label that a record has and 0 for each other, shape as ``logits``, int64.

    ``labels`` are that already; or the number of each record's one label, shape (records,) or (records, 1).
    """
    import torch.nn.functional as F

    return labels if labels.shape == logits.shape else F.one_hot(labels.reshape(len(labels)), logits.shape[-1])


def own_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of the logits of all labels that a record has, shape (records,); arguments as ``targets_of``."""
    return (logits * targets_of(logits, labels)).flatten(1).sum(1)


def classified(module: nn.Module, batch: Batch) -> Sums:
    """Return cross-entropy and hits for ``labels`` of shape (records,), one unit a record."""
    import torch
    import torch.nn.functional as F

    logits = module(batch)
    loss = F.cross_entropy(logits, batch["labels"], reduction="none")
    predicted = logits.argmax(-1)
    return Sums(loss, (predicted == batch["labels"]).float(), torch.ones_like(loss), predicted)

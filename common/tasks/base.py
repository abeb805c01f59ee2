"""The interface of a kind of task: its columns, its base model, its records, what is on top, and a score.

Whatever depends on the kind of records is decided here: nothing outside ``common.tasks`` asks which task it has.
A row of the table is one file with one class. Settings are checked before anything large is loaded, so a
task's file imports torch and transformers inside the methods that need them.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from fedveil.common.errors import ConfigError, UnreadableFile
from fedveil.common.tasks.examples import Example
from fedveil.common.tasks.roles import LABEL, Column, Role

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fedveil.common.config.sections import DataConfig, RunConfig, Scalar
    from fedveil.common.model.base import BaseModel
    from fedveil.common.model.shapes import Shapes
    from fedveil.common.tasks.module import TaskModule
    from fedveil.common.tasks.tables import Table

Record: TypeAlias = dict[str, Any]
"""One record as a batch is made of it: lists of numbers, or tensors, by the names of the batch's tensors."""
OWNER = "owner"
"""Key of a record under which stands whose it is, as a number of this process alone; it is in no batch. A record that
belongs to nobody in particular has none."""
Batch: TypeAlias = "dict[str, Tensor]"
"""Tensors whose first dimension is the records'; none holds anything that follows from several of them."""
LABELS = "labels.json"
"""File with the labels of a head that no stock class computes, in the order of its rows."""
Inventor: TypeAlias = Callable[[int, int, int], Record]
"""Makes up a record: takes its size, a number that picks what it holds, and its label."""


@dataclass(frozen=True)
class Sums:
    """Per-record sums that scores are made of, each of shape (records,), float32."""

    loss: Tensor
    correct: Tensor
    weight: Tensor
    """Units that loss and correct are over: 1 a record, or the completion's tokens."""


@dataclass(frozen=True)
class Finished:
    """The model that a run ended with: the adapter is merged into it, and the head takes features as they are."""

    task: Task
    module: TaskModule
    """In eval mode; its encoder is a stock model again."""
    base: BaseModel
    """As it was loaded; its module is the encoder's."""
    labels: tuple[str, ...]
    """In the order of the head's rows; empty without labels."""
    limit: int
    """What records are cut to."""
    asked: tuple[str, ...]
    """Settings of the columns that one asks with, such as ``text`` and ``text-pair``, in the order of the words."""

    def answer(self, words: Sequence[str]) -> list[Answer]:
        """Return what the model answers, the likeliest first.

        Args:
            words: one for each of ``asked``: a text and its pair, a prompt, an image's path.

        Raises:
            ConfigError: there are more words, or fewer, than columns to ask with.
            DataError: a word names nothing that can be read.
        """
        if len(words) != len(self.asked):
            names = " and ".join(self.asked)
            raise ConfigError(f"this run's records are asked with {names}: give {len(self.asked)}, not {len(words)}")
        return self.task.answer(self, self.task.asked(words))


@dataclass(frozen=True)
class Answer:
    """One answer of a model."""

    text: str
    """A label, or a completion."""
    probability: float | None
    """None of a completion."""


def owner_of(record: Record) -> Record:
    """Return whose a record is, alone, to be put into what is made of it; empty if it belongs to nobody."""
    return {OWNER: record[OWNER]} if OWNER in record else {}


class Task(ABC):
    """A kind of task; no state, so one instance serves every model."""

    name: ClassVar[str]
    """What ``model.task`` calls it."""
    roles: ClassVar[tuple[Role, ...]]
    """The columns that it reads. With ``LABEL`` among them records have labels, and a head is on top of the base model;
    without, the base model's own output is scored."""
    example: ClassVar[type[Example]]
    """What a row of a table becomes: its fields are those of ``roles``."""
    counted: ClassVar[bool] = False
    """Whether a record as a whole is right or wrong. Then one record changes the count of right ones by 1 at most, and
    the count may be sent with noise for that."""

    answered: ClassVar[frozenset[str]] = frozenset({LABEL.setting})
    """Settings of the columns that nobody asks with: what a model is to tell, and what was said before."""
    left_out: ClassVar[Mapping[str, str]] = {}
    """Columns of other programs' layouts that change what a record says, each with what to do about it. A row that
    fills in one which no setting names is no record: without it, it would say something else."""
    worded: ClassVar[bool] = False
    """Whether its records hold words, so that a head or an adapter can start from public phrases (``of_phrase``)."""

    pools: ClassVar[tuple[str, ...]] = ("mean",)
    """What ``head.pool`` may be."""
    hub_task: ClassVar[str] = "feature-extraction"
    """What the hub calls it, in a model card."""
    library: ClassVar[str] = "transformers"
    """Library that loads a finished model whole (``write_stock``), as the hub calls it."""
    loader: ClassVar[str] = "AutoModel"
    """Class of transformers by which a base model is loaded where FedVeil is not."""

    # --- settings ---

    @property
    def labelled(self) -> bool:
        """Whether its records have labels."""
        return LABEL in self.roles

    def check(self, config: RunConfig) -> None:
        """Raise ConfigError, naming the setting, unless a run of this task can have this configuration."""
        if config.head.pool not in self.pools:
            raise ConfigError(
                f"head.pool is {config.head.pool!r}, which model.task {self.name!r} does not have: set it to 'mean'"
            )
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
            self.of_phrase("")
        if (config.head.policy, config.head.start) == ("frozen", "zeros"):
            others = "'label-words' or 'random'" if self.worded else "'random'"
            raise ConfigError(
                "head.policy 'frozen' keeps head.start 'zeros', through which no adapter gets a gradient: "
                f"set head.start to {others}, or head.policy to 'trained'"
            )

    def with_pool(self, pool: str) -> Task:
        """Return the task as its head reads features by ``head.pool``.

        Raises:
            ConfigError: the task has no such reading.
        """
        if pool not in self.pools:
            raise ConfigError(f"model.task {self.name!r} has no head.pool {pool!r}, only {', '.join(self.pools)}")
        return self

    def asked_with(self, data: DataConfig) -> tuple[str, ...]:
        """Return the settings of the columns that one asks with."""
        settings = (column.role.setting for column in self.columns(data))
        return tuple(setting for setting in settings if setting not in self.answered)

    def columns(self, data: DataConfig) -> tuple[Column, ...]:
        """Return the columns that a run reads; an optional one that is not named is none."""
        named = [Column(role, data.columns[role.setting]) for role in self.roles]
        return tuple(column for column in named if column.name or not column.role.optional)

    # --- where records come from ---

    def reads(self, source: Path) -> bool:
        """Return whether ``source``, an existing file or folder, is of a kind that this task reads by itself.

        Any other is read as ``common.tasks.tables`` reads it.
        """
        return False

    def read_source(self, source: Path) -> Table:
        """Return the table of a file or folder that ``reads`` says is this task's.

        Raises:
            UnreadableFile: its rows cannot be told apart.
            DataError: it cannot be opened.
        """
        raise UnreadableFile(f"{source} is nothing that model.task {self.name!r} reads")

    def of_phrase(self, phrase: str) -> Example:
        """Return the example of a public phrase, about a label or not (``head.start``, ``start.text``).

        Raises:
            ConfigError: its records hold no words.
        """
        raise ConfigError(
            f"the records of model.task {self.name!r} hold no words: set head.start to 'random' or 'zeros'"
        )

    def of_pair(self, first: str, second: str) -> Example:
        """Return the example of two public texts, for data whose records are pairs; ConfigError as of ``of_phrase``."""
        raise ConfigError(f"the records of model.task {self.name!r} are no pairs: leave data.text-pair empty")

    def of_text(self, text: str) -> Example:
        """Return the example of a public text that is to teach what records do; ConfigError as of ``of_phrase``."""
        return self.of_phrase(text)

    # --- the base model ---

    @abstractmethod
    def load(self, name: str) -> tuple[nn.Module, Any]:
        """Return the stock transformers model and its processor (tokenizer, image processor) by a folder or hub id.

        Code that comes with a model must not run: pass ``common.tasks.loading.OWN_CODE`` to every loader. Any exception
        is reported as a model that cannot be loaded.
        """

    def check_model(self, module: nn.Module, name: str) -> None:
        """Raise ModelNotLoaded if a model that was loaded, in float32, is none that the task takes."""
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
    def inventor(self, base: BaseModel, limit: int) -> Inventor:
        """Return what makes up records that are no one's: before a first round a model rehearses on them.

        Different numbers give different records. A task whose records are all of one size may ignore the size asked.
        """

    def measuring_inventor(self, base: BaseModel, limit: int) -> Inventor:
        """Return what makes up records that a start is measured on: no one's, and as like real ones as is known how.

        The same as a rehearsal's, unless those are unlike.
        """
        return self.inventor(base, limit)

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

    def losses(self, module: nn.Module, batch: Batch) -> Tensor:
        """Return one loss per record, shape (records,), float32: what each site minimises."""
        sums = self.sums(module, batch)
        return sums.loss / sums.weight

    # --- the finished model ---

    def write_stock(self, model: Finished, folder: Path) -> None:
        """Write a finished model and its processor into an empty folder, as stock libraries load them.

        Where no stock class computes the head, the encoder has a folder of its own in it, with ``LABELS`` beside: a
        stock class that is given the whole folder refuses it, where it would make a head at random.

        Raises:
            OSError: the folder cannot be written.
        """
        encoder: Any = model.module.encoder
        encoder.save_pretrained(folder)
        self.write_processor(model, folder)

    def pipeline(self, model: Finished) -> str:
        """Return the pipeline of transformers that computes what ``write_stock`` writes; empty: none does."""
        del model
        return self.hub_task

    def write_head_adapter(self, model: Finished, adapter: Path, folder: Path) -> None:
        """Write the adapter for a stock classifier, the head in it (PEFT's ``SEQ_CLS``), into an empty folder.

        Args:
            model: the finished model.
            adapter: the run's ``adapter/``.
            folder: what is written to.

        Raises:
            ConfigError: no stock class computes the run's head, or there is no adapter.
            OSError: the folder cannot be written.
        """
        advice = " or run it again with head.pool 'stock'" if "stock" in self.pools else ""
        raise ConfigError(f"no stock class computes what this run's head reads: merge it without --form{advice}")

    def write_processor(self, model: Finished, folder: Path) -> None:
        """Write what turns a record into the model's input."""
        model.base.processor.save_pretrained(folder)

    def stock_code(self, model: Finished, folder: str) -> str:
        """Return Python code that loads what ``write_stock`` wrote into ``folder``, without FedVeil."""
        kind = type(model.module.encoder).__name__
        return (
            f"from transformers import AutoTokenizer, {kind}\n\n"
            f"model = {kind}.from_pretrained({folder!r})\n"
            f"tokenizer = AutoTokenizer.from_pretrained({folder!r})\n"
        )

    def adapter_code(self, base: str, settings: Mapping[str, Scalar], *, tuned: bool) -> str:
        """Return Python code that loads a run's ``adapter/`` onto its base model, without FedVeil.

        Args:
            base: the base model's hub id, or its folder.
            settings: of the run, flat.
            tuned: whether there is an adapter in PEFT's format, and not the head alone.
        """
        del settings
        return self._loads(base, self.loader, tuned=tuned)

    @staticmethod
    def _loads(base: str, *loaders: str, tuned: bool, more: str = "") -> str:
        """Return code for imports and for ``model``; the first of ``loaders`` makes it, ``more`` are other imports."""
        peft = "from peft import PeftModel\n" if tuned else ""
        code = f"{peft}{more}from transformers import {', '.join(loaders)}\n\n"
        code += f"model = {loaders[0]}.from_pretrained({base!r}).eval()\n"
        return code + ('model = PeftModel.from_pretrained(model, "adapter").eval()\n' if tuned else "")

    def asked(self, words: Sequence[str]) -> Example:
        """Return the example that these words ask with, one for each column that is not answered.

        Raises:
            DataError: a word names nothing that can be read.
        """
        raise ConfigError(f"a model of model.task {self.name!r} cannot be asked with words")

    def answer(self, model: Finished, example: Example) -> list[Answer]:
        """Return every label with its probability, the likeliest first.

        Raises:
            ConfigError: the model has no labels, and the task says nothing else to answer with.
        """
        if not model.labels:
            raise ConfigError(f"a model of model.task {self.name!r} has no labels to answer with")
        import torch

        batch = self.collate(model.base, self.prepare(model.base, [example], model.limit))
        with torch.no_grad():
            shares = model.module(batch)[0].double().softmax(-1).tolist()
        answers = [Answer(label, share) for label, share in zip(model.labels, shares, strict=True)]
        return sorted(answers, key=lambda answer: -(answer.probability or 0.0))


def classified(module: nn.Module, batch: Batch) -> Sums:
    """Return cross-entropy and hits for ``labels`` of shape (records,), one unit a record."""
    import torch
    import torch.nn.functional as F

    logits = module(batch)
    loss = F.cross_entropy(logits, batch["labels"], reduction="none")
    correct = (logits.argmax(-1) == batch["labels"]).float()
    return Sums(loss, correct, torch.ones_like(loss))

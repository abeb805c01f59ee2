"""The model that a run ended with: what it answers, and how stock libraries load it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fedveil.common.check import NOT_NEGATIVE, POSITIVE, Interval
from fedveil.common.errors import ConfigError
from fedveil.common.tasks.examples import Example

if TYPE_CHECKING:
    from torch import Tensor

    from fedveil.common.config.flat import Scalar
    from fedveil.common.model.base import BaseModel
    from fedveil.common.tasks.base import Task
    from fedveil.common.tasks.module import TaskModule

LABELS = "labels.json"
"""File with the labels of a head that no stock class computes, in the order of its rows."""


@dataclass(frozen=True)
class Answer:
    """One answer of a model."""

    text: str
    """A label, or a completion."""
    probability: float | None
    """None of a completion."""
    chosen: bool = True
    """Whether it is an answer, or a part of it; of several labels those are that are above the threshold."""


NO_LABEL = Answer("(no label)", None)
"""What a model answers that gives a text none of several labels."""


@dataclass(frozen=True)
class Finished:
    """A finished model: the adapter is merged into it, and the head takes features as they are."""

    task: Task
    module: TaskModule
    """In eval mode; its encoder is a stock model again."""
    base: BaseModel
    """As it was loaded; its module is the encoder's."""
    labels: tuple[str, ...]
    """In the order of the head's rows; empty without labels."""
    limit: int
    """Tokens that records are cut to."""
    template: str
    """The run's ``data.template``."""
    inputs: tuple[str, ...]
    """Settings of the columns that a question gives, such as ``text`` and ``text-pair``, in the order of its words."""

    def answers(self, asked: Sequence[Sequence[str]]) -> list[list[Answer]]:
        """Return what the model answers to each question, the likeliest first.

        Args:
            asked: the words of each, one for each of ``inputs``: a text and its pair, a prompt, the path of an image.

        Raises:
            ConfigError: there are more words, or fewer, than ``inputs``, or the task takes no questions.
            DataError: a word names nothing that can be read.
        """
        wrong = next((words for words in asked if len(words) != len(self.inputs)), None)
        if wrong is not None:
            names = " and ".join(self.inputs)
            raise ConfigError(f"this run's records are asked with {names}: give {len(self.inputs)}, not {len(wrong)}")
        if self.task.questions is None:
            raise ConfigError(f"a model of model.task {self.task.name!r} cannot be asked with words")
        questions = self.task.questions
        return questions.answers(self, [self._within(questions.example(words)) for words in asked])

    def continued(self, words: Sequence[str], count: int, how: Sampling) -> list[str | None]:
        """Return ``count`` sampled texts that go on after a question; None for each that did not end in time.

        Raises:
            ConfigError: the task samples none, or the question leaves no room.
        """
        questions = self.task.questions
        if questions is None or questions.continued is None:
            raise ConfigError(f"a model of model.task {self.task.name!r} writes no records")
        return questions.continued(self, self._within(questions.example(words)), count, how)

    def _within(self, example: Example) -> Example:
        return replace(example, template=self.template) if self.template else example


def label_probabilities(model: Finished, examples: Sequence[Example]) -> list[list[Answer]]:
    """Return for each example every label with its probability, the likeliest first.

    Raises:
        ConfigError: the model has no labels.
    """
    rows = logits_of(model, examples).softmax(-1).tolist()
    answers = ([Answer(label, share) for label, share in zip(model.labels, row, strict=True)] for row in rows)
    return [sorted(one, key=lambda answer: -(answer.probability or 0.0)) for one in answers]


def logits_of(model: Finished, examples: Sequence[Example]) -> Tensor:
    """Return the logits of each example, shape (examples, labels), float64; ConfigError: the model has no labels."""
    if not model.labels:
        raise ConfigError(f"a model of model.task {model.task.name!r} has no labels to answer with")
    import torch

    batch = model.task.collate(model.base, model.task.prepare(model.base, examples, model.limit))
    with torch.no_grad():
        logits: Tensor = model.module(batch)
    return logits.double()


@dataclass(frozen=True)
class Sampling:
    """How a language model draws tokens."""

    temperature: float = 1.0
    """1: as it was trained to predict them; below 1 the likely ones are drawn more often."""
    top_p: float = 0.95
    """The least likely tokens are left out, as long as the others have this probability together."""
    new_tokens: int = 0
    """Tokens of one text at most. 0: as many as ``model.max-length`` has room for."""

    def __post_init__(self) -> None:
        POSITIVE.check("--temperature", self.temperature)
        Interval(0, 1).check("--top-p", self.top_p)
        NOT_NEGATIVE.check("--new-tokens", self.new_tokens)


@dataclass(frozen=True)
class Questions:
    """How words become a question to a task's finished model, and its answers."""

    example: Callable[[Sequence[str]], Example]
    """Makes the example of a question from a word for each role with ``in_question``; DataError if one is no input."""
    answers: Callable[[Finished, Sequence[Example]], list[list[Answer]]] = label_probabilities
    """Returns what the model answers to each, the likeliest first."""
    continued: Callable[[Finished, Example, int, Sampling], list[str | None]] | None = None
    """Samples so many texts that go on after an example's prompt, None for each that did not end in time. None: the
    task learns no whole record."""


class Export:
    """How a task's finished model is written for stock libraries, and the code that loads it."""

    hub_task: ClassVar[str] = "feature-extraction"
    """The task's name on the hub, for a model card."""
    library: ClassVar[str] = "transformers"
    """Library that loads what ``write`` wrote, by its name on the hub."""
    problem_type: ClassVar[str] = "single_label_classification"
    """What transformers calls the kind of its answers; by another, pipelines make other probabilities of logits."""
    loader: ClassVar[str] = "AutoModel"
    """Class of transformers that loads the base model."""

    def write(self, model: Finished, folder: Path) -> None:
        """Write a finished model and its processor into an empty folder, as stock libraries load them.

        Where no stock class computes the head, the encoder has a folder of its own in it, with ``LABELS`` beside: a
        stock class that is given the whole folder refuses it, where it would make a head at random.

        Raises:
            OSError: the folder cannot be written.
        """
        encoder: Any = model.module.encoder
        encoder.save_pretrained(folder)
        self.write_processor(model, folder)

    def write_processor(self, model: Finished, folder: Path) -> None:
        """Write what turns a record into the model's input."""
        model.base.processor.save_pretrained(folder)

    def write_head_adapter(self, model: Finished, adapter: Path, folder: Path) -> None:
        """Write the run's ``adapter/`` for a stock classifier, the head in it (PEFT's ``SEQ_CLS``).

        Raises:
            ConfigError: no stock class computes the run's head, or there is no adapter.
            OSError: the folder cannot be written.
        """
        raise ConfigError("no stock class computes what this run's head reads: merge it without --form")

    def pipeline(self, model: Finished) -> str:
        """Return the pipeline of transformers that computes what ``write`` wrote; empty: none does."""
        del model
        return self.hub_task

    def code(self, model: Finished, folder: str) -> str:
        """Return Python code that loads what ``write`` wrote into ``folder``, without FedVeil."""
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
        return self._loads(base, tuned=tuned)

    def _loads(self, base: str, *others: str, tuned: bool, imports: str = "") -> str:
        """Return code that makes ``model``; ``others`` are more names to import from transformers."""
        peft = "from peft import PeftModel\n" if tuned else ""
        code = f"{peft}{imports}from transformers import {', '.join((self.loader, *others))}\n\n"
        code += f"model = {self.loader}.from_pretrained({base!r}).eval()\n"
        return code + ('model = PeftModel.from_pretrained(model, "adapter").eval()\n' if tuned else "")

"""Token classification: names in texts. A record is a text, and its loss the mean over its words.

Each word's first token has the word's label; the others, and the marks that a tokenizer adds, have none. A record
without a labelled token has the loss 0. Where the head alone is trained a record's features are a vector for each of
its tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

from fedveil.common.errors import ModelNotLoaded
from fedveil.common.labels import labels_of
from fedveil.common.tasks.base import IGNORED, Batch, Record, Scored, Sums, Wording
from fedveil.common.tasks.entities import (
    BIO,
    counts_of,
    kinds_of,
    labels_of_words,
    names_in,
    read_marks,
    read_words,
    words_of,
)
from fedveil.common.tasks.examples import Example
from fedveil.common.tasks.finished import Answer, Export, Finished, Questions
from fedveil.common.tasks.loading import OWN_CODE
from fedveil.common.tasks.roles import Role
from fedveil.common.tasks.stock import HEAD, stock_of
from fedveil.common.tasks.text import TOKENS, TextTask, pad_id, padded

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from fedveil.common.config.run import RunConfig
    from fedveil.common.model.base import BaseModel
    from fedveil.common.tasks.module import TaskModule

LOADER = "AutoModelForTokenClassification"


@dataclass(frozen=True, slots=True)
class WordsExample(Example):
    """One text with a label for each word. The record's own ``label`` is that of its first name's first word, or O."""

    text: str | tuple[str, ...] = ""
    """As it was read, or the words that it is cut into."""
    marks: tuple[Any, ...] = ()
    """The number of each word's label, or spans of characters with that of their first word; empty: all words have
    the record's own label."""

    def __post_init__(self) -> None:
        if self.label is None:
            numbers = (mark[2] if isinstance(mark, tuple) else mark for mark in self.marks)
            object.__setattr__(self, "label", next(filter(None, numbers), 0))

    @property
    def labels(self) -> tuple[int, ...] | None:
        """The number of each word's label; None: the marks do not fit the text."""
        if not self.marks:
            return (self.label or 0,) * len(words_of(self.text))
        if isinstance(self.marks[0], tuple):
            found = labels_of_words(self.text, self.marks) if isinstance(self.text, str) else None
            return None if found is None else tuple(found)
        return self.marks if len(self.marks) == len(words_of(self.text)) else None

    def answer(self, names: Sequence[str] = ()) -> str | None:
        """Return the labels of the words by their names, as JSON; without names their numbers."""
        return json.dumps([names[number] if names else number for number in self.labels or ()])

    def canonical(self, label: str | None) -> str:
        """Return the words and their labels as JSON, however the source marks them."""
        return json.dumps({"words": words_of(self.text), "labels": label})

    def likeness(self) -> str:
        """Return the words but for case."""
        return " ".join(words_of(self.text)).casefold()

    def lacks(self) -> tuple[str, str]:
        """Return that there is no word, or that labels or spans do not fit the words."""
        if not words_of(self.text):
            return "has no word", "remove the row"
        advice = "give each word one label, or spans of characters of the text that share no word"
        return ("", "") if self.labels is not None else ("has labels that do not fit its words", advice)

    def texts(self) -> list[str]:
        """Return the text, of words with blanks between them."""
        return [self.text if isinstance(self.text, str) else " ".join(self.text)]

    @property
    def all_labels(self) -> frozenset[int]:
        """The labels that some word of it has."""
        return frozenset(self.labels or ())


class TokenExport(Export):
    """A stock token classifier of transformers."""

    hub_task = "token-classification"

    def write(self, model: Finished, folder: Path) -> None:
        """Write the model as ``AutoModelForTokenClassification`` loads it.

        Raises:
            ModelError: what the stock class computes is not what the run's model does.
        """
        stock_of(model, LOADER).save_pretrained(folder)
        self.write_processor(model, folder)

    def code(self, model: Finished, folder: str) -> str:
        """Return code that finds the names in a text with transformers alone."""
        return (
            "from transformers import pipeline\n\n"
            f'find = pipeline("token-classification", model={folder!r}, aggregation_strategy="first")\n'
            'print(find("a text"))\n'
        )

    def adapter_code(self, base: str, settings: Mapping[str, Any], *, tuned: bool) -> str:
        """Return code that gives each token of a text its label."""
        del settings
        imports = "import json\n\nimport torch\nfrom safetensors.torch import load_file\n"
        return (
            imports
            + self._loads(base, "AutoTokenizer", tuned=tuned)
            + (
                f'tokenizer, head = AutoTokenizer.from_pretrained({base!r}), load_file("adapter/head.safetensors")\n'
                'with open("adapter/fedveil.json", encoding="utf-8") as file:\n'
                '    labels = json.load(file)["label_names"]\n'
                'tokens = tokenizer("a text", return_tensors="pt")\n'
                "with torch.no_grad():\n"
                "    features = model(**tokens).last_hidden_state[0]\n"
                'numbers = (features @ head["weight"].T + head["bias"]).argmax(-1).tolist()\n'
                'names = tokenizer.convert_ids_to_tokens(tokens["input_ids"][0])\n'
                "print(list(zip(names, (labels[i] for i in numbers))))\n"
            )
        )


def names_found(model: Finished, examples: Sequence[Example]) -> list[list[Answer]]:
    """Return the names in each text with their kinds, in its order, each with the least chance of its words' labels."""
    import torch

    answers = []
    for example in cast(Sequence[WordsExample], examples):
        (record,) = model.task.prepare(model.base, [example], model.limit)
        with torch.no_grad():
            chances, numbers = model.module(model.task.collate(model.base, [record]))[0].softmax(-1).max(-1)
        first = [i for i, label in enumerate(record["labels"]) if label != IGNORED]
        labels, words = [int(numbers[i]) for i in first], words_of(example.text)
        found = [
            Answer(
                f"{kinds_of(model.labels)[kind]}: {' '.join(words[start:end])}",
                min(float(chances[i]) for i in first[start:end]),
            )
            for start, end, kind in names_in(labels)
        ]
        answers.append(found or [Answer("no name", None)])
    return answers


def _example(text: str) -> Example:
    return WordsExample(text=text.strip(), label=0)


class TokenClassification(TextTask):
    """Names in a text: a label for each word; the loss is the mean cross-entropy of its words."""

    name: ClassVar[str] = "token-classification"
    roles: ClassVar[tuple[Role, ...]] = (
        Role("text", "text", "the text, or its words", read=read_words),
        Role("label", "marks", "the labels of its words, or spans", in_question=False, read=read_marks, labels=BIO()),
    )
    example: ClassVar[type[Any]] = WordsExample
    counted: ClassVar[bool] = True
    scored: ClassVar[Scored] = Scored("micro F1", kinds_of)
    by_token: ClassVar[bool] = True
    wording: ClassVar[Wording | None] = Wording(_example, _example)
    questions: ClassVar[Questions | None] = Questions(lambda words: _example(words[0]), names_found)
    export: ClassVar[Export] = TokenExport()

    def check(self, config: RunConfig) -> None:
        """As every task's; and the labels are those of names."""
        super().check(config)
        BIO().check(labels_of(config.data.labels))

    def load(self, name: str) -> tuple[nn.Module, Any]:
        """Return the encoder of the stock token classifier, without its head, and the tokenizer.

        Raises:
            ModelNotLoaded: that classifier is more than a linear layer on the last hidden states, or the tokenizer does
                not say which word a token is of.
        """
        import torch
        from transformers import AutoConfig, AutoModelForTokenClassification, AutoTokenizer

        with torch.random.fork_rng(), torch.device("meta"):
            shape: Any = AutoModelForTokenClassification.from_config(AutoConfig.from_pretrained(name, **OWN_CODE))
        inner = getattr(shape, shape.base_model_prefix)
        parts = [part for part in shape.children() if part is not inner and not isinstance(part, torch.nn.Dropout)]
        tokenizer = AutoTokenizer.from_pretrained(name, **OWN_CODE)
        if getattr(tokenizer, "add_prefix_space", None) is False:
            tokenizer = AutoTokenizer.from_pretrained(name, **OWN_CODE, add_prefix_space=True)
        if not tokenizer.is_fast or parts != [getattr(shape, HEAD, None)] or not isinstance(parts[0], torch.nn.Linear):
            raise ModelNotLoaded(
                f"the base model {name!r} has no stock token classifier that is a linear layer, or its tokenizer does "
                "not tell words: choose another, such as 'all-MiniLM-L6-v2'"
            )
        return type(inner).from_pretrained(name, **OWN_CODE, **_without_pooler(inner)), tokenizer

    def tokenise(self, tokenizer: Any, examples: Sequence[Any], max_length: int) -> list[Record]:
        """Return ``input_ids``, ``attention_mask``, ``token_type_ids`` where the model has them, ``labels``.

        A word of which ``max_length`` cuts the first token off has no label.
        """
        records: list[Record] = []
        for example in cast(Sequence[WordsExample], examples):
            encoded = tokenizer(
                words_of(example.text), is_split_into_words=True, truncation=True, max_length=max_length
            )
            of, labels = encoded.word_ids(0), example.labels or ()
            first = [word is not None and (i == 0 or of[i - 1] != word) for i, word in enumerate(of)]
            own = [labels[word] if new else IGNORED for word, new in zip(of, first, strict=True)]
            records.append({**{key: list(encoded[key]) for key in encoded}, "labels": own})
        return records

    def collate(self, base: BaseModel, records: Sequence[Record], size: int = 0) -> Batch:
        """Return int64 tensors of shape (records, tokens), padded on the right; padding has no label."""
        fill = {TOKENS: pad_id(base), "labels": IGNORED}
        return {key: padded([record[key] for record in records], fill.get(key, 0), size) for key in records[0]}

    def made_up(self, like: Record, tokens: Sequence[int], label: int = 0) -> Record:
        """Return a record of which every token has this label; of one token alone, as filler is, none."""
        labels = [label if len(tokens) > 1 else IGNORED] * len(tokens)
        fill = {TOKENS: list(tokens), "attention_mask": [1] * len(tokens), "labels": labels}
        return {key: fill.get(key, [0] * len(tokens)) for key in like}

    def module(self, encoder: nn.Module, base: BaseModel, classes: int, feature_scale: float) -> TaskModule:
        """Return the encoder with a head on each token's last hidden state, as it is: so the stock class has it."""
        from fedveil.common.tasks.module import TaskModule

        del feature_scale
        return TaskModule(encoder, _hidden, base.hidden_size, classes)

    def sums(self, module: nn.Module, batch: Batch) -> Sums:
        """Return cross-entropy and hits, summed over a record's words, and its names by kind."""
        import torch
        import torch.nn.functional as F

        logits, labels = module(batch), batch["labels"]
        asked, given = labels != IGNORED, logits.argmax(-1)
        loss = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)

        def names() -> Tensor:
            rows, kinds = zip(labels, given, asked, strict=True), logits.shape[-1] // 2
            return torch.tensor([counts_of(y[own].tolist(), p[own].tolist(), kinds) for y, p, own in rows])

        correct = ((given == labels) & asked).float().sum(1)
        return Sums(loss.sum(1), correct, asked.float().sum(1).clamp(min=1), parts=names)


def _without_pooler(inner: nn.Module) -> dict[str, bool]:
    """Return the option by which the stock class leaves out a pooler, if it does."""
    return {"add_pooling_layer": False} if getattr(inner, "pooler", True) is None else {}


def _hidden(encoder: nn.Module, batch: Batch) -> Tensor:
    """Return the last hidden states, shape (records, tokens, hidden), float32."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    hidden: Tensor = encoder(**inputs).last_hidden_state.float()
    return hidden

"""The text half of tasks: examples of text, the tokenizer, and records of tokens."""

from __future__ import annotations

import hashlib
import json
import random
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from fedveil.common.errors import ConfigError
from fedveil.common.tasks.base import Batch, Inventor, Record, Task, Wording, wording_of
from fedveil.common.tasks.examples import Example
from fedveil.common.tasks.finished import Questions
from fedveil.common.tasks.loading import UNCOUNTED

if TYPE_CHECKING:
    from torch import Tensor

    from fedveil.common.model.base import BaseModel

TOKENS = "input_ids"


@dataclass(frozen=True, slots=True)
class TextExample(Example):
    """One record of text; ``text`` is the prompt where there is a completion."""

    text: str = ""
    text_pair: str | None = None
    completion: str | None = None

    def canonical(self, label: str | None) -> str:
        """Return the texts and the label as a JSON list, as every ledger that is in use has them."""
        return json.dumps([self.text, self.text_pair, label, self.completion])

    def likeness(self) -> str:
        """Return the text but for case and blanks: records of one text stay together, whatever is beside it.

        A completion of nothing is the text; and within a template, where the prompt is often a label.
        """
        text = self.completion if self.template else self.text or self.completion
        return " ".join((text or "").split()).casefold()


def text_of(text: str, pair: str | None = None) -> Example:
    """Return an example of a text, or of two, that has the first label."""
    return TextExample(text=text.strip(), text_pair=pair and pair.strip(), label=0)


class TextTask(Task):
    """Texts; a record's size is its number of tokens."""

    example: ClassVar[type[Any]] = TextExample
    wording: ClassVar[Wording | None] = Wording(text_of, text_of, text_of)
    questions: ClassVar[Questions | None] = Questions(lambda words: TextExample(*words, label=0))

    def processor_parts(self, processor: Any) -> Mapping[str, Any]:
        """Return the tokenizer's rules and special tokens; files count by their content, wherever they lie."""
        return {"tokenizer": tokenizer_parts(processor)}

    def limit(self, base: BaseModel, max_length: int) -> int:
        """Return the tokens that records are cut to; fewer where the model has no positions for them and padding."""
        from fedveil.common.model.shapes import longest_within

        limit = min(max_length, longest_within(base.positions))
        special = base.processor.num_special_tokens_to_add(pair=True)
        if limit <= special:
            # Truncation does nothing then, and a record keeps its whole length.
            raise ConfigError(
                f"model.max-length is {limit}, of which the tokenizer of {base.name!r} itself takes up to "
                f"{special}: set it to {special + 1} or more"
            )
        return limit

    def prepare(self, base: BaseModel, examples: Sequence[Example], limit: int) -> list[Record]:
        """Return tokenised records of at most ``limit`` tokens; DataError: see ``tokenise``."""
        return self.tokenise(base.processor, cast(Sequence[TextExample], examples), limit)

    @abstractmethod
    def tokenise(self, tokenizer: Any, examples: Sequence[TextExample], max_length: int) -> list[Record]:
        """Return one record per example, cut to ``max_length`` tokens."""

    def size(self, record: Record) -> int:
        """Return the number of tokens."""
        return len(record[TOKENS])

    def fits(self, base: BaseModel, record: Record, limit: int) -> bool:
        """Return whether the record is of 1 to ``limit`` tokens, all of which the model knows.

        A token without an embedding ends a process on a GPU, and with it a whole round; one too many has no shape.
        """
        return 0 < self.size(record) <= limit and max(record[TOKENS]) < _embeddings(base)

    def filler(self, base: BaseModel, like: Record) -> Record:
        """Return a record of one token of padding."""
        return self.made_up(like, [pad_id(base)])

    def inventor(self, base: BaseModel, limit: int, *, lifelike: bool = False) -> Inventor:
        """Return what draws the tokens of a record, none of them special, by the record's size and number."""
        special = set(base.processor.all_special_ids)
        known = min(len(base.processor), _embeddings(base))
        usual = [token for token in range(known) if token not in special]
        (like,) = self.prepare(base, [wording_of(self).text("one two")], limit)

        def invent(size: int, number: int, label: int) -> Record:
            draw = random.Random(f"{size}/{number}")  # noqa: S311 - nothing secret: the record is no one's
            return self.made_up(like, draw.choices(usual, k=size), label)

        return invent

    @abstractmethod
    def made_up(self, like: Record, tokens: Sequence[int], label: int = 0) -> Record:
        """Return a record that is no one's, of these tokens and with the fields of ``like``."""


def pad_id(base: BaseModel) -> int:
    """Return the token that fills up a batch; masked everywhere, so any token serves if it has none."""
    tokenizer = base.processor
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return int(next(token for token in candidates if token is not None))


def padded(rows: Sequence[Sequence[int]], value: int, length: int = 0) -> Tensor:
    """Return ``rows`` as one int64 tensor, filled up on the right with ``value`` to the longest, or to ``length``."""
    import torch

    longest = length or max(len(row) for row in rows)
    return torch.tensor([list(row) + [value] * (longest - len(row)) for row in rows])


def tokens_of(batch: Batch) -> Tensor:
    """Return the tokens of a batch of text, shape (records, tokens), int64."""
    return batch[TOKENS]


def _embeddings(base: BaseModel) -> int:
    return int(base.module.get_input_embeddings().num_embeddings)  # type: ignore[operator]


def tokenizer_parts(tokenizer: Any) -> dict[str, Any]:
    """Return all that decides what a tokenizer makes of a text, for the base model's fingerprint."""
    parts = {
        "class": type(tokenizer).__name__,
        "special": {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
        "sides": [tokenizer.padding_side, tokenizer.truncation_side],
        "inputs": list(tokenizer.model_input_names),
    }
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        # It stands beside the rules. Where it is off, fingerprints are those from before it counted.
        split = {"split_special_tokens": True} if getattr(tokenizer, "split_special_tokens", False) else {}
        # Both are set anew by every call.
        counted = {key: value for key, value in rules.items() if key not in ("truncation", "padding")}
        return {**parts, **split, "rules": counted}
    options = {key: _content(value) for key, value in tokenizer.init_kwargs.items() if key not in UNCOUNTED}
    return {**parts, "vocabulary": tokenizer.get_vocab(), "options": options}


def _content(value: object) -> object:
    path = Path(value) if isinstance(value, str) and "/" in value else None
    return hashlib.sha256(path.read_bytes()).hexdigest() if path and path.is_file() else value

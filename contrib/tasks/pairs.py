"""Pairs of answers, one of which is better: the record, and its two rows."""

from __future__ import annotations

import json
from dataclasses import dataclass

from fedveil.common.tasks.base import UNBATCHED, Batch, Record
from fedveil.common.tasks.examples import Example

OTHER = "other "
"""What the names of a pair's second row begin with, in records and batches."""


@dataclass(frozen=True, slots=True)
class Pair(Example):
    """One record: a question, or nothing, and two answers to it."""

    question: str = ""
    chosen: str = ""
    """The better answer."""
    rejected: str = ""

    def canonical(self, label: str | None) -> str:
        """Return the three as a JSON list."""
        return json.dumps([self.question, self.chosen, self.rejected])

    def likeness(self) -> str:
        """Return the question but for case and blanks, or the better answer where there is none."""
        return " ".join((self.question or self.chosen).split()).casefold()

    def lacks(self) -> tuple[str, str]:
        """Return that both answers are one: nothing is preferred."""
        if self.chosen.split() != self.rejected.split():
            return "", ""
        return "has one answer twice", "remove the row"


def pair_of_text(text: str) -> Example:
    """Return a pair of public words: the second half of a text is better than all of it backwards."""
    words = text.split() or ["-"]
    half = len(words) // 2
    return Pair(question=" ".join(words[:half]), chosen=" ".join(words[half:]), rejected=" ".join([*words[::-1], "-"]))


def rows_of_pair(record: Record) -> list[Record]:
    """Return both rows of a pair, the better answer's first; of a row that alone."""
    own = {key: value for key, value in record.items() if key not in UNBATCHED}
    first = {key: value for key, value in own.items() if not key.startswith(OTHER)}
    second = {key.removeprefix(OTHER): value for key, value in own.items() if key.startswith(OTHER)}
    return [first, second] if second else [first]


def halves_of(batch: Batch) -> tuple[Batch, Batch]:
    """Return the first rows of a batch of pairs, and the second ones."""
    first = {key: value for key, value in batch.items() if not key.startswith(OTHER)}
    return first, {key.removeprefix(OTHER): value for key, value in batch.items() if key.startswith(OTHER)}

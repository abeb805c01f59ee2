"""Names in texts as labels of words: BIO, spans of characters, and the names that labels make.

The labels are ``O``, and for each kind of name ``B-`` at its first word and ``I-`` at the others, in the order O, B-x,
I-x, B-y, I-y. So a label's number tells what it is: 0 is O, an odd one begins a name, and the next goes on with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from fedveil.common.errors import ConfigError
from fedveil.common.labels import labels_text
from fedveil.common.tasks.cells import CELL_CHARACTERS, Misfit, is_missing, read_text
from fedveil.common.tasks.roles import Labelling

OUTSIDE, BEGIN, INSIDE = "O", "B-", "I-"
WORD = re.compile(r"\w+|[^\w\s]")
"""A word of a text that is not cut into words: letters and digits, or one other sign."""
Span = tuple[int, int, Any]
"""Where a name begins and ends in a text, in characters or words, the end not in it; and its kind or first label."""
SPANS = 'write [{"start": 0, "end": 5, "label": "PER"}, ...], or a label for each word'


def kinds_of(labels: Sequence[str]) -> list[str]:
    """Return the kinds of names of BIO labels in their order.

    >>> kinds_of(["O", "B-PER", "I-PER"])
    ['PER']
    """
    return [label.removeprefix(BEGIN) for label in labels[1::2]]


def bio_labels(kinds: Iterable[str]) -> tuple[str, ...]:
    """Return the labels of these kinds of names, in their order."""
    return (OUTSIDE, *(sign + kind for kind in kinds for sign in (BEGIN, INSIDE)))


class BIO(Labelling):
    """Several labels a cell: one for each word of a text, or spans that have a kind of name."""

    example: ClassVar[str] = "O,B-PER,I-PER"

    def check(self, labels: Sequence[str]) -> None:
        """Raise ConfigError unless these are the labels of some kinds of names, in their order."""
        wanted = bio_labels(dict.fromkeys(label[2:] for label in labels if label[:2] in (BEGIN, INSIDE)))
        if labels and (tuple(labels) != wanted or len(wanted) < 3):
            kinds = dict.fromkeys(label[2:] if label[:2] in (BEGIN, INSIDE) else label for label in labels)
            asked = bio_labels(kind for kind in kinds if kind and kind != OUTSIDE)
            raise ConfigError(
                f"data.labels is {labels_text(labels)!r}, and names in texts have O, then B- and I- of each kind: "
                f"write {labels_text(asked)!r}"
            )

    def in_order(self, values: Iterable[Any]) -> tuple[str, ...]:
        """Return O and the labels of all kinds that cells name, sorted by kind."""
        named = (label for value in values for label in value)
        kinds = {span[2] if isinstance(span, tuple) else span[2:] for span in named if span != OUTSIDE}
        return bio_labels(sorted(kinds))

    def numbered(self, value: Any, index: Mapping[str, int]) -> tuple[Any, ...]:
        """Return the number of each word's label, or spans with the number that their first word has."""
        if value and isinstance(value[0], tuple):
            spans = sorted((start, end, BEGIN + kind) for start, end, kind in value)
            return tuple((start, end, index[label]) for start, end, label in spans)
        return tuple(index[label] for label in value)

    def named(self, value: Any, labels: Sequence[str]) -> object:
        """Return the label of each word, or the spans."""
        if value and isinstance(value[0], tuple):
            return [{"start": start, "end": end, "label": labels[number][2:]} for start, end, number in value]
        return [labels[number] for number in value]


def read_words(value: object, folder: Path | None = None) -> str | tuple[str, ...]:
    """Return a text, or the words that one is cut into already.

    Raises:
        Misfit: as ``read_text``; or a word is none, or there is none.
    """
    if not isinstance(value, list | tuple):
        return read_text(value)
    if not value or not all(isinstance(word, str) for word in value):
        raise Misfit("has no list of words", "give a text, or each of its words")
    words = tuple(read_text(word) for word in value)
    if sum(map(len, words)) > CELL_CHARACTERS:
        raise Misfit(f"has more than {CELL_CHARACTERS} characters")
    return words


def read_marks(value: object, folder: Path | None = None) -> tuple[Any, ...]:
    """Return the label of each word as text, or spans of characters as (start, end, kind); an empty list is no name.

    Args:
        value: a list of either, or its JSON.
        folder: of the file; no cell names another.

    Raises:
        Misfit: it is no such list.
    """
    if isinstance(value, str) and len(value) <= CELL_CHARACTERS:
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise Misfit("has no list of labels", SPANS) from None
    if not isinstance(value, list):
        raise Misfit("has no value" if is_missing(value) else "has no list of labels", SPANS)
    if all(isinstance(item, str) for item in value):
        return tuple(read_text(item).strip() for item in value)
    return tuple(_span(item) for item in value)


def _span(item: object) -> Span:
    fields = item if isinstance(item, dict) else {}
    start, end, kind = (fields.get(name) for name in ("start", "end", "label"))
    if type(start) is not int or type(end) is not int or not isinstance(kind, str) or not kind.strip():
        raise Misfit("has a span without start, end and label", SPANS)
    return start, end, kind.strip()


def words_of(text: str | Sequence[str]) -> list[str]:
    """Return the words of a text; those that it is cut into already stay."""
    return WORD.findall(text) if isinstance(text, str) else list(text)


def labels_of_words(text: str, spans: Sequence[Span]) -> list[int] | None:
    """Return the number of each word's label in a text with spans of characters; None if they do not fit it.

    A word belongs to the span that has a character of it. Two spans of one word do not fit, nor does one without any.

    Args:
        text: it is cut into words by ``WORD``.
        spans: each with the number of the label of its first word.

    >>> labels_of_words("Dr. Ada Lovelace", [(4, 16, 1)])
    [0, 0, 1, 2]
    """
    places = [match.span() for match in WORD.finditer(text)]
    labels = [0] * len(places)
    for start, end, label in spans:
        inside = [i for i, (begin, close) in enumerate(places) if begin < end and start < close]
        if not 0 <= start < end <= len(text) or not inside or any(labels[i] for i in inside):
            return None
        labels[inside[0]] = label
        labels[inside[0] + 1 : inside[-1] + 1] = [label + 1] * (len(inside) - 1)
    return labels


def names_in(labels: Sequence[int]) -> Iterator[Span]:
    """Yield the names that words' labels make: first word, the one after the last, and the number of the kind.

    As conlleval and seqeval do by default: a name begins at B, and at I behind O or another kind; it ends before the
    next begins, and before O.

    >>> list(names_in([0, 1, 2, 2, 4, 0, 2]))
    [(1, 4, 0), (4, 5, 1), (6, 7, 0)]
    """
    start, kind = 0, -1
    for i, label in enumerate([*labels, 0]):
        own = (label - 1) // 2
        if kind >= 0 and (label % 2 == 1 or own != kind):
            yield start, i, kind
            kind = -1
        if label and kind < 0:
            start, kind = i, own


def counts_of(there: Sequence[int], given: Sequence[int], kinds: int) -> list[list[int]]:
    """Return by kind the names that are right, those that are there, and those that are given, shape (3, kinds).

    Args:
        there, given: labels of a record's words, and what a model gives them.
        kinds: how many there are.
    """
    names, found = set(names_in(there)), set(names_in(given))
    return [
        [sum(name[2] == kind for name in group) for kind in range(kinds)] for group in (names & found, names, found)
    ]

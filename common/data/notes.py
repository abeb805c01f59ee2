"""Notes on the texts of a data set that say what its rows do not: repeated texts, and words that mean nothing."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from fedveil.common.config.sections import DataConfig
from fedveil.common.data.named import DATASETS
from fedveil.common.data.sources import load_dataset, read_public
from fedveil.common.tasks.examples import Dataset, Example
from fedveil.common.words import counted

OFTEN = 5
"""Rows from which on a text occurs many times."""
MUCH = 0.05
"""Share of rows that repeat another one's text from which on a note is made of them."""
NOTHING = frozenset({"n/a", "na", "nan", "null", "none", "nil", "-", "--", "?", "unknown", "missing", "not available"})
"""Texts that say that there is none, in lower case."""


def notes_on(config: DataConfig, task: str) -> list[str]:
    """Return what to know of the rows of ``data.name``, a sentence each; nothing of a data set that FedVeil names.

    Raises:
        DataError, ConfigError: as for ``load_dataset``.
    """
    if config.name in DATASETS:
        return []
    reading = read_public(config, task)
    number, first = len(reading.unfit), next((row.words for row in reading.unfit), "")
    skipped = [f"{counted(number, 'row')} cannot be used and {'is' if number == 1 else 'are'} left out: {first}"]
    texts = [*notes_on_texts(reading.dataset), *_at_several_sites(reading.dataset)]
    tested = _trained_on(reading.dataset, load_dataset(config, task, config.test)) if config.test else []
    return [*skipped * bool(number), *(f"{config.name}: {note}" for note in texts), *tested]


def notes_on_texts(data: Dataset) -> list[str]:
    """Return what to know of repeated and of empty texts, a sentence each.

    >>> notes_on_texts(Dataset("mine.csv", (), ()))
    []
    """
    texts = Counter(example.likeness() for example in data.examples)
    return [*_repeated(texts, data.examples), *_nothing(texts)]


def _repeated(texts: Counter[str], examples: Sequence[Example]) -> list[str]:
    repeats, most = len(examples) - len(texts), max(texts.values(), default=0)
    if most < OFTEN and repeats <= MUCH * len(examples):
        return []
    rows = sum(number for number in texts.values() if number > 1)
    return [
        f"{rows} of {counted(len(examples), 'row')} share their text with another row, one text with {most} rows. ε "
        f"protects one row: what is said in several rows has a larger ε (with {most} rows more than {most} times as "
        "large). Remove repeats, or group rows by data.person"
    ]


def _at_several_sites(data: Dataset) -> list[str]:
    sites = defaultdict[str, set[str]](set)
    for example in data.examples:
        sites[example.likeness()].add(example.key)
    if not (shared := sum(len(names) > 1 for names in sites.values())):
        return []
    return [
        f"{counted(shared, 'text')} {'is' if shared == 1 else 'are'} at more than one site. ε is of the rows of one "
        "site: what several sites hold has a larger one. Remove it from all but one"
    ]


def _trained_on(train: Dataset, test: Dataset) -> list[str]:
    texts = {example.likeness() for example in train.examples}
    if not (both := sum(example.likeness() in texts for example in test.examples)):
        return []
    return [
        f"{both} of {counted(len(test.examples), 'row')} of the test set {'is' if both == 1 else 'are'} in the "
        "training table, too: the accuracy on them says nothing of new texts. Remove them from one of the two"
    ]


def _nothing(texts: Counter[str]) -> list[str]:
    found = {text: number for text, number in texts.items() if text in NOTHING}
    if not found:
        return []
    named = ", ".join(repr(text) for text in sorted(found))
    return [f"{counted(sum(found.values()), 'row')} have {named} as their text, and count as texts: remove them if not"]

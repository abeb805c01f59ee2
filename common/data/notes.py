"""Notes on a data set that say what its rows do not: repeated texts, words for nothing, labels that mean others.

Those on labels are of public data and of simulations alone, whose rows are there to be seen.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fedveil.common.config.sections import DataConfig
from fedveil.common.data.in_memory import MARK
from fedveil.common.data.named import DATASETS
from fedveil.common.data.sources import load_dataset, read_public
from fedveil.common.tasks import TASKS
from fedveil.common.tasks.examples import Dataset, Example
from fedveil.common.tasks.roles import LABEL, SEPARATOR
from fedveil.common.words import counted

OFTEN = 5
"""Rows from which on a text occurs many times."""
MUCH = 0.05
"""Share of rows that repeat another one's text from which on a note is made of them."""
NOTHING = frozenset({"n/a", "na", "nan", "null", "none", "nil", "-", "--", "?", "unknown", "missing", "not available"})
"""Texts that say that there is none, in lower case."""
DECIMAL = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?")
"""A number, as labels have it that are amounts."""
WRITTEN_ALIKE: Mapping[str, tuple[str, str]] = {
    ".csv": ("csv({}, dtype=str, keep_default_na=False)", "to_csv({}, index=False)"),
    ".jsonl": (
        "json({}, lines=True, dtype=False, convert_dates=False)",
        'to_json({}, lines=True, orient="records", force_ascii=False)',
    ),
    ".parquet": ("parquet({})", "to_parquet({}, index=False)"),
}
"""By the kind of file, how pandas reads and writes it with its cells as they are."""
ONE, SEVERAL = "classification", "multi-label"
"""The tasks of one label a text and of any number."""
MOST_DECIMALS = 10
"""Labels that are numbers, with decimals among them, from which on a note is made of them: ratings have fewer."""
SEPARATORS = ",;|"
"""Signs between several labels of a cell."""


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
    texts = [
        *notes_on_labels(reading.dataset, config, task),
        *notes_on_texts(reading.dataset),
        *_at_several_sites(reading.dataset),
    ]
    tested = _trained_on(reading.dataset, load_dataset(config, task, config.test)) if config.test else []
    where = "data" if config.name.startswith(MARK) else config.name
    return [*skipped * bool(number), *(f"{where}: {note}" for note in texts), *tested]


def notes_on_labels(data: Dataset, config: DataConfig, task: str) -> Iterator[str]:
    """Yield what to know of the labels that were read off a column, a sentence each.

    Labels that ``data.labels`` names are meant so.
    """
    names: Sequence[str] = data.label_names if not config.labels else ()
    column, known = config.columns[LABEL.setting], config.columns[SEPARATOR.setting]
    roles = TASKS[task].roles
    if len(alike := _alike(names)) < len(names):
        unlike = next(group for group in alike if len(group) > 1)
        yield (
            f"the column {column!r} has {len(names)} labels, and {len(alike)} but for case: "
            f"{', '.join(map(repr, unlike))} are one label each. If one is meant, "
            + (_merged(config.name, column) if LABEL in roles else "write them alike")
        )
    if len(names) > MOST_DECIMALS and all(map(DECIMAL.fullmatch, names)) and not all(map(str.isdecimal, names)):
        yield (
            f"the {len(names)} labels in {column!r} are numbers, such as {names[0]}, and each is a class by itself: a "
            "classifier learns no amounts. Put ranges into the column, such as low and high"
        )
    elif sign := next((sign for sign in SEPARATORS if sign != known and _are_several(names, sign)), ""):
        advice = f"model.task = {SEVERAL!r} with " * (task == ONE) + f"data.label-separator = {sign!r} reads them"
        looks = f"{column!r} looks like several labels separated by {sign!r}, which are {len(names)} labels as they are"
        yield f"{looks}: {advice}" if task == ONE or SEPARATOR in roles else looks
    counts = Counter(label for example in data.examples for label in example.all_labels)
    for number, name in enumerate(names):
        if name.casefold() in NOTHING:
            rows = counted(counts[number], "row")
            yield f"the label {name!r} of {rows} is a class like others: remove these rows if it says there is none"


def _alike(names: Sequence[str]) -> list[list[str]]:
    """Return names that differ in case alone together; blanks around them are gone."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.lower(), []).append(name)
    return list(groups.values())


def _are_several(names: Sequence[str], sign: str) -> bool:
    """Return whether some labels are several others with a sign between: in parts they are fewer, and none is empty."""
    parts = [[part.strip() for part in name.split(sign)] for name in names]
    distinct = {part for own in parts for part in own}
    return any(len(own) > 1 for own in parts) and len(distinct) < len(names) and "" not in distinct


def _merged(source: str, column: str) -> str:
    """Return how labels of a table come to differ in more than case, as the end of a sentence."""
    path, own = Path(source), json.dumps(column, ensure_ascii=False)
    if source.startswith(MARK):
        return f"write them alike: frame[{own}] = frame[{own}].str.lower()"
    if path.suffix.lower() not in WRITTEN_ALIKE:
        return "write them alike"
    options, writer = WRITTEN_ALIKE[path.suffix.lower()]
    old, new = (json.dumps(str(name), ensure_ascii=False) for name in (path, path.with_stem(f"{path.stem}-lower")))
    code = (
        f"import pandas; t = pandas.read_{options.format(old)}; t[{own}] = t[{own}].str.lower(); t.{writer.format(new)}"
    )
    return f"take what this writes: python -c {shlex.quote(code)}"


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

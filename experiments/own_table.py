"""A table of one's own in a simulation: guesses of columns where one choice is sure, and the test set's size.

A guess opens the table. So it is for simulations alone: real sites and what is submitted to them guess nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from fedveil.common.config.flat import Scalar, defaults
from fedveil.common.config.run import RunConfig
from fedveil.common.data.in_memory import MARK, tables_in_memory
from fedveil.common.data.named import DATASETS
from fedveil.common.data.sources import train_and_test
from fedveil.common.errors import ConfigError, DataError
from fedveil.common.files import expanded
from fedveil.common.tasks import TASKS
from fedveil.common.tasks.cells import is_missing, plain
from fedveil.common.tasks.conll import read_conll
from fedveil.common.tasks.table_files import READERS, read_file
from fedveil.common.tasks.tables import Table

TASK = "classification"
"""The task of which columns are guessed."""
BY_WORD = "token-classification"
"""The one task that reads files of a word and its label a line."""
SHARE, LEAST_TEST, LARGEST_SHARE = 10, 100, 3
"""The test set is a tenth of the table; 100 rows at least, as long as that is no more than a third."""
MOST_LABELS, LEAST_EACH, LONGEST_LABEL = 50, 5, 60
"""What a column of labels has: at most so many values, each so many times on average, none of more characters."""
LONGEST_CODE = 6
"""Most characters of a label in capitals that is taken for a code."""
LEAST_WORDS, LEAST_UNLIKE = 3, 0.5
"""What a column of texts has: so many words on average, and so large a share of texts that are not repeated."""


def with_guesses(settings: Mapping[str, Scalar], option: str = "--") -> tuple[dict[str, Scalar], list[str]]:
    """Return settings with the columns and the test size that a table of one's own suggests, and a line on each guess.

    What is written out stays as it is. A table that cannot be read is left to what reads its records.

    Args:
        settings: flat.
        option: what stands before ``text`` and ``label`` where people name columns.
    """
    tables = _own_tables(str(settings.get("data.name", "")))
    if not tables:
        return dict(settings), []
    given, said = dict(settings), list[str]()
    if "model.task" not in given and not given.get("resume") and all(map(_is_conll, tables)):
        given["model.task"] = BY_WORD
        said.append(f"{Path(tables[0].origin).name} has a label for each word, so model.task is {BY_WORD!r}")
    if given.get("model.task", TASK) == TASK:
        columns = _guessed(tables[0], given)
        given |= columns
        said += [_words(tables[0], columns, option)] * bool(columns)
    if not given.get("data.test") and "data.test-size" not in given:
        given["data.test-size"] = held_out(sum(table.size for table in tables))
    return given, said


def hints(config: RunConfig) -> list[str]:
    """Return what would help a run, a line each: here, that labels are codes from which no head can start."""
    if config.head.start != "label-words" or config.head.phrases or config.data.name in DATASETS:
        return []
    if TASKS[config.model.task].by_token:  # of its labels the codes B- and I- are meant
        return []
    labels = train_and_test(config.data, config.model.task)[1].label_names
    coded = [label for label in labels if label.isdecimal() or (label.isupper() and len(label) <= LONGEST_CODE)]
    if 2 * len(coded) <= len(labels):
        return []
    return [
        f"The labels {', '.join(coded[:3])}{', ...' * (len(coded) > 3)} are codes, so the classification head starts "
        "without knowing what they mean: tell it with head.phrases, the phrases of one label separated by |, labels by "
        f";, in the order {', '.join(labels)}. It uses no records"
    ]


def _is_conll(table: Table) -> bool:
    return READERS.get(Path(table.origin).suffix.lower()) is read_conll


def held_out(rows: int) -> int:
    """Return the size of the test set of a table for which none is set.

    >>> held_out(30), held_out(600), held_out(2000), held_out(50_000)
    (10, 100, 200, 1000)
    """
    most = int(defaults(RunConfig)["data.test-size"])
    return max(1, min(most, max(rows // SHARE, min(LEAST_TEST, rows // LARGEST_SHARE))))


def _own_tables(name: str) -> list[Table]:
    if name.startswith(MARK):
        return tables_in_memory(name)
    path = expanded(name)
    if name in DATASETS or path.suffix.lower() not in READERS or not path.is_file():
        return []
    try:
        return [read_file(path)]
    except (ConfigError, DataError):
        return []


def _guessed(table: Table, given: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Return the columns of texts and labels that no setting names and that have other names than usual."""
    found: dict[str, Scalar] = {}
    named = {str(value) for key, value in given.items() if key.startswith("data.")}
    for usual, looks in (("label", _is_label), ("text", _is_text)):
        if f"data.{usual}" not in given and usual not in table.columns:
            others = [name for name in table.columns if name not in {*named, *found.values()} - {""}]
            column = _only(name for name in others if name.strip().lower() == usual)
            column = column or _only(name for name in others if looks(table.columns[name]))
            found |= {f"data.{usual}": column} if column else {}
    return found


def _only(names: Iterable[str]) -> str:
    """Return the one name that there is; empty: there is none, or there are several."""
    found = list(names)
    return found[0] if len(found) == 1 else ""


def _cells(column: Sequence[object]) -> list[str] | None:
    """Return the filled cells of a column; None: one is neither text nor a number."""
    filled = [cell for cell in column if not is_missing(cell)]
    return [plain(cell).strip() for cell in filled] if all(isinstance(c, str | int | float) for c in filled) else None


def _is_label(column: Sequence[object]) -> bool:
    cells = _cells(column) or []
    values = set(cells)
    return 2 <= len(values) <= min(MOST_LABELS, len(cells) // LEAST_EACH) and max(map(len, values)) <= LONGEST_LABEL


def _is_text(column: Sequence[object]) -> bool:
    cells = _cells(column) or []
    words = sum(len(cell.split()) for cell in cells)
    return words > 0 and words >= LEAST_WORDS * len(cells) and len(set(cells)) >= LEAST_UNLIKE * len(cells)


def _words(table: Table, columns: Mapping[str, Scalar], option: str) -> str:
    roles = {"data.text": "texts", "data.label": "labels"}
    what = " and ".join(f"{roles[key]} in {columns[key]!r}" for key in roles if key in columns)
    flags = " and ".join(key.replace("data.", option) for key in roles if key in columns)
    return f"Guessed columns of {Path(table.origin).name}: {what} ({flags} would name others)"

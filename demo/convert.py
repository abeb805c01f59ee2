"""Put data sets that no package carries where FedVeil looks for them, or write the sentences of a data set to a file.

    python -m fedveil.demo.convert sst2 FOLDER                  # GLUE's train.tsv and dev.tsv; test.tsv if labelled
    python -m fedveil.demo.convert snli FOLDER                  # snli_1.0_train.jsonl and its like, or train.jsonl
    python -m fedveil.demo.convert qnli FOLDER                  # GLUE's train.tsv and dev.tsv
    python -m fedveil.demo.convert btc FOLDER                   # the Broad Twitter Corpus' a.conll and so on
    python -m fedveil.demo.convert sentences imdb imdb.txt      # of a named data set, as ``start.text`` takes them
    python -m fedveil.demo.convert persons imdb persons.csv     # sentences of reviews, each author of one a person
    python -m fedveil.demo.convert table medmcqa-specialties questions.csv     # as a table of your own would be

The first three write ``data/sst2/train.tsv`` and so on, of which the columns are ``text``, ``label`` and, of pairs,
``text_pair``; of ``btc`` the words, their labels and the section, with the second half of section H as the test. FOLDER
is the public distribution, unpacked. Rows without a label are left out, and counted.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedveil.common.check import nearest
from fedveil.common.config.sections import DataConfig
from fedveil.common.data.named import DATASETS
from fedveil.common.data.sentences import FEWEST_WORDS, sentences_of
from fedveil.common.data.sources import load_dataset
from fedveil.common.errors import ConfigError, DataError, FedVeilError
from fedveil.common.starts.public_text import as_file, data_set_sentences
from fedveil.common.tasks.cells import is_missing, plain
from fedveil.common.tasks.examples import Dataset
from fedveil.common.tasks.table_files import read_file
from fedveil.common.tasks.tables import Table

PERSONS, RECORDS_OF_ONE = 2000, 8
"""Authors whose reviews are cut into records, and the most sentences of one."""
UNLABELLED = ("-", "-1")
"""What stands in place of a label that annotators did not agree on."""


SECTIONS = "abegh"
"""Of the Broad Twitter Corpus, but for F, the usual test, which is kept apart."""


@dataclass(frozen=True)
class Layout:
    """A public distribution: what its files and columns are called, and what ours are."""

    splits: Mapping[str, tuple[str, ...]]
    """Our file by the names that the distribution's may have, the first that is there."""
    columns: Mapping[str, tuple[str, ...]]
    """Our column by the names that theirs may have."""


LAYOUTS: Mapping[str, Layout] = {
    "sst2": Layout(
        {f"{split}.tsv": (f"{split}.tsv",) for split in ("train", "dev", "test")},
        {"text": ("sentence", "content"), "label": ("label",)},
    ),
    "snli": Layout(
        {f"{split}.jsonl": (f"snli_1.0_{split}.jsonl", f"{split}.jsonl") for split in ("train", "dev", "test")},
        {"text": ("sentence1", "premise"), "text_pair": ("sentence2", "hypothesis"), "label": ("gold_label", "label")},
    ),
    "qnli": Layout(
        {f"{split}.tsv": (f"{split}.tsv",) for split in ("train", "dev")},
        {"text": ("question",), "text_pair": ("sentence",), "label": ("label",)},
    ),
}


def convert(corpus: str, source: Path, target: Path) -> list[str]:
    """Write a corpus's files to ``target / corpus``; return a line for people about each.

    Args:
        corpus: a key of ``LAYOUTS``.
        source: folder with the public distribution's files.
        target: folder that data sets are looked for in.

    Raises:
        ConfigError: there is no such corpus.
        DataError: ``source`` has none of its files, or a file lacks a column, or holds a cell that a TSV cannot.
    """
    if corpus not in LAYOUTS:
        raise ConfigError(f"there is no layout {corpus!r}{nearest(corpus, LAYOUTS)}: name one of {', '.join(LAYOUTS)}")
    layout, lines = LAYOUTS[corpus], []
    for ours, theirs in layout.splits.items():
        found = next((source / name for name in theirs if (source / name).is_file()), None)
        if found is None:
            continue
        table = read_file(found)
        columns = {own: _column(table, names) for own, names in layout.columns.items()}
        if not columns["label"]:
            lines.append(f"{found}: left out, for it has no labels")
            continue
        rows, left = _rows(table, columns)
        path = target / corpus / ours
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, tuple(columns), rows)
        lines.append(f"{path}: {len(rows)} records" + (f", {left} rows without a label left out" if left else ""))
    if not lines:
        wanted = ", ".join(name for names in layout.splits.values() for name in names)
        raise DataError(f"{source} holds none of the files of {corpus!r}: {wanted}")
    return lines


def convert_names(source: Path, target: Path) -> list[str]:
    """Write ``btc/train.jsonl`` and ``btc/test.jsonl`` below ``target``; return a line for people about each.

    Raises:
        DataError: a section's file is not in ``source``, or cannot be read.
    """
    rows: dict[str, list[str]] = {"train": [], "test": []}
    for section in SECTIONS:
        table = read_file(source / f"{section}.conll")
        whole = list(zip(table.columns["text"], table.columns["label"], strict=True))
        for number, (words, labels) in enumerate(whole):
            if number in table.unread:  # a word without a sign
                continue
            row = {"text": words, "label": labels, "section": section}
            split = "test" if section == SECTIONS[-1] and number > len(whole) // 2 else "train"
            rows[split].append(json.dumps(row, ensure_ascii=False) + "\n")
    (target / "btc").mkdir(parents=True, exist_ok=True)
    for split, lines in rows.items():
        (target / "btc" / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return [f"{target / 'btc' / split}.jsonl: {len(lines)} records" for split, lines in rows.items()]


def write_sentences(name: str, path: Path) -> str:
    """Write the sentences of a named data set to a file, one a line; return a line for people with its SHA-256.

    Raises:
        ConfigError: there is no such data set.
        DataError: it cannot be read.
    """
    if name not in DATASETS:
        raise ConfigError(f"there is no data set {name!r}{nearest(name, DATASETS)}: name one of {', '.join(DATASETS)}")
    content = as_file(found := data_set_sentences(name))
    path.write_bytes(content)
    return f"{path}: {len(found)} sentences, SHA-256 {hashlib.sha256(content).hexdigest()}"


def write_persons(name: str, path: Path) -> str:
    """Write sentences of the texts of a named data set to a CSV file with a column that says whose they are.

    Each text is taken for one person's. Its first sentences that are long enough to tell are records with its label.

    Raises:
        ConfigError: there is no such data set.
        DataError: it cannot be read, or its records have no label.
    """
    found = _labelled(name)
    # By a hash of their own: in their own order they may be sorted by label.
    mixed = sorted(found.examples, key=lambda one: hashlib.sha256("".join(one.texts()).encode()).digest())
    rows = [
        (sentence, found.label_names[one.label or 0], f"person-{person}")
        for person, one in enumerate(mixed[:PERSONS])
        for sentence in [s for s in sentences_of(one.texts()[0]) if len(s.split()) >= FEWEST_WORDS][:RECORDS_OF_ONE]
    ]
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label", "person"), *rows])
    return f"{path}: {len(rows)} records of {len({person for *_, person in rows})} persons"


def write_table(name: str, path: Path) -> str:
    """Write a named data set with labels to a CSV file of columns text and label, as a table of the user's would be.

    Raises:
        ConfigError: there is no such data set.
        DataError: it cannot be read, or its records have no label.
    """
    found = _labelled(name)
    # On one line each, so that a site reads them as well.
    rows = [(" ".join(one.texts()[0].split()), found.label_names[one.label or 0]) for one in found.examples]
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return f"{path}: {len(rows)} records"


def _labelled(name: str) -> Dataset:
    """Return a named data set; ConfigError if there is none, DataError if its records have no label."""
    if name not in DATASETS:
        raise ConfigError(f"there is no data set {name!r}{nearest(name, DATASETS)}: name one of {', '.join(DATASETS)}")
    found = load_dataset(DataConfig(name=name), DATASETS[name].task)
    if not found.label_names:
        raise DataError(f"{name} has no labels, which this table is of: name another")
    return found


def _column(table: Table, names: Sequence[str]) -> str:
    found = next((name for name in names if name in table.columns), "")
    if not found and "label" not in names:
        raise DataError(f"{table.origin} has no column {' or '.join(names)}; it has {', '.join(table.columns)}")
    return found


def _rows(table: Table, columns: Mapping[str, str]) -> tuple[list[list[str]], int]:
    if table.unread:
        raise DataError(next(iter(table.unread.values())).words)
    cells = [
        [plain(cell).strip() if not is_missing(cell) else "" for cell in table.columns[c]] for c in columns.values()
    ]
    place = list(columns).index("label")
    rows = [list(row) for row in zip(*cells, strict=True)]
    kept = [row for row in rows if all(row) and row[place] not in UNLABELLED]
    return kept, len(rows) - len(kept)


def _write(path: Path, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) + "\n" for row in rows)
            return
        try:
            writer = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None, lineterminator="\n")
            writer.writerows([columns, *rows])
        except csv.Error as error:
            raise DataError(f"{path} cannot be written as TSV ({error}): a cell holds a tab or a line's end") from error


WRITERS = {"sentences": write_sentences, "persons": write_persons, "table": write_table}
"""What takes a data set's name and the file to write to."""


def main(words: Sequence[str]) -> int:
    """Do what the command line says; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m fedveil.demo.convert", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("what", help=f"{', '.join([*LAYOUTS, 'btc', *WRITERS][:-1])} or table")
    parser.add_argument("source", help="the public distribution's folder; of the last three, a data set's name")
    parser.add_argument("target", nargs="?", default="data", help="the folder to write to; of those, the file")
    asked = parser.parse_args(words)
    try:
        if asked.what in WRITERS:
            lines = [WRITERS[asked.what](asked.source, Path(asked.target))]
        elif asked.what == "btc":
            lines = convert_names(Path(asked.source), Path(asked.target))
        else:
            lines = convert(asked.what, Path(asked.source), Path(asked.target))
    except (FedVeilError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

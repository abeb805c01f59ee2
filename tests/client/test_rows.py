"""A row that is no record changes nothing that leaves a site that protects its records, and its steward knows of it."""

from __future__ import annotations

import json
import logging
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fedveil.client.site
from audits.tiny_models import write_questions
from audits.tiny_site import OneSite, clinic
from fedveil.client.ledger.ledger import Ledger
from fedveil.client.outgoing import UNTOLD
from fedveil.client.site import open_site
from fedveil.common.config.flat import Columns
from fedveil.common.config.sections import DataConfig
from fedveil.common.data.sources import Reading, load_dataset, load_protected
from fedveil.common.errors import DataError, LedgerError, UnreadableFile
from fedveil.common.messages import header
from fedveil.common.messages.round import Refusal, Reply, TrainResult
from fedveil.common.messages.wire import encode_reply
from fedveil.common.tasks import table_files, tables
from fedveil.common.tasks.cells import CELL_CHARACTERS
from fedveil.common.tasks.tables import Unfit
from fedveil.privacy import dpsgd, randomness
from fedveil.strategies.job import configure

pytestmark = [pytest.mark.slow, pytest.mark.rough_prices, pytest.mark.one_length]

ODD = {
    "no text": '" ",good,a1\n',
    "no label": "the film,,a1\n",
    "an unknown label": "the film,fair,a1\n",
    "too few cells": "the film,good\n",
    "too many cells": "the film,good,a1,more,cells\n",
    "a large cell": f"{'film ' * 30_000},good,a1\n",
}
"""Rows of a CSV file that are no records."""
ODD_LINES = {
    "not JSON": "{'text': 1}",
    "no object": '["the film", "good"]',
    "a name twice": '{"text": "x", "text": "y", "label": "good"}',
    "nested without end": "[" * 100_000,
    "no label": '{"text": "the film"}',
    "null": '{"text": null, "label": "good"}',
    "a list": '{"text": ["the", "film"], "label": "good"}',
    "infinite": '{"text": Infinity, "label": "good"}',
    "not a number": '{"text": NaN, "label": "good"}',
    "half a character": '{"text": "film \\ud800", "label": "good"}',
    "a number of 5000 digits": f'{{"text": {"9" * 5000}, "label": "good"}}',
    "a large cell": json.dumps({"text": "film " * 30_000, "label": "good"}),
}
BROKEN = {
    "an open quote in the header": b'"text,label\nthe film,good\na quiet scene,bad\n',
    "a header that is not UTF-8": "text,caf\u00e9,label\nthe film,,good\n".encode("latin-1"),
    "no rows": b"text,label\n",
    "nothing": b"",
    "two columns of one name": b"text,text,label\na,b,good\n",
}
"""CSV files whose rows cannot be told apart, or that have none."""

BROKEN_LINES = {
    "a cell that goes on behind its quote": b'"Great" movie,good',
    "an open quote": b'"never closed,bad',
    "a quote in quotes": b'"the "film"",good',
    "not UTF-8": "the caf\u00e9,good".encode("latin-1"),
    "another line break": b"the film\rthe scene,good",
}
"""Lines that are no rows of a CSV file with the columns text and label."""


def data_of(site: OneSite) -> Path:
    return Path(str(site.node["data"]))


@pytest.fixture
def fixed_noise(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Make noise and batches follow a seed, and a message's random bytes be zeros; return what starts them anew."""
    generator = torch.Generator()

    def noised(total: torch.Tensor, std: float) -> torch.Tensor:
        return total + torch.randn(total.shape, generator=generator, dtype=torch.float64) * std

    def every_third(size: int, rate: float) -> torch.Tensor:
        return torch.arange(0, size, 3)

    for module in (dpsgd, fedveil.client.evaluation):
        monkeypatch.setattr(module, "add_private_noise", noised)
    monkeypatch.setattr(randomness, "private_poisson_sample", every_third)
    monkeypatch.setattr(header.secrets, "token_bytes", bytes)
    return lambda: generator.manual_seed(5) and None


class Asked:
    """A site whose model, and so its task, is built from records that fit, before any odd row comes."""

    def __init__(self, site: OneSite) -> None:
        self.site, self.number, self.task = site, 0, site.task()
        self(lambda: None)  # the rehearsal of the model draws from the same generator, once

    def __call__(self, start: Callable[[], None]) -> Reply:
        """Ask for round 1 as if the site had never been asked before."""
        self.number += 1
        self.site.node["ledger"] = str(data_of(self.site).with_name(f"ledger-{self.number}.sqlite"))
        self.site.memory.clear()
        fedveil.client.site._own_data.cache_clear()
        start()
        return self.site.ask(self.task)


def check_that_a_row_changes_nothing(site: OneSite, rows: list[str], start: Callable[[], None]) -> None:
    """Fail unless all replies with one of ``rows`` at the end of the data are, to the last byte, the one without."""
    ask, text = Asked(site), data_of(site).read_text(encoding="utf-8")
    without = ask(start)
    assert isinstance(without, TrainResult), without
    charged = site.charges()
    for row in rows:
        data_of(site).write_text(text + row, encoding="utf-8")
        reply = ask(start)
        assert isinstance(reply, TrainResult), "a row that is no record shows as a refusal"
        assert encode_reply(reply) == encode_reply(without), "a row that is no record contributes"
        assert site.charges() == charged == [("1", 1, "training")]


def test_a_row_that_is_no_record_changes_no_byte_of_the_reply(
    site: OneSite, fixed_noise: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_that_a_row_changes_nothing(site, [*ODD.values(), '"never closed,good,a1\n'], fixed_noise)

    def strictly(config: DataConfig, task: str, source: str, **_: Any) -> Reading:
        return Reading(load_dataset(config, task, source))

    # Planted fault: what is an error in public data is one here.
    monkeypatch.setattr("fedveil.client.site.load_protected", strictly)
    data_of(site).unlink()
    for row in ODD.values():
        again = clinic(site.settings, data_of(site).parent)
        with pytest.raises(AssertionError, match="shows as a refusal"):
            check_that_a_row_changes_nothing(again, [row], fixed_noise)


def test_a_line_that_is_no_record_changes_no_byte_of_the_reply(site: OneSite, fixed_noise: Callable[[], None]) -> None:
    examples = load_dataset(DataConfig(name=str(data_of(site))), "classification").examples
    lines = [json.dumps({"text": e.text, "label": ("bad", "good")[e.label or 0]}) for e in examples]
    path = data_of(site).with_suffix(".jsonl")
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")
    site.node["data"] = str(path)
    check_that_a_row_changes_nothing(site, [f"{line}\n" for line in ODD_LINES.values()], fixed_noise)


def test_an_odd_cell_of_a_parquet_file_is_a_row_that_is_no_record(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Microseconds since 1970 that no Python time can hold, in a column that the run does not read.
    seen = pa.array([0, -(2**62)], pa.int64()).cast(pa.timestamp("us"))
    path = tmp_path / "notes.parquet"
    pq.write_table(pa.table({"text": ["a film", "a scene"], "label": ["good", "fair"], "seen": seen}), path)
    reading = load_protected(DataConfig(name=str(path), labels="bad,good"), "classification")
    assert [e.text for e in reading.dataset.examples] == ["a film"]
    assert [(row.row, row.reason) for row in reading.unfit] == [(2, "has a label that is not among data.labels")]
    by_time = load_protected(
        DataConfig(name=str(path), columns=Columns({"text": "seen"}), labels="bad,good"), "classification"
    )
    assert [row.reason for row in by_time.unfit] == [
        "has a datetime in column 'seen' (data.text)",
        "has a cell in column 'seen' (data.text)",
    ]


def told(load: Callable[[DataConfig, str], object], questions: list[DataConfig]) -> set[str]:
    """Play the hostile server: return how rounds whose labels or columns ask about records would end."""

    def ending(question: DataConfig) -> str:
        try:
            load(question, "classification")
        except DataError:
            return "refused before the charge"
        return "answered"

    return {ending(question) for question in questions}


def test_no_choice_of_labels_or_columns_asks_a_question_for_free(tmp_path: Path) -> None:
    rows = [f"the film was lovely,good,{1000 + i % 3},\n" for i in range(40)] + ["the film was dull,bad,9037,x\n"]
    path = tmp_path / "own.csv"
    path.write_text("".join(["text,label,postcode,note\n", *rows]), encoding="utf-8")
    asked = [("postcode", "1000,1001,1002"), ("postcode", "1000,1001,1002,9037"), ("label", "good,fair")]
    questions = [
        DataConfig(name=str(path), columns=Columns({"label": label}), labels=labels) for label, labels in asked
    ]
    questions += [
        DataConfig(name=str(path), columns=Columns({"text": text}), labels="bad,good") for text in ("note", "postcode")
    ]
    assert told(load_protected, questions) == {"answered"}
    # Planted fault: the old reading tells by a refusal, free of charge, whether all records have one of these values.
    assert told(load_dataset, questions) == {"answered", "refused before the charge"}


@pytest.mark.parametrize("number", [0, 1])
def test_a_site_without_a_single_record_answers_with_noise_and_pays(site: OneSite, number: int) -> None:
    site.rule(send_noised_metrics=True)
    if not number:
        site.settings |= {"strategy": "fed-sb", "adapter.start": "dp-gradient"}
    task = site.task(number) if number else replace(site.task(0), state={}, basis={}, basis_fingerprint="")
    data_of(site).write_text("text,label\n,\n,good\nthe film,\n", encoding="utf-8")
    fedveil.client.site._own_data.cache_clear()
    reply = site.ask(task)
    assert isinstance(reply, TrainResult), reply
    assert site.charges()[0] == ("1", number, "training" if number else "initialisation"), site.charges()
    sent = torch.cat([t.flatten() for factors in reply.contribution.values() for t in factors.values()])
    assert sent.std() > 0, "nothing was noised"
    assert (reply.noised_correct is not None) == bool(number)


def test_a_generative_site_without_a_single_record_answers_too(toy_generation: dict[str, Any], tmp_path: Path) -> None:
    site = clinic(toy_generation, tmp_path)
    site.node["data"] = str(write_questions(tmp_path / "own.csv", 30))
    task = site.task()
    (tmp_path / "own.csv").write_text('prompt,completion\nquestion,\n,one\nquestion," "\n', encoding="utf-8")
    fedveil.client.site._own_data.cache_clear()
    assert isinstance(site.ask(task), TrainResult)


def test_a_file_that_breaks_while_a_site_is_online_is_answered_by_noise_whatever_is_wrong_with_it(
    site: OneSite, fixed_noise: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    ask, replies = Asked(site), []
    for content in BROKEN.values():
        data_of(site).write_bytes(content)
        caplog.clear()
        replies.append(ask(fixed_noise))
        assert site.charges(), "it was answered for free"
        assert "no record is read, and rounds cost the same" in caplog.text, "the site's own log does not say so"
        assert "a quiet scene" not in caplog.text, "the log quotes a record"
    assert all(isinstance(reply, TrainResult) for reply in replies)
    assert len({str(encode_reply(reply)) for reply in replies}) == 1, "the reply tells what is wrong"


def test_a_file_that_stays_broken_is_said_in_every_round_by_log_and_ledger(
    site: OneSite, caplog: pytest.LogCaptureFixture
) -> None:
    tasks = [site.task(1), site.task(2)]
    data_of(site).write_bytes(next(iter(BROKEN.values())))
    fedveil.client.site._own_data.cache_clear()
    assert all(isinstance(site.ask(task), TrainResult) for task in tasks)
    assert caplog.text.count("no record is read, and rounds cost the same") == 2
    with Ledger(site.ledger) as ledger:
        failures = ledger.failures()
    assert [(row.dataset, row.round_number) for row in failures] == [("clinic", 1), ("clinic", 2)]
    assert not any("a quiet scene" in row.reason for row in failures), "the ledger quotes a record"


def test_a_ledger_that_cannot_note_a_broken_file_is_no_refusal(
    site: OneSite, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise LedgerError("the disk is full")

    task = site.task(1)
    data_of(site).write_bytes(next(iter(BROKEN.values())))
    fedveil.client.site._own_data.cache_clear()
    monkeypatch.setattr(Ledger, "fail", full)
    assert isinstance(site.ask(task), TrainResult), "the refusal tells that no record is read"
    assert "the ledger has no row of a round that failed: the disk is full" in caplog.text


def test_data_that_are_gone_are_one_refusal_without_a_path(site: OneSite) -> None:
    ask = Asked(site)
    data_of(site).unlink()
    reply = ask(lambda: None)
    assert isinstance(reply, Refusal)
    assert (reply.kind, reply.reason) == ("failed", UNTOLD)


def test_the_sites_own_log_has_reasons_and_no_row(site: OneSite, caplog: pytest.LogCaptureFixture) -> None:
    ask = Asked(site)
    rows = ["the secret film,fair,a1\n", "the secret film,fine,a1\n", "a secret scene,,a1\n"]
    data_of(site).write_text(data_of(site).read_text(encoding="utf-8") + "".join(rows), encoding="utf-8")
    with caplog.at_level(logging.INFO, "fedveil.site"):
        ask(lambda: None)
    (line,) = [r.getMessage() for r in caplog.records if "no records" in r.getMessage()]
    assert "2 × has a label that is not among data.labels; 1 × has no value in column 'label' (data.label)" in line
    assert not any(word in line for word in ("secret", "fair", "fine", "scene"))


# What the two ways of reading say of the same file.


def reading_of(path: Path) -> list[Unfit]:
    return list(load_protected(DataConfig(name=str(path), labels="bad,good"), "classification").unfit)


@pytest.mark.parametrize("row", ODD.values(), ids=ODD.keys())
def test_public_data_with_such_a_row_are_an_error_that_names_it(row: str, tmp_path: Path) -> None:
    path = tmp_path / "reviews.csv"
    path.write_text(f"text,label,author\nthe film,good,a1\n{row}", encoding="utf-8")
    with pytest.raises(DataError, match="line 3 has") as strict:
        load_dataset(DataConfig(name=str(path), labels="bad,good"), "classification")
    (unfit,) = reading_of(path)
    assert unfit.row == 3
    assert str(strict.value) in (unfit.words, f"{unfit.words}; data.invalid-rows = 'skip' leaves such rows out")
    assert "fair" not in unfit.reason, "the reason quotes the row"


@pytest.mark.parametrize("line", BROKEN_LINES.values(), ids=BROKEN_LINES.keys())
def test_a_line_that_is_no_row_is_an_error_of_public_data_and_one_row_of_protected(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "reviews.csv"
    path.write_bytes(b"text,label\nthe film,good\n" + line + b"\nthe scene,bad\n")
    config = DataConfig(name=str(path), labels="bad,good")
    with pytest.raises(DataError, match=r"reviews\.csv"):
        load_dataset(config, "classification")
    reading = load_protected(config, "classification")
    assert [e.text for e in reading.dataset.examples] == ["the film", "the scene"]
    assert [(row.row, row.of_file) for row in reading.unfit] == [(3, True)]
    assert "film" not in reading.unfit[0].reason + reading.unfit[0].words, "it quotes the row"


def test_a_quote_that_nobody_doubled_takes_no_other_record_along(
    site: OneSite, fixed_noise: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One record begins with a quote, and another, far behind it, ends a cell with one: both as they were typed."""
    header, *rows = data_of(site).read_text(encoding="utf-8").splitlines(keepends=True)
    rows[-3] = f'the screen of 50",{rows[-3].split(",", 1)[1]}'

    def written(*odd: str) -> None:
        data_of(site).write_text("".join([header, *odd, *rows]), encoding="utf-8")

    def sent() -> list[bytes]:
        ask, replies = Asked(site), []
        for odd in ([], ['"film,good,a1\n']):
            written(*odd)
            replies.append(encode_reply(ask(fixed_noise)))
        return replies

    written()
    without, with_it = sent()
    assert without == with_it, "one record more has changed what others contribute"
    # Planted fault: cells may hold line breaks, and the file is not of a program that doubles quotes.
    monkeypatch.setattr(
        "fedveil.client.site.load_protected", lambda *place, **_: load_protected(*place, line_breaks=True)
    )
    written()
    without, with_it = sent()
    assert without != with_it


def test_cells_have_line_breaks_by_the_stewards_word_alone(site: OneSite) -> None:
    header = data_of(site).read_text(encoding="utf-8").splitlines()[0]
    content = f'{header}\n"a film\nof two, or three, lines",good,a1\nthe scene,bad,a2\n'
    data_of(site).write_text(content, encoding="utf-8", newline="")
    for breaks, texts in ((False, ["the scene"]), (True, ["a film\nof two, or three, lines", "the scene"])):
        site.rule(line_breaks=breaks)
        opened = open_site(site.node, configure(site.settings).config, "1", simulated=False)
        assert [e.text for e in opened.data.examples] == texts


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_a_file_whose_rows_cannot_be_told_apart_is_an_error_of_public_data_and_named_of_protected(
    content: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "reviews.csv"
    path.write_bytes(content)
    config = DataConfig(name=str(path), labels="bad,good")
    with pytest.raises(UnreadableFile, match=r"reviews\.csv") as strict:
        load_dataset(config, "classification")
    assert "\n" not in str(strict.value)
    reading = load_protected(config, "classification")
    assert (reading.dataset.examples, reading.unreadable) == ((), (str(strict.value),))


def test_of_a_folder_the_files_that_can_be_read_are(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(BROKEN["an open quote in the header"])
    (tmp_path / "b.csv").write_text("text,label\nthe film,good\n", encoding="utf-8")
    reading = load_protected(DataConfig(name=str(tmp_path), labels="bad,good"), "classification")
    assert len(reading.dataset.examples) == len(reading.unreadable) == 1


def test_a_cell_of_the_largest_size_is_read_and_csvs_own_limit_stays_as_it_was(tmp_path: Path) -> None:
    import csv

    path, before = tmp_path / "reviews.csv", csv.field_size_limit()
    for more, fit in ((0, 1), (1, 0)):
        path.write_text(f"text,label\n{'x' * (CELL_CHARACTERS + more)},good\n", encoding="utf-8")
        reading = load_protected(DataConfig(name=str(path), labels="bad,good"), "classification")
        assert len(reading.dataset.examples) == fit
    assert csv.field_size_limit() == before


def test_a_name_that_no_json_line_has_is_no_error_of_protected_data(tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text('{"text": "x", "label": "good"}\n', encoding="utf-8")
    config = DataConfig(name=str(path), columns=Columns({"text": "note"}), labels="bad,good")
    with pytest.raises(DataError, match="has no column 'note'"):
        load_dataset(config, "classification")
    assert [row.row for row in load_protected(config, "classification").unfit] == [1]


def check_that_no_row_is_held_by_anothers_names(folder: Path) -> None:
    """Read 400 rows beside one of 4,000 names: what they hold together is no product of the two."""
    rows = [f'{{"text": "the film {i}", "label": "good"}}' for i in range(400)]
    wide = json.dumps({"text": "one", "label": "bad"} | {str(i): i for i in range(4000)})
    config = DataConfig(labels="bad,good")
    peaks = []
    for number, lines in enumerate(([*rows, wide], [*rows, rows[0]])):
        path = folder / f"{number}.jsonl"
        path.write_text("\n".join(lines), encoding="utf-8")
        load_protected(config, "classification", str(path))  # what a first reading imports is none of it
        tracemalloc.start()
        try:
            assert len(load_protected(config, "classification", str(path)).dataset.examples) == 401
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[0] - peaks[1] < 400 * 4000 * 4, f"{peaks} bytes beside a wide row and without one"


def test_a_row_of_many_names_takes_no_other_ones_time_or_memory(tmp_path: Path) -> None:
    check_that_no_row_is_held_by_anothers_names(tmp_path)


def test_a_table_of_all_rows_by_all_names_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def whole(rows: Any) -> dict[str, list[Any]]:
        return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}

    monkeypatch.setattr(table_files, "Objects", whole)
    monkeypatch.setattr(tables.Table, "row", lambda own, at: ((name, cells[at]) for name, cells in own.columns.items()))
    with pytest.raises(AssertionError, match="beside a wide row"):
        check_that_no_row_is_held_by_anothers_names(tmp_path)


def test_the_whole_row_is_known_again_from_another_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,stars,label\nthe film, 4 ,good\nthe scene,,bad\n", encoding="utf-8")
    lines = [
        '{"label": "good", "text": "the film", "stars": 4.0}',
        '{"text": "the scene", "label": "bad", "ward": null}',
    ]
    (tmp_path / "b.jsonl").write_text("\n".join(lines), encoding="utf-8")
    rows = [
        [e.row for e in load_dataset(DataConfig(name=str(tmp_path / name)), "classification").examples]
        for name in ("a.csv", "b.jsonl")
    ]
    assert rows[0] == rows[1]
    assert len(set(rows[0])) == 2
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        assert ledger.key, "rows are hashed once more under it"

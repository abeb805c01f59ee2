"""Rows that a site holds out: by a rule that each answers by itself, never drawn, never charged, in the ledger."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from deployed import site_with_records

from audits.tiny_site import OneSite
from fedveil.client.held_out import HeldOut, held_out_of
from fedveil.client.ledger.file import key_in
from fedveil.client.ledger.ledger import Ledger
from fedveil.client.ledger.record_hashes import record_hashes
from fedveil.client.policy import Policy
from fedveil.client.site import forget_readings, open_site
from fedveil.common.config.flat import Scalar
from fedveil.common.errors import ConfigError, DataError
from fedveil.common.tasks.examples import Dataset
from fedveil.common.tasks.text import TextExample
from fedveil.deploy.site_check import check_site
from fedveil.strategies.job import configure

KEY = bytes(range(32))
DATA = Dataset(
    "ward",
    tuple(
        TextExample(text=f"note {i}", label=i % 2, person=f"p{i // 3}", part="test" if i % 4 == 0 else "train")
        for i in range(60)
    ),
    ("bad", "good"),
)
RULES = [HeldOut(column="split", value="test"), HeldOut(share=0.3), HeldOut(share=0.3, by_person=True)]
Split = Callable[[Dataset, bytes], tuple[Dataset, Dataset]]


def moved_by_others(split: Split) -> set[TextExample]:
    """Return the records that are on another side when some other record is not there."""
    whole, found = set(split(DATA, KEY)[1].examples), set[Any]()
    for left_out in DATA.examples:
        rest = Dataset("ward", tuple(e for e in DATA.examples if e is not left_out), DATA.label_names)
        found |= set(split(rest, KEY)[1].examples) ^ (whole - {left_out})
    return found


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_each_row_answers_by_itself_whether_it_is_held_out(rule: HeldOut) -> None:
    trained, held = rule.split(DATA, KEY)
    assert sorted([*trained.examples, *held.examples], key=DATA.examples.index) == list(DATA.examples)
    assert 5 < len(held.examples) < 30
    assert not moved_by_others(rule.split)


def test_a_rule_that_looks_at_other_rows_is_found() -> None:
    def first(data: Dataset, key: bytes) -> tuple[Dataset, Dataset]:
        return Dataset("t", data.examples[18:], ()), Dataset("h", data.examples[:18], ())

    assert moved_by_others(first)


def test_a_share_is_of_persons_and_of_what_rows_say_under_the_key_of_one_ledger() -> None:
    held = RULES[2].split(DATA, KEY)[1].examples
    persons = {example.person for example in held}
    assert len(held) == 3 * len(persons), "a person is on both sides"
    (copy,) = (e for e in (TextExample(text=f" NOTE  {i}", label=0) for i in range(60)) if e.text == " NOTE  7")
    both = Dataset("ward", (DATA.examples[7], copy), DATA.label_names)
    assert len(RULES[1].split(both, KEY)[1].examples) in {0, 2}, "a row and its copy are on two sides"
    assert RULES[1].split(DATA, KEY)[1] != RULES[1].split(DATA, KEY[::-1])[1], "anyone can repeat the draw"


@pytest.mark.parametrize(
    ("node", "policy", "words"),
    [
        ({"held-out-share": 0.1, "held-out-column": "a=b"}, Policy(), "are two rules for held-out rows: keep one"),
        ({"held-out-share": 1.0}, Policy(), "give a share between 0 and 1"),
        ({"held-out-share": True}, Policy(), "give a share between 0 and 1"),
        ({"held-out-column": "split"}, Policy(), "write a column and its value, such as 'split=test'"),
        ({"held-out-file": ""}, Policy(), "give a text"),
        ({"held-out-file": "own/test.csv", "data": "own"}, Policy(), "which rounds read as 'data': put it elsewhere"),
        ({"held-out-file": "own.csv", "data": "own.csv"}, Policy(), "which rounds read as 'data': put it elsewhere"),
    ],
)
def test_a_rule_that_cannot_be_followed_is_refused_in_one_line(
    node: dict[str, Scalar], policy: Policy, words: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        held_out_of({"data": "own.csv"} | node, policy)
    with pytest.raises(ConfigError, match="needs 'data'" if len(node) == 1 else "two rules|needs 'data'|data"):
        held_out_of({key: value for key, value in node.items() if key != "data"}, policy)


def with_split(site: OneSite, folder: Path) -> list[str]:
    """Give a site's rows a column by which every fourth is held out, and return the texts of these."""
    rows = list(csv.DictReader(Path(str(site.node["data"])).read_text(encoding="utf-8").splitlines()))
    path = folder / "split.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "split"])
        writer.writeheader()
        # Blank in every other row that is trained on: whoever is not held out need not say so.
        writer.writerows({**row, "split": ["test", "train", "", "train"][i % 4]} for i, row in enumerate(rows))
    site.node |= {"data": str(path), "held-out-column": "split=test"}
    return [row["text"] for row in rows[::4]]


def own(site: OneSite) -> Dataset:
    """Return what the site's rounds read."""
    forget_readings()
    return open_site(site.node, configure(site.settings).config, "1", simulated=False).data


def charged_hashes(site: OneSite) -> set[int]:
    with Ledger(site.ledger) as ledger, ledger._file.reading() as db:
        return {value for (value,) in db.execute("SELECT hash FROM records")}


def test_held_out_rows_are_neither_trained_on_nor_charged_for(site: OneSite, tmp_path: Path) -> None:
    whole = own(site)
    held = set(with_split(site, tmp_path))
    assert [e for e in whole.examples if e.text not in held] == list(own(site).examples)  # type: ignore[attr-defined]
    assert len(held) == 10
    site.train()
    left_out = Dataset("held", tuple(e for e in whole.examples if e.text in held), whole.label_names)  # type: ignore[attr-defined]
    hashes = record_hashes(left_out, key_in(site.ledger))
    rest = record_hashes(own(site), key_in(site.ledger))
    assert rest <= charged_hashes(site)
    assert not (hashes - rest) & charged_hashes(site)


def test_held_out_rows_that_are_charged_for_are_found(
    site: OneSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HeldOut, "split", lambda _, data, key: (data, data))
    with pytest.raises(AssertionError):
        test_held_out_rows_are_neither_trained_on_nor_charged_for(site, tmp_path)


def ruled(site: OneSite) -> list[str]:
    with Ledger(site.ledger) as ledger:
        return [row.rule for row in ledger.rules.all()]


def test_the_ledger_has_the_rule_before_the_first_charge_and_each_change_of_it(
    site: OneSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_split(site, tmp_path)
    monkeypatch.setattr("fedveil.client.ledger.ledger._insert", lambda *_: 1 / 0)
    site.ask(site.task())
    assert not ruled(site), "a rule was written down of a charge that was not made"
    monkeypatch.undo()
    site.train(1)
    site.train(2)
    assert ruled(site) == ["rows with 'test' in column 'split'"]
    site.node.pop("held-out-column")
    site.node["held-out-share"] = 0.25
    site.train(3)
    site.node.pop("held-out-share")
    site.train(4)
    assert ruled(site)[1:] == ["a share of 0.25 of rows, by hash under the ledger's key", ""]


def test_a_site_without_a_rule_has_no_row_and_one_that_exposes_has_its(site: OneSite, tmp_path: Path) -> None:
    site.train()
    assert not ruled(site)
    with_split(site, tmp_path)
    site.settings["privacy.mode"] = "none"
    site.rule(allow_no_privacy=True)
    site.train(1, "open")
    assert len(ruled(site)) == 1


def test_a_check_counts_held_out_rows_and_stops_where_none_is(tmp_path: Path) -> None:
    rows = "text,label,split\na,good,test\nb,bad,\nc,good,train\n"
    site = site_with_records(tmp_path, "own.csv", rows.encode())
    said: list[str] = []
    check_site(site, said.append, 'held-out-column="split=test"', rows=False)
    assert said == [
        "records: 2 of 2 rows fit",
        "held out: 1 record (rows with 'test' in column 'split'), never drawn and never charged",
    ]
    (tmp_path / "test.csv").write_text("text,label\nd,good\ne,bad\n", encoding="utf-8")
    check_site(site, said.append, f'held-out-file="{tmp_path / "test.csv"}"', rows=False)
    assert said[2:] == [
        "records: 3 of 3 rows fit",
        "held out: 2 records (a file of their own, 'test.csv'), never drawn and never charged",
    ]
    with pytest.raises(DataError, match="no row is held out by the rule of this site"):
        check_site(site, print, 'held-out-column="split=tset"')
    with pytest.raises(DataError, match=r"has no column 'part' \(held-out-column\)"):
        check_site(site, print, 'held-out-column="part=test"')

"""The records of a person that a run has, and the side of a division that the person is on."""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from persons_world import example, persons_of

from audits.tiny_site import OneSite
from audits.worlds import World
from fedveil.client import app, rehearsals
from fedveil.client.own_records import bounded, prepared
from fedveil.client.site import open_site
from fedveil.client.timing import Timing
from fedveil.common.config.sections import DataConfig
from fedveil.common.data import split
from fedveil.common.data.partition import site_part
from fedveil.common.data.sources import load_dataset, load_protected, train_and_test
from fedveil.common.data.split import public_split
from fedveil.common.errors import DataError, MechanismError
from fedveil.common.messages import header
from fedveil.common.messages.wire import encode_reply
from fedveil.common.tasks import Record
from fedveil.common.tasks.base import OWNER
from fedveil.common.tasks.examples import Dataset
from fedveil.common.tasks.tables import Table
from fedveil.common.tasks.text import TextExample, tokens_of
from fedveil.privacy import randomness, together
from fedveil.privacy.units import PERSON
from fedveil.strategies.job import configure


def test_which_records_a_person_has_follows_from_them_alone() -> None:
    draw = random.Random(1)
    everyone = [example(f"{person} says {i}", person, f"{person}{i}".encode()) for person in "abcd" for i in range(6)]
    kept = bounded(everyone, 2)
    assert Counter(e.person for e in kept) == dict.fromkeys("abcd", 2)
    for person in "abcd":
        own = [e for e in everyone if e.person == person]
        draw.shuffle(own)
        assert set(bounded(own, 2)) == {e for e in kept if e.person == person}, "others, or their order, decide"
    assert bounded(everyone, 6) == everyone
    with pytest.raises(MechanismError, match="nobody's"):
        bounded([example("whose", "")], 2)


def used_beside(folder: Path, first: str) -> dict[str, set[str]]:
    """Return the texts that are used of each person of a JSONL file, two of the five; ``first`` is its first line."""
    rows = [
        {"text": f"{i} of {name}", "label": "good", "who": name, "note": f"{name}{i}", " note": f"{i * 7 % 5}{name}"}
        for name in "abcdefgh"
        for i in range(5)
    ]
    path = folder / "rows.jsonl"
    path.write_text("\n".join([first, *map(json.dumps, rows)]), encoding="utf-8")
    config = DataConfig(labels="bad,good", person="who")
    used: dict[str, set[str]] = {}
    for kept in bounded(load_protected(config, "classification", str(path)).dataset.examples, 2):
        used.setdefault(kept.person, set()).add(kept.text)
    return {name: texts for name, texts in used.items() if name != "q"}


ORDERS = [
    '{"text": "x", "label": "bad", "who": "q", "note": "1", " note": "2"}',
    '{"text": "x", "label": "bad", "who": "q", " note": "2", "note": "1"}',
]


def test_no_persons_records_are_chosen_by_how_another_names_its_cells(tmp_path: Path) -> None:
    """Two names that are one but for blanks: a hash has one of their cells, and which follows from no other row."""
    first, second = (used_beside(tmp_path, line) for line in ORDERS)
    assert first == second
    assert [len(texts) for texts in first.values()] == [2] * 8


def test_cells_in_the_order_in_which_the_file_names_them_first_are_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_the_files_order(own: Table, index: int) -> list[tuple[str, object]]:
        return [(name, column[index]) for name, column in own.columns.items()]

    monkeypatch.setattr(Table, "row", in_the_files_order)
    with pytest.raises(AssertionError):
        test_no_persons_records_are_chosen_by_how_another_names_its_cells(tmp_path)


def test_what_the_model_is_given_has_so_many_records_of_each_person(world: World) -> None:
    examples = [example(f"the {word} of {person}", person) for word in ("film", "story", "actor") for person in "xyx"]
    for most in (1, 2, 4):
        records = prepared(world.model, examples, PERSON, most)
        assert [tokens.tolist() for tokens in tokens_each(world, records)] == [
            tokens.tolist() for tokens in tokens_each(world, world.model.prepare(bounded(examples, most)))
        ]
        assert Counter(record[OWNER] for record in records) == {0: min(most, 6), 1: min(most, 3)}


def tokens_each(world: World, records: Sequence[Record]) -> list[torch.Tensor]:
    return [tokens_of(world.model.batch([record]))[0] for record in records]


def drawn_of_persons(site: OneSite, monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """Return how many persons have how many records in the steps of a round in which everybody is drawn."""
    seen = Counter[int]()

    def spy(model: Any, records: Any, members: Sequence[Sequence[int]], shapes: Any = None) -> Any:
        seen.update(len(own) for own in members)
        return together.together(model, records, members, shapes)

    with monkeypatch.context() as patched:
        patched.setattr(randomness, "private_poisson_sample", lambda size, rate: torch.arange(size))
        patched.setattr("fedveil.privacy.plan.together", spy)
        site.train()
    return seen


def test_a_site_trains_on_no_more_records_of_a_person_than_the_run_says(
    site: OneSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.settings |= {"privacy.records-per-person": 2, "training.local-steps": 1}
    assert drawn_of_persons(site, monkeypatch) == {2: 7}
    # The planted fault: the bound is not held.
    monkeypatch.setattr("fedveil.client.own_records.bounded", lambda examples, most: examples)
    site.node["ledger"] = str(site.ledger.with_name("other.sqlite"))
    site.memory.clear()
    app.process.forget()
    assert max(drawn_of_persons(site, monkeypatch)) > 2, "the check is blind"


@pytest.mark.parametrize("taken", [False, True], ids=["made anew", "planted: taken for those of the next run"])
def test_records_that_a_run_had_of_each_person_are_made_anew_for_one_that_has_fewer(
    site: OneSite, monkeypatch: pytest.MonkeyPatch, taken: bool
) -> None:
    site.settings |= {"privacy.records-per-person": 4, "training.local-steps": 1}
    assert max(drawn_of_persons(site, monkeypatch)) > 2
    site.settings["privacy.records-per-person"] = 2
    site.node["ledger"] = str(site.ledger.with_name("other.sqlite"))
    site.memory.clear()
    if taken:
        kept = app.process.cache.records["clinic"]
        app.process.cache.records["clinic"] = replace(kept, unit=(kept.unit[0], 2))
    assert (drawn_of_persons(site, monkeypatch) == {2: 7}) is not taken


def test_derivatives_are_of_no_more_records_of_a_person_than_the_run_says_now(site: OneSite) -> None:
    """A server asks for a round with one bound and, in the same run, for the next with another."""
    site.settings |= {"phases": "4 adapter on jacobians", "training.local-steps": 1, "privacy.records-per-person": 4}
    for round_number, most in ((1, 4), (2, 2)):
        site.settings["privacy.records-per-person"] = most
        site.train(round_number)
        vectors = app.process.cache.vectors["clinic"].records
        assert max(Counter(vector[OWNER] for vector in vectors).values()) == most


def test_the_worst_round_by_person_has_all_records_of_its_persons(
    site: OneSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On vectors, whose derivatives are computed of every record first, three times; two persons' sums fit at once."""
    site.settings |= {"phases": "4 adapter on jacobians", "training.local-steps": 1, "privacy.records-per-person": 4}
    job, model = configure(site.settings), site.model()
    ours = open_site(site.node, job.config, "1", simulated=False)
    through = Timing({8: 1.0, 16: 2.0}, {8: 4, 16: 2}, 0.5, 0.0)
    on_vectors = Timing({1: 0.25}, {1: 2}, 0.125, 0.0)
    app.process.rehearsals.timings = {rehearsals.PLAIN: through, rehearsals.ON_JACOBIANS: on_vectors}
    numbers = sum(p.numel() for p in model.module.parameters() if p.requires_grad)
    monkeypatch.setattr(together, "MOST_BYTES", 2 * together.NUMBER * numbers)
    at_once = rehearsals.fewest_at_once(job, model, None)
    assert at_once == 2
    monkeypatch.setattr(rehearsals, "contrasts", lambda _: 3)  # as of four labels
    derivatives = 3 * through.worst(1, 4 * 50.0, 0)
    worst = on_vectors.worst(1, job.config.training.sample_rate * 50, 0, 4, at_once) + derivatives
    try:
        assert app.process.rehearsals.forecast(job, ours, model, 1, rehearsals.PLAIN)[0] == pytest.approx(worst)
    finally:
        app.process.rehearsals.forget()


def test_records_say_whose_they_are_and_no_batch_does(world: World) -> None:
    examples = [example("the film", "x"), example("a story", "y"), example("the actor", "x")]
    records = prepared(world.model, examples, PERSON, 8)
    assert [record[OWNER] for record in records] == [0, 1, 0]
    assert all(OWNER not in record for record in prepared(world.model, examples))
    assert OWNER not in world.model.batch(records)
    assert OWNER not in world.model.fixed_batch(records, 24, 4)


def test_a_blank_person_contributes_zero_and_changes_no_byte(site: OneSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header.secrets, "token_bytes", bytes)
    noise = patch("fedveil.privacy.dpsgd.add_private_noise", lambda total, std: total.double())
    own = Path(str(site.node["data"]))
    text = own.read_text()
    sent = []
    for more in ("", "the awful film,bad,\n", "the awful film,bad,   \n"):
        own.write_text(text + more)
        site.node["ledger"] = str(own.with_name(f"{len(sent)}.sqlite"))
        site.memory.clear()
        with noise, patch.object(randomness, "private_poisson_sample", lambda size, rate: torch.arange(size)):
            sent.append(encode_reply(site.train()))
    assert sent[0] == sent[1] == sent[2]


# --- data in one piece ------------------------------------------------------------------------------------------------
def crowd(count: int = 90, persons: int = 17) -> Dataset:
    draw = random.Random(3)
    examples = tuple(
        TextExample(text=f"text {i % 70}", label=i % 2, person=f"p{draw.randrange(persons)}", key=f"k{i % 3}")
        for i in range(count)
    )
    return Dataset("crowd", examples, ("bad", "good"))


def divided(parts: Sequence[Dataset]) -> set[str]:
    """Return the persons that several parts have."""
    held = Counter(person for part in parts for person in persons_of(part))
    return {person for person, count in held.items() if count > 1}


def test_no_person_is_in_the_training_and_in_the_test_part(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Dataset("crowd", tuple(replace(e, text=f"text {i}") for i, e in enumerate(crowd().examples)), ("a", "b"))
    train, test = public_split(whole, 20, 1)
    assert not divided([train, test])
    assert len(test.examples) == 20
    assert sorted((*train.examples, *test.examples), key=str) == sorted(whole.examples, key=str)
    monkeypatch.setattr(split, "tied", lambda data: [e.likeness() for e in data.examples])
    assert divided(public_split(dataclasses.replace(whole, name="again"), 20, 1)), "a divided person is not found"


def test_a_text_of_two_persons_takes_both_to_one_side() -> None:
    examples = [example("same", "a"), example("same", "b"), example("first", "a"), example("other", "b")]
    others = [example(f"text {i}", f"c{i}") for i in range(20)]
    for seed in range(12):
        train, test = public_split(Dataset("d", (*examples, *others), ("x", "y")), 8, seed)
        assert not divided([train, test])
        assert not {e.likeness() for e in train.examples} & {e.likeness() for e in test.examples}


@pytest.mark.parametrize("partition", ["iid", "dirichlet"])
def test_no_person_is_at_two_simulated_sites(partition: str) -> None:
    config = DataConfig(partition=partition, person="author")
    whole = crowd()
    parts = [site_part(whole, config, k, 4) for k in range(4)]
    assert not divided(parts)
    assert sum(len(part.examples) for part in parts) == 90
    nobody = Dataset("n", tuple(replace(e, person="") for e in whole.examples), whole.label_names)
    order = {e.text: e.person for e in whole.examples}
    torn = [site_part(nobody, config, k, 4) for k in range(4)]
    named = [replace_persons(part, order) for part in torn]
    assert divided(named), "a divided person is not found"


def replace_persons(part: Dataset, of: dict[str, str]) -> Dataset:
    return dataclasses.replace(part, examples=tuple(replace(e, person=of[e.text]) for e in part.examples))


def test_a_person_with_records_of_several_keys_is_not_divided_by_them() -> None:
    config = DataConfig(partition="natural", key="ward", person="author")
    with pytest.raises(DataError, match=r"several values of data\.key"):
        site_part(crowd(), config, 0, 2)
    with pytest.raises(DataError, match=r"2 different values of data\.person 'author', too few for 3"):
        site_part(crowd(9, 2), DataConfig(partition="iid", person="author"), 0, 3)


def test_a_test_file_that_shares_a_person_is_refused_where_both_are_read(tmp_path: Path) -> None:
    for name, rows in (("train", ["a,1", "b,0"]), ("other", ["c,1", "d,0"]), ("same", ["c,1", "a,0"])):
        text = "\n".join(["person,label,text", *(f"{row},text of {name} {row[0]}" for row in rows)])
        (tmp_path / f"{name}.csv").write_text(text)
    own = DataConfig(name=str(tmp_path / "train.csv"), labels="0,1", person="person", partition="iid")
    fine = replace(own, test=str(tmp_path / "other.csv"))
    assert persons_of(train_and_test(fine, "classification")[1]) == {"c", "d"}
    with pytest.raises(DataError, match="a person who is in"):
        train_and_test(replace(own, test=str(tmp_path / "same.csv")), "classification")
    with pytest.raises(DataError, match=r"no column 'patient' \(data\.person\)"):
        load_dataset(replace(own, person="patient"), "classification")

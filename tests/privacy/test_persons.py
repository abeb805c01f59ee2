"""Persons as the unit: drawn, summed, clipped, counted and charged as one, kept in one piece, and named nowhere."""

from __future__ import annotations

import csv
import dataclasses
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from audits.faults import DOUBLED, HALVED, PERSON_DIVIDED, ROW_CLIPPED, SOUND, Fault
from audits.persons import audit_persons, by_person, owned, persons_gradient, probe_persons, summed
from audits.site_rounds import sampler_faults
from audits.tiny_site import OneSite, clinic
from audits.worlds import Gradient, Recorder, World, fresh_world, minus, norm, released
from fedveil.client import app, rehearsals
from fedveil.client.budget import evaluation_releases
from fedveil.client.deadline import TRAINED, Deadline, Timing, most_drawn
from fedveil.client.ledger.ledger import Ledger
from fedveil.client.ledger.record_hashes import record_hashes
from fedveil.client.linearised import Computation, Keeping, linearised
from fedveil.client.own_records import bounded, prepared
from fedveil.client.policy import Policy
from fedveil.client.site import Site, open_site, own_settings
from fedveil.common.config.sections import DataConfig
from fedveil.common.data import split
from fedveil.common.data.partition import site_part
from fedveil.common.data.sources import load_dataset, load_protected, train_and_test
from fedveil.common.data.split import public_split
from fedveil.common.errors import ConfigError, DataError, MechanismError, PolicyRefusal, PrivacyError
from fedveil.common.messages import wire
from fedveil.common.messages.wire import encode_reply
from fedveil.common.model.shapes import Shapes
from fedveil.common.run_lines import PrivacyLine, read_lines
from fedveil.common.starts import STARTS, PaidStart
from fedveil.common.tasks import Record
from fedveil.common.tasks.base import OWNER
from fedveil.common.tasks.examples import Dataset
from fedveil.common.tasks.tables import Table
from fedveil.common.tasks.text import TextExample, tokens_of
from fedveil.deploy.site_check import check_site
from fedveil.deploy.site_folder import SiteFolder
from fedveil.experiments.in_process import run_in_process
from fedveil.privacy import MECHANISMS, randomness, together
from fedveil.privacy.accounting import Release
from fedveil.privacy.dpsgd import ClipAndNoise, PrivateSteps
from fedveil.privacy.plan import gaussian_plan
from fedveil.privacy.privacy_filter import promised
from fedveil.privacy.units import PERSON, RECORD
from fedveil.reports import markdown_report
from fedveil.strategies.job import configure

BY_PERSON = {"privacy.unit": "person", "data.person": "author"}
Folder = Callable[[str], str]


@pytest.fixture(scope="module")
def world(model_folder: Folder) -> World:
    return fresh_world(model_folder("bert"), "bert", "lora", "trained")


@pytest.fixture
def site(toy_settings: dict[str, Any], tmp_path: Path) -> OneSite:
    """Return a site whose steward protects authors, of whom there are seven."""
    made = clinic({**toy_settings, **BY_PERSON}, tmp_path)
    made.rule(unit="person", person="author")
    return made


def groups(records: Sequence[Record]) -> list[list[Record]]:
    return [[r for r in records if r[OWNER] == owner] for owner in dict.fromkeys(r[OWNER] for r in records)]


def clipped(gradient: Gradient, clip: float) -> Gradient:
    return [g * min(1.0, clip / norm(gradient)) for g in gradient]


def apart(left: Gradient, right: Gradient) -> float:
    return norm(minus(left, right)) / max(norm(right), 1e-30)


# --- the step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [0.05, 1.0, 100.0])
def test_a_step_sums_each_persons_gradients_then_clips_as_the_slow_way_does(world: World, clip: float) -> None:
    records = owned(world)
    each = [clipped(persons_gradient(world, own), clip) for own in groups(records)]
    want = [torch.stack(parts).sum(0) for parts in zip(*each, strict=True)]
    assert apart(summed(world, records, by_person(clip)), want) < 1e-5


@pytest.mark.parametrize("fault", [SOUND, ROW_CLIPPED, PERSON_DIVIDED], ids=lambda fault: fault.name or "as it is")
def test_no_person_moves_more_than_a_clip_with_all_their_records_or_is_found(world: World, fault: Fault) -> None:
    found = audit_persons(world, fault)
    assert found.passed, found.figures


def test_a_person_in_the_place_of_another_moves_two_clips_at_most(world: World) -> None:
    records, clip = owned(world), 0.05
    first, second = ([r for r in records if r[OWNER] in kept] for kept in ((0, 1), (0, 2)))
    moved = norm(minus(summed(world, first, by_person(clip)), summed(world, second, by_person(clip)))) / clip
    assert 1.0 < moved <= 2 + 1e-5


def test_persons_are_summed_alike_whatever_is_held_at_once_and_whoever_is_beside(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, clip = owned(world), 0.05
    whole = summed(world, records, by_person(clip))
    by_one = [summed(world, own, by_person(clip)) for own in groups(records)]
    monkeypatch.setattr(together, "MOST_BYTES", 1)
    assert [t.units for t in together.together(world.model, records, PERSON.members(records))] == [1, 1, 1]
    assert apart(summed(world, records, by_person(clip)), whole) < 1e-6
    assert apart([torch.stack(parts).sum(0) for parts in zip(*by_one, strict=True)], whole) < 1e-6


def bytes_held(world: World, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return what a step holds of units' sums at once, each time that it clips them."""
    held, clip = list[int](), ClipAndNoise.clip_and_accumulate

    def spy(mechanism: ClipAndNoise) -> None:
        held.append(sum(p.grad_sample.nbytes for p in world.trained))  # type: ignore[attr-defined]
        clip(mechanism)

    with monkeypatch.context() as patched:
        patched.setattr(ClipAndNoise, "clip_and_accumulate", spy)
        summed(world, owned(world), by_person(0.05))
    return held


def test_the_sums_of_units_are_held_within_their_bound(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three persons two fit, then all; their rows have several shapes, which pass one after the other."""
    records, numbers = owned(world), sum(p.numel() for p in world.trained)
    assert len({world.model.collator.size(record) for record in records}) > 1
    for fit, units in ((2, [2, 1]), (3, [3])):
        monkeypatch.setattr(together, "MOST_BYTES", fit * together.NUMBER * numbers + together.NUMBER)
        assert [t.units for t in together.together(world.model, records, PERSON.members(records))] == units
        assert bytes_held(world, monkeypatch) == [own * together.NUMBER * numbers for own in units]
    monkeypatch.setattr(together, "MOST_BYTES", 2 * together.NUMBER * numbers)
    assert max(bytes_held(world, monkeypatch)) <= together.MOST_BYTES
    one_more = together.units_at_once
    monkeypatch.setattr(together, "units_at_once", lambda size: one_more(size) + 1)
    assert max(bytes_held(world, monkeypatch)) > together.MOST_BYTES, "the check is blind"


def test_persons_pass_in_the_shapes_that_are_asked_for(world: World) -> None:
    """Those of a start are rehearsed on their own: in others a record might move another's bits."""
    records, alone = owned(world), replace(world.model.shapes, most=1)

    def rows(shapes: Shapes | None) -> list[int]:
        whole = together.together(world.model, records, PERSON.members(records), shapes)
        return [len(tokens_of(batch)) for held in whole for batch, _ in held.parts]

    assert min(rows(None)) > 1
    assert rows(alone) == [1] * len(records)


def test_rows_that_do_not_come_together_are_not_summed(world: World) -> None:
    with pytest.raises(MechanismError, match="did not come together"):
        released(world, [world.records], by_person(1.0))
    with pytest.raises(MechanismError, match="belongs to no person"):
        next(by_person(1.0).draws(world.records))


def test_a_record_that_cannot_be_computed_takes_no_other_of_its_person_away(world: World) -> None:
    records, clip = owned(world), 100.0

    def losses(batch: Any) -> torch.Tensor:
        if bool((tokens_of(batch) == world.mark).any()):
            raise RuntimeError("the marked record cannot be computed")
        return world.model.losses(batch)

    figures, optimizer = by_person(clip), Recorder(world.trained)
    with PrivateSteps(world.model.module, optimizer, figures) as steps:
        steps.step(figures.parts(world.model, records), losses)
    assert apart(optimizer.given[0], summed(world, records[:-1], figures)) < 1e-6


def test_a_person_whose_gradient_is_not_finite_counts_as_none(world: World) -> None:
    records, clip = owned(world), 1.0

    def losses(batch: Any) -> torch.Tensor:
        marked = (tokens_of(batch) == world.mark).any(1)[: batch.records]
        return world.model.losses(batch) * torch.where(marked, float("inf"), 1.0)

    figures, optimizer = by_person(clip), Recorder(world.trained)
    with PrivateSteps(world.model.module, optimizer, figures) as steps:
        steps.step(figures.parts(world.model, records), losses)
    others = [record for record in records if record[OWNER] != records[-1][OWNER]]
    assert apart(optimizer.given[0], summed(world, others, figures)) < 1e-6


def test_persons_are_drawn_as_poisson_samples_price_it_each_with_all_their_records() -> None:
    owners = [i % 40 for i in range(100)]
    records: list[Record] = [{OWNER: owner} for owner in owners]
    figures = replace(gaussian_plan(1.0, 1.0, 0.25, 10.0, 1e-5, 8.0), unit=PERSON)
    draws, table = figures.draws(records), torch.zeros(400, 40, dtype=torch.float64)
    for row in table:
        drawn = next(draws)
        row[[owners[i] for i in drawn]] = 1.0
        assert sorted(drawn) == [i for i, owner in enumerate(owners) if row[owner]], "a person is drawn in part"
    assert sampler_faults(table, 0.25) == set()


@pytest.mark.parametrize(
    "fault", [SOUND, HALVED, DOUBLED, ROW_CLIPPED, PERSON_DIVIDED], ids=lambda f: f.name or "as is"
)
def test_canaries_by_person_are_silent_about_the_code_and_speak_of_faults(tmp_path: Path, fault: Fault) -> None:
    found = probe_persons(tmp_path, fault, canaries=1500)
    assert found.passed, found.figures


def test_of_an_image_several_views_are_one_record(world: World) -> None:
    """What belongs together need not be a person's: any rows whose gradient is one vector."""
    views = [{**record, OWNER: 0} for record in world.records[:3]]
    assert apart(summed(world, views, by_person(0.05)), clipped(persons_gradient(world, views), 0.05)) < 1e-5


# --- starts and linearised rounds -------------------------------------------------------------------------------------


def drawn_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that is filled with the sizes of which Poisson samples are drawn; every sample is everybody."""
    sizes: list[int] = []

    def everybody(size: int, rate: float) -> torch.Tensor:
        sizes.append(size)
        return torch.arange(size)

    monkeypatch.setattr(randomness, "private_poisson_sample", everybody)
    return sizes


@pytest.mark.parametrize("name", [name for name, row in STARTS.items() if issubclass(row, PaidStart)])
def test_every_paid_start_draws_and_clips_persons(
    name: str, model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another test's reference: with one person's records in place of all, no more than a clip is left of a step."""
    world = fresh_world(model_folder("bert"), "bert", "lora", "trained")
    sizes = drawn_sizes(monkeypatch)
    start = STARTS[name]()
    assert isinstance(start, PaidStart)
    figures = start.plan(replace(gaussian_plan(1.0, 1.0, 0.5, 1.0, 1e-5, 8.0), unit=PERSON), 1)
    figures = replace(figures, event=figures.event.having(noise_multiplier=1e-12))
    if hasattr(start, "steps"):
        start = replace(start, steps=1)  # type: ignore[call-arg]
    records = [{**record, OWNER: 0} for record in world.records]
    with patch("fedveil.common.starts.public_metric.MADE", 8), patch("fedveil.common.starts.class_means.MADE", 8):
        statistic = start.privatise(world.model, records, figures)
    assert set(sizes) == {1}, "it drew records, and not persons"
    length = norm([t for layer in statistic.values() for t in layer.values()])
    bound = figures.event.clip_norm / figures.expected_batch_size * start.way
    assert 0 < length <= bound * (1 + 1e-5), "a person's records were clipped one by one"
    if start.way == 1:
        assert length == pytest.approx(bound, rel=1e-4)


def test_linearised_steps_clip_persons(model_folder: Folder) -> None:
    world = fresh_world(model_folder("bert"), "bert", "lora", "trained")
    records, of, data = owned(world), Computation("1", 1, 0, "", ""), Dataset("", (), ())
    clip, moved = 0.01, []
    for chosen in (records, [r for r in records if r[OWNER] != 1]):
        with linearised(world.model, chosen, Keeping(of, {}, "site", data, lambda: None)) as (vectors, trained):
            assert [vector[OWNER] for vector in vectors] == [record[OWNER] for record in chosen]
            figures = by_person(clip)
            parameters = [p for layer in trained.values() for p in layer.values()]
            with PrivateSteps(world.model.module, torch.optim.SGD(parameters, lr=0.0), figures) as steps:
                moved.append(
                    [g.double() for g in steps.release(figures.parts(world.model, vectors), world.model.losses)]
                )
    # The plan's rate is 1/2, and its divisor 1.
    assert norm(minus(*moved)) / clip == pytest.approx(1.0, abs=1e-5)


# --- the records of a person ------------------------------------------------------------------------------------------


def example(text: str, person: str, row: bytes = b"") -> TextExample:
    return TextExample(text=text, label=0, person=person, row=row)


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
        app.process.rehearsals.allow(Deadline((worst + 0.01) / TRAINED), job, ours, model, 1, rehearsals.PLAIN)
        with pytest.raises(PolicyRefusal, match="reply-after"):
            app.process.rehearsals.allow(Deadline((worst - 0.01) / TRAINED), job, ours, model, 1, rehearsals.PLAIN)
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
    monkeypatch.setattr(wire.secrets, "token_bytes", bytes)
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


def persons_of(data: Dataset) -> set[str]:
    return {e.person for e in data.examples}


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


# --- settings, policy, ledger -----------------------------------------------------------------------------------------


def test_a_unit_without_a_column_is_refused_and_a_row_says_what_it_protects() -> None:
    with pytest.raises(ConfigError, match=r"data\.person names no column"):
        configure({"privacy.unit": "person"})
    for name in ("dp-sgd", "secure-sum"):
        claim = MECHANISMS[name].of_unit("person").claim
        assert (claim.per, claim.unit, claim.adjacency) == ("person", PERSON.what, PERSON.adjacency)
        assert "person on their own" in claim.sampler
        of_records = {*RECORD.leaves_out, *RECORD.leaves_out_of_sums}
        assert not set(claim.leaves_out) & of_records
        own = set(MECHANISMS[name].claim.leaves_out) - of_records
        assert bool(own) is (name == "secure-sum")
        assert own <= set(claim.leaves_out), "what the mechanism itself leaves out is left out for persons, too"
        assert MECHANISMS[name].of_unit("record") is MECHANISMS[name]
    assert not MECHANISMS["dp-sgd"].of_unit("person").counted, "one person moves a count of records by more than 1"
    assert configure({**BY_PERSON, "privacy.mode": "none"}).mechanism is MECHANISMS["none"]
    with pytest.raises(ConfigError, match="does not protect a household"):
        MECHANISMS["dp-sgd"].of_unit("household")


def test_no_noised_count_is_of_persons() -> None:
    """One person moves a count of records by more than the clip that it is priced with."""
    here = Site("ward", Dataset("ward", (), ("bad", "good")), "ward", 100, Path(), Policy(send_noised_metrics=True))
    assert evaluation_releases(configure({}), here, 1)
    assert evaluation_releases(configure(BY_PERSON), here, 1) == []


def test_size_divisor_and_delta_count_persons(site: OneSite) -> None:
    row = MECHANISMS["dp-sgd"].of_unit("person")
    config = configure(site.settings).config
    made = row.plan(config.privacy, config.training, 4, 40)
    assert (made.unit, made.expected_batch_size) == (PERSON, 10.0)
    with pytest.raises(PrivacyError, match="above 1/2000"):
        row.plan(config.privacy, config.training, 4, 2000)


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"unit": None, "person": None}, "unit = 'record'; the run asks for privacy.unit = 'person'"),
        ({"unit": "person", "person": "label"}, "person = 'label'; the run asks for data.person = 'author'"),
        ({"unit": "person", "person": "author", "records_per_person": 7}, "records-per-person = 7; the run asks for"),
    ],
)
def test_a_run_is_held_to_the_stewards_unit_column_and_bound(site: OneSite, rules: dict[str, Any], words: str) -> None:
    site.rule(**rules)
    refused = site.refuse()
    assert refused.kind == "policy"
    assert words in refused.reason


def test_a_run_by_record_is_refused_where_the_steward_protects_persons(site: OneSite) -> None:
    site.settings |= {"privacy.unit": "record", "data.person": ""}
    assert "unit = 'person'; the run asks for privacy.unit = 'record'" in site.refuse().reason


def test_a_steward_who_protects_persons_does_so_in_public_records_too() -> None:
    policy = Policy(unit="person", person="author")
    policy.check_job(configure(BY_PERSON), private=False)
    with pytest.raises(PolicyRefusal, match="unit = 'person'; the run asks for"):
        policy.check_job(configure({}), private=False)


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"unit": "person"}, "person names no column"),
        ({"person": "author"}, "person is for unit 'person'"),
        ({"records_per_person": 1001}, "records-per-person must be above 0 and at most 1000"),
        ({"epsilon_person": 9.0}, "epsilon-person is for unit 'record' and needs records-per-person"),
        ({"records_per_person": 4, "epsilon_person": 0.0}, "epsilon-person must be above 0"),
        (
            {"unit": "person", "person": "a", "records_per_person": 4, "epsilon_person": 9.0},
            "epsilon-person is for unit 'record'",
        ),
        ({"unit": "persons"}, "did you mean 'person'"),
        ({"unit": "person", "person": "a", "records_per_person": 0}, "records-per-person must be above 0"),
    ],
)
def test_a_policy_that_contradicts_itself_is_an_error(rules: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Policy(**rules)


def test_the_ledger_charges_a_person_and_refuses_another_unit_under_any_name(site: OneSite) -> None:
    spending = site.train().spending
    assert spending is not None
    with Ledger(site.ledger) as ledger:
        assert {entry.unit for entry in ledger.entries()} == {"person"}
        (entry,) = ledger.entries()
        assert (
            ledger.epsilon("clinic", 1e-3)
            == promised([Release(entry.event, entry.count)], 1e-3)[0]
            == spending.epsilon_total
        )
    site.rule(dataset_id="other-name")
    site.settings |= {"privacy.unit": "record", "data.person": ""}
    assert "another unit than one record" in site.refuse(run="2").reason


def test_a_data_set_known_by_record_is_found_by_person(site: OneSite) -> None:
    site.rule()
    site.settings |= {"privacy.unit": "record", "data.person": ""}
    site.train()
    site.rule(dataset_id="by-person", unit="person", person="author")
    site.settings |= BY_PERSON
    assert "another unit than one person" in site.refuse(run="2").reason


def test_other_records_of_a_person_are_known_again() -> None:
    first = Dataset("first", (example("one", "x", b"1"), example("two", "y", b"2")), ("a", "b"))
    other = Dataset("other", (example("three", "x", b"3"),), ("a", "b"))
    stranger = Dataset("stranger", (example("three", "z", b"3"),), ("a", "b"))
    key = bytes(32)
    assert record_hashes(first, key) & record_hashes(other, key)
    assert not record_hashes(first, key) & record_hashes(stranger, key)
    assert record_hashes(other, key) & record_hashes(stranger, key), "rows are known by any person"


def test_what_runs_by_record_leave_unknown_of_a_person_is_in_the_claim() -> None:
    by_record = Dataset("first", (example("one", "", b"1"),), ("a", "b"))
    by_person = Dataset("other", (example("three", "x", b"3"),), ("a", "b"))
    assert not record_hashes(by_record, bytes(32)) & record_hashes(by_person, bytes(32))
    said = MECHANISMS["dp-sgd"].of_unit("person").claim.leaves_out
    assert [text for text in said if "runs by record" in text and "remember no persons" in text]


def test_a_site_reads_the_column_of_persons_for_that_unit_or_its_steward_alone(toy_settings: dict[str, Any]) -> None:
    by_record = configure({**toy_settings, "data.person": "author"}).config
    assert own_settings(by_record, Policy()).person == ""
    assert own_settings(configure({**toy_settings, **BY_PERSON}).config, Policy()).person == "author"
    assert own_settings(by_record, Policy(unit="person", person="patient")).person == "patient"


def other_rows(site: OneSite) -> str:
    """Return a file with other rows of the same seven authors."""
    own = Path(str(site.node["data"]))
    with own.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    other = own.with_name("other.csv")
    with other.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows({**row, "text": f"{row['text']} again"} for row in rows)
    return str(other)


def test_persons_that_a_run_without_privacy_released_are_known_by_another_name(site: OneSite) -> None:
    protected = {"unit": "person", "person": "author", "allow_no_privacy": True}
    private = dict(site.settings)
    site.rule(dataset_id="ward", **protected)
    site.settings |= {"privacy.mode": "none", "privacy.unit": "record", "data.person": ""}
    site.train(run="open")
    site.settings, site.node["data"] = private, other_rows(site)
    site.rule(dataset_id="lab", **protected)
    assert "were released without privacy before" in site.refuse(run="2").reason


def test_a_run_without_privacy_gets_no_other_rows_of_persons_that_were_withdrawn(site: OneSite) -> None:
    site.rule(dataset_id="ward", unit="person", person="author")
    site.train()
    with Ledger(site.ledger) as ledger:
        ledger.holds.withdraw("ward", "asked for")
    site.node["data"] = other_rows(site)
    site.rule(dataset_id="lab", unit="person", person="author", allow_no_privacy=True)
    site.settings |= {"privacy.mode": "none", "privacy.unit": "record", "data.person": ""}
    assert "are released no more" in site.refuse(run="open").reason


def folder_of(site: OneSite, folder: Path) -> SiteFolder:
    node = {key: f'"{value}"' if isinstance(value, str) else value for key, value in site.node.items()}
    return SiteFolder(folder, "clinic", "host:1", node=" ".join(f"{key}={value}" for key, value in node.items()))


def test_a_steward_hears_how_many_persons_there_are(site: OneSite, tmp_path: Path) -> None:
    said: list[str] = []
    check_site(folder_of(site, tmp_path), said.append)
    assert "persons: 7, with 6 records in the middle and 6 at most" in said
    assert any("public-size: 50 declared, 7 persons found" in line for line in said)


def test_a_check_counts_persons_against_the_size_that_the_node_declares(site: OneSite, tmp_path: Path) -> None:
    site.rule(unit="person", person="author", reply_after=600.0)
    site.node["public-size"] = 7
    check_site(folder_of(site, tmp_path), print)  # of 40 records
    site.node["public-size"] = 6
    with pytest.raises(ConfigError, match="there are 7 persons and public-size is 6"):
        check_site(folder_of(site, tmp_path), print)


# --- time -------------------------------------------------------------------------------------------------------------


def test_the_worst_round_has_all_records_of_the_most_persons_and_passes_anew_for_so_many() -> None:
    timing = Timing({8: 1.0, 16: 2.0}, {8: 4, 16: 2}, 0.5, 0.0)
    most = most_drawn(3.0)
    by_record = timing.worst(1, 3.0, 0)
    assert timing.worst(1, 3.0, 0, each=5) - by_record == pytest.approx(4 * most * 1.0)
    halved = timing.worst(1, 3.0, 0, each=5, at_once=(most + 1) // 2)
    assert halved - timing.worst(1, 3.0, 0, each=5) == pytest.approx(3.0)


# --- a whole run ------------------------------------------------------------------------------------------------------


def named_authors(path: Path) -> tuple[Path, set[str]]:
    """Return a copy of a table whose authors have names that are nothing else, and these names."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    copy = path.with_name("named.csv")
    with copy.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        for i, row in enumerate(rows):
            writer.writerow({**row, "author": f"Zaphod{i % 21}Q"})
    return copy, {f"Zaphod{i}Q" for i in range(21)}


@pytest.mark.parametrize("mode", ["dp-sgd", "secure-sum"])
def test_a_run_by_person_claims_counts_and_charges_persons_and_names_none(
    toy_settings: dict[str, Any], mode: str
) -> None:
    data, names = named_authors(Path(toy_settings["data.name"]))
    summed_alone = {"training.local-steps": 1, "training.optimizer": "sgd", "privacy.honest-sites": 2}
    settings = {
        **toy_settings,
        **BY_PERSON,
        "data.name": str(data),
        "privacy.mode": mode,
        "privacy.noise-multiplier": 2.0,
        **(summed_alone if mode == "secure-sum" else {}),
    }
    folder = run_in_process(settings, 3)
    lines = read_lines(PrivacyLine, folder)
    sizes = {line.site: line.public_size for line in lines}
    train = train_and_test(configure(settings).config.data, "classification")[0]
    assert sum(sizes.values()) == len(persons_of(train)) < 21
    assert {line.unit for line in lines} == {PERSON.what}
    for ledger in sorted((folder / "ledgers").glob("*.sqlite")):
        with Ledger(ledger) as held:
            assert {entry.unit for entry in held.entries()} == {"person"}
    report = markdown_report(folder)
    assert "differentially private in all training records of one person at one site" in report
    assert ("a person with records at several sites has the sum" in report) == (mode == "dp-sgd")
    assert ("a person with records at k sites of a sum is k persons of that sum" in report) == (mode == "secure-sum")
    assert ("A person at several sites of one sum has a larger ε" in report) == (mode == "secure-sum")
    assert "asks whether one person was trained on" in report
    assert "persons at one site" not in report
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            assert not [name for name in names if name.encode() in content], f"{path.name} names a person"

"""Persons as the unit: drawn, summed, clipped, counted and charged as one, kept in one piece, and named nowhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from persons_world import BY_PERSON, Folder

from audits.faults import DOUBLED, HALVED, PERSON_DIVIDED, ROW_CLIPPED, SOUND, Fault
from audits.persons import audit_persons, by_person, owned, persons_gradient, probe_persons, summed
from audits.site_rounds import sampler_faults
from audits.worlds import Gradient, Recorder, World, fresh_world, minus, norm, released
from fedveil.client.linearised import Computation, Keeping, linearised
from fedveil.common.errors import ConfigError, MechanismError
from fedveil.common.model.shapes import Shapes
from fedveil.common.starts import STARTS, PaidStart
from fedveil.common.tasks import Record
from fedveil.common.tasks.base import OWNER
from fedveil.common.tasks.examples import Dataset
from fedveil.common.tasks.text import tokens_of
from fedveil.privacy import MECHANISMS, randomness, together
from fedveil.privacy.dpsgd import ClipAndNoise, PrivateSteps
from fedveil.privacy.plan import gaussian_plan
from fedveil.privacy.units import PERSON, RECORD
from fedveil.strategies.job import configure


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
    if name == "text-votes":
        start = replace(start, records=2)  # type: ignore[call-arg]
        world.model.shown = {"votes": {"texts": torch.tensor([[98.0, 97.0, 100.0], [103.0, 111.0, 111.0]])}}
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

"""Unfolded records: rows with weights, added and clipped once a record, that nobody else's records change."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar
from unittest.mock import patch

import pytest
import torch

from audits.tiny_site import OneSite
from audits.unfolded import FAULTS, Compared, audit_unfolding, both, compared, joint_gradient, joint_loss, summed
from audits.worlds import World, flat, fresh_world, minus, norm, plan
from fedveil.client.made_up import inventor
from fedveil.client.policy_file import parse_policy
from fedveil.client.timing import Timing
from fedveil.client.unfolding import rows_of, unfolded
from fedveil.common import tasks
from fedveil.common.check import POSITIVE
from fedveil.common.config.fields import Section
from fedveil.common.errors import ConfigError, MechanismError
from fedveil.common.messages.round import TrainResult
from fedveil.common.model.federated import FederatedModel
from fedveil.common.tasks.base import OWNER, WEIGHT, Coins, Record
from fedveil.deploy.pin import changed_pins, pin
from fedveil.experiments.in_process import run_in_process
from fedveil.privacy.dpsgd import ClipAndNoise, PrivateSteps
from fedveil.privacy.no_privacy import ExposingPlan
from fedveil.privacy.randomness import private_uniform
from fedveil.privacy.steps import nothing
from fedveil.privacy.units import PERSON
from fedveil.strategies.job import configure
from fedveil.strategies.options import for_flower

Folder = Callable[[str], str]


@pytest.fixture(scope="module")
def world(model_folder: Folder) -> World:
    return compared(fresh_world(model_folder("llama"), "llama", "lora-frozen-a", "frozen"))


@pytest.fixture
def exact(model_folder: Folder) -> World:
    """Return a world that computes in float64, as Llama's norm does not."""
    own = compared(fresh_world(model_folder("gpt2"), "gpt2", "lora", "frozen"))
    own.model.module.double()
    return own


def samples_of(world: World, records: list[Record]) -> list[torch.Tensor]:
    """Return what a step clips: one gradient of each record, over all that is trained."""
    found: list[torch.Tensor] = []

    def look(own: ClipAndNoise) -> None:
        found.append(torch.cat([sample.flatten(1).double() for sample in own.grad_samples], 1))
        clip(own)

    clip = ClipAndNoise.clip_and_accumulate
    with patch.object(ClipAndNoise, "clip_and_accumulate", look):
        summed(world, records, plan())
    return list(found[0])


def test_a_records_gradient_is_that_of_its_joint_loss(exact: World) -> None:
    for record, found in zip(exact.records, samples_of(exact, exact.records), strict=True):
        wanted = flat(joint_gradient(exact, record))
        assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-12


def test_plain_steps_take_the_mean_over_records(exact: World) -> None:
    model, optimizer = exact.model, torch.optim.SGD(exact.trained, lr=1.0)
    before = [p.detach().clone() for p in exact.trained]
    loss = sum(joint_loss(exact, record) for record in exact.records) / len(exact.records)
    wanted = torch.autograd.grad(loss, exact.trained)  # type: ignore[arg-type]
    rows, own = unfolded(model, exact.records, private_uniform, nothing, hides=False), ExposingPlan(0.5, 64)
    with own.steps(model, optimizer) as steps:
        steps.step(own.rows(model, rows, len(exact.records)), model.losses)
    for p, old, gradient in zip(exact.trained, before, wanted, strict=True):
        assert torch.allclose(old - p, gradient, rtol=1e-11, atol=1e-15)


def test_one_record_moves_the_sum_by_one_clip_and_both_faults_are_found(world: World) -> None:
    sound = audit_unfolding(world)
    assert sound.passed
    assert float(sound.figures["clips moved by one record, at most"]) > 1 - 1e-4, "the bound is not attained"
    for fault in FAULTS:
        assert audit_unfolding(world, fault).passed, f"{fault.name} was not found"


def test_a_neighbour_changes_no_row_of_a_record(world: World) -> None:
    def rows(records: list[Record], owner: int) -> list[Record]:
        made = unfolded(world.model, records, private_uniform, nothing, hides=True)
        return [{k: v for k, v in row.items() if k != OWNER} for row in made if row[OWNER] == owner]

    for i, record in enumerate(world.records):
        assert rows([record], 0) == rows(world.records, i)


def test_rows_of_a_persons_records_are_clipped_once(world: World) -> None:
    owners = [0, 1, 1, 2, 1, 2, 1]
    records = [{**record, OWNER: owner} for record, owner in zip(world.records, owners, strict=True)]
    figures = replace(plan(1e-3), unit=PERSON)
    everyone, others = summed(world, records, figures), summed(world, [r for r in records if r[OWNER] != 1], figures)
    assert norm(minus(everyone, others)) == pytest.approx(1e-3, rel=1e-4)


def test_rows_that_do_not_come_together_are_not_summed(world: World) -> None:
    rows = [row for record in world.records for row in rows_of(world.model, record, private_uniform)]
    with PrivateSteps(world.model.module, torch.optim.SGD(world.trained, lr=0.0), plan()) as steps:
        with pytest.raises(MechanismError, match="did not come together"):
            steps.step(world.model.fixed_batches(rows), world.model.losses)
        with pytest.raises(MechanismError, match="did not come together"):
            steps.whole_sums(next(world.model.fixed_batches(rows)), world.model.losses)


def test_a_record_that_cannot_be_unfolded_contributes_zero_where_that_is_hidden(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, bad = Compared.unfold, world.records[2]

    def fails(task: Compared, model: FederatedModel, record: Record, coins: Coins) -> list[Record]:
        if record["input_ids"] == bad["input_ids"]:
            raise ValueError("no")
        return own(task, model, record, coins)

    whole = summed(world, [record for record in world.records if record is not bad], plan())
    monkeypatch.setattr(Compared, "unfold", fails)
    assert norm(minus(whole, summed(world, world.records, plan()))) < 1e-6 * norm(whole)
    with pytest.raises(ValueError, match="no"):
        unfolded(world.model, world.records, private_uniform, nothing, hides=False)


def test_a_rehearsal_passes_rows_of_few_records(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[int]()
    own = Compared.unfold

    def counted(task: Compared, model: FederatedModel, record: Record, coins: Coins) -> list[Record]:
        seen.append(len(record["input_ids"]))
        return own(task, model, record, coins)

    monkeypatch.setattr(Compared, "unfold", counted)
    invent = inventor(world.model, world.model.collator)
    made = [invent(length, number) for length in range(1, 24) for number in range(30)]
    assert not any(WEIGHT in row for row in made)
    assert len(seen) <= 2 * (len(world.model.shapes.lengths) + 6)


def test_the_worst_time_counts_rows_and_their_making() -> None:
    timing = Timing({8: 1.0}, {8: 4}, 0.5, 0.0)
    several = replace(timing, unfold=2.0, unfolded=3)
    units = 17  # most_drawn(1.0)
    more = units * 2.0 + 2 * units * 1.0 / 4 + (2.0 - 1.0)
    assert several.worst(1, 1.0, 0) == pytest.approx(timing.worst(1, 1.0, 0) + more)


@dataclass(frozen=True)
class Scaled(Section, Compared):
    """The same with an option."""

    prefix: ClassVar[str] = "scaled."
    name: ClassVar[str] = "scaled"

    by: Annotated[float, POSITIVE] = 1.0
    """What weights are multiplied by."""

    def unfold(self, model: FederatedModel, record: Record, coins: Coins) -> list[Record]:
        return [{**row, WEIGHT: self.by * row[WEIGHT]} for row in super().unfold(model, record, coins)]


@pytest.fixture
def row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tasks.TASKS, "scaled", Scaled())


@pytest.fixture
def toy(row: None, model_folder: Folder, tmp_path: Path) -> dict[str, Any]:
    rows = [{"prompt": f"the film {i} was", "completion": f"warm {i}"} for i in range(60)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {
        "model.name": model_folder("llama"),
        "model.task": "scaled",
        "scaled.by": 2.0,
        "model.max-length": 24,
        "data.name": str(path),
        "data.test-size": 10,
        "data.partition": "iid",
        "strategy": "ffa-lora",
        "adapter.targets": "q_proj,v_proj",
        "head.policy": "frozen",
        "rounds": 2,
        "training.sample-rate": 0.3,
        "privacy.delta": 1e-3,
        "privacy.noise-multiplier": 1.0,
        "privacy.epsilon": 1000.0,
        "device": "cpu",
        "precision": "float32",
        "output": str(tmp_path / "runs"),
    }


@pytest.mark.rough_prices
@pytest.mark.parametrize("mode", ["dp-sgd", "none"])
def test_a_run_trains_on_rows_by_the_option_that_it_names(
    mode: str, toy: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, own = set[float](), Scaled.unfold

    def noted(task: Scaled, model: FederatedModel, record: Record, coins: Coins) -> list[Record]:
        seen.add(task.by)
        return own(task, model, record, coins)

    monkeypatch.setattr(Scaled, "unfold", noted)
    folder = run_in_process({**toy, "privacy.mode": mode}, 2)
    assert (folder / "report.html").exists()
    assert seen == {2.0}
    job = configure(toy)
    assert configure(for_flower(job.settings())) == job
    assert job.settings()["scaled.by"] == 2.0


@pytest.mark.rough_prices
def test_a_policy_pins_the_options_of_a_task(toy: dict[str, Any], tmp_path: Path) -> None:
    node = {"site": "clinic", "data": toy["data.name"], "public-size": 60, "ledger": str(tmp_path / "c.sqlite")}
    site = OneSite(toy, dict(node))
    site.rule()
    text = Path(str(site.node["policy"])).read_text(encoding="utf-8")
    assert "scaled.by = 2.0" in text
    assert isinstance(site.ask(site.task()), TrainResult)
    site.settings["scaled.by"] = 3.0
    assert "the site's policy has scaled.by = '2.0'; the run asks for scaled.by = '3.0'" in site.refuse(2).reason
    path = tmp_path / "policy.toml"
    pin(path, changed_pins(path, "scaled", {"scaled.by": 4.0}, "", 24), {"epsilon": 1.0, "delta": 1e-5})
    assert parse_policy(path.read_text(encoding="utf-8"), path).columns["scaled.by"] == "4.0"
    pin(path, changed_pins(path, "", {"prompt": "question"}, "", 0))
    assert "scaled.by = 4.0" in path.read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match=r"scaled\.by must be a number"):
        parse_policy(text.replace("scaled.by = 2.0", 'scaled.by = "2"'), path)
    with pytest.raises(ConfigError, match=r"task is pinned, but scaled\.by is not"):
        parse_policy(text.replace("scaled.by = 2.0", ""), path)
    pin(path, changed_pins(path, "causal-lm", {}, "", 0))
    assert "scaled" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"scaled.by": -1.0}, r"scaled\.by must be above 0"),
        ({"scaled.of": 1.0}, r"unknown setting 'scaled\.of'"),
        ({"model.task": "causal-lm"}, r"scaled\.by cannot be set: .* set model\.task to 'scaled', or leave it out"),
        ({"adapter.name": "none", "head.policy": "trained"}, "head.policy"),
        ({"adapter.start": "public-gradient", "start.data": "asdiv"}, "takes records as they are"),
        ({"adapter.start": "dp-gradient"}, "takes records as they are, sites' or public ones"),
    ],
)
def test_what_a_task_that_unfolds_cannot_have_is_refused(toy: dict[str, Any], more: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        configure({**toy, **more})


def test_both_rows_of_a_record_are_used(world: World) -> None:
    assert all(first != second for first, second in map(both, world.records) if len(first["input_ids"]) > 6)

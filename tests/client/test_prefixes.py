"""Outputs of the layers below the adapter: kept, displaced or computed, a record has the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from audits import worlds
from audits.tiny_models import save_tiny_model
from audits.tiny_site import clinic
from audits.worlds import World, fresh_world
from fedveil.client import app, kept_prefixes, prefixes
from fedveil.client.cores import Cores
from fedveil.client.linearised import _vectors
from fedveil.client.prefixes import Prefixes, most_bytes
from fedveil.client.rehearsal import rehearse
from fedveil.common.model.device import denormals_flushed
from fedveil.common.model.federated import FederatedModel
from fedveil.common.model.prefix import Prefix
from fedveil.common.model.sharing import unshared
from fedveil.common.tasks import Record
from fedveil.privacy.dpsgd import PrivateSteps
from fedveil.privacy.plan import gaussian_plan
from fedveil.strategies.job import configure

PLAN = gaussian_plan(0.5, 1.0, 0.5, 4.0, 1e-3, 100.0)
LAST = {
    "bert": "layer.1.attention.self.query,layer.1.attention.self.value",
    "gpt2": "h.1.attn.c_attn",
    "llama": "layers.1.self_attn.v_proj",
}
"""The last of two layers."""
RUN = {"adapter.targets": LAST["bert"], "training.sample-rate": 1.0}


def adapted_last(family: str, folder: Path, monkeypatch: pytest.MonkeyPatch, precision: str = "float32") -> World:
    monkeypatch.setattr(worlds, "TARGETS", LAST)
    head = "trained" if family == "bert" else "frozen"
    made = fresh_world(save_tiny_model(family, folder), family, "lora", head, precision)
    with denormals_flushed():
        rehearse(made.model)
    return World(made.model, made.records * 2)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield adapted_last("bert", tmp_path, monkeypatch)
    torch.set_num_threads(before)


def summed(world: World, cores: Cores | None = None) -> Tensor:
    """Return a step's sum before the noise."""
    sums: list[Tensor] = []
    model = world.model
    with (
        denormals_flushed(),
        model.many_passes(),
        (cores or Cores(1)).opened(model, "sums", PLAN) as share,
        PrivateSteps(model.module, torch.optim.SGD(world.trained, lr=0.0), PLAN) as steps,
    ):
        assert cores is None or share is not unshared
        steps.share, add_noise = share, steps._mechanism.add_noise

        def look() -> None:
            sums.extend(parameter.summed_grad.flatten() for parameter in steps._mechanism.params)
            add_noise()

        steps._mechanism.add_noise = look  # type: ignore[method-assign]
        steps.step(model.fixed_batches(world.records), model.losses)
    return torch.cat(sums)


def kept(world: World, store: Prefixes, cores: Cores | None = None) -> Tensor:
    with store.opened(world.model, "clinic", "run"):
        return summed(world, cores)


def passes_of(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Return a list that is told of each pass of this process whether it began behind the frozen layers."""
    began, skipped = list[bool](), Prefix._skipped
    monkeypatch.setattr(Prefix, "_skipped", lambda *words: (began.append(True), skipped(*words))[1])
    return began


@pytest.mark.parametrize("family", LAST)
def test_kept_displaced_and_computed_are_the_same_to_the_last_bit(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = adapted_last(family, tmp_path, monkeypatch, "bfloat16")
    computed, skipped = summed(world), passes_of(monkeypatch)
    store = Prefixes()
    assert torch.equal(kept(world, store), computed)
    assert not skipped
    assert torch.equal(kept(world, store), computed)
    batches = sum(1 for _ in world.model.fixed_batches(world.records))
    assert len(skipped) == batches
    few = Prefixes(most=4096)  # room for some records alone
    assert all(torch.equal(kept(world, few), computed) for _ in range(2))
    assert batches < len(skipped) < 2 * batches
    # What is trained moves from step to step, and what is kept does not move with it.
    with torch.no_grad():
        world.trained[0].add_(0.25)
    moved = summed(world)
    assert not torch.equal(moved, computed)
    assert torch.equal(kept(world, store), moved)


def test_workers_share_what_is_kept_and_add_up_to_the_same_sum(world: World) -> None:
    computed, cores, store = summed(world), Cores(2), Prefixes()
    try:
        assert all(torch.equal(kept(world, store, cores), computed) for _ in range(2))
        assert store.memory is not None
        assert Path(f"/proc/self/fd/{store.memory.descriptor}").readlink() == Path("/memfd: (deleted)")
        assert store.has("clinic", store.names("clinic")[0])
        assert set(store.runs) == {"clinic"}, "what was made up stays"
        for worker in cores.workers:
            assert "/memfd" not in Path(f"/proc/{worker.process.pid}/maps").read_text(encoding="utf-8")
        # What workers have kept serves this process, and the other way round.
        assert torch.equal(kept(world, store), computed)
        # The planted fault: workers read what is another record's.
        first, other = list(store._places["clinic"].values())[:2]
        size = min(first[1], other[1]) - 64
        store.memory.bytes[first[0] + 64 : first[0] + 64 + size] = store.memory.bytes[
            other[0] + 64 : other[0] + 64 + size
        ].clone()
        assert not torch.equal(kept(world, store, cores), computed), "another record's values went unnoticed"
    finally:
        cores.close()


def test_features_and_jacobians_begin_behind_the_layers_too(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, store = _vectors(world.model, world.records, lambda: None), Prefixes()
    with store.opened(world.model, "clinic", "run"):
        _vectors(world.model, world.records, lambda: None)
        skipped = passes_of(monkeypatch)
        again = _vectors(world.model, world.records, lambda: None)
    assert skipped
    for one, other in zip(alone, again, strict=True):
        assert all(torch.equal(torch.as_tensor(one[key]), torch.as_tensor(other[key])) for key in one)


def nameless(*left_out: str) -> Callable[..., bytes]:
    """Return ``name_of`` that leaves a part of a name out."""

    def name(model: FederatedModel, record: Record, length: int, rows: int) -> bytes:
        parts = {"record": record, "length": (length, rows), "precision": model.precision, "base": model.base}
        parts["layer"] = model.prefix and model.prefix.name
        chosen = repr([(k, str(v)) for k, v in parts.items() if k not in left_out])
        return prefixes.hashlib.sha256(chosen.encode()).digest()

    return name


def test_values_of_another_record_are_found_by_the_rehearsal(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefixes, "name_of", nameless("record"))
    spoilt = adapted_last("bert", tmp_path, monkeypatch)
    assert spoilt.model.prefix is None
    assert torch.equal(kept(spoilt, Prefixes()), summed(spoilt)), "all is as without it"
    monkeypatch.setattr(prefixes, "name_of", nameless())
    assert adapted_last("bert", tmp_path, monkeypatch).model.prefix is not None


CHANGES: dict[str, Callable[[FederatedModel], object]] = {
    "precision": lambda model: setattr(model, "precision", torch.bfloat16),
    "layer": lambda model: setattr(model.prefix, "name", "another"),
    "length": lambda model: setattr(model, "shapes", model.shapes.narrowed(16, 2)),
}


@pytest.mark.parametrize("part", CHANGES)
def test_values_of_another_precision_layer_or_shape_serve_no_pass(
    world: World, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, skipped = world.model, passes_of(monkeypatch)
    ends = []
    for fault in (False, True):
        with monkeypatch.context() as patch:
            if fault:
                patch.setattr(prefixes, "name_of", nameless(part))
            store, before = Prefixes(), (model.precision, model.prefix.name, model.shapes)  # type: ignore[union-attr]
            kept(world, store)
            known, asked = len(store.names("clinic")), len(skipped)
            CHANGES[part](model)
            ends += [kept(world, store)]
            assert (len(skipped) > asked) is (fault or part == "length"), "the planted fault went unnoticed"
            assert (len(store.names("clinic")) == known) is fault
            model.precision, model.prefix.name, model.shapes = before  # type: ignore[union-attr]
    CHANGES[part](model)
    assert torch.equal(ends[0], summed(world))
    if part == "precision":
        assert not torch.equal(*ends), "float32's values passed for bfloat16's unnoticed"


def test_a_run_keeps_and_drops_them_and_its_forecast_counts_on_none(
    toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_process: None
) -> None:
    timed: list[bool] = []
    settle = kept_prefixes.settle_prefix

    def watched(rehearsal: Any) -> None:
        assert rehearsal.seconds, "passes are timed first"
        timed.append(rehearsal.model.keeper is None)
        settle(rehearsal)

    monkeypatch.setattr("fedveil.client.rehearsal.settle_prefix", watched)
    site, cache = clinic({**toy_settings, **RUN}, tmp_path), app.process.cache
    site.train(1, "one")
    assert timed
    assert all(timed)
    skipped, timings = passes_of(monkeypatch), dict(app.process.rehearsals.timings)
    assert cache.prefixes.names("clinic")
    job, model = configure(site.settings), app.process.model
    assert model is not None
    assert model.prefix is not None
    assert most_bytes(job, model, 50) == 50 * model.prefix.forms[model.shapes.lengths[-1]].size
    site.train(2, "one")
    assert skipped
    assert app.process.rehearsals.timings == timings
    site.train(1, "two")
    assert cache.prefixes.runs == {"clinic": "two"}
    app.process.forget()
    assert cache.prefixes.memory is None
    site.train(2, "two")
    assert cache.prefixes.memory is not None
    site.train(4, "two")
    assert cache.prefixes.memory is None, "the last round leaves some"


def test_where_the_first_layer_is_adapted_nothing_is_kept(
    toy_settings: dict[str, Any], tmp_path: Path, fresh_process: None
) -> None:
    site = clinic({**toy_settings, "training.sample-rate": 1.0}, tmp_path)
    site.train(1)
    assert app.process.model is not None
    assert app.process.model.prefix is None
    assert app.process.cache.prefixes.memory is None

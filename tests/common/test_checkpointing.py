"""Layers computed again in the backward pass: the same gradients of each record, in less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from alone import SIZES, records_of, samples
from digits import save_vit
from recomputed_models import Folder, batch_of, tiny
from torch import Tensor, nn

from fedveil.client.linearised import Computation, Keeping, linearised
from fedveil.client.rehearsal import rehearse, rehearse_linearised
from fedveil.common.errors import MechanismError, ModelError
from fedveil.common.model import recomputed
from fedveil.common.model.federated import FederatedModel
from fedveil.common.model.recomputed import computed_once
from fedveil.common.model.shapes import FixedBatch
from fedveil.common.tasks import Record
from fedveil.common.tasks.examples import Dataset
from fedveil.common.tasks.featured import TANGENTS
from fedveil.contrib.adapters.lora_nested import Nested
from fedveil.experiments.in_process import run_in_process
from fedveil.experiments.planner.forecast import forecast
from fedveil.privacy.linear_samples import SampleHooks
from fedveil.strategies.job import configure

pytestmark = pytest.mark.rough_prices

FAMILIES = ("bert", "gpt2", "llama", "vit")
CASES = [
    *((family, adapter, "float32") for family in FAMILIES for adapter in ("lora", "lora-sb", "dora", "lora-diagonal")),
    *((family, "lora-frozen-a", "bfloat16") for family in FAMILIES),
]


@pytest.fixture(scope="module")
def folder(model_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    vit = save_vit(tmp_path_factory.mktemp("vit"), "vit")
    return lambda family: vit if family == "vit" else model_folder(family)


# --- gradients --------------------------------------------------------------------------------------------------------


def records_for(model: FederatedModel, family: str) -> list[Record]:
    return records_of(model, (model.max_length,) * 3 if family == "vit" else SIZES)


def check_own(plain: FederatedModel, records: list[Record], found: list[Tensor], precision: str) -> None:
    """Hold each record's gradient against one that is computed with no record beside it, no hooks, nothing again."""
    trained = [p for p in plain.module.parameters() if p.requires_grad]
    for row, record in enumerate(records):
        # bfloat16 rounds another way without hooks.
        want = torch.autograd.grad(plain.losses(batch_of(plain, [record])).sum(), trained)
        for sample, gradient in zip(found, want, strict=True):
            apart = float((sample[row].double().cpu() - gradient.double().cpu()).norm())
            assert apart <= (1e-5 if precision == "float32" else 0.03) * max(float(gradient.norm()), 1e-4)


@pytest.mark.parametrize(("family", "adapter", "precision"), CASES)
def test_gradients_are_each_records_own_and_those_without_to_the_bit(
    folder: Folder, family: str, adapter: str, precision: str
) -> None:
    model = tiny(folder(family), family, adapter, precision)
    plain = tiny(folder(family), family, adapter, precision, again=False)
    records = records_for(model, family)
    together = batch_of(model, records)
    found = samples(model, together)
    assert all(map(torch.equal, found, samples(plain, together))), "computing again changes a gradient"
    check_own(plain, records, found, precision)
    for row, record in enumerate(records):
        two = batch_of(model, [records[row - 1], record])
        beside, as_before = samples(model, two), samples(plain, two)
        # In how many rows a machine computes a record alike is for the rehearsal: to compute again adds no difference.
        assert all(map(torch.equal, beside, as_before)), "computing again changes a gradient beside another record"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize(("family", "adapter", "precision"), CASES)
def test_a_gpu_computes_again_what_it_has_without_and_what_a_processor_has(
    folder: Folder, family: str, adapter: str, precision: str
) -> None:
    """A GPU's kernels may add in another order, so not to the bit."""
    there, plain = (tiny(folder(family), family, adapter, precision, again, device="cuda") for again in (True, False))
    here = tiny(folder(family), family, adapter, precision, again=False)
    records, close = records_for(there, family), 1e-4 if precision == "float32" else 0.06
    found = samples(there, batch_of(there, records))
    for other in (plain, here):
        for mine, theirs in zip(found, samples(other, batch_of(other, records)), strict=True):
            assert float((mine.cpu() - theirs.cpu()).norm()) <= close * max(float(theirs.norm()), 1e-4)
    check_own(plain, records, found, precision)
    rehearse(there)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rehearsal_keeps_every_row(folder: Folder, family: str) -> None:
    model = tiny(folder(family), family)
    shapes = model.shapes
    rehearse(model)
    assert model.shapes == shapes
    assert all(p.grad is None for p in model.module.parameters())


def test_the_planted_faults_are_refused(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    right = recomputed.checkpoint

    def twice(function: Any, carrier: Tensor, *given: Any, **options: Any) -> Any:
        function(carrier, *given)  # with its gradient, so that activations are taken here and again
        return right(function, carrier, *given, **options)

    def other_form(function: Any, *given: Any, **options: Any) -> Any:
        return right(function, *given, use_reentrant=False)

    model = tiny(folder("bert"), "bert", "dora", targets="query,value")
    batch = batch_of(model, records_of(model))
    want = samples(model, batch)
    for fault in (twice, other_form):
        with monkeypatch.context() as patch:
            patch.setattr(recomputed, "checkpoint", fault)
            assert all(map(torch.equal, samples(model, batch), want)), "what has no hooks goes wrong"
            patch.setattr(SampleHooks, "_is_own", lambda *_: False)  # as layers of any other type
            with pytest.raises((MechanismError, ModelError)):
                samples(model, batch)
            with pytest.raises(ModelError, match="cannot be trained privately"):
                rehearse(model)


def test_a_rehearsal_finds_a_layer_that_is_another_when_it_is_computed_again(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = recomputed.checkpoint

    def another(function: Any, carrier: Tensor, *given: Any, **options: Any) -> Any:
        passes = iter((1.0, 1.01))
        return right(lambda carrier, *rest: function(carrier, *rest) * next(passes), carrier, *given, **options)

    monkeypatch.setattr(recomputed, "checkpoint", another)
    with pytest.raises(ModelError, match="cannot be trained privately"):
        rehearse(tiny(folder("llama"), "llama"))


def test_a_records_own_rank_holds_in_the_second_pass(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain, whole = (
        tiny(folder("bert"), "bert", adapter=adapter, again=again)
        for adapter, again in (("lora-nested", True), ("lora-nested", False), ("lora-frozen-a", False))
    )
    records = records_of(model)
    batch = batch_of(model, records)
    want = samples(plain, batch)
    assert all(map(torch.equal, samples(model, batch), want))
    assert not all(map(torch.equal, samples(whole, batch), want)), "ranks change nothing here"

    def forgetful(layer: Nested, projected: Tensor) -> Tensor:
        ranks, layer.ranks.now = layer.ranks.now, None
        return projected if ranks is None else projected * (torch.arange(projected.shape[-1]) < ranks[:, None])[:, None]

    monkeypatch.setattr(Nested, "forward", forgetful)
    assert not all(map(torch.equal, samples(model, batch), want)), "the planted fault is not found"


def test_a_linearised_model_has_the_same_derivatives(folder: Folder) -> None:
    made = []
    for again in (True, False):
        model = tiny(folder("bert"), "bert", again=again)
        records = records_of(model)
        of = Computation("1", 4, 0, "", "")
        keeping = Keeping(of, {}, "site", Dataset("made-up", (), ()), lambda: None)
        with linearised(model, records, keeping) as (vectors, _):
            made.append([vector[TANGENTS] for vector in vectors])
        rehearse_linearised(model)
    assert all(map(torch.equal, *made))


# --- what is kept and what is computed --------------------------------------------------------------------------------


def passes_of(model: FederatedModel, batch: FixedBatch) -> list[int]:
    """Return how often each layer passes in a step."""
    counts: list[int] = []

    def count(layer: nn.Module, given: Any, output: Any) -> None:
        counts[places[id(layer)]] += 1

    layers = [m for m in model.module.modules() if type(m).__name__ == "BertSelfAttention"]
    places = {id(layer): i for i, layer in enumerate(layers)}
    counts += [0] * len(layers)
    hooks = [layer.register_forward_hook(count) for layer in layers]
    samples(model, batch)
    for hook in hooks:
        hook.remove()
    return counts


def test_layers_below_the_first_adapted_one_pass_once(folder: Folder) -> None:
    model = tiny(folder("bert"), "bert", targets="layer.1.attention.self.query")
    batch = batch_of(model, records_of(model))
    assert passes_of(model, batch) == [1, 2]
    with computed_once(model.peft_model):
        assert passes_of(model, batch) == [1, 1]
    assert passes_of(model, batch) == [1, 2], "the context was not left"


def test_less_is_kept_for_the_backward_pass(folder: Folder) -> None:
    kept = []
    for again in (True, False):
        model = tiny(folder("bert"), "bert", again=again)
        model.module.train()
        sizes: list[int] = []

        def keep(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.losses(batch_of(model, records_of(model)))
        kept.append(sum(sizes))
    assert kept[0] < kept[1] / 3, "the first passes keep more than the layers' inputs"


def test_scores_and_features_are_of_one_pass(folder: Folder) -> None:
    model, plain = (tiny(folder("bert"), "bert", again=again) for again in (True, False))
    records = records_of(model)
    assert model.score(records) == plain.score(records)
    assert torch.equal(model.features(batch_of(model, records)), plain.features(batch_of(plain, records)))


# --- refusals, runs, plans --------------------------------------------------------------------------------------------


def test_a_model_without_such_layers_is_refused_in_one_line() -> None:
    with pytest.raises(ModelError, match=r"^model\.checkpointing is true, but 'own' has no layers .* to false$"):
        recomputed.recompute_layers(nn.Linear(2, 2), "own")


def test_an_input_given_by_name_is_refused_in_one_line(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(folder("bert"), "bert")
    layers: Any = model.base.module.encoder.layer  # type: ignore[union-attr]
    own = type(layers[1]).forward
    monkeypatch.setattr(layers[1], "forward", lambda hidden, *_, **__: own(layers[1], hidden_states=hidden))
    with pytest.raises(ModelError, match=r"the layer '.*layer\.1' takes its input by name.*checkpointing to false"):
        rehearse(model)


def test_a_run_without_privacy_ends_the_same_to_the_bit(toy_settings: dict[str, Any]) -> None:
    asked = {**toy_settings, "rounds": 1, "privacy.mode": "none"}
    runs = [run_in_process({**asked, "model.checkpointing": again}, 2) for again in (False, True)]
    first, second = ((run / "adapter" / "adapter_model.safetensors").read_bytes() for run in runs)
    assert first == second


def test_a_plan_measures_steps_that_compute_again(
    toy_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    right = recomputed.checkpoint

    def counted(*given: Any, **options: Any) -> Any:
        calls.append(1)
        return right(*given, **options)

    monkeypatch.setattr(recomputed, "checkpoint", counted)
    told = forecast(
        configure({**toy_settings, "privacy.mode": "none", "model.checkpointing": True}), (100, 100), workers=1
    )
    assert calls
    assert told.calibration is not None
    assert told.calibration.record_seconds > 0

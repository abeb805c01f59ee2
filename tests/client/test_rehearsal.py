"""What passes on made-up records before a charge: models that mix records are refused, shapes that hold are kept."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from audits.tiny_models import VOCABULARY, tiny_deberta, tiny_tokenizer
from audits.tiny_site import OneSite, clinic
from fedveil.client import app, budget, rehearsal, rehearsals
from fedveil.client.deadline import Deadline, Timing
from fedveil.client.ledger.ledger import Ledger
from fedveil.client.ledger.rows import Failure
from fedveil.client.own_records import prepared
from fedveil.client.process import SiteProcess
from fedveil.client.rehearsal import rehearse, rehearse_columns, rehearse_initial
from fedveil.client.rehearsals import PLAIN
from fedveil.client.site import open_site
from fedveil.common.adapters import ADAPTERS
from fedveil.common.adapters.mapped import Mapped
from fedveil.common.config.sections import HeadConfig
from fedveil.common.errors import ConfigError, LedgerError, ModelError
from fedveil.common.messages.columns import Chosen, whole_factors
from fedveil.common.messages.round import Refusal, TrainResult
from fedveil.common.messages.state import HEAD
from fedveil.common.messages.tensors import entries
from fedveil.common.model.base import BaseModel, load_base_model
from fedveil.common.model.federated import FederatedModel, model_of
from fedveil.common.starts import Start, dp_gradient
from fedveil.common.starts.kaiming import Kaiming
from fedveil.common.starts.orthonormal import Orthonormal
from fedveil.common.tasks import TASKS
from fedveil.common.tasks.text import TextExample
from fedveil.contrib.adapters.dora import DoRA
from fedveil.privacy.dpsgd import PrivateSteps
from fedveil.strategies.job import configure

pytestmark = pytest.mark.rough_prices

SIZE = len(VOCABULARY)
HONEST = [("bert", "classification", "query,value"), ("gpt2", "causal-lm", "c_attn"), ("llama", "causal-lm", "q_proj")]


def llama(positions: int, scaling: dict[str, Any]) -> Any:
    """Return a tiny Llama with rotary scaling."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=SIZE,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=positions,
            rope_parameters={"rope_theta": 10000.0, **scaling},
        )
    )


def federated(
    folder: str, task: str, targets: str, precision: str = "float32", adapter: str = "lora", start: Start | None = None
) -> FederatedModel:
    own = Orthonormal() if "B" in ADAPTERS[adapter].directions else Kaiming()
    return FederatedModel(
        *(load_base_model(folder, task), ADAPTERS[adapter](4, 4.0, tuple(targets.split(",")), start or own)),
        *(TASKS[task], HeadConfig("trained" if task == "classification" else "frozen", "random")),
        seed=1,
        label_names=("bad", "good"),
        max_length=39,
        device="cpu",
        precision=precision,
    )


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[Any], str]:
    def save(module: Any) -> str:
        module.save_pretrained(tmp_path / "model")
        tiny_tokenizer().save_pretrained(tmp_path / "model")
        return str(tmp_path / "model")

    return save


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "task", "targets"), HONEST)
def test_honest_models_pass_with_many_rows_and_are_left_as_they_were(
    family: str, task: str, targets: str, precision: str, model_folder: Callable[[str], str]
) -> None:
    model = federated(model_folder(family), task, targets, precision)
    before, shapes = model.read(), model.shapes
    rehearse(model)
    rehearse_initial(model, dp_gradient.DPGradient())
    assert model.shapes == shapes, "an honest model on a CPU lost its rows"
    assert all(torch.equal(tensor, before[layer][name]) for layer, name, tensor in entries(model.read()))
    assert model.precision == getattr(torch, precision)
    assert all(p.grad is None for p in model.module.parameters())


MAPPED = [name for name, adapter in ADAPTERS.items() if issubclass(adapter, Mapped)]


PRECISIONS = ("float32", "bfloat16")
MAPPED_PAIRS = [(name, k, PRECISIONS[(i + k) % 2]) for i, name in enumerate(MAPPED) for k in range(len(HONEST))]
"""Every map with every family, and with both precisions."""


@pytest.mark.parametrize(("name", "honest", "precision"), MAPPED_PAIRS)
def test_an_adapter_with_a_map_of_its_own_passes(
    precision: str, name: str, honest: int, model_folder: Callable[[str], str]
) -> None:
    family, task, targets = HONEST[honest]
    model = federated(model_folder(family), task, targets, precision, name)
    before, shapes = model.read(), model.shapes
    rehearse(model)
    rehearse_initial(model, dp_gradient.DPGradient())
    assert model.shapes == shapes, "an honest model on a CPU lost its rows"
    assert all(torch.equal(tensor, before[layer][name]) for layer, name, tensor in entries(model.read()))


@pytest.mark.parametrize(("name", "precision"), [(name, PRECISIONS[i % 2]) for i, name in enumerate(MAPPED)])
def test_an_adapter_with_a_map_of_its_own_that_is_called_twice_does_not_pass(
    precision: str, name: str, saved: Callable[[Any], str]
) -> None:
    with pytest.raises(ModelError, match=r"in the layer 'encoder\.layer\.0\.attention\.self\.query_proj' a record"):
        rehearse(federated(saved(tiny_deberta()), "classification", "query_proj,key_proj", precision, name))


class Mixing(DoRA):
    """The fault: what is added to a record's output depends on the inputs of all."""

    name = "mixing"

    def change(self, factors: Any, inputs: Any, projected: Any, base_weight: Any, scale: float) -> Any:
        return super().change(factors, inputs - inputs.mean(0, keepdim=True), projected, base_weight, scale)


def test_a_map_that_mixes_the_records_is_refused(
    model_folder: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ADAPTERS, "mixing", Mixing)
    with pytest.raises(ModelError, match=r"in the layer '\S+query' a record"):
        rehearse(federated(model_folder("bert"), "classification", "query,value", adapter="mixing"))


@pytest.mark.parametrize("check", [rehearse, partial(rehearse_initial, start=dp_gradient.DPGradient())])
def test_deberta_with_shared_projections_is_refused_by_its_layers_name(
    check: Callable[[FederatedModel], None], saved: Callable[[Any], str]
) -> None:
    with pytest.raises(ModelError, match=r"in the layer 'encoder\.layer\.0\.attention\.self\.query_proj' a record"):
        check(federated(saved(tiny_deberta()), "classification", "query_proj,key_proj"))


def test_deberta_with_projections_of_its_own_for_positions_passes(saved: Callable[[Any], str]) -> None:
    rehearse(federated(saved(tiny_deberta(shared=False)), "classification", "query_proj,key_proj"))


def test_rotary_scaling_by_the_longest_record_is_refused(
    saved: Callable[[Any], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(llama(16, {"rope_type": "dynamic", "factor": 4.0}))
    model = federated(folder, "causal-lm", "q_proj,v_proj")
    rehearse(model)
    assert model.max_length == 15, "records pass beyond the length from which angles follow the longest record"
    monkeypatch.setattr(BaseModel, "positions", property(lambda _: 40))
    with pytest.raises(ModelError, match="depends on the records beside it or before it"):
        rehearse(federated(folder, "causal-lm", "q_proj,v_proj"))


def test_longrope_follows_from_a_records_own_shape(saved: Callable[[Any], str]) -> None:
    scaling = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 12,
    }
    model = federated(saved(llama(40, scaling)), "causal-lm", "q_proj,v_proj")
    rehearse(model)
    with PrivateSteps(model.module, torch.optim.SGD(model_parameters(model), lr=0.0), rehearsal._PLAN) as steps:
        short = model.prepare([TextExample(text="the film", completion="was")])
        long = model.prepare([TextExample(text="the film was very " * 8, completion="warm")])

        def gradient(records: list[Any]) -> list[Tensor]:
            first = next(model.fixed_batches(records))
            return [sample[0].clone() for sample in steps.samples(first, model.losses)]

        alone = gradient(short)
        gradient(long)
        assert all(map(torch.equal, alone, gradient([*short, *long]))), "a long record moves a short one"


def experts() -> Any:
    """Return a tiny mixture of experts: of most batches some expert gets one token, or three."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return MixtralForCausalLM(
            MixtralConfig(
                vocab_size=SIZE,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                num_local_experts=16,
                max_position_embeddings=16,
            )
        )


@pytest.mark.parametrize("way", ["grouped_mm", "eager"])
@pytest.mark.parametrize("check", [rehearse, partial(rehearse_initial, start=dp_gradient.DPGradient())])
def test_records_that_share_experts_pass_one_by_one(
    check: Callable[[FederatedModel], Any], way: str, saved: Callable[[Any], str]
) -> None:
    model = federated(saved(experts()), "causal-lm", "q_proj,v_proj")
    model.base.module.set_experts_implementation(way)  # type: ignore[operator]
    check(model)
    shapes = model.shapes if check is rehearse else model.initial_shapes
    assert shapes is not None
    assert {shapes.rows_of(length) for length in shapes.lengths} == {1}


def test_an_expert_that_gets_others_tokens_moves_a_record_which_is_why(
    saved: Callable[[Any], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault: nobody looks at shapes inside a pass. In these rows the rehearsal alone finds nothing."""
    monkeypatch.setattr(rehearsal, "follow_from_records", lambda model, batches: False)
    model = federated(saved(experts()), "causal-lm", "q_proj,v_proj")
    rehearse(model)
    rows = model.shapes.rows_of(8)
    assert rows > 1, "the bits in all rows of a batch of one record tell of experts, too"
    records = [model.collator.inventor(model.base, model.max_length)(7, number, 0) for number in range(rows)]
    with PrivateSteps(model.module, torch.optim.SGD(model_parameters(model), lr=0.0), rehearsal._PLAN) as steps:
        alone, beside = (
            [s[0] for s in steps.samples(model.fixed_batch(r, 8, rows), model.losses)] for r in (records[:1], records)
        )
    assert not all(map(torch.equal, alone, beside))


def model_parameters(model: FederatedModel) -> list[nn.Parameter]:
    return [p for p in model.module.parameters() if p.requires_grad]


@pytest.mark.parametrize(
    "mixing",
    [
        lambda losses: losses.flip(0).cumsum(0),
        lambda losses: losses * losses.detach().mean(),
        lambda losses: losses * (1.0 + 1e-3 * len(losses)),
    ],
    ids=["sums over records", "a factor of all records", "a factor of the number of records"],
)
def test_a_loss_that_mixes_records_is_refused(
    mixing: Callable[[Tensor], Tensor], model_folder: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = federated(model_folder("bert"), "classification", "query,value")
    losses = model.losses
    monkeypatch.setattr(model, "losses", lambda batch: mixing(losses(batch)))
    with pytest.raises(ModelError, match="a record's gradient depends on the records beside it"):
        rehearse(model)


def test_where_rows_are_not_equal_to_the_bit_every_record_passes_alone(
    model_folder: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = federated(model_folder("bert"), "classification", "query,value")
    samples = PrivateSteps.samples

    def by_row(steps: PrivateSteps, batch: Any, losses: Any) -> list[Tensor]:
        """Round as a device may whose kernels depend on the row, far below what mixing shows."""
        return [
            sample * (1 + 1e-6 * torch.arange(len(sample)).view(-1, *[1] * (sample.dim() - 1)))
            for sample in samples(steps, batch, losses)
        ]

    monkeypatch.setattr(PrivateSteps, "samples", by_row)
    rehearse(model)
    assert {model.shapes.rows_of(length) for length in model.shapes.lengths} == {1}


@pytest.mark.parametrize("growth", [1.001, 1 + 2e-7], ids=["much", "by little more than rounding"])
def test_a_model_that_remembers_what_passed_before_is_refused(
    growth: float, model_folder: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server's adapter may let what is as small as rounding grow into another gradient."""
    model = federated(model_folder("bert"), "classification", "query,value")
    losses, passed = model.losses, [1.0]

    def remembering(batch: Any) -> Tensor:
        passed[0] *= growth
        return losses(batch) * passed[0]

    monkeypatch.setattr(model, "losses", remembering)
    with pytest.raises(ModelError, match="before it"):
        rehearse(model)


def test_a_model_that_is_another_one_as_lengths_descend_and_stays_so_is_refused(
    model_folder: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = federated(model_folder("bert"), "classification", "query,value")
    losses, among, scale = model.losses, rehearsal._Rehearsal._among_others, [1.0]

    def later(*own: Any) -> list[Tensor]:
        scale[0] = 1.01
        return among(*own)

    monkeypatch.setattr(rehearsal._Rehearsal, "_among_others", later)
    monkeypatch.setattr(model, "losses", lambda batch: losses(batch) * scale[0])
    with pytest.raises(ModelError, match=r"depends on what was computed before it$"):
        rehearse(model)


def test_a_record_that_only_a_longer_one_before_it_moves_is_refused(
    model_folder: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = federated(model_folder("bert"), "classification", "query,value")
    losses = model.losses

    def moved(batch: Any) -> Tensor:
        found, tokens = losses(batch), batch["attention_mask"].sum(dim=1)
        return found * (1 + (tokens[: len(found)] < tokens[0]).float())

    monkeypatch.setattr(model, "losses", moved)
    with pytest.raises(ModelError, match="depends on the records beside it"):
        rehearse(model)


def test_products_that_records_share_in_the_longest_shape_alone_are_found(
    model_folder: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = federated(model_folder("bert"), "classification", "query,value")

    def shared(own: FederatedModel, batches: Any) -> bool:
        return {batch["input_ids"].shape[1] for batch in batches} == {own.shapes.lengths[-1]}

    monkeypatch.setattr(rehearsal, "follow_from_records", shared)
    rehearse(model)
    assert {model.shapes.rows_of(length) for length in model.shapes.lengths} == {1}


def test_the_scale_of_features_is_1_while_a_model_rehearses(
    model_folder: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the server's, and could make a record's part in a gradient vanish."""
    model = federated(model_folder("bert"), "classification", "query,value")
    model.module.feature_scale = 1e-9
    losses, seen = model.losses, set()

    def watched(batch: Any) -> Tensor:
        seen.add(model.module.feature_scale)
        return losses(batch)

    monkeypatch.setattr(model, "losses", watched)
    rehearse(model)
    assert (seen, model.module.feature_scale) == ({1.0}, 1e-9)


def test_a_turn_rehearses_its_own_factors_alone(
    model_folder: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = federated(model_folder("bert"), "classification", "query,value")
    first, *others = sorted({name for _, name in model.below_head()})
    turns: list[set[int]] = []
    monkeypatch.setattr(rehearsal._Rehearsal, "run", lambda own: turns.append(set(map(id, own.trained))))
    rehearse_columns(model, whole_factors(model.start, [first]))
    rehearse(model)
    resting = {id(p) for (_, name), p in model.below_head().items() if name in others}
    assert resting
    assert turns[1] - turns[0] == resting


def test_shapes_that_do_not_fit_the_memory_are_refused_before_a_charge(
    toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = clinic(toy_settings, tmp_path)
    monkeypatch.setattr(app, "process", SiteProcess())  # nothing is rehearsed
    losses = FederatedModel.losses

    def out_of_memory(model: FederatedModel, batch: Any) -> Tensor:
        if batch["input_ids"].shape[1] == model.shapes.lengths[-1] and len(batch["input_ids"]) > 3:
            raise torch.OutOfMemoryError("tried to allocate")
        return losses(model, batch)

    monkeypatch.setattr(FederatedModel, "losses", out_of_memory)
    reply = site.refuse()
    assert "do not fit this site's memory" in reply.reason
    assert not site.ledger.exists() or not site.charges()


def test_a_server_cannot_scale_the_rehearsal_until_nothing_shows(saved: Callable[[Any], str]) -> None:
    """Under these settings all gradients are zero in float32; a later state makes them large, and records mix."""
    model = FederatedModel(
        load_base_model(saved(tiny_deberta()), "classification"),
        *(
            ADAPTERS["lora"](4, 4.2e-45, ("query_proj", "key_proj"), Kaiming()),
            TASKS["classification"],
            HeadConfig(start="zeros"),
        ),
        seed=1,
        label_names=("bad", "good"),
        feature_scale=1e-4,
        max_length=39,
        device="cpu",
        precision="float32",
    )
    scale, before = model.module.feature_scale, model.read()
    with pytest.raises(ModelError, match="in the layer"):
        rehearse(model)
    assert model.module.feature_scale == scale
    assert all(torch.equal(tensor, before[layer][name]) for layer, name, tensor in entries(model.read()))
    assert {s for m in model.peft_model.modules() for s in getattr(m, "scaling", {}).values()} == {4.2e-45 / 4}


def test_a_scale_that_is_a_factor_is_1_while_a_model_rehearses(
    model_folder: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times any other number of ours all of the adapter's gradients would be too small beside the head's to tell."""
    model = federated(
        model_folder("bert"), "classification", "query,value", "float32", "lora-increments", Orthonormal()
    )
    model.write({layer: {"s": torch.tensor([1e-6])} for layer in model.start if layer != HEAD})
    before, losses, seen = model.read(), model.losses, set[float]()

    def watched(batch: Any) -> Tensor:
        seen.update(float(held["s"]) for layer, held in model.places().items() if layer != HEAD)
        return losses(batch)

    monkeypatch.setattr(model, "losses", watched)
    rehearse(model)
    assert seen == {1.0}
    assert all(torch.equal(tensor, before[layer][name]) for layer, name, tensor in entries(model.read()))


@pytest.mark.parametrize("name", [name for name, adapter in ADAPTERS.items() if adapter.divisors])
def test_what_a_change_is_divided_by_is_1_while_a_model_rehearses(
    name: str, model_folder: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among numbers around 0 some are so small that a model of thirty layers has no gradient that is finite."""
    model = federated(model_folder("llama"), "causal-lm", "v_proj,o_proj", "bfloat16", name)
    before, losses, seen = model.read(), model.losses, list[Tensor]()

    def watched(batch: Any) -> Tensor:
        seen.extend(held[c].clone() for held in model.places().values() for c in model.adapter.divisors if c in held)
        return losses(batch)

    monkeypatch.setattr(model, "losses", watched)
    rehearse(model)
    assert seen, "the divisors are nowhere"
    assert all((c == 1).all() for c in seen)
    assert all(torch.equal(tensor, before[layer][name]) for layer, name, tensor in entries(model.read()))


def test_gradients_that_say_nothing_are_refused(
    model_folder: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for factor in (0.0, 1e-30, float("nan"), float("inf")):
        model = federated(model_folder("bert"), "classification", "query,value")
        losses = model.losses
        monkeypatch.setattr(model, "losses", lambda batch, f=factor, own=losses: own(batch) * f)
        with pytest.raises(ModelError, match=r"could be compared|depends on"):
            rehearse(model)


def test_a_row_in_the_middle_that_is_computed_otherwise_costs_the_rows_of_that_length(
    model_folder: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = federated(model_folder("bert"), "classification", "query,value")
    samples = PrivateSteps.samples

    def uneven(steps: PrivateSteps, batch: Any, losses: Any) -> list[Tensor]:
        """Round the fourth row otherwise, in batches of 16 alone: as threads do whose share is cut in a row."""
        found = samples(steps, batch, losses)
        if batch.rows == 16:
            for sample in found:
                sample[3] *= 1 + 1e-6
        return found

    monkeypatch.setattr(PrivateSteps, "samples", uneven)
    rehearse(model)
    assert {length: model.shapes.rows_of(length) for length in (8, 16, 24, 32)} == {8: 48, 16: 24, 24: 12, 32: 12}


@pytest.mark.parametrize("longest", [1, 2, 3])
def test_a_length_that_leaves_no_room_for_a_text_is_refused(longest: int, model_folder: Callable[[str], str]) -> None:
    with pytest.raises(ConfigError, match=r"model.max-length is \d, of which the tokenizer"):
        FederatedModel(
            *(
                load_base_model(model_folder("bert"), "classification"),
                ADAPTERS["lora"](4, 4.0, ("query",), Kaiming()),
            ),
            *(TASKS["classification"], HeadConfig(start="random")),
            seed=1,
            label_names=("bad", "good"),
            max_length=longest,
        )


# --- after the charge -------------------------------------------------------------------------------------------------


def test_a_round_that_fails_after_its_charge_sends_noise_and_says_so_at_the_site(
    toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    site = clinic({**toy_settings, "training.sample-rate": 1.0}, tmp_path)
    site.train(1, run="another")  # rehearsed
    step = PrivateSteps.step

    def fail(steps: PrivateSteps, batches: Any, losses: Any) -> None:
        parts = list(batches)
        if parts:
            raise RuntimeError("record 7 says: a lovely film")
        step(steps, parts, losses)

    monkeypatch.setattr(PrivateSteps, "step", fail)
    task = site.task(1)
    reply = site.ask(task)
    assert isinstance(reply, TrainResult), reply
    assert reply.spending is not None
    moved = [float((t != task.state[layer][name]).double().mean()) for layer, name, t in entries(reply.contribution)]
    assert all(share > 0.9 for share in moved), "a tensor carries no noise"
    (line,) = [r.getMessage() for r in caplog.records if "noise alone is sent" in r.getMessage()]
    assert "lovely" not in line
    assert len(site.charges()) == 2
    (failure,) = failures(site)
    assert (failure.dataset, failure.run, failure.round_number) == ("clinic", task.run, 1)
    assert "lovely" not in failure.reason


def failures(site: OneSite) -> list[Failure]:
    with Ledger(site.ledger) as ledger:
        return ledger.failures()


def test_a_ledger_that_cannot_note_the_failure_is_no_refusal(
    toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = clinic(toy_settings, tmp_path)
    step = PrivateSteps.step

    def fail(steps: PrivateSteps, batches: Any, losses: Any) -> None:
        parts = list(batches)
        if parts:
            raise MemoryError
        step(steps, parts, losses)

    def full(*_: Any, **__: Any) -> None:
        raise LedgerError("the disk is full")

    monkeypatch.setattr(PrivateSteps, "step", fail)
    monkeypatch.setattr(Ledger, "fail", full)
    assert isinstance(site.ask(site.task()), TrainResult)
    assert failures(site) == []


def test_round_0_that_fails_after_its_charge_sends_noise(
    toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"strategy": "fed-sb", "adapter.start": "dp-gradient", "start.sample-rate": 1.0, "privacy.epsilon": 50.0}
    site = clinic({**toy_settings, **own}, tmp_path)
    private_gradient = dp_gradient.private_gradient

    def fail(model: FederatedModel, parts: Any, plan: Any, *_: Any) -> Any:
        if list(parts):
            raise MemoryError
        return private_gradient(model, [], plan)

    monkeypatch.setattr(dp_gradient, "private_gradient", fail)
    reply = site.ask(replace(site.task(0), state={}, basis={}, basis_fingerprint=""))
    assert isinstance(reply, TrainResult), reply
    assert all(float((tensor != 0).double().mean()) > 0.9 for _, _, tensor in entries(reply.contribution))
    assert [failure.round_number for failure in failures(site)] == [0]


def test_without_privacy_a_failure_is_a_refusal(
    toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = clinic({**toy_settings, "privacy.mode": "none"}, tmp_path)
    site.rule(allow_no_privacy=True)
    monkeypatch.setattr("fedveil.common.model.plain.plain_step", lambda *_: 1 / 0)
    assert isinstance(site.ask(site.task()), Refusal)


def test_a_start_whose_rehearsal_fails_leaves_no_round_rehearsed(
    toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"strategy": "fed-sb", "adapter.start": "dp-gradient", "start.sample-rate": 1.0, "privacy.epsilon": 50.0}
    site = clinic({**toy_settings, **own}, tmp_path)
    assert isinstance(site.ask(site.task(1)), TrainResult)
    assert set(app.process.rehearsals.timings) == {PLAIN}
    # As after rounds of another kind, which a server may ask for before round 0.
    app.process.rehearsals.timings["steps on A"] = app.process.rehearsals.timings[PLAIN]

    def fails(model: FederatedModel, _: Any) -> Any:
        model.base.module.set_attn_implementation("sdpa")
        raise ModelError("no memory")

    monkeypatch.setattr(rehearsals, "rehearse_initial", fails)
    refused = site.ask(replace(site.task(0, run="2"), state={}, basis={}, basis_fingerprint=""))
    model_of.cache_clear()  # that model attends otherwise now
    assert isinstance(refused, Refusal)
    assert app.process.rehearsals.timings == {}, (
        "rounds count as rehearsed with an attention that they were not rehearsed with"
    )


def narrow(model: FederatedModel) -> None:
    model.shapes = model.shapes.narrowed(model.shapes.longest, 1)


def attend_otherwise(model: FederatedModel) -> None:
    model.base.module.set_attn_implementation("sdpa")  # type: ignore[operator]


def lower_nothing(model: FederatedModel) -> None:
    model.lowers = False


@pytest.mark.parametrize(
    ("way", "fails"), [(narrow, False), (narrow, True), (attend_otherwise, False), (lower_nothing, False)]
)
def test_a_kind_of_round_that_changes_how_the_model_computes_has_the_others_rehearsed_anew(
    way: Callable[[FederatedModel], None],
    fails: bool,
    toy_settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rounds that train B are rehearsed, and those that train A change what was seen then."""
    asked = clinic({**toy_settings, "strategy": "rolora"}, tmp_path)
    model_of.cache_clear()
    job, seen = configure(asked.settings), list[str]()
    site, model = open_site(asked.node, job.config, "1", simulated=False), asked.model()

    def turned(model: FederatedModel, chosen: Chosen) -> Timing:
        seen.extend({name for factors in chosen.values() for name in factors})
        if len(seen) == 2:
            way(model)
            if fails:
                raise ModelError("no memory")
        return Timing({8: 0.1}, {8: 1}, 0.1, 0.1)

    monkeypatch.setattr(app, "process", SiteProcess())
    monkeypatch.setattr(rehearsals, "rehearse_columns", turned)
    for number in (1, 2):
        with pytest.raises(ModelError) if fails and number == 1 else nullcontext():
            app.process.rehearsals.hold_to(Deadline(), job, site, model, asked.task(number))
    model_of.cache_clear()
    # All kinds of rounds are rehearsed before the first; the last in a way that both were seen in.
    wanted = ["B", "A", "A", "B"] if fails else ["B", "A", "B"]
    assert seen == wanted, "a round is trained in a way that no rehearsal has seen"


# --- records ----------------------------------------------------------------------------------------------------------


def test_steps_of_every_kind_are_rehearsed_by_a_name_of_their_own() -> None:
    """Steps that passed for others would train in shapes, or through factors, that nothing has looked at."""

    def name(columns: Any = None) -> str:
        job: Any = None
        site: Any = SimpleNamespace(trained_columns=lambda *_: (columns, 0))
        task: Any = SimpleNamespace(round_number=1, state={})
        whole = {layer: {factor: torch.zeros(2, 3) for factor in "AB"} for layer in "ab"}
        model: Any = SimpleNamespace(start=whole)
        return rehearsals.steps_of(job, site, model, task).name

    none, first, two = torch.arange(0), torch.arange(1), torch.arange(2)
    chosen = [{"a": {"B": first}}, {"a": {"B": two}}, {"a": {"B": first}, "b": {"B": first}}, {"a": {"B": none}}]
    chosen += [{"a": {factor: torch.arange(3)}} for factor in "AB"]
    kinds = [name(), *(name(columns=columns) for columns in chosen)]
    assert len(set(kinds)) == len(kinds)


def test_a_record_that_the_model_cannot_take_is_left_out(
    model_folder: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = federated(model_folder("bert"), "classification", "query,value")
    good = [TextExample(text="the film", label=0), TextExample(text="warm story", label=1)]
    wanted = model.prepare(good)
    tokenise = model.task.tokenise

    def picky(tokenizer: Any, examples: Any, longest: int) -> Any:
        if any(example.text == "odd" for example in examples):
            raise TypeError("TextInputSequence must be str")
        records = tokenise(tokenizer, examples, longest)
        # Unknown, not cut, and without a number.
        others: dict[str, Any] = {"two": [SIZE + 3], "three": [5] * (model.max_length + 1), "four": [5, None]}
        pairs = zip(records, examples, strict=True)
        return [{**record, "input_ids": others.get(e.text, record["input_ids"])} for record, e in pairs]

    monkeypatch.setattr(type(model.task), "tokenise", lambda _, *arguments: picky(*arguments))
    odd = [TextExample(text=text, label=1) for text in ("odd", "two", "three", "four")]
    assert prepared(model, [good[0], *odd, good[1]]) == wanted
    assert prepared(model, []) == []


def test_denormal_numbers_are_flushed_in_every_pass_and_in_no_price(
    toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a state of them takes more than twice the processor time that was rehearsed."""
    site = clinic({**toy_settings, "training.sample-rate": 1.0}, tmp_path)
    task = site.task()
    passed, priced, losses, pay = list[bool](), list[bool](), FederatedModel.losses, budget.pay_round

    def flushes() -> bool:
        return not float(torch.tensor(1e-40) * 1.0)

    def passing(self: FederatedModel, *args: Any, **options: Any) -> Any:
        passed.append(flushes())
        return losses(self, *args, **options)

    def pricing(*args: Any, **options: Any) -> Any:
        priced.append(flushes())
        return pay(*args, **options)

    can = torch.set_flush_denormal(True)
    torch.set_flush_denormal(False)
    monkeypatch.setattr(FederatedModel, "losses", passing)
    monkeypatch.setattr(budget, "pay_round", pricing)
    monkeypatch.setattr(app.process.rehearsals, "timings", {})
    assert isinstance(site.ask(task), TrainResult)
    rehearsed = len(passed)
    assert set(passed) == {can}
    assert (priced, flushes()) == ([False], False)
    assert isinstance(site.ask(site.task(2)), TrainResult)
    assert len(passed) > rehearsed
    assert set(passed) == {can}

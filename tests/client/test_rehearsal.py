"""What passes on made-up records before a charge: models that mix records are refused, shapes that hold are kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rehearsals import SIZE, federated
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from audits.tiny_models import tiny_deberta, tiny_tokenizer
from audits.tiny_site import clinic
from fedveil.client import app, exact_shapes, rehearsal
from fedveil.client.process import SiteProcess
from fedveil.client.rehearsal import rehearse, rehearse_columns, rehearse_initial
from fedveil.common.adapters import ADAPTERS
from fedveil.common.adapters.mapped import Mapped
from fedveil.common.config.sections import HeadConfig
from fedveil.common.errors import ConfigError, ModelError
from fedveil.common.messages.columns import columns_of
from fedveil.common.messages.state import HEAD
from fedveil.common.messages.tensors import entries
from fedveil.common.model.base import BaseModel, load_base_model
from fedveil.common.model.federated import FederatedModel
from fedveil.common.starts import dp_gradient
from fedveil.common.starts.kaiming import Kaiming
from fedveil.common.starts.orthonormal import Orthonormal
from fedveil.common.tasks import TASKS
from fedveil.common.tasks.text import TextExample
from fedveil.contrib.adapters.dora import DoRA
from fedveil.privacy.dpsgd import PrivateSteps

pytestmark = pytest.mark.rough_prices


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


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[Any], str]:
    def save(module: Any) -> str:
        module.save_pretrained(tmp_path / "model")
        tiny_tokenizer().save_pretrained(tmp_path / "model")
        return str(tmp_path / "model")

    return save


@pytest.mark.parametrize(("honest", "precision"), [(0, "float32"), (0, "bfloat16"), (1, "float32"), (2, "bfloat16")])
def test_honest_models_pass_with_many_rows_and_are_left_as_they_were(
    honest: int, precision: str, model_folder: Callable[[str], str]
) -> None:
    family, task, targets = HONEST[honest]
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


@pytest.mark.parametrize(
    ("name", "honest", "precision"), [(name, i % len(HONEST), PRECISIONS[i % 2]) for i, name in enumerate(MAPPED)]
)
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


@pytest.mark.parametrize(
    ("way", "check"),
    [("grouped_mm", rehearse), ("eager", partial(rehearse_initial, start=dp_gradient.DPGradient()))],
)
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
    monkeypatch.setattr(exact_shapes, "follow_from_records", lambda model, batches: False)
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
    losses, among, scale = model.losses, rehearsal._Rehearsal.among_others, [1.0]

    def later(*own: Any) -> list[Tensor]:
        scale[0] = 1.01
        return among(*own)

    monkeypatch.setattr(rehearsal._Rehearsal, "among_others", later)
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

    monkeypatch.setattr(exact_shapes, "follow_from_records", shared)
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
    rehearse_columns(model, columns_of(model.start, {first: torch.arange}))
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


@pytest.mark.parametrize("name", [name for name, adapter in ADAPTERS.items() if "c" in adapter.traits.ones])
def test_what_a_change_is_divided_by_is_1_while_a_model_rehearses(
    name: str, model_folder: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among numbers around 0 some are so small that a model of thirty layers has no gradient that is finite."""
    model = federated(model_folder("llama"), "causal-lm", "v_proj,o_proj", "bfloat16", name)
    before, losses, seen = model.read(), model.losses, list[Tensor]()

    def watched(batch: Any) -> Tensor:
        seen.extend(held[c].clone() for held in model.places().values() for c in model.adapter.traits.ones if c in held)
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

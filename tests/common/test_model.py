"""The model of a run: what its state is, how its head starts, how it is scored, where its base comes from."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from audits.tiny_models import FILLER, TARGETS, tiny_model, tiny_tokenizer
from audits.worlds import plan
from fedveil.client.optimizers import build_optimizer
from fedveil.common.adapters import ADAPTERS
from fedveil.common.config.sections import HeadConfig, ModelConfig
from fedveil.common.errors import ConfigError, FedVeilError, ModelError, ProtocolError
from fedveil.common.messages.state import HEAD, AdapterState
from fedveil.common.messages.tensors import entries, fingerprint
from fedveil.common.model.base import BaseModel, load_base_model, model_fingerprint, weights_fingerprint
from fedveil.common.model.federated import FederatedModel, model_of
from fedveil.common.model.files import files_of
from fedveil.common.model.plain import plain_step
from fedveil.common.model.scoring import score_records
from fedveil.common.starts import STARTS
from fedveil.common.starts.kaiming import Kaiming
from fedveil.common.tasks import TASKS, Classification, Record
from fedveil.common.tasks.text import TextExample, pad_id
from fedveil.privacy.dpsgd import PrivateSteps
from fedveil.strategies.resolve import resolve

ModelFor = Callable[..., FederatedModel]


@pytest.fixture
def model_for(model_folder: Callable[[str], str]) -> ModelFor:
    """Return a function that builds a tiny model; keywords are FederatedModel's, and ``head`` a HeadConfig."""

    def make(
        family: str = "bert",
        adapter: str = "lora",
        head: HeadConfig | None = None,
        base: BaseModel | None = None,
        **options: Any,
    ) -> FederatedModel:
        task = "classification" if family == "bert" else "causal-lm"
        settings: dict[str, Any] = {
            "seed": 1,
            "label_names": ("bad", "good"),
            "max_length": 24,
            "device": "cpu",
            "precision": "float32",
        }
        return FederatedModel(
            base or load_base_model(model_folder(family), task),
            ADAPTERS[adapter](
                3,
                6.0,
                tuple(TARGETS[family].split(",")),
                STARTS["orthonormal" if "B" in ADAPTERS[adapter].directions else "kaiming"](),
            ),
            TASKS[task],
            head or HeadConfig(start="random"),
            **{**settings, **options},
        )

    return make


def records_of(model: FederatedModel, count: int = 9) -> list[Record]:
    words = random.Random(4)
    return model.prepare(
        [
            TextExample(
                text=" ".join(words.choices(FILLER, k=words.randint(1, 12))),
                label=i % 2,
                completion=" ".join(words.choices(FILLER, k=words.randint(1, 6))),
            )
            for i in range(count)
        ]
    )


def same(left: AdapterState, right: AdapterState) -> bool:
    a, b = list(entries(left)), list(entries(right))
    return [(x, y) for x, y, _ in a] == [(x, y) for x, y, _ in b] and all(
        torch.equal(p, q) for (_, _, p), (_, _, q) in zip(a, b, strict=True)
    )


def shifted(state: AdapterState) -> AdapterState:
    return {layer: {name: tensor + 1.0 for name, tensor in factors.items()} for layer, factors in state.items()}


def pairs(*families: str) -> list[tuple[str, str]]:
    """Return every adapter with a family, by turns; the head alone goes with the one that has a head."""
    return [(a, "bert" if a == "none" else families[i % len(families)]) for i, a in enumerate(sorted(ADAPTERS))]


# --- state ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("adapter", "family"), pairs("bert", "gpt2", "llama"))
def test_what_is_written_is_read_back_and_a_copy(family: str, adapter: str, model_for: ModelFor) -> None:
    model = model_for(family, adapter)
    state = shifted(model.read())
    assert not same(state, model.read())
    model.write(state)
    read = model.read()
    assert same(read, state)
    for _, _, tensor in entries(read):
        tensor.zero_()
    assert same(model.read(), state), "what was read is the live model, not a copy"


def test_a_part_of_the_state_is_written_and_the_rest_left(model_for: ModelFor) -> None:
    model = model_for()
    before = model.read()
    model.write({HEAD: {"bias": torch.tensor([1.0, 2.0])}})
    after = model.read()
    assert after[HEAD]["bias"].tolist() == [1.0, 2.0]
    after[HEAD]["bias"] = before[HEAD]["bias"]
    assert same(after, before)


def _with(state: AdapterState, layer: str, name: str, tensor: Tensor) -> AdapterState:
    return {**state, layer: {**state.get(layer, {}), name: tensor}}


@pytest.mark.parametrize("fault", ["head shape", "head name", "layer", "factor", "factor shape"])
def test_nothing_is_written_when_any_part_does_not_fit(fault: str, model_for: ModelFor) -> None:
    model = model_for()
    before = model.read()
    state = shifted(before)
    last = sorted(layer for layer in state if layer != HEAD)[-1]
    bad = {
        "head shape": _with(state, HEAD, "weight", torch.zeros(3, 16)),
        "head name": _with(state, HEAD, "scale", torch.zeros(2)),
        "layer": _with(state, "nowhere", "B", torch.zeros(2, 2)),
        "factor": _with(state, last, "R", torch.zeros(3, 3)),
        "factor shape": _with(state, last, "B", torch.zeros(1, 3)),
    }[fault]
    with pytest.raises(ProtocolError) as refusal:
        model.write(bad)
    assert "\n" not in str(refusal.value)
    assert same(model.read(), before), "a part of a state that does not fit was written"
    model.write(state)
    assert same(model.read(), state)


def test_a_frozen_head_never_travels_and_is_not_trained(model_for: ModelFor) -> None:
    frozen, trained = model_for(head=HeadConfig(policy="frozen", start="random")), model_for()
    assert HEAD not in frozen.read()
    assert HEAD not in frozen.trained()
    assert not any(p.requires_grad for p in frozen.module.head.parameters())
    with pytest.raises(ProtocolError, match="no head tensor"):
        frozen.write({HEAD: {"bias": torch.zeros(2)}})
    assert set(trained.read()[HEAD]) == set(trained.trained()[HEAD]) == {"weight", "bias"}
    assert set(trained.read()) - {HEAD} == set(frozen.read())


@pytest.mark.parametrize(("adapter", "family"), pairs("bert", "gpt2", "llama"))
def test_what_is_trained_is_exactly_what_takes_a_gradient(family: str, adapter: str, model_for: ModelFor) -> None:
    model = model_for(family, adapter)
    trained = {id(p) for factors in model.trained().values() for p in factors.values()}
    assert trained == {id(p) for p in model.module.parameters() if p.requires_grad}
    names = {name for layer, factors in model.trained().items() for name in factors if layer != HEAD}
    assert names == set(ADAPTERS[adapter].trained)


def test_every_party_builds_the_same_model_from_the_same_settings(model_for: ModelFor) -> None:
    torch.manual_seed(1)
    here = model_for()
    torch.manual_seed(2)
    there = model_for()
    assert same(here.read(), there.read())
    assert not same(here.read(), model_for(seed=2).read())
    records = records_of(here)
    assert here.score(records) == there.score(records)


def test_the_start_is_kept_apart_from_the_live_model(model_for: ModelFor) -> None:
    model = model_for()
    start = fingerprint(model.start)
    model.write(shifted(model.start))
    assert fingerprint(model.start) == start
    model.write(model.start)
    assert fingerprint(model.read()) == start


def test_model_of_keeps_one_model_per_settings(model_folder: Callable[[str], str]) -> None:
    config, adapter = (
        ModelConfig(name=model_folder("bert"), max_length=24),
        ADAPTERS["lora"](3, 6.0, ("query",), Kaiming()),
    )
    settings: dict[str, Any] = {
        "config": config,
        "task": TASKS["classification"],
        "adapter": adapter,
        "head": HeadConfig(start="random"),
        "seed": 1,
        "label_names": ("bad", "good"),
        "label_phrases": (),
        "device": "cpu",
        "precision": "float32",
        "files": files_of(model_folder("bert")),
    }
    first = model_of(**settings)
    assert model_of(**settings) is first
    assert model_of(**{**settings, "seed": 2}) is not first
    other = ADAPTERS["lora-frozen-a"](3, 6.0, ("query",), Kaiming())
    assert model_of(**{**settings, "adapter": other}).adapter is other, "two adapters with equal fields were mixed up"


# --- dropout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_dropout_is_off_in_train_mode(family: str, model_for: ModelFor) -> None:
    module = tiny_model(family)
    module.config.attention_dropout = 0.5
    for child in module.modules():
        if isinstance(child, nn.Dropout):
            child.p = 0.5
        if isinstance(getattr(child, "attention_dropout", None), float):
            child.attention_dropout = 0.5
    module.requires_grad_(False)

    def moves(model: nn.Module) -> bool:
        ids = torch.tensor([[2, 5, 6, 7, 8, 9, 3]])
        with torch.no_grad():
            return not torch.equal(model(input_ids=ids)[0], model(input_ids=ids)[0])

    assert moves(module.train()), "this model has no dropout to turn off"
    model = model_for(family, base=BaseModel("toy", module, tiny_tokenizer(), "-"))
    assert not moves(model.peft_model.train())
    records = records_of(model)
    model.module.train()
    with torch.no_grad():
        first, second = model.losses(model.batch(records)), model.losses(model.batch(records))
    assert torch.equal(first, second)


# --- the head's start -------------------------------------------------------------------------------------------------


def head_of(model: FederatedModel) -> tuple[Tensor, Tensor]:
    return model.module.head.weight.detach(), model.module.head.bias.detach()


def test_a_head_of_zeros_is_zero(model_for: ModelFor) -> None:
    weight, bias = head_of(model_for(head=HeadConfig(start="zeros")))
    assert not weight.any()
    assert not bias.any()


def test_a_random_head_follows_from_the_seed_and_has_rows_of_length_one(model_for: ModelFor) -> None:
    weight, bias = head_of(model_for(head=HeadConfig(start="random")))
    assert torch.allclose(weight.norm(dim=1), torch.ones(2))
    assert not bias.any()
    torch.manual_seed(99)
    assert torch.equal(weight, head_of(model_for(head=HeadConfig(start="random")))[0])
    assert not torch.allclose(weight, head_of(model_for(head=HeadConfig(start="random"), seed=2))[0])


PHRASES = "bright film | warm story ; dull film | cold story"


@pytest.mark.parametrize("feature_scale", [0.0, 4.0])
@pytest.mark.parametrize("margin", [1.0, 3.0])
def test_label_words_lead_on_their_own_phrases_by_the_margin_and_are_even_at_the_mean(
    margin: float, feature_scale: float, model_for: ModelFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HeadConfig, "margin", margin)
    names = ("bad", "middling", "good")
    phrases = [["dull film", "cold story"], ["film is quite warm"], ["bright film and story"]]
    head = HeadConfig(start="label-words", phrases=";".join("|".join(p) for p in phrases))
    model = model_for(head=head, label_names=names, feature_scale=feature_scale)
    features = []
    for texts in phrases:
        rows = []
        for text in texts:
            ids = torch.tensor([model.base.processor(text)["input_ids"]])
            with torch.no_grad():
                row = model.peft_model(input_ids=ids).last_hidden_state[0].mean(0)
            rows.append(row * feature_scale / row.norm() if feature_scale else row)
        features.append(torch.stack(rows).mean(0))
    weight, bias = head_of(model)
    logits = torch.stack([weight @ row + bias for row in features])
    leads = [logits[i, i] - logits[i, torch.arange(3) != i].mean() for i in range(3)]
    assert float(torch.stack(leads).mean()) == pytest.approx(margin, rel=1e-4)
    assert torch.allclose(weight @ torch.stack(features).mean(0) + bias, torch.zeros(3), atol=1e-4)


def test_rows_of_label_words_cancel_and_for_two_labels_are_opposite(model_for: ModelFor) -> None:
    weight, bias = head_of(model_for(head=HeadConfig(start="label-words", phrases=PHRASES)))
    assert float(weight.norm()) > 0.1
    assert float(weight.sum(0).norm()) < 1e-4 * float(weight.norm())
    assert torch.allclose(weight[0], -weight[1], atol=1e-4)
    assert float(bias.sum()) == pytest.approx(0.0, abs=1e-4)


def test_phrases_that_tell_no_labels_apart_start_the_head_at_zero(model_for: ModelFor) -> None:
    for names, phrases in ((("bad", "good"), "bright film; bright film"), (("only",), "bright film")):
        head = HeadConfig(start="label-words", phrases=phrases)
        weight, bias = head_of(model_for(head=head, label_names=names))
        assert not weight.any()
        assert not bias.any()


def test_label_words_use_the_phrases_and_without_them_the_labels_names(model_for: ModelFor) -> None:
    def weight(phrases: str, names: tuple[str, ...] = ("dull", "bright")) -> Tensor:
        return head_of(model_for(head=HeadConfig(start="label-words", phrases=phrases), label_names=names))[0]

    assert torch.equal(weight("dull;bright", names=("0", "1")), weight(""))
    assert not torch.allclose(weight(PHRASES), weight(""))
    assert torch.equal(weight("dull film|cold story; bright film"), weight(" dull film | cold story ;bright film"))


def test_label_words_take_the_data_sets_own_phrases_unless_the_run_has_others(model_for: ModelFor) -> None:
    own = (("dull film", "cold story"), ("bright film", "warm story"))
    names = ("tired", "lovely")

    def weight(phrases: str = "", **options: Any) -> Tensor:
        return head_of(model_for(head=HeadConfig(start="label-words", phrases=phrases), label_names=names, **options))[
            0
        ]

    configured = "dull film | cold story ; bright film | warm story"
    assert torch.equal(weight(label_phrases=own), weight(configured))
    assert torch.equal(weight(configured, label_phrases=(("one",), ("two",))), weight(configured))
    assert not torch.allclose(weight(label_phrases=own), weight())


def test_the_start_of_the_head_is_the_same_in_every_precision(model_for: ModelFor) -> None:
    head = HeadConfig(start="label-words", phrases=PHRASES)
    assert torch.equal(head_of(model_for(head=head))[0], head_of(model_for(head=head, precision="bfloat16"))[0])


def test_the_start_of_the_head_knows_no_dropout(model_folder: Callable[[str], str], model_for: ModelFor) -> None:
    def weight() -> Tensor:
        base = load_base_model(model_folder("bert"), "classification")
        assert any(child.p > 0 for child in base.module.modules() if isinstance(child, nn.Dropout))
        base.module.train()
        return head_of(model_for(base=base, head=HeadConfig(start="label-words", phrases=PHRASES)))[0]

    assert torch.equal(weight(), weight())


@pytest.mark.parametrize("phrases", ["bright film", "bright; dull; middling"])
def test_phrases_for_another_number_of_labels_are_refused_with_both_numbers(phrases: str, model_for: ModelFor) -> None:
    with pytest.raises(
        ConfigError, match=rf"{len(phrases.split(';'))} labels, the data have 2 \(bad, good\)"
    ) as refusal:
        model_for(head=HeadConfig(start="label-words", phrases=phrases))
    assert "\n" not in str(refusal.value)


# --- score ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_the_score_is_what_a_loop_over_records_counts(family: str, model_for: ModelFor) -> None:
    model = model_for(family)
    records = records_of(model)
    loss = hits = units = 0.0
    for record in records:
        with torch.no_grad():
            logits = model.module(model.batch([record]))[0].double()
        if family == "bert":
            targets = [(logits, record["labels"][0])]
        else:
            targets = [(logits[t - 1], label) for t, label in enumerate(record["labels"]) if label >= 0]
        for row, target in targets:
            loss += float(row.logsumexp(0) - row[target])
            hits += float(int(row.argmax()) == target)
            units += 1
    score = model.score(records)
    assert score.loss == pytest.approx(loss / units, abs=1e-5)
    assert score.accuracy == pytest.approx(hits / units)
    assert model.score(records[:2]) != score


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_score_does_not_depend_on_how_records_are_batched(family: str, model_for: ModelFor) -> None:
    model = model_for(family)
    records = records_of(model, 17)

    def score(batch_tokens: int, order: list[Record]) -> tuple[float, float]:
        got = score_records(model.module, model.task, model.base, order, model.device, torch.float32, batch_tokens)
        return got.accuracy, got.loss

    want = score(16384, records)
    for batch_tokens in (1, 30, 100):
        assert score(batch_tokens, records) == pytest.approx(want, abs=1e-5)
    assert score(30, records[::-1]) == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_scoring_leaves_the_mode_and_the_state_as_they_were(training: bool, model_for: ModelFor) -> None:
    model = model_for()
    model.module.train(training)
    before = model.read()
    model.score(records_of(model))
    assert model.module.training == training
    assert same(model.read(), before)
    assert all(p.grad is None for p in model.module.parameters())


def test_losses_are_one_float32_number_per_record_also_in_bfloat16(model_for: ModelFor) -> None:
    for family in ("bert", "gpt2", "llama"):
        exact, rounded = model_for(family), model_for(family, precision="bfloat16")
        batch = exact.batch(records_of(exact))
        with torch.no_grad():
            want, got = exact.losses(batch), rounded.losses(batch)
        assert got.shape == want.shape == (9,)
        assert got.dtype == torch.float32
        assert torch.allclose(got, want, rtol=0.05)
        assert not torch.equal(got, want), "the forward pass was not in bfloat16"


# --- the base model ---------------------------------------------------------------------------------------------------


def test_the_base_is_frozen_float32_and_without_a_pooler(model_folder: Callable[[str], str]) -> None:
    base = load_base_model(model_folder("bert"), "classification")
    assert not base.module.training
    assert {p.dtype for p in base.module.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in base.module.parameters())
    assert not any("pooler" in name for name, _ in base.module.named_parameters())
    assert base.hidden_size == 16


def test_padding_is_the_tokenizers_own_pad_token_also_when_that_is_token_0(model_folder: Callable[[str], str]) -> None:
    base = load_base_model(model_folder("bert"), "classification")
    assert pad_id(base) == base.processor.pad_token_id == 0


def test_padding_falls_back_to_the_end_mark_and_then_to_token_0() -> None:
    def padding(**ids: int | None) -> int:
        return pad_id(BaseModel("toy", nn.Identity(), SimpleNamespace(**ids), "-"))

    assert padding(pad_token_id=7, eos_token_id=2) == 7
    assert padding(pad_token_id=None, eos_token_id=2) == 2
    assert padding(pad_token_id=None, eos_token_id=None) == 0


def test_the_fingerprint_changes_with_one_weight_one_name_and_one_shape() -> None:
    def module(*, name: str = "layer", last: float = 0.0, shape: tuple[int, int] = (2, 6)) -> nn.Module:
        module = nn.Module()
        weight = torch.arange(12.0)
        weight[-1] += last
        module.register_parameter(name, nn.Parameter(weight.reshape(shape)))
        return module

    original = weights_fingerprint(module())
    assert weights_fingerprint(module()) == original
    for changed in (module(last=1e-3), module(name="other"), module(shape=(3, 4)), module().double()):
        assert weights_fingerprint(changed) != original


def changed_folder(folder: str, place: Path, name: str, change: Callable[[dict[str, Any]], None]) -> str:
    """Return a copy of a model's folder in which one of its JSON files is changed."""
    shutil.copytree(folder, place)
    file = place / name
    values = json.loads(file.read_text(encoding="utf-8"))
    change(values)
    file.write_text(json.dumps(values), encoding="utf-8")
    return str(place)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config.json", lambda config: config.update(rope_parameters={"rope_type": "dynamic", "factor": 2.0})),
        ("config.json", lambda config: config.update(rms_norm_eps=1e-3)),
        ("tokenizer.json", lambda rules: rules["model"]["vocab"].update({"film": 6, "story": 5})),
        ("tokenizer.json", lambda rules: rules.update(normalizer={"type": "Lowercase"})),
        ("tokenizer_config.json", lambda settings: settings.update(split_special_tokens=True)),
    ],
    ids=["rotary scaling", "a norm's epsilon", "two words swapped", "lower case", "special tokens in a text are split"],
)
def test_the_same_weights_as_another_function_have_another_fingerprint(
    name: str, change: Callable[[dict[str, Any]], None], model_folder: Callable[[str], str], tmp_path: Path
) -> None:
    stock = load_base_model(model_folder("llama"), "causal-lm")
    other = load_base_model(changed_folder(model_folder("llama"), tmp_path / "model", name, change), "causal-lm")
    assert weights_fingerprint(other.module) == weights_fingerprint(stock.module)
    assert other.fingerprint != stock.fingerprint
    same = load_base_model(changed_folder(model_folder("llama"), tmp_path / "same", name, lambda _: None), "causal-lm")
    assert same.fingerprint == stock.fingerprint, "where a model lies changes its fingerprint"


def test_using_a_tokenizer_leaves_its_fingerprint(model_folder: Callable[[str], str]) -> None:
    base = load_base_model(model_folder("bert"), "classification")
    base.processor(["the film was", "the"], truncation=True, padding=True, max_length=4)
    assert model_fingerprint(base.module, Classification().processor_parts(base.processor)) == base.fingerprint


def test_records_are_cut_to_one_less_than_the_models_positions(model_for: ModelFor) -> None:
    model = model_for()
    assert model.base.positions == 40
    long = FederatedModel(
        *(
            load_base_model(model.base.name, "classification"),
            ADAPTERS["lora"](2, 2.0, ("query",), Kaiming()),
        ),
        *(TASKS["classification"], HeadConfig(start="random")),
        seed=1,
        label_names=("bad", "good"),
        max_length=64,
    )
    (record,) = long.prepare([TextExample(text="the film was " * 60, label=0)])
    assert len(record["input_ids"]) == 39
    for batch in long.fixed_batches([record]):
        long.losses(batch)


def test_the_fingerprint_of_a_base_is_that_of_weights_configuration_and_tokenizer(
    model_folder: Callable[[str], str],
) -> None:
    stock = load_base_model(model_folder("bert"), "classification")
    again = load_base_model(model_folder("bert"), "classification")
    assert (
        stock.fingerprint
        == again.fingerprint
        == model_fingerprint(stock.module, Classification().processor_parts(stock.processor))
    )
    assert stock.fingerprint != load_base_model(model_folder("llama"), "causal-lm").fingerprint


@pytest.mark.parametrize(
    ("adapter", "family", "private"), [(*pair, i // 2 % 2 == 1) for i, pair in enumerate(pairs("bert", "gpt2"))]
)
def test_the_weights_under_an_adapter_have_the_bases_fingerprint_also_after_training_and_scoring(
    adapter: str, family: str, private: bool, model_for: ModelFor
) -> None:
    model = model_for(family, adapter, head=HeadConfig("trained" if family == "bert" else "frozen", "random"))
    if adapter == "lora-mixture":  # of no library all its adapters are 0, and no weight of theirs says anything
        model.write(shifted(model.read()))
    records, before = records_of(model), model.read()
    task = "classification" if family == "bert" else "causal-lm"
    stock = weights_fingerprint(load_base_model(model.base.name, task).module)
    asked = {"head-rate": 1.0, "training.optimizer": "adam", "training.learning-rate": 0.05}
    optimizer = build_optimizer(model.trained(), resolve(asked).config.training)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    model.module.train()
    if private:
        with PrivateSteps(model.module, optimizer, plan()) as steps:
            for _ in range(2):
                steps.step([model.batch(records)], model.losses)
    else:
        for _ in range(2):
            plain_step(iter([model.batch(records)]), model, optimizer, parameters)
    model.score(records)
    moved = [not torch.equal(tensor, before[layer][name]) for layer, name, tensor in entries(model.read())]
    assert sum(moved) == len(parameters), "training moved something else than what is trained: nothing is proved"
    base = model.peft_model if adapter == "none" else model.peft_model.unload()
    assert weights_fingerprint(base) == stock, "the base moved under the adapter"


@pytest.mark.parametrize("task", ["classification", "causal-lm"])
@pytest.mark.parametrize("name", ["no-such-model-anywhere", "nobody/no-such-model", "/no/such/folder", ""])
def test_a_model_that_does_not_exist_is_refused_in_one_line(name: str, task: str) -> None:
    with pytest.raises(ModelError, match="cannot load the base model") as refusal:
        load_base_model(name, task)
    assert repr(name) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_folder_without_a_model_in_it_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot load the base model") as refusal:
        load_base_model(str(tmp_path), "classification")
    assert "\n" not in str(refusal.value)


def test_targets_that_fit_no_layer_are_refused_and_named(model_folder: Callable[[str], str]) -> None:
    with pytest.raises(FedVeilError, match="nonsense") as refusal:
        FederatedModel(
            load_base_model(model_folder("bert"), "classification"),
            ADAPTERS["lora"](3, 6.0, ("nonsense",), Kaiming()),
            TASKS["classification"],
            HeadConfig(start="zeros"),
            seed=1,
            label_names=("bad", "good"),
            device="cpu",
        )
    assert "adapter.targets" in str(refusal.value)

"""Public texts in batches: their gradients, directions and calibration are those of one text at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from audits.tiny_models import TARGETS
from fedveil.common.adapters import ADAPTERS
from fedveil.common.adapters.layers import layers_of, stored_transposed
from fedveil.common.config.sections import HeadConfig
from fedveil.common.errors import ModelError
from fedveil.common.messages.state import AdapterState
from fedveil.common.model.base import load_base_model
from fedveil.common.model.federated import FederatedModel
from fedveil.common.starts import STARTS, Start, calibration, public_metric
from fedveil.common.starts.base import Labels
from fedveil.common.starts.gradient import open_weights, record_gradients
from fedveil.common.starts.public_metric import PublicMetric
from fedveil.common.tasks import TASKS, Record
from fedveil.strategies.job import configure

pytestmark = [pytest.mark.rough_prices, pytest.mark.peft]

Folder = Callable[[str], str]
LABELS = Labels(("bad", "good"), (("dull film", "awful story", "cold"), ("warm film", "lovely story", "joyful")))
CONFIG = {"adapter.start": "public-metric", "adapter.name": "lora-metric", "privacy.clip-norm": 0.5}


def tiny(folder: str, family: str, start: Start, adapter: str = "lora-metric") -> FederatedModel:
    return FederatedModel(
        load_base_model(folder, "classification"),
        ADAPTERS[adapter](2, 4.0, tuple(TARGETS[family].split(",")), start),
        TASKS["classification"],
        HeadConfig(start="random"),
        seed=1,
        label_names=LABELS.names,
        max_length=24,
        device="cpu",
        precision="float32",
    )


def one_by_one(
    model: FederatedModel, records: Sequence[Record], only: Collection[str] = ()
) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Yield what ``record_gradients`` does, of each text alone and through autograd of the weights themselves."""
    layers = layers_of(model.peft_model)
    model.module.eval()
    with open_weights(model) as weights:
        for record in records:
            found = torch.autograd.grad(model.losses(model.batch([record])).sum(), list(weights.values()))
            whole = {n: g.T if stored_transposed(layers[n]) else g for n, g in zip(weights, found, strict=True)}
            yield {n: (torch.eye(len(G))[None], G[None]) for n, G in whole.items() if not only or n in only}


def furthest(found: AdapterState, wanted: AdapterState) -> float:
    """Return the largest distance of two tensors, over the length of the one that is wanted."""
    assert found.keys() == wanted.keys()
    return max(
        float((found[layer][name] - tensor).norm() / tensor.norm())
        for layer, factors in wanted.items()
        for name, tensor in factors.items()
    )


def spanned(made: AdapterState) -> AdapterState:
    """Return what does not turn with a choice among directions of nearly one length: Vᵀ V, and B as it is."""
    return {layer: {"B": f["B"].double(), "VV": f["V"].double().T @ f["V"].double()} for layer, f in made.items()}


def made_by(model: FederatedModel, start: PublicMetric) -> AdapterState:
    return spanned(start.around(model, configure(CONFIG).config, LABELS))


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_directions_of_batches_are_those_of_single_texts(
    family: str, model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = PublicMetric(records=40)
    model = tiny(model_folder(family), family, start)
    made = made_by(model, start)

    def beside_another(*given: Any) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
        for batch in record_gradients(*given):
            yield {layer: (left.roll(1, 0), right) for layer, (left, right) in batch.items()}

    monkeypatch.setattr(public_metric, "record_gradients", one_by_one)
    slow = made_by(model, start)
    monkeypatch.setattr(public_metric, "record_gradients", beside_another)
    assert furthest(made, slow) < 1e-4  # float32: measured 1e-6
    assert furthest(made_by(model, start), slow) > 0.01, "rows of one text with those of another are not found"


def test_a_layer_without_rows_of_records_sees_them_one_by_one(model_folder: Folder) -> None:
    """As where a model packs the texts of a batch without padding: then no row says whose it is."""
    start = PublicMetric(records=12)
    model = tiny(model_folder("bert"), "bert", start)
    records, batches = start.texts(model), 0
    name, adapted = next(iter(layers_of(model.peft_model).items()))
    wanted = sum(one[name][0][0].T @ one[name][1][0] for one in one_by_one(model, records))
    layer: nn.Module = adapted.get_base_layer()
    shape: list[torch.Size] = []

    def pack(_: nn.Module, given: tuple[Tensor, ...]) -> Tensor:
        shape.append(given[0].shape)
        return given[0].flatten(0, 1)

    layer.register_forward_pre_hook(pack)
    layer.register_forward_hook(lambda _, __, output: output.view(*shape.pop()[:2], -1))
    found = torch.zeros_like(wanted)
    for batch in record_gradients(model, records):
        left, right = batch[name]
        batches += 1
        found += (left.mT @ right).sum(0)
    assert batches == len(records)
    assert (found - wanted).norm() < 1e-5 * wanted.norm()


def test_a_layer_that_no_pass_uses_is_named(model_folder: Folder) -> None:
    start = PublicMetric(records=4)
    model = tiny(model_folder("bert"), "bert", start)
    layer = next(iter(layers_of(model.peft_model).values())).get_base_layer()
    layer.register_forward_hook(lambda _, __, output: output.detach())
    with pytest.raises(ModelError, match=r"adapter\.targets"):
        list(record_gradients(model, start.texts(model)))


@pytest.mark.parametrize(
    ("family", "adapter"), [("bert", "lora-frozen-a"), ("gpt2", "lora-frozen-a"), ("bert", "salt")]
)
def test_a_calibrated_length_is_that_of_single_texts(
    family: str, adapter: str, model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(model_folder(family), family, STARTS["svd-of-weights"](), adapter)
    records = PublicMetric(records=40).texts(model)
    made = calibration.calibrated(model, model.start, records)
    monkeypatch.setattr(calibration, "record_gradients", one_by_one)
    slow = calibration.calibrated(model, model.start, records)
    own = {layer: factors for layer, factors in slow.items() if layer in layers_of(model.peft_model)}
    moved = {
        layer: {n: t for n, t in f.items() if not torch.equal(t, model.start[layer][n])} for layer, f in own.items()
    }
    assert all(moved.values())
    assert furthest({k: {n: made[k][n] for n in f} for k, f in moved.items()}, moved) < 1e-5

"""Kept features of public records: the scores that they give, what they follow from, and who shares them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch

from fedveil.common.messages.state import HEAD, METRIC, AdapterState
from fedveil.common.messages.tensors import merge
from fedveil.common.model import public_features
from fedveil.common.model.federated import FederatedModel
from fedveil.common.starts.class_means import ClassMeans
from fedveil.common.tasks.featured import FEATURES
from fedveil.server.model import ServerModel
from fedveil.strategies.job import configure

pytestmark = pytest.mark.rough_prices


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the records of every pass of features that is made from now on; none is kept from before.

    Tests of one process share a model, and those of other files score the same records.
    """
    monkeypatch.setattr(public_features, "_kept", WeakKeyDictionary())
    seen, features = list[int](), FederatedModel.features

    def counted(self: FederatedModel, batch: Any) -> Any:
        seen.append(len(batch["labels"]))
        return features(self, batch)

    monkeypatch.setattr(FederatedModel, "features", counted)
    return seen


def moved(state: AdapterState, layers: tuple[str, ...] = (), seed: int = 0) -> AdapterState:
    """Return a state with other numbers in every tensor of these layers, or of all but the head's."""
    draw = torch.Generator().manual_seed(seed)
    chosen = layers or tuple(layer for layer in state if layer not in (HEAD, METRIC))
    return merge(
        state,
        {
            layer: {n: t + 0.3 * torch.randn(t.shape, generator=draw) for n, t in state[layer].items()}
            for layer in chosen
        },
    )


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_score_of_kept_features_is_that_of_the_whole_model_to_the_last_bit(
    precision: str, toy_settings: dict[str, Any], passes: list[int]
) -> None:
    server = ServerModel(configure({**toy_settings, "precision": precision}))
    count = len(server.records)

    def slow(state: AdapterState) -> Any:
        server.model.write(state)
        return server.model.score(server.records, server._slices)

    start = server.start
    scores = [server.score(start), server.score(start), server.score(moved(start, (HEAD,)))]
    assert scores == [slow(start), slow(start), slow(moved(start, (HEAD,)))]
    assert scores[0] != scores[2]
    assert sum(passes) == count, "an adapter that rests is passed again"
    assert server.score(moved(start)) == slow(moved(start)) != scores[0]
    assert sum(passes) == 2 * count


def test_kept_features_of_an_adapter_that_has_moved_are_found(
    toy_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a key that overlooks the adapter, the score of the one before comes back."""
    server = ServerModel(configure(toy_settings))
    true = [server.score(state).loss for state in (server.start, moved(server.start))]
    assert true[0] != true[1]
    monkeypatch.setattr(public_features, "adapter_key", lambda _: "any")
    stale = [server.score(state).loss for state in (server.start, moved(server.start))]
    assert stale == [true[0], true[0]]


def test_the_key_sees_every_tensor_scale_and_record(toy_settings: dict[str, Any]) -> None:
    server = ServerModel(configure(toy_settings))
    model, records = server.model, server.records
    model.write(server.start)
    keys = {public_features.adapter_key(model)}
    for layer, factors in server.start.items():
        for name, tensor in factors.items() if layer != HEAD else ():
            other = tensor.clone()
            other.view(-1)[-1] += 2.0**-20
            model.write(merge(server.start, {layer: {name: other}}))
            keys.add(public_features.adapter_key(model))
    tensors = sum(len(factors) for layer, factors in server.start.items() if layer != HEAD)
    assert len(keys) == 1 + tensors
    model.write(server.start)
    layer = next(iter(public_features.layers_of(model.peft_model).values()))
    scale = layer.scaling["default"]
    layer.scaling["default"] = 2 * scale
    assert public_features.adapter_key(model) not in keys
    layer.scaling["default"] = scale
    assert public_features.adapter_key(model) in keys
    one, key = dict(records[0]), public_features.records_key(records)
    assert public_features.records_key([dict(record) for record in records]) == key
    for name in one:
        changed = {**one, name: [*one[name][:-1], one[name][-1] + 1]}
        assert public_features.records_key([changed, *records[1:]]) != key
    assert public_features.records_key([*records[1:], one]) != key
    assert public_features.records_key([{"pixels": torch.zeros(2)}]) != public_features.records_key(
        [{"pixels": torch.zeros(2, 1)}]
    )


def test_sites_of_one_process_make_the_map_of_made_up_records_once(
    toy_settings: dict[str, Any], passes: list[int]
) -> None:
    server = ServerModel(configure(toy_settings))
    start = ClassMeans()
    first, again = start._map(server.model), start._map(server.model)
    assert sum(passes) == 512
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_records_stay_as_they_were_and_no_more_than_the_latest_are_kept(
    toy_settings: dict[str, Any], model_folder: Callable[[str], str]
) -> None:
    server = ServerModel(configure(toy_settings))
    for seed in range(4):
        server.score(moved(server.start, seed=seed))
    assert not any(FEATURES in record for record in server.records)
    assert len(public_features._kept[server.model]) == public_features.MOST

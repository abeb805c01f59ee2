"""Rows that complete a seed: factors in turn, a shared pair, gates, ranks by explained variance, block-affine Bone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from exact import draw, off
from safetensors.torch import load_file
from torch import Tensor, nn

from audits.tiny_models import TARGETS
from fedveil.common.adapters import ADAPTERS, Adapter
from fedveil.common.adapters.attach import attach, read_factors, write_factors
from fedveil.common.adapters.layers import layer_shape, layers_of
from fedveil.common.errors import ConfigError
from fedveil.common.messages.columns import narrowed
from fedveil.common.messages.state import HEAD, AdapterState
from fedveil.common.messages.tensors import merge
from fedveil.common.model.base import load_base_model
from fedveil.common.run_lines import RoundLine, read_lines
from fedveil.common.starts import STARTS
from fedveil.contrib.adapters.bone import Bone
from fedveil.contrib.adapters.lora_shared import LoRAShared
from fedveil.contrib.starts.eva import spread_ranks
from fedveil.contrib.strategies.columns import MASK
from fedveil.contrib.strategies.diffora_gates import DiffoRAGates
from fedveil.contrib.strategies.eva_ranks import EVARanks
from fedveil.contrib.strategies.rolora import RoLoRA
from fedveil.contrib.strategies.s2_lora import S2LoRA
from fedveil.contrib.strategies.turns import Turns
from fedveil.experiments.evaluate import evaluate_run, read_peft_config
from fedveil.experiments.in_process import run_in_process
from fedveil.privacy.dpsgd import PrivateSteps
from fedveil.privacy.plan import gaussian_plan
from fedveil.strategies import Contribution
from fedveil.strategies.job import configure
from fedveil.strategies.payload import payload

pytestmark = [pytest.mark.rough_prices, pytest.mark.peft]

RANK, S = 3, 2.0
SHAPES = {"first": (5, 7), "second": (5, 7), "other": (9, 6)}
"""Of layers; two are of one shape."""
SHARES = (0.6, 0.3, 0.1)


def shared_state(seed: int = 0) -> AdapterState:
    """A pair for each shape in its first layer, z in all, and a head."""
    state: AdapterState = {HEAD: {"weight": draw(2, 4, seed=seed)}}
    for number, (layer, (out, into)) in enumerate(SHAPES.items()):
        state[layer] = {"z": draw(RANK, seed=seed + 10 + number)}
        if layer != "second":
            state[layer] |= {
                "A": draw(RANK, into, seed=seed + 20 + number),
                "B": draw(out, RANK, seed=seed + 30 + number),
            }
    return state


def gated_state(seed: int = 0) -> AdapterState:
    return {
        layer: {
            "A": draw(RANK, into, seed=number),
            "B": draw(out, RANK, seed=seed + 40 + number),
            "g": draw(1, seed=seed + 50 + number).sigmoid(),
        }
        for number, (layer, (out, into)) in enumerate(SHAPES.items())
    }


def pairs_state(seed: int = 0) -> AdapterState:
    moved = {layer: {"A": draw(RANK, into, seed=seed + 60 + i)} for i, (layer, (_, into)) in enumerate(SHAPES.items())}
    plain = {layer: {n: t for n, t in held.items() if n != "g"} for layer, held in gated_state(seed).items()}
    return merge(plain, moved)


def weights(state: AdapterState) -> dict[str, Tensor]:
    """Return each layer's change, written out."""
    found = {}
    for layer in SHAPES:
        held = state["first"] if layer == "second" and "z" in state[layer] else state[layer]
        middle = torch.diag(state[layer].get("z", torch.ones(RANK, dtype=torch.float64)))
        found[layer] = S * state[layer].get("g", torch.ones(1, dtype=torch.float64)) * (held["B"] @ middle @ held["A"])
    return found


WORLDS: dict[str, tuple[Turns, Callable[[int], AdapterState], tuple[str, ...]]] = {
    "rolora": (RoLoRA(), pairs_state, ("B", "A")),
    "s2-lora": (S2LoRA(), shared_state, ("z", "A", "B")),
    "diffora-gates": (DiffoRAGates(cut=100), gated_state, ("B", "g")),
}


@pytest.mark.parametrize("name", WORLDS)
def test_the_average_is_exact_in_every_turn_and_what_rests_is_untouched(name: str) -> None:
    strategy, make, order = WORLDS[name]
    state = strategy.start(make(0), order)
    for number in range(2 * len(order)):
        trained = order[number % len(order)]
        models = []
        for seed in range(len(SHARES)):
            moved = make(100 * number + seed + 1)
            change = {x: {trained: moved[x][trained]} for x in SHAPES if trained in moved[x]}
            models.append(merge(state.adapter, change))
        chosen = strategy.trained_columns(strategy.downlink(state), number + 1, 0)
        sites = []
        for share, model in zip(SHARES, models, strict=True):
            of_run = {x: {n: t for n, t in held.items() if x == HEAD or n in order} for x, held in model.items()}
            sites.append(Contribution("site", 1000 * share, narrowed(of_run, chosen)))
        assert all({*held} == {trained} for x, held in sites[0].state.items() if x != HEAD), "more is sent than trained"
        after = strategy.combine(state, sites)
        wanted = [weights(model) for model in models]
        for layer in SHAPES:
            mean = sum(share * one[layer] for share, one in zip(SHARES, wanted, strict=True))
            assert off(weights(after.adapter)[layer], mean) < 1e-12
            for factor, tensor in state.adapter[layer].items():
                assert factor == trained or torch.equal(after.adapter[layer][factor], tensor)
        state = after
    both = [merge(make(0), make(seed + 1)) for seed in range(len(SHARES))]
    averaged = {
        x: {n: sum(p * one[x][n] for p, one in zip(SHARES, both, strict=True)) for n in both[0][x]} for x in SHAPES
    }
    mean = sum(p * weights(one)["first"] for p, one in zip(SHARES, both, strict=True))
    assert off(weights(averaged)["first"], mean) > 0.1, "factors averaged at once would do as well: nothing is shown"


def test_a_threshold_shrinks_coefficients_behind_their_own_turn_alone() -> None:
    strategy = S2LoRA(threshold=0.5)
    state = replace(strategy.start(shared_state(), ("z", "A", "B")), round_number=1)
    after = strategy.settle(state).adapter
    slow = [max(abs(z) - 0.5, 0.0) * (1 if z > 0 else -1) for z in state.adapter["other"]["z"].tolist()]
    assert after["other"]["z"].tolist() == pytest.approx(slow, abs=1e-15)
    assert any(value == 0 for x in SHAPES for value in after[x]["z"].tolist())
    assert all(torch.equal(after[x]["A"], state.adapter[x]["A"]) for x in ("first", "other"))
    assert strategy.settle(replace(state, round_number=2)).adapter == state.adapter


class Two(nn.Module):
    """Two square layers and one that is not, one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(6, 6)
        self.value = nn.Linear(6, 6)
        self.dense = nn.Linear(6, 4)
        self.config = None

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(self.value(self.query(x).sin()).cos())


def test_a_shared_pair_has_the_sum_of_its_layers_gradients_and_one_clip() -> None:
    """Against autograd of the weights W0 + s B diag(z) A written out, a record at a time, float64."""
    torch.manual_seed(3)
    plain = Two()
    adapter = LoRAShared(RANK, S * RANK, ("query", "value", "dense"), STARTS["shared"]())
    model = attach(adapter, copy.deepcopy(plain), 1)
    state = read_factors(adapter, model)
    names = sorted(state)
    assert [sorted(state[name]) for name in names] == [["A", "B", "z"], ["A", "B", "z"], ["z"]]
    moved = {x: {n: draw(*t.shape, seed=7 + i).float() for i, (n, t) in enumerate(h.items())} for x, h in state.items()}
    write_factors(adapter, model, moved)
    model, plain = model.double().train(), plain.double()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 3 * RANK + 2 * 6 * RANK + (6 + 4) * RANK
    x = draw(4, 5, 6, seed=8)
    plan = gaussian_plan(1.0, 1.0, sample_rate=0.5, expected_batch_size=2.0, delta=1e-3, max_epsilon=9.0)
    with PrivateSteps(model, torch.optim.SGD(trained, 0.0), plan) as steps:
        samples = dict(zip(map(id, steps.trained), steps.samples(x, lambda b: model(b).sin().sum((1, 2))), strict=True))
    live = {name: {k: v.double().requires_grad_() for k, v in held.items()} for name, held in moved.items()}
    shapes = {name: layer_shape(layer) for name, layer in layers_of(model).items()}
    owner = next(name for name in names if shapes[name] == (6, 6) and "A" in live[name])

    def written_out(record: Tensor) -> Tensor:
        weight = {}
        for name in names:
            pair = live[name if "A" in live[name] else owner]
            base = getattr(plain, name.rpartition(".")[2])
            weight[name.rpartition(".")[2]] = (
                base.weight + S * pair["B"] @ torch.diag(live[name]["z"]) @ pair["A"],
                base.bias,
            )
        h = nn.functional.linear(record, *weight["query"]).sin()
        h = nn.functional.linear(nn.functional.linear(h, *weight["value"]).cos(), *weight["dense"])
        return h.sin().sum()

    for i in range(4):
        flat = [t for held in live.values() for t in held.values()]
        wanted = iter(torch.autograd.grad(written_out(x[i]), flat))
        for name, held in live.items():
            for factor in held:
                module, attribute = adapter.places(layers_of(model)[name])[factor]
                gradient = next(wanted)
                assert off(samples[id(getattr(module, attribute))][i], gradient) < 1e-12 * gradient.abs().max()


def test_gates_are_kept_in_range_and_the_largest_stay_after_the_cut() -> None:
    strategy = DiffoRAGates(cut=4, layers=0.5)
    state = strategy.start(gated_state(), ("B", "g"))
    assert [strategy.turn(number) for number in range(1, 8)] == ["B", "g", "B", "g", "B", "B", "B"]
    gates = {"first": 1.7, "second": -0.2, "other": 0.4}
    given = {x: {"g": torch.tensor([gate])} for x, gate in gates.items()}
    state = replace(state, adapter=merge(state.adapter, given), round_number=2)
    state = strategy.settle(state)
    assert [float(state.adapter[x]["g"]) for x in gates] == pytest.approx([1.0, 0.0, 0.4])
    cut = strategy.settle(replace(state, round_number=4))
    assert [bool(cut.adapter[x]["B"].any()) for x in gates] == [True, False, True]
    chosen = strategy.trained_columns(strategy.downlink(cut), 5, 0)
    assert {x: {n: len(c) for n, c in held.items()} for x, held in chosen.items()} == {
        "first": {"B": RANK},
        "second": {"B": 0},
        "other": {"B": RANK},
    }
    again = strategy.settle(replace(cut, round_number=5))
    assert all(torch.equal(again.adapter[x]["B"], cut.adapter[x]["B"]) for x in gates), "a choice is made twice"


def test_ranks_follow_explained_variance_within_the_budget() -> None:
    values = {f"layer-{i}": draw(8, seed=i).square().sort(descending=True).values for i in range(5)}
    ranks = spread_ranks(values, mean=3, most=6)
    assert sum(ranks.values()) == 15
    assert max(ranks.values()) <= 6
    shares = {layer: (own / own.sum()).tolist() for layer, own in values.items()}
    taken = [share for layer, own in shares.items() for share in own[: ranks[layer]]]
    left = [own[ranks[layer]] for layer, own in shares.items() if ranks[layer] < 6]
    assert min(taken) >= max(left), "a direction that explains less was taken before another"


def test_a_run_with_evas_ranks_trains_sends_and_exports_each_layers_own(toy_settings: dict[str, Any]) -> None:
    own = {
        "strategy": "eva-ranks",
        "adapter.rank": 6,
        "adapter.start": "eva",
        "start.mean-rank": 3,
        "start.text": "made-up",
    }
    run = run_in_process({**toy_settings, **own, "training.learning-rate": 0.1}, 2)
    config = read_peft_config(run / "adapter" / "adapter_config.json")
    ranks = [*config["rank_pattern"].values()]
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    widths = [t.shape[0] for name, t in tensors.items() if "lora_A" in name]
    assert sorted(widths) == sorted(ranks)
    assert len(set(ranks)) > 1
    layers = len([name for name, _ in layers_in(toy_settings)])
    assert sum(ranks) <= 3 * layers
    even = run_in_process({**toy_settings, "strategy": "ffa-lora", "adapter.rank": 6, "rounds": 1}, 2)
    sent, usual = (read_lines(RoundLine, one)[-1].bytes_up for one in (run, even))
    assert sent < 0.75 * usual
    last = read_lines(RoundLine, run)[-1].accuracy
    assert evaluate_run(run).accuracy == pytest.approx(last, abs=0.03)
    with pytest.raises(ConfigError, match=r"raise adapter\.rank"):
        configure({**toy_settings, **own, "start.mean-rank": 7})


def layers_in(settings: dict[str, Any]) -> list[tuple[str, nn.Module]]:
    base = load_base_model(settings["model.name"], "classification").module
    ends = tuple(settings["adapter.targets"].split(","))
    return [(n, m) for n, m in base.named_modules() if isinstance(m, nn.Linear) and n.endswith(ends)]


def test_masks_follow_from_rows_of_zero() -> None:
    state = gated_state()
    state["first"]["A"][1:] = 0
    memory = EVARanks().start({x: {n: t for n, t in h.items() if n != "g"} for x, h in state.items()}, ("B",)).memory
    assert memory["first"][MASK].tolist() == [1, 0, 0]
    assert memory["other"][MASK].tolist() == [1, 1, 1]


def test_bone_is_the_block_affine_change_that_peft_computes() -> None:
    W, adapter = draw(12, 12, seed=1), Bone(4, 1.0, ("dense",))
    D = draw(3, 4, 4, seed=2)
    slow = torch.zeros(12, 12, dtype=torch.float64)
    for i in range(3):
        for j in range(3):
            block = W[4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
            slow[4 * i : 4 * i + 4, 4 * j : 4 * j + 4] = (block + torch.eye(4, dtype=torch.float64)) @ D[i]
    assert off(adapter.delta({"D": D}, W), slow) < 1e-13
    from peft import MissConfig, get_peft_model

    net = nn.Sequential()
    net.dense = nn.Linear(12, 12, bias=False, dtype=torch.float64)
    net.dense.weight = nn.Parameter(W.clone())
    model = get_peft_model(net, MissConfig(r=4, target_modules=["dense"], init_weights="bat"))
    layer = model.base_model.model.dense
    layer.miss_block["default"] = nn.Parameter(D.clone())
    assert off(layer.get_delta_weight("default", W).detach(), slow) < 1e-13
    assert adapter.block(9, 6) == 3
    assert adapter.shapes(9, 6) == {"D": (3, 3, 3)}
    assert torch.linalg.matrix_rank(slow) == 12, "block affine has full rank"


@pytest.mark.parametrize(
    ("strategy", "adapter"),
    [("s2-lora", "lora-shared"), ("diffora-gates", "lora-gated"), ("fedavg-lora", "bone")],
)
@pytest.mark.parametrize("mode", ["dp-sgd", "none"])
def test_a_federation_trains_and_stock_peft_scores_it_as_the_server_did(
    toy_settings: dict[str, Any], strategy: str, adapter: str, mode: str
) -> None:
    own = {"strategy": strategy, "adapter.name": adapter, "privacy.mode": mode, "rounds": 6, "adapter.start": "shared"}
    if adapter == "bone":
        own |= {"adapter.rank": 4, "adapter.start": "orthonormal", "adapter.targets": "query,value"}
    if strategy == "diffora-gates":
        own |= {"diffora-gates.cut": 4}
    run = run_in_process({**toy_settings, **own, "training.learning-rate": 0.1}, 2)
    lines = read_lines(RoundLine, run)
    assert evaluate_run(run).accuracy == pytest.approx(lines[-1].accuracy, abs=0.03)
    assert mode == "dp-sgd" or lines[-1].accuracy > 0.6
    if strategy == "s2-lora":
        by_turn = [line.bytes_up for line in lines]
        assert by_turn[0] < by_turn[1]
        shapes = [(m.out_features, m.in_features) for _, m in layers_in(toy_settings)]
        job = configure({**toy_settings, **own})
        _, up = payload(job.strategy, job.adapter, shapes)
        usual = payload(job.strategy, ADAPTERS["lora-diagonal"](3, 6.0, ()), shapes)[1]
        assert up == usual, "the plan counts a pair for each layer"


def test_the_pair_in_the_plan_is_one_for_each_shape() -> None:
    adapter: Adapter = LoRAShared(8, 8.0, ())
    down, _ = payload(S2LoRA(), adapter, [(384, 384)] * 12)
    numbers = 4 * (2 * 384 * 8 + 12 * 8)
    assert numbers <= down < 1.2 * numbers + 2000


def path_of(run: Path) -> Path:
    return run / "adapter" / "adapter_config.json"


def test_bone_is_written_in_pefts_own_form_where_it_has_one(toy_settings: dict[str, Any]) -> None:
    import json

    own = {
        "strategy": "fedavg-lora",
        "adapter.name": "bone",
        "adapter.rank": 4,
        "rounds": 1,
        "adapter.start": "orthonormal",
    }
    kinds = []
    for rank in (4, 3):
        run = run_in_process({**toy_settings, **own, "adapter.targets": TARGETS["bert"], "adapter.rank": rank}, 2)
        kinds.append(json.loads(path_of(run).read_text())["peft_type"])
    assert kinds == ["MISS", "LORA"]

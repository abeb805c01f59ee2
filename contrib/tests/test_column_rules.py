"""Rules of the columns of B that are trained: DyLoRA (N), SwitchLoRA (W), IncreLoRA and DiffoRA (C6, T6, K2), exports.

The letters are those of the invariants; scores against noise alone are statistical, with fixed seeds.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import torch
from made_run import spent
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModel

from audits.tiny_models import PLAIN_STEP
from fedveil.client import process
from fedveil.common.adapters import LoRAFrozenA
from fedveil.common.adapters.export import alpha_at
from fedveil.common.adapters.lora_frozen_a import of_columns
from fedveil.common.adapters.split import SplitColumns
from fedveil.common.config.sections import HeadConfig
from fedveil.common.errors import ConfigError
from fedveil.common.messages.round import TrainResult
from fedveil.common.messages.state import AdapterState
from fedveil.common.model.base import load_base_model
from fedveil.common.model.federated import FederatedModel
from fedveil.common.run_lines import PrivacyLine, RoundLine, read_lines
from fedveil.common.starts import STARTS
from fedveil.common.tasks import TASKS
from fedveil.common.tasks.sentence_modules import ENCODER
from fedveil.contrib.strategies import by_energy
from fedveil.contrib.strategies.by_energy import SCORE, ByEnergy
from fedveil.contrib.strategies.columns import MASK
from fedveil.contrib.strategies.diffora import DiffoRA
from fedveil.contrib.strategies.increlora import IncreLoRA
from fedveil.contrib.strategies.switchlora import SwitchLoRA
from fedveil.experiments.evaluate import evaluate_run
from fedveil.experiments.in_process import run_in_process, simulated_nodes
from fedveil.experiments.serving.merge import merge_run
from fedveil.privacy import dpsgd
from fedveil.privacy.accounting import gaussian_release
from fedveil.privacy.privacy_filter import promised
from fedveil.server.checkpoint import memory_of, saved_state
from fedveil.strategies import Contribution, ServerState
from fedveil.strategies.job import configure

pytestmark = [pytest.mark.rough_prices, pytest.mark.one_length, pytest.mark.peft]

RANK = 6


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def model(model_folder: Callable[[str], str]) -> FederatedModel:
    """Tiny BERT with layers that are not square."""
    adapter = LoRAFrozenA(RANK, 9.0, ("query", "intermediate.dense"), STARTS["orthonormal"]())
    base = load_base_model(model_folder("bert"), "classification")
    head = HeadConfig(start="random")
    return FederatedModel(
        base,
        adapter,
        TASKS["classification"],
        head,
        seed=1,
        label_names=("bad", "good"),
        device="cpu",
        precision="float32",
    )


def merged(folder: Path, adapter: Path) -> dict[str, Tensor]:
    """The change that stock PEFT merges into each weight of the stock base model."""
    plain = AutoModel.from_pretrained(folder)
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    after = PeftModel.from_pretrained(plain, str(adapter)).merge_and_unload().state_dict()
    return {n.removesuffix(".weight"): after[n] - t for n, t in before.items() if not torch.equal(after[n], t)}


def test_n2_one_run_exports_every_rank(toy_settings: dict[str, Any]) -> None:
    own = {"strategy": "dylora", "adapter.rank": 4, "adapter.targets": "query,intermediate.dense", "rounds": 1}
    folder = run_in_process({**toy_settings, **own}, 2)
    state, s = saved_state(folder).adapter, 6.0 / 4
    places = {**{b: folder / "ranks" / str(b) for b in (1, 2, 3)}, 4: folder / "adapter"}
    for rank, place in places.items():
        found = merged(Path(toy_settings["model.name"]), place)
        layers = {layer: f for layer, f in state.items() if "A" in f}
        assert found.keys() == layers.keys()
        for layer, factors in layers.items():
            wanted = s * factors["B"][:, :rank] @ factors["A"][:rank]
            assert float((found[layer] - wanted).abs().max()) < 1e-6, f"{layer} at rank {rank}"


def test_c8_ranks_by_layer_merge_to_the_same_weights_and_a_layer_of_none_is_left_out(
    model: FederatedModel, model_folder: Callable[[str], str], tmp_path: Path
) -> None:
    state = {layer: dict(factors) for layer, factors in model.start.items() if "A" in factors}
    columns = dict(zip(sorted(state), ([0, 1], [], [1, 4, 5], list(range(RANK))), strict=True))
    for seed, (layer, chosen) in enumerate(columns.items()):
        B = torch.zeros_like(state[layer]["B"])
        B[:, chosen] = normal(seed, len(B), len(chosen)).float()
        state[layer]["B"] = B
    model.adapter.export(model.peft_model, state, tmp_path, "base")
    found = merged(Path(model_folder("bert")), tmp_path)
    assert found.keys() == {layer for layer, chosen in columns.items() if chosen}
    for layer, change in found.items():
        assert float((change - model.adapter.delta(state[layer])).abs().max()) < 1e-6


# W: a window over a pool.

LAYERS = {"query": (5, 7), "dense": (9, 6)}


def start() -> AdapterState:
    return {
        layer: {"A": torch.linalg.qr(normal(i, into, RANK))[0].T, "B": torch.zeros(out, RANK, dtype=torch.float64)}
        for i, (layer, (out, into)) in enumerate(LAYERS.items())
    }


def sites(
    strategy: Any, state: ServerState, seed: int, common: dict[str, float], noise: float, count: int = 3
) -> list[Contribution]:
    """Contributions of noise and, in some layers, of a change of this norm that all sites have in common."""
    received = strategy.downlink(state)
    chosen, made = strategy.trained_columns(received, state.round_number + 1, 0), []
    for k in range(count):
        sent: AdapterState = {}
        for i, (layer, (out, _)) in enumerate(LAYERS.items()):
            columns = chosen[layer]["B"]
            if len(columns):
                signal = normal(99 + i, out, len(columns))
                change = common.get(layer, 0.0) * signal / signal.norm() + noise * normal(
                    1000 * seed + 10 * k + i, out, len(columns)
                )
                sent[layer] = {"B": state.adapter[layer]["B"][:, columns] + change}
        made.append(Contribution(str(k), 1.0 + k, sent, 0, noise))
    return made


def test_w1_a_window_over_a_pool_is_the_form_that_merges_into_the_base() -> None:
    """Published: what leaves the slots goes into the base weight, and what comes into them is taken out of it."""
    strategy, s = SwitchLoRA(window=2), 1.5
    state = strategy.start(start(), ("B",))
    weights = {layer: normal(7 + i, *shape) for i, (layer, shape) in enumerate(LAYERS.items())}
    base, slots = {layer: W0.clone() for layer, W0 in weights.items()}, set[int]()
    for number in range(1, 31):
        window = set(strategy.trained_columns(strategy.downlink(state), number, 0)["query"]["B"].tolist())
        held = {layer: state.adapter[layer]["B"].clone() for layer in LAYERS}
        state = strategy.server_update(state, sites(strategy, state, number, {}, 0.1))
        for layer, W0 in weights.items():
            A, B = state.adapter[layer]["A"], state.adapter[layer]["B"]
            for i in slots - window:
                base[layer] += s * torch.outer(held[layer][:, i], A[i])
            for i in window - slots:
                base[layer] -= s * torch.outer(held[layer][:, i], A[i])
            now = sorted(window)
            assert float((base[layer] + s * B[:, now] @ A[now] - W0 - s * B @ A).abs().max()) < 1e-12
            resting = sorted(set(range(RANK)) - window)
            assert torch.equal(B[:, resting], held[layer][:, resting])
        slots = window


def test_w2_the_window_follows_from_the_round_alone_and_a_late_site_rebuilds_the_weights() -> None:
    strategy = SwitchLoRA(window=4, interval=2)
    state = strategy.start(start(), ("B",))
    for number in range(1, 7):
        first = (number - 1) // 2 * 4
        wanted = sorted((first + i) % RANK for i in range(4))
        assert strategy.trained_columns(strategy.downlink(state), number, 0)["query"]["B"].tolist() == wanted
        again = strategy.settle(replace(strategy.start(start(), ("B",)), round_number=number - 1))
        assert all(torch.equal(again.memory[x][MASK], state.memory[x][MASK]) for x in LAYERS)
        state = strategy.server_update(state, sites(strategy, state, number, {}, 0.1))
    late = strategy.install(start(), strategy.downlink(state))
    for layer in LAYERS:
        assert late[layer].keys() == {"A", "B"}
        for name in ("A", "B"):
            assert torch.equal(late[layer][name], state.adapter[layer][name])


# IncreLoRA and DiffoRA: a choice by what sites have in common.


@pytest.mark.parametrize("kind", [IncreLoRA, DiffoRA])
def test_a_change_that_was_shortened_to_nothing_ends_no_run(kind: Any) -> None:
    """At least half of the sites may send back what they received, so that the middle length is 0."""
    strategy = kind()
    state = strategy.settle(strategy.start(start(), ("B",)))
    contributions = sites(strategy, state, 1, {}, 0.1)
    contributions[0] = replace(contributions[0], noise=0.0)
    after = strategy.server_update(state, contributions)
    assert after.round_number == 1


def counts(state: ServerState) -> dict[str, int]:
    return {layer: int(held[MASK].sum()) for layer, held in state.memory.items()}


def test_increlora_gives_columns_to_the_layer_that_learns_and_to_no_other() -> None:
    strategy = IncreLoRA(start_columns=2, more_columns=3, top_layers=2)
    state = strategy.start(start(), ("B",))
    seen = [counts(state)]
    for number in range(3):
        before = {layer: state.adapter[layer]["B"].clone() for layer in LAYERS}
        state = strategy.server_update(state, sites(strategy, state, number, {"dense": 5.0}, 0.1))
        seen.append(counts(state))
        for layer in LAYERS:
            resting = seen[-2][layer]
            assert torch.equal(state.adapter[layer]["B"][:, resting:], before[layer][:, resting:])
    assert [held["dense"] for held in seen] == [2, 5, 6, 6]
    assert [held["query"] for held in seen] == [2, 2, 2, 2]


def test_a_layers_score_is_the_energy_of_its_sites_shares_and_noises_less_the_least_of_so_many_layers() -> None:
    strategy = IncreLoRA(start_columns=4)
    state = strategy.start(start(), ("B",))
    noises = (0.1, 0.3, 0.2)
    made = [
        replace(one, weight=weight, noise=noise)
        for one, weight, noise in zip(
            sites(strategy, state, 3, {"query": 0.4, "dense": 0.8}, 0.1), (1.0, 6.0, 3.0), noises, strict=True
        )
    ]
    combined, shares = strategy.combine(state, made), (0.1, 0.6, 0.3)
    for layer in LAYERS:
        held = state.adapter[layer]["B"][:, :4]
        changes = [(one.state[layer]["B"] - held).flatten() for one in made]
        units = [float(change.norm()) / noise for change, noise in zip(changes, noises, strict=True)]
        changes = [change * min(1, sorted(units)[1] / unit) for change, unit in zip(changes, units, strict=True)]
        pairs = [(j, k) for j in range(3) for k in range(3) if j != k]
        value = sum(shares[j] * shares[k] * float(changes[j] @ changes[k]) for j, k in pairs)
        variance = sum((shares[j] * shares[k] * noises[j] * noises[k]) ** 2 for j, k in pairs)
        wanted = value / (2 * len(changes[0]) * variance) ** 0.5 - NormalDist().inv_cdf(1 - 0.05 / len(LAYERS))
        assert float(combined.memory[layer][SCORE]) == pytest.approx(wanted, rel=1e-5)


def test_a_round_that_gives_no_score_chooses_nothing_by_the_last_ones() -> None:
    strategy = IncreLoRA(start_columns=1, more_columns=1)
    state = strategy.start(start(), ("B",))
    state = strategy.server_update(state, sites(strategy, state, 1, {"dense": 5.0}, 0.1))
    assert counts(state) == {"query": 1, "dense": 2}
    for made in (
        sites(strategy, state, 2, {"dense": 5.0}, 0.1, 1),
        [replace(one, noise=None) for one in sites(strategy, state, 2, {"dense": 5.0}, 0.1)],
    ):
        assert counts(strategy.server_update(state, made)) == counts(state)


def test_increlora_grows_after_every_round_of_its_interval_and_after_no_other() -> None:
    strategy, seen = IncreLoRA(start_columns=1, more_columns=1, interval=3), list[int]()
    state = strategy.start(start(), ("B",))
    for number in range(1, 7):
        state = strategy.server_update(state, sites(strategy, state, number, {"dense": 5.0}, 0.1))
        seen.append(counts(state)["dense"])
    assert seen == [1, 1, 2, 2, 2, 3]


def test_c6_a_layer_that_grows_computes_what_it_did_and_by_alpha_over_its_columns_it_would_not() -> None:
    strategy = IncreLoRA(start_columns=4, more_columns=2, top_layers=2)
    state = strategy.start(start(), ("B",))
    combined = strategy.combine(state, sites(strategy, state, 1, {"query": 5.0, "dense": 5.0}, 0.1))
    grown = strategy.settle(combined)
    assert (counts(combined), counts(grown)) == ({"query": 4, "dense": 4}, {"query": 6, "dense": 6})
    whole, x = LoRAFrozenA(RANK, 9.0, ("l",)), normal(3, 5, RANK)
    for layer in LAYERS:
        factors = grown.adapter[layer]
        assert torch.equal(factors["B"], combined.adapter[layer]["B"])
        assert bool(factors["B"][:, :4].all())
        assert not bool(factors["B"][:, 4:].any())

        def exported(adapter: LoRAFrozenA, columns: int, factors: dict[str, Tensor] = factors) -> Tensor:
            return adapter.delta(of_columns(factors, torch.arange(columns)))

        before, after = (
            exported(replace(whole, rank=columns, alpha=alpha_at(whole, columns)), columns) for columns in (4, 6)
        )
        assert float((after - before).abs().max()) < 4e-15 * float(before.abs().max())
        linear = nn.Linear(RANK, len(factors["B"]), bias=False, dtype=torch.float64)
        linear.weight = nn.Parameter(factors["B"].clone())
        trained = [SplitColumns(linear, torch.arange(columns))(x) for columns in (4, 6)]
        assert float((trained[1] - trained[0]).detach().abs().max()) < 1e-14
        # Planted: alpha stays as it is while the rank grows, and a third of the update is gone.
        shrunk = [exported(replace(whole, rank=columns), columns) for columns in (4, 6)]
        assert 1 - float(shrunk[1].norm() / shrunk[0].norm()) == pytest.approx(2 / 6, abs=1e-12)


def grown_by_chance(told: float) -> float:
    """Share of rounds of noise alone in which some layer grows, where sites tell ``told`` times the noise they have."""
    strategy, found = IncreLoRA(start_columns=4), 0
    fresh = strategy.start(start(), ("B",))
    for seed in range(200):
        made = [replace(one, noise=told * 0.1) for one in sites(strategy, fresh, seed, {}, 0.1)]
        found += counts(strategy.server_update(fresh, made)) != counts(fresh)
    return found / 200


def test_noise_alone_makes_layers_grow_as_seldom_as_the_level_says_and_a_wrong_noise_is_noticed() -> None:
    # The level is 5 % over both layers; 200 rounds have a standard deviation of 1.5 %.
    assert 0.0 < grown_by_chance(1.0) < 0.12
    assert grown_by_chance(0.5) > 0.2, "noise that is told at half would go unnoticed"


def grown_by_a_liar(count: int) -> float:
    """Share of rounds of noise alone in which some layer grows, where a site sends a direction of its own, 30 fold."""
    strategy, found = IncreLoRA(start_columns=4), 0
    fresh = strategy.start(start(), ("B",))
    made_up = normal(77, LAYERS["query"][0], 4)
    for seed in range(200):
        *honest, liar = sites(strategy, fresh, seed, {}, 0.1, count)
        lie = {**liar.state, "query": {"B": fresh.adapter["query"]["B"][:, :4] + 3.0 * made_up}}
        found += counts(strategy.server_update(fresh, [*honest, replace(liar, state=lie)])) != counts(fresh)
    return found / 200


@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_site_that_sends_much_makes_no_layer_grow_by_chance(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # The level is 5 % over both layers; 200 rounds have a standard deviation of 1.5 %.
    assert grown_by_a_liar(count) < 0.12
    monkeypatch.setattr(by_energy, "evened", lambda changes, noises: changes)
    assert grown_by_a_liar(count) > 0.25, "the length of a lie goes unnoticed"


def test_a_site_that_sends_much_keeps_no_layer_that_learns_from_being_told() -> None:
    """DiffoRA's choice: of four sites one sends a long change where the others learn, and one where nobody does."""
    strategy, right = DiffoRA(), 0
    fresh = strategy.start(start(), ("B",))
    for seed in range(40):
        *honest, liar = sites(strategy, fresh, seed, {"dense": 5.0}, 0.1, 4)
        lie = {layer: {"B": f["B"] + 3.0 * normal(55 + seed, *f["B"].shape)} for layer, f in liar.state.items()}
        after = strategy.server_update(fresh, [*honest, replace(liar, state=lie)])
        right += counts(after) == {"query": 0, "dense": RANK}
    assert right >= 34


def test_diffora_keeps_what_learns_puts_the_rest_back_to_zero_and_asks_no_more() -> None:
    strategy = DiffoRA(warmup=2)
    state = strategy.start(start(), ("B",))
    state = strategy.server_update(state, sites(strategy, state, 1, {"query": 5.0}, 0.1))
    assert counts(state) == {"query": RANK, "dense": RANK}, "it chose before its time"
    state = strategy.server_update(state, sites(strategy, state, 2, {"query": 5.0}, 0.1))
    assert counts(state) == {"query": RANK, "dense": 0}
    assert not bool(state.adapter["dense"]["B"].any())
    kept = state.adapter["query"]["B"].clone()
    state = strategy.server_update(state, sites(strategy, state, 3, {}, 0.1))
    assert counts(state) == {"query": RANK, "dense": 0}, "the layer that is left was dropped by a round of noise"
    assert not torch.equal(state.adapter["query"]["B"], kept)
    assert not bool(state.adapter["dense"]["B"].any())


def test_where_no_layer_is_told_from_noise_diffora_trains_all_and_asks_again() -> None:
    strategy = DiffoRA()
    state = strategy.start(start(), ("B",))
    state = strategy.server_update(state, sites(strategy, state, 5, {}, 0.1))
    assert counts(state) == {"query": RANK, "dense": RANK}
    state = strategy.server_update(state, sites(strategy, state, 6, {"dense": 5.0}, 0.1))
    assert counts(state) == {"query": 0, "dense": RANK}


def clipped(gradient: Sequence[Tensor], clip: float) -> list[Tensor]:
    """Return one record's gradient behind the mechanism's own clip."""
    held: list[Any] = [nn.Parameter(torch.zeros_like(g)) for g in gradient]
    mechanism = dpsgd.ClipAndNoise(
        torch.optim.SGD(held, 0.0), noise_multiplier=1.0, max_grad_norm=clip, expected_batch_size=1
    )
    for parameter, g in zip(held, gradient, strict=True):
        parameter.grad_sample = g[None]
    mechanism.clip_and_accumulate()
    return [parameter.summed_grad for parameter in held]


Scores = Callable[[Sequence[Tensor], Sequence[Tensor]], list[Tensor]]
"""From a record's gradient, by module, and what the clip leaves of it."""


@pytest.mark.parametrize("kappa", [0.1, 1.0])
def test_k1_scores_that_are_appended_to_a_clipped_gradient_lengthen_it_by_a_known_factor(kappa: float) -> None:
    """An identity, for no run appends any: κ times the norms of what the clip leaves of a record, by module."""
    clip, shapes = 0.7, ((9, 4), (5, 6), (3, 7))
    long, longer = ([size * normal(10 * size + k, *s) for k, s in enumerate(shapes)] for size in (1, 5))
    short, nothing = ([times * g for g in long] for times in (1e-2, 0.0))
    records = [long, longer, [*longer[:2], 0 * longer[2]], short, nothing]
    bound = clip * math.sqrt(1 + kappa**2)
    assert kappa != 0.1 or bound / clip == pytest.approx(1.00499, abs=1e-5)

    def moved(record: int, scores: Scores) -> float:
        """Return by how much the sum over all records moves without one."""
        whole = []
        for gradient in records:
            kept = clipped(gradient, clip)
            whole.append(torch.cat([*(g.flatten() for g in kept), kappa * torch.stack(scores(gradient, kept))]))
        rest = [vector for i, vector in enumerate(whole) if i != record]
        return float((torch.stack(whole).sum(0) - torch.stack(rest).sum(0)).norm())

    def norms(_: Sequence[Tensor], kept: Sequence[Tensor]) -> list[Tensor]:
        return [g.norm() for g in kept]

    for record in (0, 1, 2):
        assert moved(record, norms) == pytest.approx(bound, rel=1e-5), "what is longer than the clip attains the bound"
    for record in (3, 4):
        assert moved(record, norms) < 0.2 * bound
    # Planted: norms before the clip, and sums of numbers, which can be longer than what they are of.
    assert moved(1, lambda gradient, _: [g.norm() for g in gradient]) > bound * (1 + 1e-2)
    assert moved(1, lambda _, kept: [g.abs().sum() for g in kept]) > bound * (1 + 1e-2)


@pytest.mark.parametrize("strategy", [IncreLoRA(), DiffoRA()], ids=lambda s: s.name)
def test_k2_a_choice_follows_from_what_was_sent_alone(strategy: ByEnergy) -> None:
    state = strategy.start(start(), ("B",))
    made = sites(strategy, state, 1, {"dense": 5.0}, 0.1)
    first, again = strategy.server_update(state, made), strategy.server_update(state, list(reversed(made)))
    for layer in LAYERS:
        assert torch.equal(first.memory[layer][MASK], again.memory[layer][MASK])
        assert float((first.memory[layer][SCORE] - again.memory[layer][SCORE]).abs()) < 1e-4
    for few in (made[:1], [replace(one, noise=None) for one in made]):
        new = strategy.server_update(state, few)
        assert counts(new) == counts(state), "a choice without a score"


def swapped(path: Path, target: Path) -> str:
    """Write the same records with each label for the other."""
    other = {"good": "bad", "bad": "good"}
    with path.open(encoding="utf-8", newline="") as file, target.open("w", encoding="utf-8", newline="") as copy:
        rows = csv.DictReader(file)
        writer = csv.DictWriter(copy, rows.fieldnames or [])
        writer.writeheader()
        writer.writerows({**row, "label": other[row["label"]]} for row in rows)
    return str(target)


@dataclass
class Told:
    """What a run of one round leaves, and what is in none of its messages."""

    masks: dict[str, list[float]]
    adapter: AdapterState
    unsent: list[Tensor]
    """The sites' clipped sums, before their noise."""


@pytest.fixture
def unsent() -> list[Tensor]:
    """Return where a run of ``on_both`` leaves the sums."""
    return []


@pytest.fixture
def on_both(
    unsent: list[Tensor], toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], list[Told]]:
    """Return a function that runs a strategy on records, and on others that disagree in every label.

    What the mechanism gives out is the same in both runs: noise, and in the layers with 24 outputs something common.
    """
    train_round = process.train_round

    def trained(*task: Any) -> TrainResult:
        draw = torch.Generator().manual_seed(len(unsent))

        def noised(total: Tensor, std: float) -> Tensor:
            unsent.append(total.double().clone())
            noise = torch.randn(total.shape, generator=draw, dtype=torch.float64)
            return std * (noise + (5.0 if len(total) == 24 else 0.0))

        with monkeypatch.context() as patch:
            patch.setattr(dpsgd, "add_private_noise", noised)
            return train_round(*task)

    monkeypatch.setattr(process, "train_round", trained)
    datas = [toy_settings["data.name"], swapped(Path(toy_settings["data.name"]), tmp_path / "swapped.csv")]

    def both(strategy: str) -> list[Told]:
        own = {"strategy": strategy, "rounds": 1, "training.sample-rate": 1.0, **PLAIN_STEP}
        own |= {"privacy.noise-multiplier": 2.0, "privacy.epsilon": 100.0}
        told = []
        for name, data in zip(("0", "1"), datas, strict=True):
            unsent.clear()
            folder = run_in_process({**toy_settings, **own, "data.name": data}, 2, name)
            masks = {layer: held[MASK].tolist() for layer, held in memory_of(folder)[0].items()}
            told.append(Told(masks, saved_state(folder).adapter, list(unsent)))
        assert not any(torch.equal(*sums) for sums in zip(*(one.unsent for one in told), strict=True)), "same records"
        return told

    return both


@pytest.mark.parametrize("strategy", ["increlora", "diffora"])
def test_k2_other_records_whose_noised_sums_are_the_same_make_the_same_choice(
    strategy: str, on_both: Callable[[str], list[Told]]
) -> None:
    one, other = on_both(strategy)
    for layer, factors in one.adapter.items():
        assert all(torch.equal(t, other.adapter[layer][name]) for name, t in factors.items())
    assert one.masks == other.masks
    assert len({tuple(mask) for mask in one.masks.values()}) == 2, "nothing was chosen: nothing is proved"


def test_k2_a_planted_choice_by_sums_before_their_noise_is_found(
    unsent: list[Tensor], on_both: Callable[[str], list[Told]], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = IncreLoRA.choose

    def choose(self: IncreLoRA, state: ServerState, scores: dict[str, float]) -> ServerState:
        return real(self, state, {layer: float(t.sum()) for layer, t in zip(sorted(scores), unsent, strict=False)})

    monkeypatch.setattr(IncreLoRA, "choose", choose)
    one, other = on_both("increlora")
    assert one.masks != other.masks, "a choice by what was never sent goes unnoticed"


@pytest.mark.parametrize("strategy", ["increlora", "diffora"])
@pytest.mark.parametrize(
    "wrong", [{"training.local-steps": 2}, {"training.optimizer": "adam"}, {"training.weight-decay": 0.1}], ids=str
)
def test_t6_a_run_whose_noise_is_not_that_of_one_plain_step_is_refused(strategy: str, wrong: dict[str, Any]) -> None:
    configure({"strategy": strategy, **PLAIN_STEP})
    with pytest.raises(ConfigError, match="chooses by the noise that is known of one plain step"):
        configure({"strategy": strategy, **PLAIN_STEP, **wrong})
    configure({"strategy": strategy, "privacy.mode": "none", **wrong})


def test_a_run_of_increlora_and_of_diffora_sends_less_and_scores_like_its_export(toy_settings: dict[str, Any]) -> None:
    """Without privacy layers are told apart by what two sites have in common: some grow, and some are dropped."""
    own = {"adapter.rank": 8, "rounds": 3, "privacy.mode": "none", "server.optimizer": "adam", **PLAIN_STEP}
    sent = {}
    for strategy in ("increlora", "diffora"):
        folder = run_in_process({**toy_settings, **own, "strategy": strategy, "training.learning-rate": 0.5}, 3)
        lines = read_lines(RoundLine, folder)
        sent[strategy] = [line.bytes_up for line in lines]
        assert lines[-1].accuracy == evaluate_run(folder).accuracy, "the saved adapter does not score like the run"
    assert sent["increlora"][0] < sent["increlora"][-1]
    assert sent["diffora"][0] > sent["diffora"][-1]


GATE = {
    "strategy": "ffa-lora",
    "server.rule": "soft-threshold",
    "server.optimizer": "momentum",
    "server.momentum": 0.0,
    "server.learning-rate": 10.0,
    "soft-threshold.threshold": 0.01,
}


@pytest.mark.parametrize("chosen", [{"strategy": "increlora"}, GATE], ids=["by columns", "behind the gate"])
def test_a_run_goes_on_from_the_last_ones_merged_model_and_the_ledger_charges_both(
    toy_settings: dict[str, Any], tmp_path: Path, chosen: dict[str, Any]
) -> None:
    """CoDyRA's chain of tasks: the base of the second run is W0 + delta of the first, ranks by layer and all."""
    budget = {"privacy.noise-multiplier": 2.0, "privacy.epsilon": 50.0, "rounds": 1}
    own = {**toy_settings, **budget, **PLAIN_STEP, "adapter.rank": 4, **chosen}
    nodes = simulated_nodes(2, tmp_path / "ledgers")
    first = run_in_process(own, nodes, "first")
    merge_run(first, tmp_path / "merged")
    encoder = str(tmp_path / "merged" / ENCODER)
    second = run_in_process({**own, "model.name": encoder}, nodes, "second")

    marks = [json.loads((run / "adapter" / "fedveil.json").read_text())["base_fingerprint"] for run in (first, second)]
    assert marks[0] != marks[1]
    before, after = (load_base_model(name, "classification").module for name in (own["model.name"], encoder))
    state, s = saved_state(first).adapter, own["adapter.alpha"] / 4
    weights = dict(after.named_parameters())
    if "server.rule" in chosen:
        ranks = {int(torch.linalg.matrix_rank(factors["B"])) for layer, factors in state.items() if "B" in factors}
        assert min(ranks) < 4, "the gate has cut nothing"
        assert max(ranks), "the gate has cut everything"
    for name, tensor in before.named_parameters():
        factors = state.get(name.removesuffix(".weight"), {})
        change = s * factors["B"] @ factors["A"] if "A" in factors and name.endswith(".weight") else 0.0
        assert float((weights[name] - tensor - change).detach().abs().max()) < 1e-6, name
    alone, both = (spent(read_lines(PrivacyLine, run)[-1]) for run in (first, second))
    assert (alone.steps_total, both.steps_total) == (1, 2)
    assert both.epsilon_total == pytest.approx(promised([gaussian_release(2.0, 0.25, 2)], 1e-3)[0], abs=1e-9)
    assert both.epsilon_total > 1.2 * alone.epsilon_total

"""Training by columns: the invariants C1 to C5, C7 and C9 of the columns engine, and a federation of four ranks.

Pure tests are in float64, with layers that are not square, unequal weights and choices that differ by site.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from flwr.common.serde import message_from_proto, message_to_proto
from made_run import spent
from torch import Tensor, nn

from audits.tiny_site import clinic
from fedveil.client.app import answer, train
from fedveil.client.ledger.ledger import Ledger
from fedveil.client.site import Site, open_site
from fedveil.common.adapters import LoRAFrozenA
from fedveil.common.adapters.split import SplitColumns
from fedveil.common.config.flat import Scalar
from fedveil.common.config.run import RunConfig
from fedveil.common.errors import ConfigError, ProtocolError, RunFailed
from fedveil.common.messages.blocks import layout_of
from fedveil.common.messages.columns import Chosen, narrowed, narrowed_layout, widened
from fedveil.common.messages.round import KeyTask, TrainResult, TrainTask
from fedveil.common.messages.state import HEAD, AdapterState
from fedveil.common.messages.tensors import merge
from fedveil.common.messages.wire import decode_reply, encode_task
from fedveil.common.run_lines import PrivacyLine, RoundLine, read_lines
from fedveil.contrib.strategies.columns import MASK
from fedveil.contrib.strategies.flexlora import FlexLoRA
from fedveil.contrib.strategies.heterogeneous_ranks import HeterogeneousRanks
from fedveil.experiments.in_process import InProcessTransport, run_in_process, simulated_nodes
from fedveil.privacy.dpsgd import PrivateSteps
from fedveil.privacy.plan import gaussian_plan
from fedveil.privacy.record_level import DPSGD
from fedveil.server.aggregation import factors_of
from fedveil.server.app import FlowerTransport
from fedveil.server.conduct import conduct
from fedveil.server.optimizer import server_step
from fedveil.server.records import RunFolder
from fedveil.server.replies import replies_to
from fedveil.strategies import Contribution, Moments, ServerState
from fedveil.strategies.ffa_lora import FFALoRA
from fedveil.strategies.job import configure
from fedveil.strategies.resolve import resolve

pytestmark = [pytest.mark.rough_prices, pytest.mark.peft]

RANK = 6
LAYERS = {"query": (5, 7), "dense": (9, 6)}
RANKS, SHARES = (1, 3, 3, 6), (0.4, 0.3, 0.2, 0.1)
ADAPTER = LoRAFrozenA(RANK, 9.0, ())


def drawn(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def start(seed: int = 0) -> AdapterState:
    """An A with orthonormal rows, a B that is not 0, and a head."""
    normal = drawn(seed)
    layers = {
        layer: {"A": torch.linalg.qr(normal(into, RANK))[0].T, "B": normal(out, RANK)}
        for layer, (out, into) in LAYERS.items()
    }
    return {**layers, HEAD: {"weight": normal(2, 4), "bias": normal(2)}}


def weights_of(state: AdapterState, scaling: float = ADAPTER.scaling) -> dict[str, Tensor]:
    return {layer: scaling * state[layer]["B"] @ state[layer]["A"] for layer in LAYERS}


def trained_at(state: ServerState, rank: int, seed: int) -> AdapterState:
    """The whole model of a site of this rank: its columns moved, all else as it was received."""
    normal = drawn(seed)
    moved = {
        layer: {"B": state.adapter[layer]["B"].index_add(1, torch.arange(rank), normal(out, rank))}
        for layer, (out, _) in LAYERS.items()
    }
    return merge(state.adapter, {**moved, HEAD: {"weight": normal(2, 4), "bias": normal(2)}})


def sent(strategy: HeterogeneousRanks, state: ServerState, model: AdapterState, rank: int) -> AdapterState:
    whole = {**{layer: {"B": model[layer]["B"]} for layer in LAYERS}, HEAD: model[HEAD]}
    return narrowed(whole, strategy.trained_columns(strategy.downlink(state), state.round_number + 1, rank))


def round_of(ranks: Sequence[int], seed: int = 1) -> tuple[ServerState, list[AdapterState], list[Contribution]]:
    strategy = HeterogeneousRanks()
    state = strategy.start(start(), ("B",))
    models = [trained_at(state, rank, seed + k) for k, rank in enumerate(ranks)]
    sites = [
        Contribution(f"site-{k}", 1000 * share, sent(strategy, state, model, rank), rank)
        for k, (share, model, rank) in enumerate(zip(SHARES, models, ranks, strict=True))
    ]
    return state, models, sites


def mean_of(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {
        layer: torch.stack([share * part[layer] for share, part in zip(SHARES, parts, strict=True)]).sum(0)
        for layer in LAYERS
    }


def gap(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    return max(float((left[layer] - right[layer]).norm() / right[layer].norm()) for layer in LAYERS)


def test_c1_increments_of_any_columns_are_the_mean_of_the_sites_weights() -> None:
    state, models, sites = round_of(RANKS)
    new = HeterogeneousRanks().server_update(state, sites)
    assert gap(weights_of(new.adapter), mean_of([weights_of(model) for model in models])) < 1e-12
    widths = [[part.state[layer]["B"].shape[1] for layer in LAYERS] for part in sites]
    assert widths == [[rank, rank] for rank in RANKS], "more columns travel than a site trains"


def test_c2_with_all_columns_everywhere_it_is_ffa_lora_bit_for_bit_and_with_none_nothing_moves() -> None:
    state, _, sites = round_of([RANK] * 4)
    new = HeterogeneousRanks().server_update(state, sites)
    plain = FFALoRA().server_update(FFALoRA().start(start(), ("B",)), [replace(s, rank=0) for s in sites])
    for layer in LAYERS:
        assert torch.equal(new.adapter[layer]["B"], plain.adapter[layer]["B"])

    masked = replace(state, memory={layer: {MASK: torch.zeros(RANK)} for layer in LAYERS})
    nothing = [replace(site, state={HEAD: site.state[HEAD]}, rank=0) for site in sites]
    rested = HeterogeneousRanks().server_update(masked, nothing)
    for layer in LAYERS:
        assert torch.equal(rested.adapter[layer]["B"], state.adapter[layer]["B"])
    assert not torch.equal(rested.adapter[HEAD]["weight"], state.adapter[HEAD]["weight"])


def test_c3_padded_states_and_renormalised_columns_are_not_the_mean() -> None:
    state, models, sites = round_of(RANKS)
    wanted = mean_of([weights_of(model) for model in models])
    present = {i: sum(share for share, rank in zip(SHARES, RANKS, strict=True) if i < rank) for i in range(RANK)}
    shares = torch.tensor([present[i] for i in range(RANK)], dtype=torch.float64)
    padded: AdapterState = {}
    alone: AdapterState = {}
    for layer, (out, _) in LAYERS.items():
        B, total = state.adapter[layer]["B"], torch.zeros(out, RANK, dtype=torch.float64)
        added = torch.zeros_like(total)
        for share, rank, site in zip(SHARES, RANKS, sites, strict=True):
            total[:, :rank] += share * site.state[layer]["B"]
            added[:, :rank] += share * (site.state[layer]["B"] - B[:, :rank])
        assert float((total - (shares * B + added)).abs().max()) < 1e-12, "padding is not P_i B_i and the update"
        padded[layer] = {"A": state.adapter[layer]["A"], "B": total}
        alone[layer] = {"A": state.adapter[layer]["A"], "B": B + added / shares}
    assert gap(weights_of(padded), wanted) > 0.1
    assert gap(weights_of(alone), wanted) > 0.1


CONFIG = resolve(
    {"recipe": "plain", "rounds": 9, "server.optimizer": "adam", "server.learning-rate": 0.05, "server.adam-tau": 1e-3}
).config
HEAVY = resolve(
    {
        "recipe": "plain",
        "rounds": 9,
        "server.optimizer": "momentum",
        "server.learning-rate": 0.5,
        "server.momentum": 0.9,
    }
).config


def after(
    state: ServerState, ranks: Sequence[int], config: RunConfig, seed: int, *, resting: bool = True
) -> ServerState:
    """The state after a round of sites of these ranks; without ``resting`` as under a server that knows no columns."""
    strategy = HeterogeneousRanks()
    sites = [
        Contribution(str(k), 1.0 + k, sent(strategy, state, trained_at(state, rank, seed + k), rank), rank)
        for k, rank in enumerate(ranks)
    ]

    def step(before: ServerState, averaged: ServerState) -> ServerState:
        return server_step(config, before, averaged if resting else replace(averaged, active={}))

    return strategy.server_update(state, sites, step)


@pytest.mark.parametrize("config", [CONFIG, HEAVY], ids=["adam", "momentum"])
def test_c4_a_resting_column_stays_bit_for_bit_under_the_servers_own_optimiser(config: RunConfig) -> None:
    moved = HeterogeneousRanks().start(start(), ("B",))
    for number in range(3):
        moved = after(moved, (6, 4), config, 10 * number)
    rested = after(after(moved, (2, 3), config, 40), (3, 1), config, 50)
    for layer in LAYERS:
        then, now = moved.adapter[layer]["B"], rested.adapter[layer]["B"]
        assert torch.equal(then[:, 3:], now[:, 3:]), "a column that nobody trained has moved"
        assert not torch.equal(then[:, :3], now[:, :3])
        for part in ("first", "second"):
            held, kept = getattr(moved.optimizer, part), getattr(rested.optimizer, part)
            assert not held or torch.equal(held[layer]["B"][:, 3:], kept[layer]["B"][:, 3:])
    if config is CONFIG:
        assert rested.optimizer.clocks["query"]["B"].tolist() == [5, 5, 5, 3, 3, 3]
    planted = after(moved, (2, 3), config, 40, resting=False)
    drift = max(float((planted.adapter[x]["B"] - moved.adapter[x]["B"])[:, 3:].abs().max()) for x in LAYERS)
    assert drift > 1e-3, "moments alone would not have moved it: the test sees nothing"


def test_c4_columns_that_are_trained_together_have_one_adam() -> None:
    by_columns = HeterogeneousRanks().start(start(), ("B",))
    whole = FFALoRA().start(start(), ("B",))
    for number in range(4):
        sites = [
            Contribution(
                str(k), 2.0 + k, sent(HeterogeneousRanks(), by_columns, trained_at(by_columns, RANK, s), RANK), RANK
            )
            for k, s in enumerate((number, 20 + number))
        ]
        by_columns = HeterogeneousRanks().server_update(by_columns, sites, lambda a, b: server_step(CONFIG, a, b))
        plain = [replace(site, rank=0) for site in sites]
        whole = FFALoRA().server_update(whole, plain, lambda a, b: server_step(CONFIG, a, b))
    for layer in LAYERS:
        assert torch.equal(by_columns.adapter[layer]["B"], whole.adapter[layer]["B"])


@pytest.mark.parametrize("kind", [HeterogeneousRanks, FlexLoRA], ids=lambda kind: kind.name)
def test_a_column_that_one_site_trains_moves_by_its_share_under_adam_too(kind: type[HeterogeneousRanks]) -> None:
    """Of three sites one declares all columns: with a tenth of the weight those of its own move a tenth as far."""
    strategy, state = kind(), kind().start(start(), ("B",))
    parts = [
        Contribution(str(k), weight, sent(strategy, state, trained_at(state, rank, 3 + k), rank), rank)
        for k, (weight, rank) in enumerate(((4.0, 3), (5.0, 3), (1.0, RANK)))
    ]
    averaged = strategy.combine(state, parts)
    for layer in LAYERS:
        assert averaged.active[layer]["B"].tolist() == pytest.approx([1.0] * 3 + [0.1] * (RANK - 3))
        assert averaged.active[layer]["B"][0] == 1.0
    sharp = replace(CONFIG, server=replace(CONFIG.server, adam_tau=1e-12))
    stepped = server_step(sharp, state, averaged)
    whole = {layer: {"B": torch.ones(RANK, dtype=torch.float64)} for layer in LAYERS}
    planted = server_step(sharp, state, replace(averaged, active=whole))
    for layer in LAYERS:
        steps = [(one.adapter[layer]["B"] - state.adapter[layer]["B"]).abs().mean(0) for one in (stepped, planted)]
        assert (steps[0] / steps[0][0]).tolist() == pytest.approx([1.0] * 3 + [0.1] * (RANK - 3), rel=1e-6)
        assert (steps[1] / steps[1][0]).tolist() == pytest.approx([1.0] * RANK), "the fault is not found"


def test_columns_of_a_layer_whose_moments_begin_anew_count_their_steps_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LAYERS, "query", (8, 7))
    strategy, state = FlexLoRA(), FlexLoRA().start(start(), ("B",))
    for number in range(3):
        parts = [
            Contribution(str(k), 1.0 + k, sent(strategy, state, trained_at(state, rank, 7 * number + k), rank), rank)
            for k, rank in enumerate((3, RANK))
        ]
        averaged = strategy.combine(state, parts)
        fresh = server_step(CONFIG, replace(state, optimizer=Moments()), averaged)
        stepped = server_step(CONFIG, state, averaged)
        for layer in LAYERS:
            assert torch.equal(stepped.adapter[layer]["B"], fresh.adapter[layer]["B"])
            assert stepped.optimizer.clocks[layer]["B"].tolist() == [1.0] * RANK
        state = strategy.settle(stepped)
    assert state.optimizer.steps == {HEAD: 3}


def split_layer(columns: Sequence[int], seed: int = 3) -> tuple[nn.Linear, SplitColumns, Tensor]:
    normal = drawn(seed)
    whole = nn.Linear(RANK, 9, bias=False, dtype=torch.float64)
    with torch.no_grad():
        whole.weight.copy_(normal(9, RANK))
    return whole, SplitColumns(whole, torch.tensor(columns)), normal(4, 3, RANK)


@pytest.mark.parametrize("columns", [[0, 1], [1, 4, 5], list(range(RANK))])
def test_c5_per_record_gradients_are_those_of_the_chosen_columns_in_the_whole(columns: list[int]) -> None:
    whole, split, x = split_layer(columns)
    assert float((whole(x) - split(x)).detach().abs().max()) < 1e-14, "the layer computes another map"

    def losses(module: nn.Module, x: Tensor) -> Tensor:
        return module(x).tanh().square().sum((1, 2))

    plan = gaussian_plan(1.0, 1.0, 1.0, 4.0, 1e-5, 8.0)
    with PrivateSteps(split, torch.optim.SGD([split.weight], 0.0), plan) as steps:
        (samples,) = steps.samples(x, lambda x: losses(split, x))
    assert samples.shape == (4, 9, len(columns)), "clip and noise cover other numbers than the trained columns"
    for record, sample in zip(x, samples, strict=True):
        (want,) = torch.autograd.grad(losses(whole, record[None]).sum(), [whole.weight])
        assert float((sample - want[:, columns]).abs().max()) < 1e-12


def test_c5_the_noise_in_the_weights_is_that_of_the_trained_columns() -> None:
    columns, std, noise = [1, 4, 5], 0.7, []
    whole, split, _ = split_layer(columns)
    A, before = torch.linalg.qr(drawn(4)(7, RANK))[0].T, whole.weight.detach().clone()
    plan = gaussian_plan(std, 1.0, 1.0, 1.0, 1e-5, 8.0)
    for _ in range(120):
        optimizer = torch.optim.SGD([split.weight], 1.0)
        with PrivateSteps(split, optimizer, plan) as steps:
            old = split.weight.detach().clone()
            steps.step([], lambda x: x)
            change = torch.zeros_like(before)
            change[:, columns] = split.weight.detach() - old
        noise.append(float((2.0 * change @ A).square().sum()))
    wanted = (2.0 * std) ** 2 * 9 * len(columns)
    ratio = sum(noise) / len(noise) / wanted
    assert abs(ratio - 1) < 0.1, f"{ratio:.2f} times s² τ² m |S|"
    assert RANK / len(columns) > 1.5, "noise on every column would not be told apart"


def test_c7_splitting_a_site_in_two_and_permuting_sites_change_nothing() -> None:
    state, _, sites = round_of(RANKS)
    new = weights_of(HeterogeneousRanks().server_update(state, sites).adapter)
    halves = [replace(sites[2], site=f"half-{i}", weight=sites[2].weight / 2) for i in range(2)]
    for others in ([*sites[:2], *halves, sites[3]], sites[::-1]):
        assert gap(weights_of(HeterogeneousRanks().server_update(state, others).adapter), new) < 1e-14


def test_c9_sites_with_scales_of_their_own_are_right_only_by_the_ratio_of_scales() -> None:
    state, models, sites = round_of(RANKS)
    scales = [9.0 / rank for rank in RANKS]
    s, A = ADAPTER.scaling, {layer: state.adapter[layer]["A"] for layer in LAYERS}
    # Increments from 0, each read under the site's own alpha / r_k.
    zero = replace(state, adapter=merge(state.adapter, {k: {"B": 0 * state.adapter[k]["B"]} for k in LAYERS}))
    parts = [
        {k: own * (model[k]["B"] - state.adapter[k]["B"]) @ A[k] for k in LAYERS}
        for own, model in zip(scales, models, strict=True)
    ]
    wanted = mean_of(parts)

    def averaged(factors: Sequence[float]) -> dict[str, Tensor]:
        moved = [
            replace(
                site,
                state={
                    **{k: {"B": f * (site.state[k]["B"] - state.adapter[k]["B"][:, : site.rank])} for k in LAYERS},
                    HEAD: site.state[HEAD],
                },
            )
            for f, site in zip(factors, sites, strict=True)
        ]
        return weights_of(HeterogeneousRanks().server_update(zero, moved).adapter)

    assert gap(averaged([own / s for own in scales]), wanted) < 1e-12
    assert gap(averaged([1.0] * 4), wanted) > 0.3


def test_what_is_narrowed_is_widened_again_and_another_layout_is_refused() -> None:
    state: AdapterState = {layer: {"B": start()[layer]["B"]} for layer in LAYERS}
    chosen: Chosen = {"query": {"B": torch.tensor([1, 3])}, "dense": {"B": torch.tensor([], dtype=torch.int64)}}
    part = narrowed({**state, HEAD: start()[HEAD]}, chosen)
    assert layout_of(part) == narrowed_layout(layout_of({**state, HEAD: start()[HEAD]}), chosen)
    assert {k: v["B"].shape for k, v in part.items() if k != HEAD} == {"query": (5, 2)}
    full = widened(part, start(5), chosen)
    assert torch.equal(full["query"]["B"][:, [1, 3]], state["query"]["B"][:, [1, 3]])
    assert torch.equal(full["query"]["B"][:, [0, 2, 4, 5]], start(5)["query"]["B"][:, [0, 2, 4, 5]])
    assert torch.equal(full["dense"]["B"], start(5)["dense"]["B"])
    for wrong in ({"query": {"B": state["query"]["B"]}}, {"query": {"A": part["query"]["B"]}}, {}):
        with pytest.raises(ProtocolError, match="a contribution has"):
            widened(wrong, start(5), chosen)
    with pytest.raises(ProtocolError, match="a contribution has"):
        widened({**part, "dense": {"B": state["dense"]["B"]}}, start(5), chosen)


def test_a_mask_of_other_numbers_is_refused() -> None:
    received: dict[str, Any] = {"query": {"B": torch.zeros(5, 2), MASK: torch.tensor([1.0, 0.5])}}
    with pytest.raises(ProtocolError, match="other numbers than 0 and 1"):
        HeterogeneousRanks().trained_columns(received, 1, 1)


# A federation: tiny BERT, four sites of ranks 2, 4, 8 and 16, private, over Flower's own messages and apps.

FOUR = (2, 4, 8, 16)


def flower_message(content: RecordDict, node: int, kind: str, ttl: float, group_id: str) -> Message:
    """As Flower's SuperLink would pass it on: made within no run."""
    made = make_message(Metadata(1, "", 0, node, "", group_id, time.time(), ttl, kind), content)
    return message_from_proto(message_to_proto(made))


class LocalGrid:
    """Flower's grid without a network: every message goes to the real client app, and its answer comes back."""

    def __init__(self, nodes: Sequence[dict[str, Any]], settings: dict[str, Any]) -> None:
        self.contexts = {
            number: Context(1, number, dict(node), RecordDict(), dict(settings)) for number, node in enumerate(nodes, 1)
        }
        self.answers: dict[str, Message] = {}
        self.replies: list[RecordDict] = []

    def get_node_ids(self) -> list[int]:
        return list(self.contexts)

    def push_messages(self, messages: Sequence[Message]) -> list[str]:
        names = [f"task-{len(self.answers) + i}" for i in range(len(messages))]
        for name, message in zip(names, messages, strict=True):
            answer = train(message, self.contexts[message.metadata.dst_node_id])
            self.answers[name] = message_from_proto(message_to_proto(answer))
            self.answers[name].metadata.__dict__["_reply_to_message_id"] = name
            self.replies.append(self.answers[name].content)
        return names

    def pull_messages(self, message_ids: Sequence[str]) -> list[Message]:
        return [self.answers[name] for name in message_ids]


@pytest.fixture
def four(toy_settings: dict[str, Any], tmp_path: Path) -> tuple[dict[str, Any], list[dict[str, Scalar]]]:
    settings = {
        **toy_settings,
        "strategy": "heterogeneous-ranks",
        "adapter.rank": 16,
        "adapter.targets": "query,intermediate.dense",
        "training.optimizer": "sgd",
        "training.local-steps": 1,
        "training.learning-rate": 0.5,
        "max-share": 0.9,
    }
    nodes = simulated_nodes(4, tmp_path / "ledgers")
    for node, rank, size in zip(nodes, FOUR, (90, 40, 50, 60), strict=True):
        node |= {"rank": rank, "public-size": size}
    return settings, nodes


@pytest.mark.parametrize("shortens", [False, True], ids=["as sent", "long ones shortened"])
def test_four_sites_of_ranks_2_4_8_and_16_through_flower_are_the_mean_of_their_weights(
    shortens: bool, four: tuple[dict[str, Any], list[dict[str, Scalar]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """C1 and C5 on what travels: private, two rounds, each against the slow mean of the sites' whole weights."""
    settings, nodes = four
    monkeypatch.setattr("fedveil.server.app.Message", flower_message)
    monkeypatch.setattr("fedveil.server.app.POLL_SECONDS", 0.01)
    monkeypatch.setattr("fedveil.client.process.in_simulation", lambda: True)
    told: list[dict[str, float]] = []

    def factors(job: Any, results: Sequence[TrainResult], state: ServerState) -> list[float]:
        # Of sites as small as these one is often twice as long as the middle one, and honest.
        found = factors_of(job, results, state) if shortens else [1.0] * len(results)
        told.append({result.site: factor for result, factor in zip(results, found, strict=True)})
        return found

    monkeypatch.setattr("fedveil.server.aggregation.factors_of", factors)
    if shortens:  # whatever is longer than the middle one
        monkeypatch.setattr(DPSGD, "longest", 1.0)
    grid, job, states = LocalGrid(nodes, settings), configure(settings), list[ServerState]()
    saved = RunFolder._save
    monkeypatch.setattr(RunFolder, "_save", lambda own, kept: (states.append(kept.state), saved(own, kept)))
    folder = conduct(job, "1", lambda model, folder: FlowerTransport(cast(Any, grid), job, model, folder))
    lines = read_lines(RoundLine, folder)
    assert [line.participants for line in lines] == [[f"site-{k}" for k in range(4)]] * 2
    outs = {"query": 16, "dense": 24}
    head, numbers = 2 * 16 + 2, 2 * sum(outs.values())
    assert [line.bytes_up for line in lines] == [4 * sum(rank * numbers + head for rank in FOUR)] * 2
    epsilons = [spent(line).epsilon_total for line in read_lines(PrivacyLine, folder)]
    assert len(epsilons) == 8
    assert all(0 < value <= 8 for value in epsilons)

    for number, (before, now) in enumerate(pairwise(states), 1):
        weights: dict[str, Tensor] = {}
        sizes = 0.0
        for record in grid.replies[4 * (number - 1) : 4 * number]:
            layout = layout_of({k: {n: t for n, t in f.items() if n != "A"} for k, f in before.adapter.items()})

            def of_rank(rank: int, layout: Any = layout) -> Any:
                every = {layer: {"B": torch.arange(rank)} for layer in layout if layer != HEAD}
                return narrowed_layout(layout, every)

            reply = decode_reply(record, of_rank, "1", number)
            assert isinstance(reply, TrainResult)
            sizes += reply.public_size
            for layer, factors in reply.contribution.items():
                if layer == HEAD:
                    continue
                B = before.adapter[layer]["B"].double().clone()
                assert factors["B"].shape[1] == reply.rank == FOUR[int(reply.site[-1])]
                assert not torch.equal(factors["B"].double(), B[:, : reply.rank]), "nothing was trained"
                B[:, : reply.rank] += told[number - 1][reply.site] * (factors["B"].double() - B[:, : reply.rank])
                whole = job.adapter.delta({"A": before.adapter[layer]["A"].double(), "B": B})
                weights[layer] = weights.get(layer, torch.zeros_like(whole)) + reply.public_size * whole
        for layer, total in weights.items():
            held = now.adapter[layer]
            new = job.adapter.delta({"A": held["A"].double(), "B": held["B"].double()})
            assert float((new - total / sizes).norm() / new.norm()) < 1e-6, f"{layer} in round {number}"
    assert [sum(factor < 1 for factor in by_site.values()) for by_site in told] == ([2, 2] if shortens else [0, 0])


def test_a_site_that_changes_its_rank_does_not_count(
    four: tuple[dict[str, Any], list[dict[str, Scalar]]],
) -> None:
    settings, nodes = four

    class Changing(InProcessTransport):
        def deliver(self, node: int, task: Any, content: Any) -> Any:
            if task.round_number == 2 and node == 3:
                self._nodes[node]["rank"] = 5
            return super().deliver(node, task, content)

    folder = run_in_process(settings, nodes, kind=Changing)
    first, second = read_lines(RoundLine, folder)
    assert not first.failures
    assert [(a.site, a.reason) for a in second.failures] == [
        ("site-3", "the site declares rank 5, it was 16 in this run")
    ]
    assert second.participants == ["site-0", "site-1", "site-2"]


def test_where_all_train_alike_a_site_of_a_lower_rank_refuses_before_it_pays(
    four: tuple[dict[str, Any], list[dict[str, Scalar]]],
) -> None:
    settings, nodes = four
    with pytest.raises(RunFailed, match="this site trains at most 2 columns"):
        run_in_process({**settings, "strategy": "ffa-lora", "min-sites": 4}, nodes)
    with Ledger(Path(str(nodes[0]["ledger"]))) as ledger:
        assert ledger.entries() == []


@pytest.mark.parametrize("rank", [0, -1, True, "four"])
def test_a_rank_that_is_none_is_refused(four: tuple[dict[str, Any], list[dict[str, Scalar]]], rank: Scalar) -> None:
    settings, nodes = four
    with pytest.raises(ConfigError, match=r"node setting 'rank' is .* at least 1"):
        open_site({**nodes[0], "rank": rank}, configure(settings).config, "1", simulated=True)


def test_a_simulation_has_the_ranks_that_its_settings_say(toy_settings: dict[str, Any]) -> None:
    own = {"strategy": "heterogeneous-ranks", "adapter.site-ranks": "1, 3", "privacy.mode": "none"}
    folder = run_in_process({**toy_settings, **own, "rounds": 1, "head.policy": "frozen"}, 3)
    (line,) = read_lines(RoundLine, folder)
    numbers = 2 * (16 + 16 + 16 + 24 + 16)  # outputs of the five layers of each of two blocks
    assert line.bytes_up == 4 * numbers * (1 + 3 + 1)
    for wrong in ("0", "2,", "four", "1;2"):
        with pytest.raises(ConfigError, match="write ranks of at least 1"):
            configure({**own, "adapter.site-ranks": wrong})


def test_a_deployed_site_s_rank_is_no_word_of_a_server_s(
    toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks: list[int] = []

    def stop(own: Any, job: Any, site: Site) -> None:
        ranks.append(site.rank)
        raise ProtocolError("enough")

    own = {"strategy": "heterogeneous-ranks", "adapter.site-ranks": "1"}
    site = clinic({**toy_settings, **own}, tmp_path)
    task = encode_task(site.task())
    monkeypatch.setattr("fedveil.client.process.SiteProcess.model_of", stop)
    for own_rank, simulated in (({}, False), ({"rank": 3}, False), ({"rank": 3}, True), ({}, True)):
        answer(task, {**site.node, **own_rank}, site.settings, "1", {}, simulated=simulated)
    assert ranks == [0, 3, 3, 1]


def test_a_secure_sum_and_a_linearised_model_are_refused() -> None:
    base = {"strategy": "heterogeneous-ranks"}
    with pytest.raises(ConfigError, match="nobody sees more than a sum"):
        configure({**base, "privacy.mode": "secure-sum", "privacy.honest-sites": 2})
    with pytest.raises(ConfigError, match="steps on features and jacobians have not"):
        configure({**base, "phases": "6 adapter on jacobians", "training.optimizer": "sgd"})
    with pytest.raises(ConfigError, match="by a rule of its own"):
        configure({**base, "phases": "5 adapter+head on examples, 1 head on features"})
    with pytest.raises(ConfigError, match="trains B, where it would be a rate alone"):
        configure({**base, "server.rule": "lora-pro"})


def test_a_declared_rank_is_held_against_what_the_run_asks(
    four: tuple[dict[str, Any], list[dict[str, Scalar]]],
) -> None:
    job = configure(four[0])
    layout = {"query": {"B": (16, 16)}}
    task = TrainTask("1", 1, {"query": {"B": torch.zeros(16, 16)}}, {}, "", "ab" * 16, "cd" * 16)
    expected = replies_to(task, job, layout)
    assert callable(expected)
    assert expected(4) == {"query": {"B": (16, 4)}}
    with pytest.raises(ProtocolError, match="declares rank 17, the run has 16"):
        expected(17)
    assert expected(0) == layout, "a site that declares none trains all"
    assert replies_to(task, configure({}), layout) == layout
    assert expected(16) == layout
    assert replies_to(replace(task, round_number=0), job, layout) == layout, "round 0 brings a whole gradient"
    assert replies_to(KeyTask("1", 1, 0), job, layout) == layout
    told = replies_to(task, configure({"strategy": "switchlora"}), layout)
    assert callable(told)
    with pytest.raises(ProtocolError, match="declares rank 99"):
        told(99)

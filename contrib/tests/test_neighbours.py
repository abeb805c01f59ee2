"""Aggregation neighbours: invariants X1, X2, X4 and X6 to X8, against slow sums of whole products, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fedveil.contrib.strategies.merging
import fedveil.experiments.in_process
from fedveil.common.adapters import LoRA
from fedveil.common.errors import ConfigError
from fedveil.common.messages.round import TrainResult
from fedveil.common.messages.state import AdapterState, Factors
from fedveil.common.messages.tensors import entries, merge
from fedveil.common.messages.wire import encode_reply
from fedveil.common.run_lines import RoundLine, read_lines
from fedveil.contrib.adapters.lora_merged import LoRAMerged, pair_of
from fedveil.contrib.strategies.fedex_lora import FedExLoRA
from fedveil.contrib.strategies.flexlora import FlexLoRA
from fedveil.contrib.strategies.flora import FLoRA
from fedveil.contrib.strategies.hetlora import HetLoRA
from fedveil.contrib.strategies.rolora import RoLoRA
from fedveil.experiments.in_process import run_in_process
from fedveil.server.checkpoint import saved_state
from fedveil.server.optimizer import server_step
from fedveil.strategies import Average, Contribution, Moments, ServerState, Strategy
from fedveil.strategies.base import is_exact
from fedveil.strategies.fedavg import FedAvgLoRA
from fedveil.strategies.job import configure

pytestmark = [pytest.mark.rough_prices, pytest.mark.peft]

OUT, INTO, RANK = 9, 6, 2
SHARES = (0.5, 0.3, 0.2)
MERGING: tuple[Strategy, ...] = (FedExLoRA(), FLoRA())


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def begun(seed: int = 1) -> AdapterState:
    """Return a layer that is not square, with a D that earlier rounds have left."""
    return {
        "layer": {
            "A": normal(RANK, INTO, seed=seed),
            "B": normal(OUT, RANK, seed=seed + 1),
            "D": normal(OUT, INTO, seed=seed + 2),
        }
    }


def sites(of: Sequence[Factors]) -> list[Contribution]:
    return [Contribution(f"{k}", 100 * p, {"layer": f}) for k, (p, f) in enumerate(zip(SHARES, of, strict=True))]


def trained(seed: int) -> Factors:
    B = normal(OUT, RANK, seed=seed)
    B[:, 1] = 2 * B[:, 0]  # without full rank
    return {"A": normal(RANK, INTO, seed=seed + 50), "B": B}


def weight(state: AdapterState) -> Tensor:
    return LoRAMerged(RANK, 3.0, ()).delta(state["layer"])


@pytest.mark.parametrize("strategy", MERGING, ids=lambda s: s.name)
def test_x1_x2_the_new_weights_are_the_mean_of_the_sites_over_rounds(strategy: Strategy) -> None:
    state = strategy.start(begun(), ("A", "B"))
    for number in (10, 20, 30):
        factors = [trained(number + k) for k in range(3)]
        models = [weight(merge(state.adapter, {"layer": own})) for own in factors]
        state = strategy.server_update(state, sites(factors))
        wanted = sum((p * model for p, model in zip(SHARES, models, strict=True)), torch.zeros(()))
        assert float((weight(state.adapter) - wanted).abs().max()) < 1e-12
    stacked_b = torch.cat([own["B"] for own in factors], 1)
    stacked_a = torch.cat([p * own["A"] for p, own in zip(SHARES, factors, strict=True)])
    product = sum((p * own["B"] @ own["A"] for p, own in zip(SHARES, factors, strict=True)), torch.zeros(()))
    assert float((stacked_b @ stacked_a - product).abs().max()) < 1e-12
    twice = torch.cat([p * own["B"] for p, own in zip(SHARES, factors, strict=True)], 1) @ stacked_a
    assert float((twice - product).abs().max()) > 0.1, "shares on both factors would be seen"


def test_x1_a_covariance_that_is_left_out_or_taken_about_nothing_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    factors = [trained(10 + k) for k in range(3)]
    state = FedExLoRA().start(begun(), ("A", "B"))
    models = [weight(merge(state.adapter, {"layer": own})) for own in factors]
    wanted = sum((p * model for p, model in zip(SHARES, models, strict=True)), torch.zeros(()))
    monkeypatch.setattr(fedveil.contrib.strategies.merging, "_covariance", lambda *_: normal(OUT, INTO, seed=1) * 0)
    left_out = FedExLoRA().server_update(state, sites(factors))
    assert float((weight(left_out.adapter) - wanted).abs().max()) > 0.1


def test_flora_begins_every_round_with_the_model_as_it_was_and_nothing_of_the_factors() -> None:
    state = FLoRA().start(begun(), ("A", "B"))
    first = FLoRA().server_update(state, sites([trained(k) for k in range(3)]))
    again = FLoRA().server_update(replace(first, round_number=0), sites([first.adapter["layer"]] * 3))
    assert float(first.adapter["layer"]["B"].abs().max()) == 0
    assert torch.allclose(weight(first.adapter), weight(again.adapter), atol=1e-12)
    second = FLoRA().settle(replace(first, round_number=2))
    assert not torch.allclose(first.adapter["layer"]["A"], second.adapter["layer"]["A"]), "A is drawn by the round"
    assert torch.equal(FLoRA().settle(first).adapter["layer"]["A"].norm(), first.adapter["layer"]["A"].norm())


def test_flora_begins_the_servers_moments_anew_with_the_factors() -> None:
    config = configure({**TURNING, "rounds": 6}).config
    state = FLoRA().start(begun(), ("A", "B"))
    for number in (10, 20):
        averaged = FLoRA().combine(state, sites([trained(number + k) for k in range(3)]))
        stepped = server_step(config, state, averaged)
        fresh = server_step(config, replace(state, optimizer=Moments()), averaged)
        assert all(torch.equal(stepped.adapter["layer"][n], fresh.adapter["layer"][n]) for n in ("A", "B"))
        assert stepped.optimizer.first["layer"].keys() == {"A", "B"}
        state = FLoRA().settle(stepped)
        assert state.optimizer == Moments()


def test_x7_stacking_carries_k_times_the_quadratic_noise_of_averaged_factors() -> None:
    """Of sites that send noise alone, from factors of 0, where nothing of first order is left."""
    count, draws, generator = 4, 1500, torch.Generator().manual_seed(3)
    empty: AdapterState = {"layer": {name: 0 * tensor for name, tensor in begun()["layer"].items()}}

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    lengths = {strategy.name: 0.0 for strategy in (FLoRA(), FedExLoRA(), FedAvgLoRA())}
    for _ in range(draws):
        sent = [
            Contribution(f"{k}", 100.0, {"layer": {"A": noise(RANK, INTO), "B": noise(OUT, RANK)}})
            for k in range(count)
        ]
        for strategy in (FLoRA(), FedExLoRA(), FedAvgLoRA()):
            held = empty if strategy.name != "fedavg-lora" else {"layer": {k: empty["layer"][k] for k in "AB"}}
            after = strategy.server_update(strategy.start(held, ("A", "B")), sent).adapter
            made = {"layer": {"D": empty["layer"]["D"], **after["layer"]}}
            lengths[strategy.name] += float(weight(made).square().sum()) / draws
    # s = 3 / 2, and each of the products' numbers is a sum of r.
    one = 1.5**2 * OUT * INTO * RANK / count**2
    assert lengths["flora"] == pytest.approx(count * one, rel=0.05)
    assert lengths["fedex-lora"] == pytest.approx(count * one, rel=0.05), "an exact mean has the same noise"
    assert lengths["fedavg-lora"] == pytest.approx(one, rel=0.05)


def test_fedex_lora_adopts_its_average_under_privacy_too_and_refuses_a_server_that_steps_elsewhere() -> None:
    job = configure({"strategy": "fedex-lora"})
    assert job.config.privacy.mechanism.charged
    assert (job.config.server.optimizer, job.config.training.optimizer) == ("none", "adam")
    assert configure({"strategy": "flora"}).config.server.optimizer == "adam"
    factors, state = [trained(10 + k) for k in range(3)], FedExLoRA().start(begun(), ("A", "B"))
    models = [weight(merge(state.adapter, {"layer": own})) for own in factors]
    wanted = sum((p * model for p, model in zip(SHARES, models, strict=True)), torch.zeros(()))
    stepped = FedExLoRA().server_update(state, sites(factors), partial(server_step, job.config))
    assert float((weight(stepped.adapter) - wanted).abs().max()) < 1e-12
    for optimizer in ("adam", "momentum"):
        with pytest.raises(ConfigError, match=r"needs server\.optimizer 'none', because .*, and it is"):
            configure({"strategy": "fedex-lora", "server.optimizer": optimizer})


def test_the_exported_pair_has_the_rank_of_the_change_and_nothing_has_rank_one() -> None:
    state: ServerState = FedExLoRA().start(begun(), ("A", "B"))
    delta = weight(state.adapter)
    pair = pair_of(delta)
    assert (pair["B"].shape, pair["A"].shape) == ((OUT, INTO), (INTO, INTO))
    assert torch.allclose(pair["B"] @ pair["A"], delta, atol=1e-12)
    low = normal(OUT, RANK, seed=4) @ normal(RANK, INTO, seed=5)
    assert pair_of(low)["A"].shape == (RANK, INTO)
    assert pair_of(0 * delta)["A"].shape == (1, INTO)


# --- factors that take turns ------------------------------------------------------------------------------------------

TURNING: dict[str, Any] = {
    "strategy": "rolora",
    "training.optimizer": "sgd",
    "training.learning-rate": 1.0,
    "training.local-steps": 1,
    "server.optimizer": "adam",
}


def test_x4_each_turn_is_exact_and_the_factor_that_rests_stays_bit_for_bit_under_the_servers_adam() -> None:
    strategy, config = RoLoRA(), configure({**TURNING, "rounds": 6}).config
    state = strategy.start({"layer": trained(1)}, ("A", "B"))
    moments: dict[str, Tensor] = {}
    for number in range(1, 7):
        turn, rest = RoLoRA.order[(number + 1) % 2], RoLoRA.order[number % 2]
        sent = [{turn: trained(10 * number + k)[turn]} for k in range(3)]
        models = [LoRA(RANK, 3.0, ()).delta({**state.adapter["layer"], **own}) for own in sent]
        averaged = strategy.server_update(state, sites(sent))
        wanted = sum((p * model for p, model in zip(SHARES, models, strict=True)), torch.zeros(()))
        assert float((LoRA(RANK, 3.0, ()).delta(averaged.adapter["layer"]) - wanted).abs().max()) < 1e-12
        stepped = strategy.server_update(state, sites(sent), partial(server_step, config))
        assert torch.equal(stepped.adapter["layer"][rest], state.adapter["layer"][rest])
        assert not torch.equal(stepped.adapter["layer"][turn], state.adapter["layer"][turn])
        if moments:
            assert torch.equal(stepped.optimizer.first["layer"][rest], moments[rest])
        moments, state = dict(stepped.optimizer.first["layer"]), stepped
    # Each factor's clock counts its own turns: three of six rounds.
    assert {name: clock.unique().tolist() for name, clock in state.optimizer.clocks["layer"].items()} == {
        "A": [3.0],
        "B": [3.0],
    }


def test_x4_a_resting_factor_that_is_not_marked_moves_and_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure({**TURNING, "rounds": 2}).config
    marked = Average.update
    monkeypatch.setattr(RoLoRA, "update", lambda *given: replace(marked(*given), active={}))
    state = RoLoRA().start({"layer": trained(1)}, ("A", "B"))
    for number in (1, 2):
        turn = RoLoRA.order[(number + 1) % 2]
        before = state.adapter["layer"]
        step = partial(server_step, config)
        state = RoLoRA().server_update(state, sites([{turn: trained(10 * number + k)[turn]} for k in range(3)]), step)
    assert not torch.equal(state.adapter["layer"]["B"], before["B"]), "Adam's first moment goes on"


def test_x4_a_private_run_trains_and_sends_the_factor_whose_turn_it_is(
    toy_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[list[str]] = []

    def kept(reply: Any) -> Any:
        if isinstance(reply, TrainResult):
            sent.append(sorted({n for layer, f in reply.contribution.items() if layer != "head" for n in f}))
        return encode_reply(reply)

    monkeypatch.setattr(fedveil.experiments.in_process, "encode_reply", kept)
    folder = run_in_process({**toy_settings, **TURNING, "rounds": 2}, 2)
    assert sent == [["B"], ["B"], ["A"], ["A"]]
    state, lines = saved_state(folder), read_lines(RoundLine, folder)
    sizes = {n: sum(f[n].numel() for layer, f in state.adapter.items() if layer != "head") for n in "AB"}
    head = sum(tensor.numel() for tensor in state.adapter["head"].values())
    assert [line.bytes_up for line in lines] == [8 * (sizes["B"] + head), 8 * (sizes["A"] + head)]


# --- ranks that differ ------------------------------------------------------------------------------------------------


def test_x6_flexlora_by_increments_is_exact_and_the_published_form_forgets() -> None:
    strategy, ranks, shares = FlexLoRA(), (1, 3, 4), (0.5, 0.3, 0.2)
    A = torch.linalg.qr(normal(INTO, 4, seed=1))[0].T
    state = strategy.settle(
        replace(strategy.start({"layer": {"A": A, "B": normal(OUT, 4, seed=2)}}, ("B",)), round_number=1)
    )
    for number in (10, 20, 30):
        received = strategy.downlink(state)
        held, contributions, models = state.adapter["layer"], [], []
        left = torch.linalg.svdvals(held["B"])
        assert torch.allclose(held["B"].norm(dim=0), left, atol=1e-10), "columns are not in descending order"
        for k, (rank, share) in enumerate(zip(ranks, shares, strict=True)):
            columns = strategy.trained_columns(received, 1, rank)["layer"]["B"]
            assert columns.tolist() == list(range(rank))
            moved = held["B"].clone()
            moved[:, columns] += normal(OUT, rank, seed=number + k)
            models.append(moved @ held["A"])
            own: AdapterState = {"layer": {"B": moved[:, columns]}}
            contributions.append(Contribution(f"{k}", 100 * share, own, rank))
        state = strategy.server_update(state, contributions)
        wanted = sum((p * model for p, model in zip(shares, models, strict=True)), torch.zeros(()))
        now = state.adapter["layer"]
        assert float((now["B"] @ now["A"] - wanted).abs().max()) < 1e-12
    # As published: every site gets the best product of its rank, nobody changes it, and the sum of those is the next.
    product, first = now["B"] @ now["A"], torch.linalg.svdvals(now["B"])
    for _ in range(6):
        U, S, Vt = torch.linalg.svd(product, full_matrices=False)
        product = sum((p * (U[:, :r] * S[:r]) @ Vt[:r] for p, r in zip(shares, ranks, strict=True)), torch.zeros(()))
    decayed = torch.linalg.svdvals(product)[:4] / first
    assert decayed.tolist() == pytest.approx([1.0, 0.5**6, 0.5**6, 0.2**6], rel=1e-9)


def test_c3_padding_shrinks_what_few_sites_train_and_is_not_the_mean() -> None:
    strategy = HetLoRA()
    A = torch.linalg.qr(normal(INTO, 4, seed=1))[0].T
    state = strategy.start({"layer": {"A": A, "B": normal(OUT, 4, seed=2)}}, ("B",))
    received, before = strategy.downlink(state), state.adapter["layer"]["B"]
    contributions = []
    for k, rank in enumerate((1, 3, 4)):
        columns = strategy.trained_columns(received, 1, rank)["layer"]["B"]
        contributions.append(Contribution(f"{k}", 1.0, {"layer": {"B": before[:, columns]}}, rank))
    lengths = torch.tensor([float((before[:, :rank] @ A[:rank]).norm()) for rank in (1, 3, 4)])
    shares = lengths.double() / lengths.double().sum()
    after = strategy.server_update(state, contributions).adapter["layer"]["B"]
    left = [1.0, float(shares[1:].sum()), float(shares[1:].sum()), float(shares[2])]
    assert torch.allclose(after, before * torch.tensor(left, dtype=torch.float64), atol=1e-7)
    assert not is_exact(type(strategy), LoRA)


def test_x8_weights_by_norm_follow_the_noise_and_are_refused_under_privacy() -> None:
    signal, draw = normal(64, 4, seed=1), torch.Generator().manual_seed(2)
    A = torch.linalg.qr(normal(INTO, 4, seed=3))[0].T
    state = HetLoRA().start({"layer": {"A": A, "B": 0 * signal}}, ("B",))
    noisy = [signal + std * torch.randn(signal.shape, generator=draw, dtype=torch.float64) for std in (2.0, 8.0)]
    contributions = [Contribution(f"{k}", 1.0, {"layer": {"B": B}}, 4) for k, B in enumerate(noisy)]
    after = HetLoRA().server_update(state, contributions).adapter["layer"]["B"]
    share = float(((after - noisy[0]) * (noisy[1] - noisy[0])).sum() / (noisy[1] - noisy[0]).square().sum())
    assert share > 0.75, "the noisier site of two with equal signal is the one that counts"
    for mode in ({}, {"privacy.mode": "secure-sum", "privacy.honest-sites": 3}):
        with pytest.raises(ConfigError, match="hetlora"):
            configure({"strategy": "hetlora", **mode})
    assert configure({"strategy": "hetlora", "privacy.mode": "none"}).strategy.name == "hetlora"


@pytest.mark.parametrize("strategy", ["flexlora", "hetlora"])
def test_sites_of_unlike_ranks_meet_in_one_run(strategy: str, toy_settings: dict[str, Any], tmp_path: Path) -> None:
    mode = {"privacy.mode": "none"} if strategy == "hetlora" else {}
    nodes = [
        {"partition-id": k, "num-partitions": 2, "ledger": str(tmp_path / f"{k}.sqlite"), "rank": rank}
        for k, rank in enumerate((1, 3))
    ]
    run = run_in_process({**toy_settings, **TURNING, **mode, "strategy": strategy, "rounds": 2}, nodes)
    lines = read_lines(RoundLine, run)
    assert [len(line.participants) for line in lines] == [2, 2]
    assert all(torch.isfinite(tensor).all() for _, _, tensor in entries(saved_state(run).adapter))


def test_what_cannot_be_run_says_why_and_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"'fedsa-lora' cannot be run: .*no clip bounds.*'rolora'"):
        configure({"strategy": "fedsa-lora"})
    for strategy in ("fedex-lora", "flora", "flexlora"):
        with pytest.raises(ConfigError, match="nobody sees more than a sum"):
            configure({"strategy": strategy, "privacy.mode": "secure-sum", "privacy.honest-sites": 3})
    with pytest.raises(ConfigError, match="leave phases empty"):
        configure({"strategy": "rolora", "phases": "6 adapter on jacobians"})

"""FedSVD: rows V1 to V8 of the invariants, in float64 on layers that are not square."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_run import spent
from safetensors.torch import load_file
from torch import Tensor

from fedveil.common.adapters import LoRAFrozenA
from fedveil.common.messages.round import TrainResult, TrainTask
from fedveil.common.messages.state import HEAD, AdapterState
from fedveil.common.run_lines import PrivacyLine, RoundLine, read_lines
from fedveil.experiments.evaluate import evaluate_run
from fedveil.experiments.in_process import InProcessTransport, run_in_process
from fedveil.server.sites import Exchange
from fedveil.strategies import Contribution, ServerState
from fedveil.strategies.fed_svd import FedSVD, refactor
from fedveil.strategies.ffa_lora import FFALoRA
from fedveil.strategies.job import configure

pytestmark = [pytest.mark.rough_prices, pytest.mark.peft]

SHAPES = {"wide": (5, 11), "tall": (13, 6)}
RANK = 3


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@st.composite
def factors(pick: Callable[..., int]) -> tuple[Tensor, Tensor]:
    rank = pick(st.integers(1, 4))
    out, inp = pick(st.integers(rank, 12)), pick(st.integers(rank, 12))
    seed = pick(st.integers(0, 10_000))
    return draw(out, rank, seed=seed), draw(rank, inp, seed=seed + 1)


@given(factors())
@settings(max_examples=40, deadline=None)
def test_v1_the_product_does_not_change(pair: tuple[Tensor, Tensor]) -> None:
    B, A = pair
    new_b, change = refactor(B, A)
    error = (new_b @ change @ A - B @ A).norm() / (B @ A).norm()
    assert error < 1e-12, f"the product moved by {error:.1e}"


@given(factors())
@settings(max_examples=40, deadline=None)
def test_v2_rows_of_a_are_orthonormal_and_columns_of_b_descend(pair: tuple[Tensor, Tensor]) -> None:
    B, A = pair
    new_b, change = refactor(B, A)
    new_a, gram = change @ A, new_b.T @ new_b
    assert (new_a @ new_a.T - torch.eye(len(A), dtype=torch.float64)).abs().max() < 1e-9
    assert (gram - torch.diag(gram.diagonal())).abs().max() < 1e-9 * max(1.0, float(gram.max()))
    lengths = gram.diagonal()
    assert (lengths[:-1] - lengths[1:] >= -1e-9 * lengths[0]).all()


def test_v3_a_never_leaves_the_row_space_of_its_start() -> None:
    A0, A, B = draw(RANK, 9, seed=1), draw(RANK, 9, seed=1), draw(7, RANK, seed=2)
    projector = torch.linalg.pinv(A0) @ A0
    for round_number in range(4):
        B, change = refactor(B + draw(7, RANK, seed=round_number), A)
        before, A = A, change @ A
        assert (A - A @ projector).abs().max() < 1e-10
        if round_number:
            rotation = A @ before.T
            assert (rotation @ rotation.T - torch.eye(RANK)).abs().max() < 1e-10


def test_v4_the_cheap_route_equals_the_full_svd_and_repeating_it_changes_nothing() -> None:
    B, A = draw(8, RANK, seed=3), draw(RANK, 10, seed=4)
    new_b, change = refactor(B, A)
    U, S, Vt = torch.linalg.svd(B @ A, full_matrices=False)
    signs = torch.sign((change @ A * Vt[:RANK]).sum(1))
    assert (new_b - U[:, :RANK] * S[:RANK] * signs).abs().max() < 1e-12
    assert (change @ A - Vt[:RANK] * signs[:, None]).abs().max() < 1e-12
    again_b, again = refactor(new_b, change @ A)
    assert (again - torch.eye(RANK)).abs().max() < 1e-12
    assert (again_b - new_b).abs().max() < 1e-12


@pytest.mark.parametrize("used", [0, 1, 2])
def test_v6_a_rank_deficient_b_is_harmless(used: int) -> None:
    A = draw(RANK, 9, seed=5)
    B = draw(7, used, seed=6) @ draw(used, RANK, seed=7) if used else torch.zeros(7, RANK, dtype=torch.float64)
    new_b, change = refactor(B, A)
    new_a = change @ A
    assert new_b.isfinite().all()
    assert new_a.isfinite().all()
    assert (new_b @ new_a - B @ A).abs().max() < 1e-12
    assert (new_a.norm(dim=1) > 0.1).all(), "a row of A at length 0 could never be trained again"
    assert (new_a @ new_a.T - torch.eye(RANK)).abs().max() < 1e-10
    projector = torch.linalg.pinv(A) @ A
    assert (new_a - new_a @ projector).abs().max() < 1e-10, "unused rows must come from A's own row space"


def test_v7_the_gradient_of_b_is_bounded_by_the_input() -> None:
    _, change = refactor(draw(7, RANK, seed=8), draw(RANK, 9, seed=9))
    A = change @ draw(RANK, 9, seed=9)
    x, upstream = draw(9, seed=10), draw(7, seed=11)
    assert torch.outer(upstream, A @ x).norm() <= upstream.norm() * x.norm() * (1 + 1e-12)


def adapter_start(seed: int = 0) -> AdapterState:
    return {
        name: {"A": draw(RANK, n, seed=seed + n), "B": torch.zeros(m, RANK, dtype=torch.float64)}
        for name, (m, n) in SHAPES.items()
    }


def orthonormal(adapter: AdapterState) -> AdapterState:
    return {name: {"A": torch.linalg.qr(f["A"].T)[0].T.contiguous(), "B": f["B"]} for name, f in adapter.items()}


TARGET = {name: draw(m, n, seed=99 + m) for name, (m, n) in SHAPES.items()}


def site_step(adapter: AdapterState, site: int, kind: str, noise: Tensor | None) -> AdapterState:
    """Three steps on the loss ½‖BA − T_k‖², clipped jointly over layers; noise is given in weight space."""
    B = {name: f["B"].clone() for name, f in adapter.items()}
    optimizer = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[kind](B.values(), lr=0.1)
    for step in range(3):
        grads = {}
        for name, f in adapter.items():
            residual = B[name] @ f["A"] - TARGET[name] * (1 + 0.3 * site)
            grads[name] = residual @ f["A"].T
        norm = sum(float(g.pow(2).sum()) for g in grads.values()) ** 0.5
        factor = min(1.0, 2.0 / norm)
        for name, f in adapter.items():
            g = grads[name] * factor
            if noise is not None:
                # The same draw, expressed in this basis: N Aᵀ is isotropic when A's rows are orthonormal.
                g = g + noise[: len(g), : f["A"].shape[1]] @ f["A"].T * 0.1 * (step + 1)
            B[name].grad = g
        optimizer.step()
    return {name: {"B": b} for name, b in B.items()}


def trajectory(strategy: FedSVD | FFALoRA, kind: str, *, noisy: bool) -> list[AdapterState]:
    adapter = LoRAFrozenA(RANK, float(RANK), ("x",))
    state: ServerState = strategy.start(orthonormal(adapter_start()), ("B",))
    deltas = []
    for round_number in range(5):
        contributions = []
        # Partial participation with unequal weights.
        for site in (round_number % 3, (round_number + 1) % 3):
            received = strategy.install(orthonormal(adapter_start()), strategy.downlink(state))
            noise = draw(13, 11, seed=1000 * round_number + site) if noisy else None
            contributions.append(Contribution(str(site), 1.0 + site, site_step(received, site, kind, noise)))
        state = strategy.server_update(state, contributions)
        deltas.append({name: {"W": adapter.delta(f)} for name, f in state.adapter.items()})
    return deltas


def distance(left: list[AdapterState], right: list[AdapterState]) -> float:
    pairs = zip(left, right, strict=True)
    return max(float((a[name]["W"] - b[name]["W"]).abs().max()) for a, b in pairs for name in SHAPES)


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("options", [FedSVD(), FedSVD(period=2)])
def test_v5_under_sgd_it_is_ffa_lora_with_an_orthonormal_a(options: FedSVD, noisy: bool) -> None:
    assert distance(trajectory(options, "sgd", noisy=noisy), trajectory(FFALoRA(), "sgd", noisy=noisy)) < 1e-10


def test_v5_under_adam_it_is_another_algorithm_from_the_first_turn_on() -> None:
    turning, fixed = trajectory(FedSVD(), "adam", noisy=False), trajectory(FFALoRA(), "adam", noisy=False)
    assert distance(turning[:1], fixed[:1]) < 1e-10, "they differ before a basis has turned, so by something else"
    gap = distance(turning, fixed)
    assert gap > 1e-2, f"under Adam the basis makes a difference of {gap:.1e} only"


def test_a_late_joiner_rebuilds_a_from_the_start_and_the_rotation() -> None:
    strategy, start = FedSVD(), adapter_start()
    state = strategy.start(start, ("B",))
    for seed in range(3):
        sites = [Contribution("s", 1.0, {n: {"B": draw(m, RANK, seed=seed + m)} for n, (m, _) in SHAPES.items()})]
        state = strategy.server_update(state, sites)
    installed = strategy.install(start, strategy.downlink(state))
    for name in SHAPES:
        assert set(strategy.downlink(state)[name]) == {"B", "M"}
        assert torch.equal(installed[name]["A"], state.adapter[name]["A"])
        assert torch.equal(installed[name]["B"], state.adapter[name]["B"])


@pytest.mark.parametrize("flips", [(-1, -1, -1), (1, -1, 1), (-1, 1, 1)])
def test_v4_a_server_whose_svd_has_other_signs_gets_the_same_factors(
    flips: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    B, A, real = draw(8, RANK, seed=3), draw(RANK, 10, seed=4), torch.linalg.svd
    here = refactor(B, A)

    def elsewhere(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """An SVD as right as ours: which of a pair's two signs comes out is the library's affair."""
        u, s, vt = real(matrix)
        signs = torch.tensor(flips, dtype=torch.float64)
        return u * signs, s, vt * signs[:, None]

    monkeypatch.setattr(torch.linalg, "svd", elsewhere)
    there = refactor(B, A)
    assert torch.equal(here[0], there[0]), "B depends on the signs that an SVD happens to give"
    assert torch.equal(here[1], there[1]), "the rotation depends on the signs that an SVD happens to give"


def test_the_period_says_when_it_re_factorises() -> None:
    strategy = FedSVD(period=2)
    state = strategy.start(adapter_start(), ("B",))
    moved = []
    for seed in range(5):
        before = state.adapter["wide"]["A"]
        sites = [Contribution("s", 1.0, {n: {"B": draw(m, RANK, seed=seed + m)} for n, (m, _) in SHAPES.items()})]
        state = strategy.server_update(state, sites)
        moved.append(not torch.equal(before, state.adapter["wide"]["A"]))
    assert moved == [False, True, False, True, False]


def test_float32_factors_keep_the_product_to_1e_5() -> None:
    B, A = draw(64, 8, seed=1).float(), draw(8, 96, seed=2).float()
    strategy = FedSVD()
    state = strategy.start({"l": {"A": A, "B": torch.zeros_like(B)}}, ("B",))
    state = strategy.server_update(replace(state), [Contribution("s", 1.0, {"l": {"B": B}})])
    product = state.adapter["l"]["B"] @ state.adapter["l"]["A"]
    assert (product - B @ A).norm() / (B @ A).norm() < 1e-5


# --- the shipped default: DP-SGD at the sites, Adam at the server -----------------------------------------------------


def adams_step(m: Tensor, v: Tensor, t: int, rate: float, epsilon: float) -> Tensor:
    return rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + epsilon)


@pytest.mark.parametrize("period", [1, 2])
def test_under_privacy_each_round_of_a_federation_is_the_servers_adam_on_b_and_then_a_turn(
    toy_settings: dict[str, Any], period: int
) -> None:
    own = {key: value for key, value in toy_settings.items() if not key.startswith(("training.", "server."))}
    chosen = {**own, "strategy": "fed-svd", "fed-svd.period": period, "rounds": 4}
    job = configure(chosen)
    config = job.config
    assert (config.privacy.mechanism.claims, config.server.optimizer, config.training.optimizer) == (
        True,
        "adam",
        "sgd",
    )
    heard: list[tuple[TrainTask, list[TrainResult]]] = []

    class Listening(InProcessTransport):
        """Keeps what the sites got and sent, in the order of rounds."""

        def exchange(self, tasks: Mapping[int, TrainTask], timeout: float) -> Exchange:
            got = super().exchange(tasks, timeout)
            results = [reply for reply in got.replies.values() if isinstance(reply, TrainResult)]
            heard.append((next(iter(tasks.values())), results))
            return got

    folder = run_in_process(chosen, 3, "1", Listening)
    assert [len(results) for _, results in heard] == [3] * 4
    start = job.model(("bad", "good")).start
    exported = load_file(str(folder / "adapter" / "adapter_model.safetensors"))

    def weights_sent(round_number: int, layer: str) -> Tensor:
        """Return B A as the sites of a round got it, or as the run left it behind."""
        if round_number <= 4:
            B, A = received(round_number, layer)
            return B @ A
        name = f"base_model.model.{layer}.lora_"
        return exported[f"{name}B.weight"].double() @ exported[f"{name}A.weight"].double()

    def received(round_number: int, layer: str) -> tuple[Tensor, Tensor]:
        down = heard[round_number - 1][0].state[layer]
        return down["B"].double(), down["M"].double() @ start[layer]["A"].double()

    for layer in (layer for layer in start if layer != HEAD):
        m = v = torch.zeros_like(start[layer]["B"], dtype=torch.float64)
        t = 0
        for round_number, (_, results) in enumerate(heard, 1):
            B, A = received(round_number, layer)
            size = sum(result.public_size for result in results)
            averaged = sum(
                (result.public_size / size * result.contribution[layer]["B"].double() for result in results),
                torch.zeros(()),
            )
            t, g = t + 1, B - averaged
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g.square()
            rate = config.server.learning_rate * (1 - (round_number - 1) / 4)
            stepped = B - adams_step(m, v, t, rate, config.server.adam_tau)
            gap = float((weights_sent(round_number + 1, layer) - stepped @ A).abs().max())
            assert gap < 1e-6, f"{layer}: after round {round_number} the weights are off Adam's step by {gap:.1e}"
            if round_number % period == 0:
                # The basis turns, and with it goes what Adam knew about the old one's coordinates.
                m, v, t = torch.zeros_like(m), torch.zeros_like(v), 0
                if round_number < 4:
                    turned = received(round_number + 1, layer)[1]
                    off = float((turned @ turned.T - torch.eye(len(turned))).abs().max())
                    assert off < 1e-5, f"{layer}: rows of A are off orthonormal by {off:.1e} after a turn"
                    assert (turned - A).abs().max() > 1e-2, f"{layer}: the basis did not turn: nothing is proved"
    line = read_lines(RoundLine, folder)[-1]
    assert line.accuracy == evaluate_run(folder).accuracy, "the saved adapter does not score like the run"
    assert 0 < spent(read_lines(PrivacyLine, folder)[-1]).epsilon_total <= 8.0

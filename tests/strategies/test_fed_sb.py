"""Fed-SB: rows S1 to S7 of the invariants, in float64 on layers that are not square; its starts in three families.

Starts that look at a model are compared with the stock one, into which nothing was put. GPT-2 stores its weights
transposed (Conv1D).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from audits.tiny_models import FILLER, GOOD, TARGETS
from audits.worlds import plan
from fedveil.client.local_training import train_round
from fedveil.client.site import Site
from fedveil.common.adapters import LoRASB
from fedveil.common.config.sections import HeadConfig
from fedveil.common.data.sources import train_and_test
from fedveil.common.errors import ConfigError, ModelError
from fedveil.common.messages.round import TrainTask
from fedveil.common.messages.state import HEAD, AdapterState
from fedveil.common.messages.tensors import fingerprint, start_fingerprint
from fedveil.common.model.base import load_base_model
from fedveil.common.model.federated import FederatedModel
from fedveil.common.starts import STARTS, Start
from fedveil.common.starts.directions import leading_singular_triple
from fedveil.common.starts.dp_gradient import DPGradient
from fedveil.common.starts.gradient import gradient_basis, mean_gradient, private_gradient
from fedveil.common.tasks import TASKS, Record
from fedveil.common.tasks.text import TextExample
from fedveil.contrib.starts.nonprivate_gradient import NonprivateGradient
from fedveil.strategies import Contribution, ServerState, mean
from fedveil.strategies.fed_sb import FedSB
from fedveil.strategies.job import Job, configure

pytestmark = pytest.mark.peft

OUT, IN, RANK = 7, 12, 3
SHAPES = {"wide": (5, 11), "tall": (13, 6)}
ADAPTER = LoRASB(RANK, 16.0, ("x",))
Folder = Callable[[str], str]
each_family = pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def basis(seed: int = 0) -> dict[str, Tensor]:
    B = torch.linalg.qr(draw(OUT, RANK, seed=seed))[0]
    A = torch.linalg.qr(draw(IN, RANK, seed=seed + 1))[0].T.contiguous()
    return {"B": B, "A": A, "R": torch.zeros(RANK, RANK, dtype=torch.float64)}


def leading(matrix: Tensor, rank: int = RANK) -> tuple[Tensor, Tensor, Tensor]:
    """Return the projectors on the leading left and right singular vectors, and the values, from the two squares."""
    left, right = torch.linalg.eigh(matrix @ matrix.T), torch.linalg.eigh(matrix.T @ matrix)
    U, V = left.eigenvectors[:, -rank:], right.eigenvectors[:, -rank:]
    return U @ U.T, V @ V.T, left.eigenvalues[-rank:].flip(0).sqrt()


@given(st.lists(st.floats(0.1, 9.0), min_size=1, max_size=5), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_s1_the_mean_of_r_is_the_mean_of_the_weights(weights: list[float], seed: int) -> None:
    start = basis(seed)
    strategy = FedSB()
    sites = [Contribution(str(k), w, {"l": {"R": draw(RANK, RANK, seed=seed + 7 * k)}}) for k, w in enumerate(weights)]
    state = strategy.server_update(strategy.start({"l": start}, ("R",)), sites)
    exact = sum(
        w / sum(weights) * ADAPTER.delta({**start, "R": site.state["l"]["R"]})
        for w, site in zip(weights, sites, strict=True)
    )
    assert (ADAPTER.delta(state.adapter["l"]) - exact).abs().max() < 1e-12
    assert torch.equal(state.adapter["l"]["A"], start["A"])
    assert torch.equal(state.adapter["l"]["B"], start["B"])


@pytest.mark.parametrize("sign", [True, False])
def test_s2_b_and_a_are_orthonormal(sign: bool) -> None:
    made = gradient_basis(draw(OUT, IN, seed=3), RANK, 1e-3, sign=sign)
    eye = torch.eye(RANK, dtype=torch.float64)
    assert (made["B"].T @ made["B"] - eye).abs().max() < 1e-12
    assert (made["A"] @ made["A"].T - eye).abs().max() < 1e-12


def test_s3_the_published_start_is_the_best_rank_r_sign_step() -> None:
    G, step = draw(OUT, IN, seed=4), 0.02
    made = gradient_basis(G, RANK, step, sign=True)
    D = -step * torch.sign(G)
    tail = torch.linalg.svdvals(D)[RANK:].pow(2).sum().sqrt()
    residual = (D - ADAPTER.delta(made)).norm()
    assert float(residual) == pytest.approx(float(tail), rel=1e-10)
    assert torch.equal(made["R"], torch.diag(torch.diagonal(made["R"])))


def test_s3_alpha_cancels() -> None:
    factors = {**basis(), "R": draw(RANK, RANK, seed=5)}
    other = LoRASB(RANK, float(RANK), ("x",))
    assert torch.equal(ADAPTER.delta(factors), other.delta(factors))
    assert ADAPTER.scaling == other.scaling == 1.0


def test_the_noised_start_drops_the_sign_and_starts_at_zero() -> None:
    G = draw(OUT, 1, seed=6) @ draw(1, IN, seed=7)
    made = gradient_basis(G, 1, 1e-3, sign=False)
    assert (made["R"] == 0).all()
    assert abs(float((made["B"][:, 0] @ G[:, 0]) / G[:, 0].norm())) == pytest.approx(1.0, abs=1e-12)


def test_s4_the_first_step_is_the_projected_gradient() -> None:
    factors, G, rate = basis(8), draw(OUT, IN, seed=9), 0.3
    R = torch.zeros(RANK, RANK, dtype=torch.float64, requires_grad=True)
    (ADAPTER.delta({**factors, "R": R}) * G).sum().backward()
    assert R.grad is not None
    change = ADAPTER.delta({**factors, "R": -rate * R.grad})
    wanted = -rate * factors["B"] @ factors["B"].T @ G @ factors["A"].T @ factors["A"]
    assert (change - wanted).abs().max() < 1e-10


def test_s5_noise_on_r_enters_the_weights_at_its_own_norm() -> None:
    X = draw(RANK, RANK, seed=10)
    assert float(ADAPTER.delta({**basis(), "R": X}).norm()) == pytest.approx(float(X.norm()), rel=1e-12)


def test_s6_a_round_uses_only_its_own_sites() -> None:
    strategy = FedSB()
    state = strategy.start({"l": basis()}, ("R",))
    for round_number, (first, second) in enumerate([(0, 1), (1, 2), (0, 2)]):
        own = [draw(RANK, RANK, seed=10 * round_number + k) for k in range(3)]
        sites = [Contribution(str(k), 1.0 + k, {"l": {"R": own[k]}}) for k in (first, second)]
        state = strategy.server_update(state, sites)
        for i in range(RANK):
            for j in range(RANK):
                both = (1 + first) * float(own[first][i, j]) + (1 + second) * float(own[second][i, j])
                wanted = both / (2 + first + second)
                gap = abs(float(state.adapter["l"]["R"][i, j]) - wanted)
                assert gap < 1e-12, f"round {round_number + 1}: R is off the mean of its own two sites by {gap:.1e}"


def test_s7_raw_private_gradients_are_refused_under_privacy() -> None:
    with pytest.raises(ConfigError, match="raw gradients of private records"):
        configure({"strategy": "fed-sb", "adapter.start": "nonprivate-gradient"})
    configure({"strategy": "fed-sb", "adapter.start": "nonprivate-gradient", "privacy.mode": "none"})
    with pytest.raises(ConfigError, match=r"needs start\.data"):
        configure({"strategy": "fed-sb", "adapter.start": "public-gradient"})
    with pytest.raises(ConfigError, match="alone pays for: use 'public-gradient'"):
        configure({"strategy": "fed-sb", "adapter.start": "dp-gradient", "privacy.mode": "none"})


@pytest.mark.parametrize("flips", [(-1, -1, -1), (1, -1, 1), (-1, 1, 1)])
def test_parties_whose_svd_has_other_signs_get_the_same_factors(
    flips: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix, real = draw(OUT, IN, seed=11), torch.linalg.svd
    U, S, Vt = leading_singular_triple(matrix, RANK)

    def elsewhere(matrix: Tensor, full_matrices: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """An SVD as right as ours: which of a pair's two signs comes out is the library's affair."""
        signs = torch.tensor([*flips, *[1] * (OUT - RANK)], dtype=torch.float64)
        u, s, vt = real(matrix, full_matrices=full_matrices)
        return u * signs, s, vt * signs[:, None]

    monkeypatch.setattr(torch.linalg, "svd", elsewhere)
    there = leading_singular_triple(matrix, RANK)
    assert torch.equal(U, there[0]), "B depends on the signs that an SVD happens to give"
    assert torch.equal(Vt, there[2]), "A depends on the signs that an SVD happens to give"
    left, right, values = leading(matrix)
    assert (U * S @ Vt - left @ matrix @ right).abs().max() < 1e-12
    assert (S - values).abs().max() < 1e-12


def test_only_gradient_starts_send_a_basis() -> None:
    for start, sent in (("orthonormal", set()), ("svd-of-weights", set()), ("dp-gradient", {"A", "B"})):
        job = configure({"strategy": "fed-sb", "adapter.start": start})
        assert set(job.basis(job.start({"l": basis()})).get("l", {})) == sent


# --- where B and A come from ------------------------------------------------------------------------------------------


def task_of(family: str) -> str:
    return "classification" if family == "bert" else "causal-lm"


def tiny(folder: str, family: str, init: str = "orthonormal", head: str = "random") -> FederatedModel:
    """Return a tiny model with LoRA-SB in it; only BERT has a head."""
    return FederatedModel(
        load_base_model(folder, task_of(family)),
        LoRASB(RANK, 16.0, tuple(TARGETS[family].split(",")), STARTS[init]()),
        TASKS[task_of(family)],
        HeadConfig(policy="trained" if family == "bert" else "frozen", start=head),
        seed=1,
        label_names=("bad", "good"),
        max_length=24,
        device="cpu",
        precision="float32",
    )


def stock_weights(module: nn.Module, family: str) -> dict[str, tuple[nn.Parameter, bool]]:
    """Return the weights that the targets name in a stock model, and whether each is stored as (in, out)."""
    return {
        name: (child.weight, type(child).__name__ == "Conv1D")
        for name, child in module.named_modules()
        if name.rsplit(".", 1)[-1] in TARGETS[family].split(",") and hasattr(child, "weight")
    }


def w0(folder: str, family: str) -> dict[str, Tensor]:
    """Return the stock weights as (out, in), in float64."""
    stock = stock_weights(load_base_model(folder, task_of(family)).module, family)
    return {name: (w.T if transposed else w).detach().double() for name, (w, transposed) in stock.items()}


@pytest.mark.parametrize("init", ["orthonormal", "svd-of-weights"])
@each_family
def test_s2_the_adapters_own_start_is_orthonormal_and_changes_nothing(
    model_folder: Folder, family: str, init: str
) -> None:
    start, weights = tiny(model_folder(family), family, init).start, w0(model_folder(family), family)
    assert set(start) - {HEAD} == set(weights)
    assert any(W.shape[0] != W.shape[1] for W in weights.values()), "only square layers: a transposed start would pass"
    for layer, W in weights.items():
        B, A = start[layer]["B"].double(), start[layer]["A"].double()
        shapes = (tuple(B.shape), tuple(A.shape))
        assert shapes == ((W.shape[0], RANK), (RANK, W.shape[1])), f"{layer}: B and A have shapes {shapes}"
        for what, gram in (("BᵀB", B.T @ B), ("A Aᵀ", A @ A.T)):
            gap = float((gram - torch.eye(RANK)).abs().max())
            assert gap < 1e-6, f"{layer}: {what} is off the identity by {gap:.1e}"
        assert not start[layer]["R"].any(), f"{layer}: R does not start at 0"
        assert B.shape != A.T.shape or not torch.equal(B, A.T), f"{layer}: B is A transposed, not a draw of its own"


@each_family
def test_svd_of_weights_spans_the_leading_singular_vectors_of_w0(model_folder: Folder, family: str) -> None:
    start = tiny(model_folder(family), family, "svd-of-weights").start
    for layer, W in w0(model_folder(family), family).items():
        B, A = start[layer]["B"].double(), start[layer]["A"].double()
        left, right, values = leading(W)
        for what, gap in (("B", B @ B.T - left), ("A", A.T @ A - right)):
            off = float(gap.abs().max())
            assert off < 1e-6, f"{layer}: the span of {what} is off that of W0's leading vectors by {off:.1e}"
        off = float((B.T @ W @ A.T - torch.diag(values)).abs().max() / values[0])
        assert off < 1e-6, f"{layer}: columns of B and rows of A are not paired as W0's singular vectors are"


# --- the full gradient ------------------------------------------------------------------------------------------------


EXAMPLES = [
    TextExample(text=" ".join(FILLER[:length]), label=i % 2, completion=" ".join(GOOD[: 1 + i % 3]))
    for i, length in enumerate((2, 11, 5, 8, 3, 9, 6))
]


def loss_of(module: nn.Module, head: tuple[Tensor, Tensor] | None, record: Record) -> Tensor:
    """Return one record's loss in a stock model, by its formula."""
    out = module(input_ids=torch.tensor([record["input_ids"]]))
    if head:
        logits = head[0] @ out.last_hidden_state[0].mean(0) + head[1]
        return logits.logsumexp(0) - logits[record["labels"][0]]
    logits = out.logits[0]
    tokens = [(logits[t - 1], token) for t, token in enumerate(record["labels"]) if token >= 0]
    return torch.stack([row.logsumexp(0) - row[token] for row, token in tokens]).mean()


def alone(model: FederatedModel, folder: str, family: str, records: list[Record]) -> list[dict[str, Tensor]]:
    """Return each record's gradient of every layer's W0, (out, in), off the stock model in float64, one by one."""
    module = load_base_model(folder, task_of(family)).module.double()
    stock = stock_weights(module, family)
    live = [weight.requires_grad_(True) for weight, _ in stock.values()]
    linear = model.module.head if family == "bert" else None
    head = (linear.weight.detach().double(), linear.bias.detach().double()) if linear else None
    found = []
    for record in records:
        gradients = torch.autograd.grad(loss_of(module, head, record), live)
        pairs = zip(stock.items(), gradients, strict=True)
        found.append({name: g.T if transposed else g for (name, (_, transposed)), g in pairs})
    return found


def check_gradient(got: AdapterState, wanted: dict[str, Tensor]) -> None:
    assert set(got) == set(wanted), "the gradient is not of exactly the adapted layers"
    for layer, factors in got.items():
        G = factors["G"]
        assert G.shape == wanted[layer].shape, f"{layer}: G has shape {tuple(G.shape)}, not (out, in)"
        error = float((G.double() - wanted[layer]).norm() / wanted[layer].norm())
        assert error < 1e-5, f"{layer}: G is off the loop over records by {error:.1e} of its length"


def in_parts(model: FederatedModel, records: list[Record]) -> list[dict[str, Tensor]]:
    # Of unequal sizes, where a mean of the parts' means would be another number.
    return [model.batch(records[:2]), model.batch(records[2:6]), model.batch(records[6:])]


@each_family
def test_the_mean_gradient_is_that_of_a_loop_over_records(model_folder: Folder, family: str) -> None:
    folder = model_folder(family)
    model = tiny(folder, family)
    records = model.prepare(EXAMPLES)
    single = alone(model, folder, family, records)
    wanted = {layer: sum((g[layer] for g in single), torch.tensor(0.0)) / len(records) for layer in single[0]}
    check_gradient(mean_gradient(model, in_parts(model, records)), wanted)


@each_family
def test_the_private_gradient_is_the_jointly_clipped_sum_over_the_public_divisor(
    model_folder: Folder, family: str
) -> None:
    folder = model_folder(family)
    model = tiny(folder, family)
    records = model.prepare(EXAMPLES)
    single = alone(model, folder, family, records)
    lengths = [math.sqrt(sum(float(g.square().sum()) for g in gradient.values())) for gradient in single]
    clip = sorted(lengths)[len(lengths) // 2]
    assert min(lengths) < clip < max(lengths), "the clip cuts all records or none"
    factors = [min(1.0, clip / length) / 5.0 for length in lengths]
    wanted = {
        layer: sum((f * g[layer] for f, g in zip(factors, single, strict=True)), torch.tensor(0.0))
        for layer in single[0]
    }
    check_gradient(private_gradient(model, in_parts(model, records), plan(clip, divisor=5.0)), wanted)


@each_family
def test_the_private_gradient_carries_the_plans_noise_also_without_a_record(model_folder: Folder, family: str) -> None:
    model = tiny(model_folder(family), family)
    sent = [private_gradient(model, [], plan(clip=0.5, noise=3.0, divisor=7.0)) for _ in range(4)]
    numbers = torch.cat([f["G"].flatten() for state in sent for f in state.values()]).double()
    # Of 3,072 normal numbers or more, the deviation's relative error is 1.3 % or less.
    assert numbers.numel() >= 3072
    ratio = float(numbers.square().mean().sqrt()) / (3.0 * 0.5 / 7.0)
    assert abs(ratio - 1) < 0.08, f"{family}: the release carries {ratio:.2f} times the noise that the ledger is told"


def test_a_gradient_leaves_the_model_as_it_was(model_folder: Folder) -> None:
    model = tiny(model_folder("gpt2"), "gpt2")
    records = model.prepare(EXAMPLES)
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in model.module.named_parameters()}
    for take in (mean_gradient, lambda m, parts: private_gradient(m, parts, plan())):
        take(model, in_parts(model, records))
        for name, p in model.module.named_parameters():
            value, wanted = before[name]
            assert torch.equal(p, value), f"{name} moved"
            assert p.requires_grad == wanted, f"{name}: whether it is trained changed"
            assert p.grad is None, f"{name} keeps a gradient of private records"
            assert getattr(p, "grad_sample", None) is None, f"{name} keeps records' gradients"


def test_a_gradient_that_says_nothing_is_refused(model_folder: Folder) -> None:
    model = tiny(model_folder("bert"), "bert")
    with pytest.raises(ModelError, match=r"raise start\.sample-rate"):
        mean_gradient(model, [])
    flat = tiny(model_folder("bert"), "bert", head="zeros")
    with pytest.raises(ModelError, match=r"set head\.start"):
        mean_gradient(flat, [flat.batch(flat.prepare(EXAMPLES))])


# --- the start from it ------------------------------------------------------------------------------------------------


def begun(origin: Start) -> tuple[ServerState, dict[str, Tensor]]:
    """Return the state that two sites of sizes 1 and 3 begin, and the mean gradient of each layer."""
    start = {
        layer: {"B": draw(m, RANK, seed=m), "R": draw(RANK, RANK, seed=m + 1), "A": draw(RANK, n, seed=m + 2)}
        for layer, (m, n) in SHAPES.items()
    }
    first, third = ({layer: draw(m, n, seed=m + k) for layer, (m, n) in SHAPES.items()} for k in (20, 30))
    sites = [
        Contribution(str(weight), weight, {layer: {"G": G} for layer, G in own.items()})
        for weight, own in ((1.0, first), (3.0, third))
    ]
    job = replace(configure({"strategy": "fed-sb", "adapter.rank": RANK}), origin=origin)
    state = job.begin({**start, HEAD: {"bias": torch.ones(2)}}, mean(sites))
    assert state.round_number == 0
    assert torch.equal(state.adapter[HEAD]["bias"], torch.ones(2)), "a start from a gradient touched the head"
    return state, {layer: 0.25 * first[layer] + 0.75 * third[layer] for layer in SHAPES}


@pytest.mark.parametrize("init", ["public-gradient", "nonprivate-gradient"])
def test_the_published_start_is_one_sign_step_down_the_sites_mean_gradient(init: str) -> None:
    state, means = begun(STARTS[init](step=0.02))
    for layer, G in means.items():
        D = 0.02 * torch.where(G > 0, -1.0, 1.0).double()
        left, right, values = leading(D)
        factors = state.adapter[layer]
        gap = float((ADAPTER.delta(factors) - left @ D @ right).abs().max())
        assert gap < 1e-12, f"{layer}: the start is off the sign step's best rank-{RANK} part by {gap:.1e}"
        assert (factors["R"] - torch.diag(values)).abs().max() < 1e-12, f"{layer}: R is not D's singular values"
        assert float((ADAPTER.delta(factors) * G).sum()) < 0, f"{layer}: the start goes up the gradient"


def test_a_noised_start_spans_the_sites_mean_gradient_and_moves_no_weight() -> None:
    state, means = begun(DPGradient())
    for layer, G in means.items():
        left, right, _ = leading(G)
        B, A = state.adapter[layer]["B"], state.adapter[layer]["A"]
        assert not state.adapter[layer]["R"].any(), f"{layer}: noise moves the weights before round 1"
        assert (B @ B.T - left).abs().max() < 1e-12, f"{layer}: B does not span the mean gradient's leading vectors"
        assert (A.T @ A - right).abs().max() < 1e-12, f"{layer}: A does not span the mean gradient's leading vectors"


@each_family
def test_the_published_start_lowers_the_loss_of_the_records_it_was_made_from(model_folder: Folder, family: str) -> None:
    model = tiny(model_folder(family), family)
    batch = model.batch(model.prepare(EXAMPLES))
    job = replace(configure({"strategy": "fed-sb", "adapter.rank": RANK}), origin=NonprivateGradient())
    state = job.begin(model.start, mean_gradient(model, [batch]))
    with torch.no_grad():
        before = float(model.losses(batch).mean())
        model.write(state.adapter)
        after = float(model.losses(batch).mean())
    assert after < before - 1e-5, f"{family}: from {before:.6f} the start goes to {after:.6f}"


# --- W0 ---------------------------------------------------------------------------------------------------------------


def round_task(job: Job, model: FederatedModel, state: ServerState, round_number: int) -> TrainTask:
    basis = job.basis(state) if round_number else {}
    return TrainTask(
        run="1",
        round_number=round_number,
        state=job.strategy.downlink(state) if round_number else {},
        basis=basis,
        basis_fingerprint=fingerprint(basis) if basis else "",
        base_fingerprint=model.base.fingerprint,
        start_fingerprint=start_fingerprint(model.start),
    )


@pytest.mark.parametrize(
    ("init", "mode"), [("svd-of-weights", "dp-sgd"), ("dp-gradient", "dp-sgd"), ("nonprivate-gradient", "none")]
)
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_s3_the_base_is_the_same_bit_for_bit_after_a_start_a_round_and_the_export(
    toy_settings: dict[str, Any],
    toy_generation: dict[str, Any],
    model_folder: Folder,
    tmp_path: Path,
    family: str,
    init: str,
    mode: str,
) -> None:
    folder = model_folder(family)
    own: dict[str, Any] = {
        "model.name": folder,
        "adapter.targets": TARGETS[family],
        "strategy": "fed-sb",
        "adapter.start": init,
    }
    budget: dict[str, Any] = {"privacy.mode": mode, "privacy.noise-multiplier": 1.0, "privacy.epsilon": 50.0}
    job = configure({**(toy_settings if family == "bert" else toy_generation), **own, **budget})
    model = tiny(folder, family, init)
    data = train_and_test(job.config.data, job.config.model.task)[0]
    site = Site("only", data, "only", 100, tmp_path / "ledger.sqlite")
    records = model.prepare(data.examples[:60])

    state = job.start(model.start)
    if job.origin.asked == "sites":
        sent = train_round(site, job, model, records, round_task(job, model, state, 0))
        state = job.begin(model.start, sent.contribution)
    sent = train_round(site, job, model, records, round_task(job, model, state, 1))
    after = job.strategy.server_update(state, [Contribution("only", 1.0, sent.contribution)]).adapter
    model.write(after)
    job.adapter.export(model.peft_model, after, tmp_path / "adapter", folder)

    for layer in (layer for layer in after if layer != HEAD):
        moved = float((after[layer]["R"] - state.adapter[layer]["R"]).abs().max())
        assert moved > 1e-4, f"{layer}: R hardly moved, so nothing is proved"
        for factor in ("A", "B"):
            assert torch.equal(after[layer][factor], state.adapter[layer][factor]), f"{layer}.{factor} moved in a round"
    live = {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): tensor
        for name, tensor in model.peft_model.state_dict().items()
        if "lora_" not in name
    }
    stock = load_base_model(folder, task_of(family)).module.state_dict()
    assert live.keys() == stock.keys()
    changed = [name for name, tensor in stock.items() if not torch.equal(live[name], tensor)]
    assert not changed, f"frozen tensors moved: {changed}"

"""FlyLoRA: a choice of directions at every position (Y1 to Y4), its sensitivity, its averages and its runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from adapter_models import FAMILIES, Folder, float64_model, furthest_from_alone
from digits import tiny_vit
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel

from audits.tiny_models import with_biases
from audits.tiny_site import clinic
from fedveil.common.adapters.attach import attach
from fedveil.common.adapters.base import parameters_of
from fedveil.common.errors import ConfigError
from fedveil.common.messages.state import AdapterState
from fedveil.common.run_lines import PrivacyLine, read_lines
from fedveil.common.starts import STARTS
from fedveil.contrib.adapters import lora_routed
from fedveil.contrib.adapters.lora_routed import LoRARouted, Routes
from fedveil.experiments.in_process import run_in_process
from fedveil.privacy.dpsgd import PrivateSteps
from fedveil.privacy.plan import gaussian_plan
from fedveil.server.checkpoint import saved_state
from fedveil.strategies import STRATEGIES, Contribution
from fedveil.strategies.job import configure

pytestmark = [pytest.mark.rough_prices, pytest.mark.one_length, pytest.mark.peft]

OUT, INTO, RANK, ACTIVE = 7, 11, 6, 2


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def slow(x: Tensor, A: Tensor, B: Tensor, active: int, bias: Tensor | None = None) -> Tensor:
    """Return B (M ∘ A x) of each position, one by one, for x of shape (positions, in); a bias turns the choice."""
    rows, turn = [], torch.zeros(len(A)) if bias is None else bias
    for position in x:
        y = A @ position
        kept = sorted(range(len(y)), key=lambda i: -abs(float(y[i])) - float(turn[i]))[:active]
        rows.append(sum((y[i] * B[:, i] for i in kept), torch.zeros(len(B), dtype=torch.float64)))
    return torch.stack(rows)


class Counting(Routes):
    """The fault: as published, a bias counts how often the batch takes each direction, and turns the next choice."""

    def __init__(self, active: int, rank: int) -> None:
        super().__init__(active)
        self.bias = torch.zeros(rank, dtype=torch.float64)

    def largest(self, projected: Tensor) -> Tensor:
        score = projected.detach().abs()
        taken = torch.zeros_like(score).scatter(-1, (score + self.bias).topk(self.active, dim=-1).indices, 1.0)
        self.bias = 5 * (self.active / score.shape[-1] - taken.flatten(0, -2).mean(0))
        kept = (score + self.bias).topk(self.active, dim=-1).indices
        return projected * torch.zeros_like(projected).scatter(-1, kept, 1.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_y1_the_gradient_of_each_record_is_that_of_one_alone(model_folder: Folder, family: str) -> None:
    gap = furthest_from_alone(float64_model(model_folder(family), "lora-routed", family)[1])
    assert gap < 1e-12, f"a record's gradient is {gap:.1e} off that of the record alone"


def samples_of(model: nn.Module, losses: Callable[[Tensor], Tensor], batch: Tensor) -> tuple[Tensor, ...]:
    trained = [p for p in model.parameters() if p.requires_grad]
    figures = gaussian_plan(1.0, 1.0, sample_rate=0.5, expected_batch_size=2.0, delta=1e-3, max_epsilon=9.0)
    with PrivateSteps(model, torch.optim.SGD(trained, 0.0), figures) as steps:
        return tuple(steps.samples(batch, losses))


def test_y1_so_is_that_of_a_vision_transformer_under_a_sparse_a() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        base = with_biases(tiny_vit("vit")).eval()
    adapter = LoRARouted(RANK, 6.0, ("q_proj", "v_proj"), STARTS["sparse"]())
    model = attach(adapter, base, 1)
    with torch.no_grad():
        for seed, factors in enumerate(parameters_of(adapter, model).values()):
            factors["B"].copy_(draw(*factors["B"].shape, seed=seed))
    side = model.config.image_size
    pixels = draw(4, 3, side, side, seed=5)

    def losses(batch: Tensor) -> Tensor:
        hidden = model(pixel_values=batch).last_hidden_state
        return cast(Tensor, (hidden * draw(*hidden.shape[1:], seed=6)).sum((1, 2)).sin())

    model.double().train()
    trained = [p for p in model.parameters() if p.requires_grad]
    alone = [torch.autograd.grad(losses(pixels[i : i + 1]).sum(), trained) for i in range(4)]
    found = samples_of(model, losses, pixels)
    model.eval()
    whole = [torch.autograd.grad(losses(pixels[i : i + 1]).sum(), trained) for i in range(4)]
    largest = max(float(g.abs().max()) for gradients in alone for g in gradients)
    for i, gradients in enumerate(alone):
        for sample, wanted in zip(found, gradients, strict=True):
            assert float((sample[i] - wanted).abs().max()) < 1e-12 * largest
    assert max(float((a - b).abs().max()) for a, b in zip(alone[0], whole[0], strict=True)) > 1e-3 * largest


def layer_behind(routes: Routes) -> tuple[nn.Sequential, Callable[[Tensor], Tensor]]:
    frozen, moving = nn.Linear(INTO, RANK, bias=False).double(), nn.Linear(RANK, OUT, bias=False).double()
    with torch.no_grad():
        frozen.weight.copy_(draw(RANK, INTO, seed=1))
        moving.weight.copy_(draw(OUT, RANK, seed=2))
    frozen.requires_grad_(False)
    layer = nn.Sequential(frozen, routes, moving)
    return layer, lambda x: layer(x).tanh().square().sum((1, 2))


def clipped_sum(routes: Routes, x: Tensor) -> Tensor:
    layer, losses = layer_behind(routes)
    (samples,) = samples_of(layer, losses, x)
    flat = samples.flatten(1)
    return (flat * (1.0 / flat.norm(dim=1, keepdim=True)).clamp(max=1.0)).sum(0)


def test_y4_a_record_more_moves_the_clipped_sum_by_one_clip_and_with_a_counted_bias_by_more() -> None:
    x = 3 * draw(24, 5, INTO, seed=3)
    odd = 50 * draw(1, 5, INTO, seed=4)
    with_it = torch.cat([x, odd])
    assert float((clipped_sum(Routes(ACTIVE), with_it) - clipped_sum(Routes(ACTIVE), x)).norm()) <= 1 + 1e-9
    faulty = [clipped_sum(Counting(ACTIVE, RANK), records) for records in (with_it, x)]
    assert float((faulty[0] - faulty[1]).norm()) > 1.2, "records that share a count are not found"


@pytest.mark.parametrize("active", [1, 2, 5, 6])
def test_y1_the_pass_is_the_slow_one_position_after_position(active: int) -> None:
    layer, _ = layer_behind(Routes(active))
    A, B = (layer[i].weight.detach() for i in (0, 2))
    x = draw(9, INTO, seed=5)
    assert float((layer(x).detach() - slow(x, A, B, active)).abs().max()) < 1e-12
    if active == RANK:
        assert float((layer(x).detach() - x @ A.T @ B.T).abs().max()) < 1e-12


def test_y2_the_mean_of_what_sites_compute_is_what_their_mean_computes() -> None:
    A, x, shares = draw(RANK, INTO, seed=1), draw(9, INTO, seed=5), (0.5, 0.3, 0.2)
    sites = [draw(OUT, RANK, seed=10 + k) for k in range(3)]
    strategy = STRATEGIES["flylora"]()
    state = strategy.start({"layer": {"A": A, "B": torch.zeros(OUT, RANK).double()}}, ("B",))
    parts = [Contribution(str(k), w, {"layer": {"B": B}}) for k, (w, B) in enumerate(zip(shares, sites, strict=True))]
    averaged = strategy.server_update(state, parts).adapter["layer"]["B"]
    wanted = sum(w * slow(x, A, B, ACTIVE) for w, B in zip(shares, sites, strict=True))
    assert float((slow(x, A, averaged, ACTIVE) - wanted).abs().max()) < 1e-12
    # So it is with one bias for all. Planted: each site's own, as the published one would be.
    biases = [draw(RANK, seed=20 + k) for k in range(3)]
    for held, exact in (([biases[0]] * 3, True), (biases, False)):
        sent = sum(w * slow(x, A, B, ACTIVE, d) for w, B, d in zip(shares, sites, held, strict=True))
        ours = slow(x, A, averaged, ACTIVE, sum(w * d for w, d in zip(shares, held, strict=True)))
        off = float((ours - sent).abs().max())
        assert (off < 1e-12) if exact else (off > 1e-2)


def changed(start: AdapterState, end: AdapterState) -> dict[str, float]:
    return {layer: float((end[layer]["B"] - start[layer]["B"]).norm()) for layer in end if "B" in start.get(layer, {})}


def test_y3_a_run_chooses_and_its_export_has_all_directions(toy_settings: dict[str, Any]) -> None:
    own = {"adapter.start": "sparse", "adapter.rank": 4, "adapter.targets": "query,intermediate.dense", "rounds": 2}
    settings = {**toy_settings, **own, "privacy.mode": "none"}
    routed = run_in_process({**settings, "strategy": "flylora"}, 2, "routed")
    plain = run_in_process({**settings, "strategy": "ffa-lora"}, 2, "plain")
    held, other = saved_state(routed).adapter, saved_state(plain).adapter
    assert max(changed(other, held).values()) > 1e-4, "nothing is chosen"
    stock = AutoModel.from_pretrained(Path(toy_settings["model.name"]))
    before = {name: tensor.clone() for name, tensor in stock.state_dict().items()}
    after = PeftModel.from_pretrained(stock, str(routed / "adapter")).merge_and_unload().state_dict()
    for layer, factors in held.items():
        if "A" in factors:
            change = after[f"{layer}.weight"] - before[f"{layer}.weight"]
            assert float((change - 6.0 / 4 * factors["B"] @ factors["A"]).abs().max()) < 1e-6


def test_it_runs_privately_and_pays_what_ffa_lora_pays(toy_settings: dict[str, Any]) -> None:
    own = {**toy_settings, "adapter.start": "sparse", "rounds": 2}
    folders = [run_in_process({**own, "strategy": name}, 2, name) for name in ("flylora", "ffa-lora")]
    paid = [[(line.round_number, line.site, line.spent) for line in read_lines(PrivacyLine, f)] for f in folders]
    assert paid[0] == paid[1] != []
    shapes = [{n: t.shape for n, t in load_file(f / "adapter/adapter_model.safetensors").items()} for f in folders]
    assert shapes[0] == shapes[1]


def test_its_rounds_are_rehearsed_with_their_choice_and_a_counted_bias_is_refused_unpaid(
    toy_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {**toy_settings, "adapter.start": "sparse", "adapter.rank": RANK, "rounds": 2, "strategy": "flylora"}
    monkeypatch.setattr(lora_routed, "Routes", lambda active: Counting(active, RANK))
    site = clinic(asked, tmp_path)
    assert re.search("depends on the records beside it", site.refuse().reason)
    assert not site.ledger.exists() or not site.charges()


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"adapter.rank": 1}, r"adapter\.rank is 1, of which 'lora-routed' chooses nothing"),
        ({"adapter.name": "lora"}, r"strategy 'flylora' works on an adapter that trains B"),
    ],
)
def test_it_is_refused_where_nothing_is_chosen(more: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        configure({"strategy": "flylora", **more})

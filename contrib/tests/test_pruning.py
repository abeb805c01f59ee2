"""Pruned base models: what is taken out, what an adapter on the small one is on the large one, what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from made_run import adapter_told
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from audits.tiny_models import VOCABULARY
from fedveil.client.local_training import check_task
from fedveil.common.adapters import LoRAFrozenA
from fedveil.common.adapters.attach import attach, read_factors
from fedveil.common.data.sources import public_test
from fedveil.common.derived import sources_in
from fedveil.common.errors import ConfigError, DataError, ModelError, ProtocolError
from fedveil.common.messages.round import TrainTask
from fedveil.common.model.base import load_base_model
from fedveil.common.model.scoring import score_records
from fedveil.common.starts import STARTS
from fedveil.contrib.experiments.pruning import prune
from fedveil.contrib.experiments.pruning.files import NAME, read_pruned
from fedveil.contrib.experiments.pruning.prune import prune_model
from fedveil.contrib.experiments.pruning.recover import recover_run, score_recovered
from fedveil.contrib.experiments.pruning.units import Kept, by_scores, by_text, pruned, recovered, units_of
from fedveil.contrib.rules import loraprune
from fedveil.contrib.rules.loraprune import COLUMNS, ROWS, importance, running
from fedveil.experiments.evaluate import load_result
from fedveil.experiments.in_process import run_in_process
from fedveil.reports.derived import sources_of
from fedveil.server.checkpoint import memory_of
from fedveil.strategies import Contribution, ServerState
from fedveil.strategies.ffa_lora import FFALoRA
from fedveil.strategies.job import configure

pytestmark = [pytest.mark.rough_prices, pytest.mark.peft]

EVERY = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
KEPT = Kept(groups=((0, 2), (1, 2)), neurons=((1, 2, 5, 7, 11), (0, 3, 4, 9, 13)))
"""Of two layers, which lose different units."""
OTHER = Kept(groups=((0, 1), (0, 2)), neurons=((0, 2, 5, 7, 10), (1, 3, 4, 8, 13)))
"""As many units, but not the same."""


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def large() -> nn.Module:
    """Return a random model with grouped queries (3 groups of 2), biases, and heads wider than hidden / heads."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=24,
            intermediate_size=14,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=3,
            head_dim=6,
            attention_bias=True,
            mlp_bias=True,
            bos_token_id=2,
            eos_token_id=3,
        )
        model = LlamaForCausalLM(config).double().eval().requires_grad_(False)
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


def zeroed(model: nn.Module, kept: Kept) -> nn.Module:
    """Return the large model whose pruned units say nothing: the slow, obvious reference."""
    units, state = units_of(model), {name: t.clone() for name, t in model.state_dict().items()}
    for name, tensor in state.items():
        rows, columns = kept.sides(name, units)
        mask = torch.ones_like(tensor)
        if rows is not None:
            mask[[i for i in range(len(tensor)) if i not in rows]] = 0
        if columns is not None and tensor.dim() == 2:
            mask[:, [i for i in range(tensor.shape[1]) if i not in columns]] = 0
        state[name] = tensor * mask
    other = LlamaForCausalLM(model.config).double().eval()
    other.load_state_dict(state)
    return other


TOKENS = torch.tensor([[2, 5, 9, 11, 14, 3], [2, 7, 6, 21, 3, 3]])


def with_changes(model: nn.Module, changes: dict[str, Tensor]) -> Tensor:
    """Return the logits of a model whose layers' weights are moved."""
    before = {layer: model.get_parameter(f"{layer}.weight").detach().clone() for layer in changes}
    with torch.no_grad():
        for layer, change in changes.items():
            model.get_parameter(f"{layer}.weight").add_(change)
        logits: Tensor = model(TOKENS).logits
        for layer, weight in before.items():
            model.get_parameter(f"{layer}.weight").copy_(weight)
    return logits


def pairs_of(small: nn.Module, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """Return a pair of factors for every projection."""
    found = {}
    for i, (name, module) in enumerate(small.named_modules()):
        if name.rpartition(".")[2] in EVERY:
            out, into = module.weight.shape  # type: ignore[union-attr,misc]
            found[name] = {"A": draw(2, into, seed=seed + i), "B": 0.3 * draw(out, 2, seed=seed + 50 + i)}
    return found


def onto(model: nn.Module, pairs: dict[str, dict[str, Tensor]], kept: Kept = KEPT) -> dict[str, dict[str, Tensor]]:
    units = units_of(model)
    return {
        layer: recovered(pair, tuple(model.get_parameter(f"{layer}.weight").shape), *kept.sides(layer, units))
        for layer, pair in pairs.items()
    }


def deltas(pairs: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {layer: pair["B"] @ pair["A"] for layer, pair in pairs.items()}


def small_of(model: nn.Module, kept: Kept = KEPT) -> nn.Module:
    return pruned(model, kept)


def test_invariant_p1_the_zeroed_large_model_with_the_recovered_adapter_is_the_pruned_one_with_its_own(
    large: nn.Module,
) -> None:
    """Gated layers and grouped heads, all seven projections, biases: to rounding, with and without an adapter."""
    small, reference = small_of(large), zeroed(large, KEPT)
    exact = {name: t.double() for name, t in large.state_dict().items()}
    assert all(torch.equal(t, t.float().double()) or t.dtype == torch.float64 for name, t in exact.items())
    pairs = pairs_of(small)
    assert len(pairs) == 14
    for changes in ({}, deltas(pairs)):
        there = with_changes(reference, deltas(onto(large, pairs)) if changes else {})
        here = with_changes(small, changes)
        assert (there - here).abs().max() < 1e-12 * here.abs().max()
    whole = with_changes(large, deltas(onto(large, pairs)))
    assert (whole - with_changes(small, deltas(pairs))).abs().max() > 1e-2, "nothing was pruned: nothing is proved"


def test_invariant_p1_the_recovered_delta_is_the_scattered_one_and_zero_elsewhere(large: nn.Module) -> None:
    units, pairs = units_of(large), pairs_of(small_of(large))
    for layer, pair in onto(large, pairs).items():
        rows, columns = KEPT.sides(layer, units)
        whole, small = pair["B"] @ pair["A"], pairs[layer]["B"] @ pairs[layer]["A"]
        out, into = whole.shape
        chosen = torch.zeros_like(whole)
        chosen[torch.tensor(rows or range(out))[:, None], torch.tensor(columns or range(into))[None]] = small
        assert (whole - chosen).abs().max() < 1e-12
        assert (rows is None) != (columns is None)


def test_invariant_p1_full_minus_pruned_of_a_gated_layer_is_what_the_pruned_neurons_say(large: nn.Module) -> None:
    mlp, small = large.model.layers[0].mlp, zeroed(large, KEPT).model.layers[0].mlp  # type: ignore[union-attr]
    x = draw(5, 24, seed=8)
    gone = [i for i in range(14) if i not in KEPT.neurons[0]]
    gate = mlp.gate_proj(x)[:, gone]  # type: ignore[operator]
    said = (torch.nn.functional.silu(gate) * mlp.up_proj(x)[:, gone]) @ mlp.down_proj.weight[:, gone].T  # type: ignore[operator,index]
    assert (mlp(x) - small(x) - said).abs().max() < 1e-12  # type: ignore[operator]


def test_invariant_p1_a_planted_group_size_of_one_is_found(large: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Indices of q and o are those of k and v times the group's size: taken alike, the model is another."""
    right = with_changes(zeroed(large, KEPT), {})
    real = Kept.sides

    def alike(self: Kept, layer: str, units: Any) -> Any:
        rows, columns = real(self, layer, units)
        if ".q_proj" in layer or ".o_proj" in layer:
            wrong = tuple(range(len(rows or columns or ())))
            return (wrong, None) if rows else (None, wrong)
        return rows, columns

    monkeypatch.setattr(Kept, "sides", alike)
    assert (with_changes(small_of(large), {}) - right).abs().max() > 1e-3


def test_invariant_p2_averaging_and_recovering_commute_and_different_masks_need_increments(large: nn.Module) -> None:
    weights = (0.5, 0.3, 0.2)
    small = small_of(large)
    A = {layer: pair["A"] for layer, pair in pairs_of(small).items()}
    sites = [
        {layer: {"A": A[layer], "B": pair["B"]} for layer, pair in pairs_of(small, 9 * k).items()} for k in range(3)
    ]
    mean = {
        layer: {"A": A[layer], "B": sum(w * site[layer]["B"] for w, site in zip(weights, sites, strict=True))}
        for layer in A
    }
    recovered_mean = deltas(onto(large, mean))  # type: ignore[arg-type]
    each = [deltas(onto(large, site)) for site in sites]
    for layer, delta in recovered_mean.items():
        assert (sum(w * e[layer] for w, e in zip(weights, each, strict=True)) - delta).abs().max() < 1e-12
    # Sites with different prunings, which no run has: averaged are increments, in the large model's coordinates, of a B
    # that stands away from 0 already.
    layer, units = "model.layers.0.mlp.up_proj", units_of(large)
    shape, A0, held = (14, 24), draw(2, 24, seed=4), draw(14, 2, seed=5)
    masks = [kept.sides(layer, units)[0] or () for kept in (KEPT, OTHER)]
    steps = [0.1 * draw(5, 2, seed=60 + k) for k in range(2)]
    state = ServerState(0, {layer: {"A": A0, "B": held}}, ("B",))

    def averaged(sent: list[Tensor]) -> Tensor:
        parts = [
            Contribution(str(k), w, {layer: {"B": B}}) for k, (w, B) in enumerate(zip((60, 40), sent, strict=True))
        ]
        return FFALoRA().server_update(state, parts).adapter[layer]["B"]

    def large_of(B: Tensor, mask: Sequence[int]) -> Tensor:
        return recovered({"A": A0, "B": B}, shape, tuple(mask), None)["B"]

    exact = held.clone()
    for share, mask, step in zip((0.6, 0.4), masks, steps, strict=True):
        for row, number in enumerate(mask):
            exact[number] += share * step[row]
    both = list(zip(masks, steps, strict=True))
    assert (averaged([held + large_of(step, mask) for mask, step in both]) - exact).abs().max() < 1e-12
    padded = averaged([large_of(held[list(mask)] + step, mask) for mask, step in both])
    assert (padded - exact).norm() > 0.3 * exact.norm(), "padded states would do: nothing is proved"


def test_invariant_p2_a_site_with_another_pruning_of_the_same_model_is_refused(
    toy_generation: dict[str, Any], model_folder: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are of the same shapes, so that what it sends would be taken for increments of the server's model."""
    source, folders = model_folder("llama"), [tmp_path / name for name in ("ours", "theirs")]
    ours = prune_model(source, folders[0], groups=1, neurons=16).kept
    theirs = Kept(ours.groups, tuple(tuple(i for i in range(24) if i not in kept[:8]) for kept in ours.neurons))
    monkeypatch.setattr(prune, "by_text", lambda *_: theirs)
    prune_model(source, folders[1], groups=1, neurons=16)
    jobs = [configure({**toy_generation, "model.name": str(folder)}) for folder in folders]
    models = [job.model((), ()) for job in jobs]
    down = jobs[0].strategy.downlink(jobs[0].start(models[0].start))
    start, (mark, other) = jobs[0].start_fingerprint(models[0].start), (model.base.fingerprint for model in models)
    task = TrainTask("1", 1, down, {}, "", mark, start)
    check_task(task, jobs[0], models[0])
    with pytest.raises(
        ProtocolError, match=rf"base model is {mark[:12]}, .* is {other[:12]}: install the same weights"
    ):
        check_task(task, jobs[1], models[1])
    # Planted: without the fingerprint nothing tells them apart.
    check_task(replace(task, base_fingerprint=other), jobs[1], models[1])


def test_invariant_p3_a_is_orthonormal_in_kept_coordinates_before_and_after_and_a_fill_is_another_function(
    large: nn.Module,
) -> None:
    small = small_of(large).float()
    adapter = LoRAFrozenA(2, 2.0, ("down_proj", "o_proj"), STARTS["orthonormal"]())
    state = read_factors(adapter, attach(adapter, small, 1))
    units = units_of(large)
    for layer, pair in state.items():
        shape = tuple(large.get_parameter(f"{layer}.weight").shape)
        whole = recovered(pair, shape, *KEPT.sides(layer, units))["A"]
        for A in (pair["A"], whole):
            assert (A @ A.T - torch.eye(2)).abs().max() < 1e-6
        exact = {"A": torch.linalg.qr(pair["A"].double().T)[0].T, "B": pair["B"].double()}
        for A in (exact["A"], recovered(exact, shape, *KEPT.sides(layer, units))["A"]):
            assert (A @ A.T - torch.eye(2)).abs().max() < 1e-12
        columns = KEPT.sides(layer, units)[1] or ()
        seeded = STARTS["orthonormal"]().factors(_place(layer, shape), ("A",))["A"][:, list(columns)]
        singular = torch.linalg.svdvals(seeded)
        assert float(singular.min()) < 0.95, "cut from a large A rows would be orthonormal: nothing is proved"
    # normA, planted: what it fills in adds an untrained change.
    layer = "model.layers.0.mlp.down_proj"
    pair = {"A": state[layer]["A"], "B": draw(24, 2, seed=3).float()}
    ours = recovered(pair, (24, 14), *KEPT.sides(layer, units))
    filled = torch.where(ours["A"] == 0, 0.5 * draw(2, 14, seed=4).float(), ours["A"])
    assert (ours["B"] @ (filled - ours["A"])).norm() > 0.3 * (ours["B"] @ ours["A"]).norm()


def _place(layer: str, shape: tuple[int, ...]) -> Any:
    from fedveil.common.adapters import Place

    return Place(layer, shape[0], shape[1], 2, 1, lambda: torch.zeros(shape))


TEXTS = (TOKENS[:1, :5], TOKENS[1:], torch.tensor([[2, 8]]))
"""Of unlike lengths: a score is of tokens, not of texts."""


def energies(model: nn.Module) -> dict[tuple[int, str], list[float]]:
    """Return what each unit adds to the stream, column by column and token by token: the slow, obvious reference."""
    found: dict[tuple[int, str], list[float]] = {}
    for number, layer in enumerate(model.model.layers):  # type: ignore[union-attr,arg-type]
        for kind, end, count in (("groups", layer.self_attn.o_proj, 3), ("neurons", layer.mlp.down_proj, 14)):
            seen: list[Tensor] = []
            hook = end.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0][0]))
            for tokens in TEXTS:
                model(tokens)
            hook.remove()
            each = end.weight.shape[1] // count
            totals = [0.0] * count
            for token in torch.cat(seen):
                for column, number_in in enumerate(token):
                    totals[column // each] += float((end.weight[:, column] * number_in).square().sum())
            found[number, kind] = totals
    return found


def test_units_are_chosen_by_what_they_add_on_a_text_and_layers_choose_apart(large: nn.Module) -> None:
    """In float64 against token by token; the longest weights are others, so that they decide nothing alone."""
    expected = energies(large)
    for groups, neurons in ((1, 5), (2, 9)):
        kept = by_text(large, TEXTS, groups, neurons)
        for number in range(2):
            for kind, count in (("groups", groups), ("neurons", neurons)):
                totals = expected[number, kind]
                best = sorted(sorted(range(len(totals)), key=lambda unit: -totals[unit])[:count])
                assert getattr(kept, kind)[number] == tuple(best)
        assert kept.neurons[0] != kept.neurons[1]
    lengths = large.model.layers[0].mlp.down_proj.weight.norm(dim=0)  # type: ignore[union-attr,index]
    assert tuple(lengths.topk(5).indices.sort().values.tolist()) != by_text(large, TEXTS, 1, 5).neurons[0]
    assert by_text(large, TEXTS, 3, 14) == Kept(groups=((0, 1, 2),) * 2, neurons=(tuple(range(14)),) * 2)
    same = pruned(large, by_text(large, TEXTS, 3, 14))
    assert (same(TOKENS).logits - large(TOKENS).logits).abs().max() < 1e-12
    assert not any(module._forward_pre_hooks for module in large.modules()), "a hook is left"
    for groups, neurons, named in ((0, 3, "--groups is 0"), (4, 3, "--groups is 4"), (1, 15, "--neurons is 15")):
        with pytest.raises(ConfigError, match=named):
            by_text(large, TEXTS, groups, neurons)
    with pytest.raises(ModelError, match="different numbers of units"):
        pruned(large, Kept(groups=((0, 1), (0,)), neurons=KEPT.neurons))


def test_a_run_on_a_pruned_model_is_recovered_onto_the_large_one_and_both_are_known_by_fingerprint(
    toy_generation: dict[str, Any], model_folder: Callable[[str], str], tmp_path: Path
) -> None:
    source, small = model_folder("llama"), tmp_path / "small"
    about = prune_model(source, small, groups=1, neurons=16)
    assert read_pruned(small) == about
    assert (about.large_fingerprint, about.small_fingerprint) == tuple(
        load_base_model(str(folder), "causal-lm").fingerprint for folder in (source, small)
    )
    own = {"model.name": str(small), "strategy": "ffa-lora", "adapter.targets": "q_proj,v_proj,o_proj,down_proj"}
    folder = run_in_process({**toy_generation, **own, "rounds": 1}, 2)
    target = tmp_path / "recovered"
    assert recover_run(folder, target) == source
    told = json.loads((target / "recovered.json").read_text())
    assert told["trained_on"] == about.small_fingerprint != told["recovered_onto"] == about.large_fingerprint
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source), str(target)).merge_and_unload()
    trained = load_file(str(folder / "adapter" / "adapter_model.safetensors"))
    before = AutoModelForCausalLM.from_pretrained(source).state_dict()
    units, moved = units_of(stock), 0
    for name, weight in stock.state_dict().items():
        layer = name.removesuffix(".weight")
        if f"base_model.model.{layer}.lora_A.weight" not in trained:
            assert torch.equal(weight, before[name])
            continue
        A, B = (trained[f"base_model.model.{layer}.lora_{letter}.weight"] for letter in "AB")
        scale = json.loads((target / "adapter_config.json").read_text())["lora_alpha"] / len(A)
        whole = recovered({"A": A, "B": B}, tuple(weight.shape), *about.kept.sides(layer, units))
        assert (weight - before[name] - scale * whole["B"] @ whole["A"]).abs().max() < 1e-6
        moved += 1
    assert moved == 8
    with pytest.raises(DataError, match="exists already"):
        recover_run(folder, target)
    with pytest.raises(DataError, match="exists already"):
        prune_model(source, small, 1, 16)
    # Scored on the large one: as it is, and moved by hand as PEFT has merged it above.
    alone, tuned = score_recovered(folder, target)
    for score, weights in ((alone, before), (tuned, stock.state_dict())):
        result = load_result(folder / "adapter")  # what the run was scored by, but of the large model
        base = load_base_model(source, "causal-lm")
        base.module.load_state_dict(weights)
        task, about_run = result.task, result.about
        by_hand = task.module(base.module, base, 0, about_run.feature_scale)
        examples = public_test(configure(about_run.settings).config.data, "causal-lm").examples
        records = task.prepare(base, examples, task.limit(base, about_run.max_length))
        expected = score_records(by_hand, task, base, records, torch.device("cpu"), torch.float32)
        assert score.loss == pytest.approx(expected.loss, abs=2e-5), "the large model is scored as another"
    assert abs(alone.loss - tuned.loss) > 1e-3, "the adapter moves nothing: nothing is proved"
    with pytest.raises(DataError, match="holds no recovered adapter: give the folder that `recover` made"):
        score_recovered(folder, folder)
    for key, named in (("trained_on", "name the run that it was recovered from"), ("recovered_onto", "other weights")):
        (target / "recovered.json").write_text(json.dumps({**told, key: "0" * 64}), encoding="utf-8")
        with pytest.raises(ModelError, match=named):
            score_recovered(folder, target)


def test_invariant_p5_another_small_or_large_model_than_the_runs_is_refused(
    model_folder: Callable[[str], str], tmp_path: Path
) -> None:
    """Sentences of FedVeil's own decide what is pruned, or what was sent: no option takes records or a text."""
    source, small = model_folder("llama"), tmp_path / "small"
    about = prune_model(source, small, groups=1, neurons=16)
    run = tmp_path / "run" / "adapter"
    run.mkdir(parents=True)
    (run / "adapter_config.json").write_text("{}", encoding="utf-8")
    from safetensors.torch import save_file

    def leave(fingerprint: str, name: str) -> None:
        (run / "fedveil.json").write_text(
            json.dumps(adapter_told(base_model=str(small), base_fingerprint=fingerprint)), encoding="utf-8"
        )
        save_file({name: torch.zeros(2, 16)}, str(run / "adapter_model.safetensors"))

    key = "base_model.model.model.layers.0.self_attn.q_proj"
    leave("0" * 64, f"{key}.lora_A.weight")
    with pytest.raises(ModelError, match="the run trained on a model of fingerprint 000000000000"):
        recover_run(run.parent, tmp_path / "out")
    leave(about.small_fingerprint, f"{key}.lora_magnitude_vector")
    with pytest.raises(ModelError, match="no factor of a plain LoRA"):
        recover_run(run.parent, tmp_path / "out")
    told = json.loads((small / NAME).read_text())
    (small / NAME).write_text(json.dumps({**told, "large_fingerprint": "1" * 64}), encoding="utf-8")
    with pytest.raises(ModelError, match="was made of 111111111111"):
        recover_run(run.parent, tmp_path / "out")
    (small / NAME).write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match=r"no pruned\.json that can be read"):
        recover_run(run.parent, tmp_path / "out")
    with pytest.raises(ConfigError, match="nothing is taken out: name with --groups or --neurons"):
        prune_model(source, tmp_path / "same", 0, 0)
    with pytest.raises(ModelError, match="cannot be pruned to a stock model"):
        prune_model(model_folder("gpt2"), tmp_path / "gpt2", 1, 1)
    assert not (tmp_path / "gpt2").exists()


# --- LoRAPrune --------------------------------------------------------------------------------------------------------


def criterion(W: Tensor, A: Tensor, B: Tensor, a: Tensor, b: Tensor, s: float) -> Tensor:
    """Return the squares of the criterion, number by number, off the identity behind it."""
    return ((s * (B @ A - (B - b) @ (A - a))) * (W + s * B @ A)).square()


PARTS = (("A", -2, "B"), ("B", -1, "A"))
"""Each factor, what its lengths are over, and whose noise it multiplies."""


@pytest.mark.parametrize("trained", [("B",), ("A", "B")])
def test_invariant_p4_the_criterion_from_changes_is_that_from_gradients(trained: tuple[str, ...]) -> None:
    W, A, B, s, eta = draw(9, 13, seed=1), draw(2, 13, seed=2), draw(9, 2, seed=3), 1.7, 0.3
    held = {"A": A, "B": B}
    gradients = {"A": draw(2, 13, seed=4), "B": draw(9, 2, seed=5)}
    sent = {name: held[name] - eta * gradients[name] for name in trained}
    step = {name: (held[name] - sent[name]) / eta for name in trained}
    a, b = (step.get(n, torch.zeros_like(held[n])) for n in ("A", "B"))
    whole = criterion(W, A, B, a, b, s)
    found = importance(W, held, step, s, 0.0)
    assert (found[ROWS] - whole.sum(1) / whole.norm()).abs().max() < 1e-12
    assert (found[COLUMNS] - whole.sum(0) / whole.norm()).abs().max() < 1e-12
    assert (running(found, found)[ROWS] - found[ROWS]).abs().max() < 1e-12


@pytest.mark.parametrize("trained", [("B",), ("A",), ("A", "B")])
def test_invariant_p4_what_noise_adds_to_the_criterion_is_taken_off_without_bias(trained: tuple[str, ...]) -> None:
    """Of gradients as long as the factors and of noise alone, over 8,000 draws, beside the criterion without noise."""
    W, s, tau, draws, both = draw(9, 13, seed=1), 1.7, 0.4, 8000, len(trained) == 2
    held = {"A": draw(2, 13, seed=2), "B": draw(9, 2, seed=3)}
    scale = (W + s * held["B"] @ held["A"]).square() * s**2 * tau**2
    for length in (1.0, 0.0):
        gradients = {"A": length * draw(2, 13, seed=4), "B": length * draw(9, 2, seed=5)}
        clean = {n: gradients[n] if n in trained else 0 * gradients[n] for n in held}
        wanted = criterion(W, *held.values(), *clean.values(), s).sum(1)
        generator = torch.Generator().manual_seed(6)
        noise = {n: tau * torch.randn(draws, *held[n].shape, generator=generator).double() for n in held}
        noised = {n: clean[n] + (noise[n] if n in trained else 0 * noise[n]) for n in held}
        raw = criterion(W, *held.values(), *noised.values(), s)
        spread = sum((held[n] - noised[n]).square().sum(d, keepdim=True) for n, d, of in PARTS if of in trained)
        net = raw - scale * (spread - 2 * tau**2 * both)
        for number in range(20):
            found = importance(W, held, {n: noised[n][number] for n in trained}, s, tau**2)
            assert float((found[ROWS] - net[number].sum(1) / net[number].norm()).abs().max()) < 1e-12
        error = net.sum(2).std(0) / math.sqrt(draws)
        assert float(((net.sum(2).mean(0) - wanted) / error).abs().max()) < 4.5
        assert float(((raw.sum(2).mean(0) - wanted) / error).abs().max()) > 20, "noise that is left goes unnoticed"
        lengths = sum(held[n].square().sum(d, keepdim=True) for n, d, of in PARTS if of in trained)
        left = raw.sum(2).mean(0) - (scale * (lengths + 2 * tau**2 * both)).sum(1) - wanted
        assert (float((left / error).abs().max()) > 10) == (both and length > 0), "the factors' lengths say enough"


@pytest.mark.parametrize(("strategy", "trained"), [("ffa-lora", ("B",)), ("fedavg-lora", ("A", "B"))])
def test_invariant_p4_a_servers_scores_are_of_gradients_less_their_noise_and_a_tenth_is_new(
    strategy: str, trained: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    peak, noise = 0.3, 0.02
    plain: dict[str, Any] = {"training.local-steps": 1, "training.optimizer": "sgd", "training.learning-rate": peak}
    plain |= {"schedule": "linear", "server.optimizer": "none"}  # the second round of two has half the rate
    own = {"strategy": strategy, "adapter.rank": 4, "adapter.alpha": 6.8, "server.rule": "loraprune", "rounds": 2}
    job = configure({**plain, "recipe": "plain", **own})
    W, A, B, s = draw(9, 13, seed=1), draw(2, 13, seed=2), draw(9, 2, seed=3), 6.8 / 4
    monkeypatch.setattr(loraprune, "layers_of", lambda _: {"layer": None})
    monkeypatch.setattr(loraprune, "base_weight", lambda _: W)
    model: Any = SimpleNamespace(peft_model=None, adapter=job.adapter)
    state, expected = ServerState(0, {"layer": {"A": A, "B": B}}, trained), dict[str, Tensor]()
    for round_number, rate in ((1, peak), (2, peak / 2)):
        variance = (noise / rate) ** 2
        gradients = {"A": draw(2, 13, seed=10 * round_number), "B": draw(9, 2, seed=10 * round_number + 1)}
        left = {n: t - gradients[n] if n in trained else t for n, t in (("A", A), ("B", B))}
        spread = sum(left[n].square().sum(d, keepdim=True) for n, d, of in PARTS if of in trained)
        bias = (W + s * B @ A).square() * s**2 * variance * (spread - (2 * variance if "A" in trained else 0))
        sent = {n: t - rate * gradients[n] if n in trained else t for n, t in (("A", A), ("B", B))}
        averaged = replace(state, adapter={"layer": sent})
        memory = job.rule.remember(state, averaged, model, job.config, lambda: noise)
        state = replace(state, round_number=round_number, memory=memory)
        a = gradients["A"] if "A" in trained else torch.zeros_like(A)
        net = criterion(W, A, B, a, gradients["B"], s) - bias
        now = {ROWS: net.sum(1) / net.norm(), COLUMNS: net.sum(0) / net.norm()}
        expected = {n: 0.9 * expected[n] + 0.1 * t if expected else t for n, t in now.items()}
        for name, tensor in expected.items():
            assert (state.memory["layer"][name] - tensor).abs().max() < 1e-12, f"round {round_number}: {name}"


def test_invariant_p4_a_run_keeps_its_scores_and_prune_chooses_by_them(
    toy_generation: dict[str, Any], model_folder: Callable[[str], str], tmp_path: Path
) -> None:
    plain = {"training.local-steps": 1, "training.optimizer": "sgd", "strategy": "ffa-lora", "rounds": 2}
    own = {**plain, "server.rule": "loraprune", "adapter.targets": "v_proj,down_proj"}
    folder = run_in_process({**toy_generation, **own}, 2)
    memory, _ = memory_of(folder)
    units = units_of(load_base_model(model_folder("llama"), "causal-lm").module)
    assert {tuple(held[COLUMNS].shape) for layer, held in memory.items() if "down" in layer} == {(units.neurons,)}
    about = prune_model(model_folder("llama"), tmp_path / "small", 1, 16, by=folder)
    named = sources_in(load_base_model(str(tmp_path / "small"), "causal-lm").module.config.to_dict())
    assert [source.run for source in named] == [source.run for source in sources_of(folder)]
    for number, kept in enumerate(about.kept.neurons):
        scores = next(held[COLUMNS] for layer, held in memory.items() if f"layers.{number}.mlp.down" in layer)
        assert set(kept) == set(scores.argsort(descending=True, stable=True)[:16].tolist())
    module = load_base_model(model_folder("llama"), "causal-lm").module
    with pytest.raises(ConfigError, match="no score of the neurons of layer 0"):
        by_scores(module, {k: f for k, f in memory.items() if "down" not in k}, 1, 16)
    with pytest.raises(ModelError, match="name its run"):
        prune_model(str(tmp_path / "small"), tmp_path / "smaller", 1, 8, by=folder)


PRUNES: dict[str, Any] = {"training.local-steps": 1, "training.optimizer": "sgd", "server.rule": "loraprune"}


def test_scores_of_gradients_without_noise_are_refused() -> None:
    plain = {**PRUNES, "strategy": "ffa-lora"}
    assert configure(plain).rule == loraprune.LoRAPrune()
    with pytest.raises(ConfigError, match="a base model that is pruned by them tells"):
        configure({**plain, "privacy.mode": "none"})


def test_scores_are_refused_where_a_change_is_no_gradient_of_a_and_b() -> None:
    with pytest.raises(ConfigError, match="because a score is made of gradients"):
        configure({**PRUNES, "strategy": "ffa-lora", "training.local-steps": 2})
    for strategy in ("fed-sb", "rolora", "increlora", "dylora", "fedex-lora"):
        with pytest.raises(ConfigError, match="scores by changes of all of A or B"):
            configure({**PRUNES, "strategy": strategy})

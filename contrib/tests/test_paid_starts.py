"""EVA and LoRA-GA from records: what a site releases, what it costs, and what its noise leaves of a direction."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from paid_worlds import RANK, TEXTS, Make, _clip_each, draw, each_family, noiseless, plan_of, records_of
from safetensors.torch import load_file
from torch import Tensor

from fedveil.client import budget
from fedveil.client.ledger.ledger import Ledger
from fedveil.client.ledger.rows import Terms
from fedveil.client.rehearsal import rehearse_initial
from fedveil.client.site import Site
from fedveil.common.adapters.layers import layers_of
from fedveil.common.errors import ConfigError, ModelError
from fedveil.common.messages.state import AdapterState
from fedveil.common.messages.tensors import weighted_sum
from fedveil.common.model.federated import FederatedModel
from fedveil.common.run_lines import PrivacyLine, RoundLine, read_lines
from fedveil.common.starts import STARTS, PaidStart
from fedveil.common.starts.calibration import calibrated
from fedveil.common.starts.directions import leading_rows, orthonormal_rows
from fedveil.common.starts.gradient import mean_gradient
from fedveil.common.starts.paid import SampledStart
from fedveil.contrib.nulls import without_lift
from fedveil.contrib.starts.dp_eva import DPEVA
from fedveil.contrib.starts.dp_lora_ga import DPLoRAGA, sketching
from fedveil.contrib.starts.eva import EVA, input_moments
from fedveil.contrib.starts.inputs import mean_moments, open_moments, packed, shared_inputs, unpacked
from fedveil.contrib.starts.nonprivate_eva import NonprivateEVA
from fedveil.experiments.in_process import run_in_process
from fedveil.privacy import dpsgd
from fedveil.privacy.dpsgd import PrivateSteps
from fedveil.privacy.privacy_filter import promised
from fedveil.server.model import ServerModel
from fedveil.strategies.job import configure

pytestmark = [pytest.mark.rough_prices, pytest.mark.peft]


def moments(model: FederatedModel, texts: list[str] = TEXTS) -> dict[str, Tensor]:
    """Return the mean of the records' moments, all in one padded batch."""
    return {name: held["M"] for name, held in mean_moments(model, [model.batch(records_of(model, texts))]).items()}


# --- EVA: the statistic -----------------------------------------------------------------------------------------------
@each_family
def test_invariant_25_a_records_moment_is_the_mean_of_unit_tokens_whatever_is_beside_it(
    tiny: Make, family: str
) -> None:
    model = tiny(family, DPEVA())
    records = records_of(model)
    alone: list[dict[str, Tensor]] = []
    inputs: dict[str, Tensor] = {}
    layers = layers_of(model.peft_model)
    firsts = sorted(set(shared_inputs(model).values()))
    hooks = [
        layers[name].register_forward_hook(lambda _, given, __, name=name: inputs.__setitem__(name, given[0].detach()))  # type: ignore[attr-defined]
        for name in firsts
    ]
    for record in records:
        with torch.no_grad():
            model.losses(model.batch([record]))
        unit = {name: (x[0] / x[0].norm(dim=1, keepdim=True)).double() for name, x in inputs.items()}
        alone.append({name: x.T @ x / len(x) for name, x in unit.items()})
        for name, x in unit.items():
            gram = x @ x.T
            assert float(alone[-1][name].trace()) == pytest.approx(1, abs=1e-6)
            assert float(packed(alone[-1][name]).norm()) == pytest.approx(float(gram.norm()) / len(x), rel=1e-9)
    for hook in hooks:
        hook.remove()
    with open_moments(model) as maps:
        model.module.train()
        steps = PrivateSteps(model.module, torch.optim.SGD(maps.values(), lr=0.0), plan_of(DPEVA()))
        order = {id(parameter): name for name, parameter in maps.items()}
        seen: dict[tuple[int, str], Tensor] = {}
        for chosen in ([0, 1, 2], [3, 2], [4], [2, 4]):
            with steps:
                samples = steps.samples(model.fixed_batch([records[i] for i in chosen], 24, 4), model.losses)
            for parameter, sample in zip(steps.trained, samples, strict=True):
                for row, i in enumerate(chosen):
                    wanted = alone[i][order[id(parameter)]]
                    assert (sample[row].double() - wanted).abs().max() < 1e-6, "float32's own rounding is less"
                    before = seen.setdefault((i, order[id(parameter)]), sample[row].clone())
                    assert torch.equal(sample[row], before), "a record's moment depends on others"
    assert not hasattr(model.module, "moments")
    assert model.statistic is None


def test_invariant_25_the_packed_moment_is_isometric_and_comes_back() -> None:
    S, other = (draw(6, 6, seed=seed) + draw(6, 6, seed=seed).T for seed in (1, 2))
    assert float(packed(S) @ packed(other)) == pytest.approx(float((S * other).sum()), abs=1e-12)
    assert (unpacked(packed(S)) - S).abs().max() < 1e-12
    assert float(packed(draw(6, 6)).norm()) <= float(draw(6, 6).norm()), "the other half has no place in it"


def test_invariant_25_removing_a_record_moves_the_sum_by_the_clip_over_all_inputs_together(
    tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("bert", DPEVA())
    records, start = records_of(model), DPEVA(sample_rate=1.0)
    noiseless(monkeypatch)

    def moved(clip: float) -> float:
        whole, rest = (start.privatise(model, kept, plan_of(start, clip)) for kept in (records, records[1:]))
        change = [whole[name]["M"].double() - rest[name]["M"].double() for name in whole]
        return float(torch.cat(change).norm())

    assert moved(0.5) == pytest.approx(0.5, abs=1e-5), "every record is longer than that, so the clip is attained"
    unclipped = moved(100.0)
    assert unclipped <= math.sqrt(len(set(shared_inputs(model).values()))) + 1e-6
    assert moved(0.9 * unclipped) == pytest.approx(0.9 * unclipped, abs=1e-5)
    # Planted: a clip that each input has for itself is the promise broken.
    monkeypatch.setattr(dpsgd.ClipAndNoise, "clip_and_accumulate", _clip_each)
    assert moved(0.5) > 0.5 + 0.1, "the check has no teeth"


def test_invariant_23_the_sites_mean_is_that_of_all_records_in_any_order(tiny: Make) -> None:
    model = tiny("bert", DPEVA())
    whole, turned = moments(model), moments(model, TEXTS[::-1])
    parts = [moments(model, TEXTS[:2]), moments(model, TEXTS[2:])]
    pooled = weighted_sum([2 / 5, 3 / 5], [{"all": part} for part in parts])["all"]
    swapped = weighted_sum([3 / 5, 2 / 5], [{"all": part} for part in reversed(parts)])["all"]
    sites = [{name: leading_rows(M.double(), RANK) for name, M in part.items()} for part in parts]
    for name, M in whole.items():
        assert (pooled[name] - M).abs().max() < 1e-6
        assert (turned[name] - M).abs().max() < 1e-6
        assert (swapped[name] - pooled[name]).abs().max() < 1e-12, "the order of sites counts"
        mean = (sites[0][name] + sites[1][name]) / 2
        assert (mean - leading_rows(M.double(), RANK)).abs().max() > 1e-3, "averaging A would do: nothing is proved"


@each_family
def test_the_open_mean_of_moments_is_of_each_records_own_tokens_and_not_of_its_padding(tiny: Make, family: str) -> None:
    model = tiny(family, NonprivateEVA())
    whole, alone = moments(model), [moments(model, [text]) for text in TEXTS]
    for name, M in whole.items():
        assert all(float(one[name].trace()) == pytest.approx(1, abs=1e-6) for one in alone)
        assert (torch.stack([one[name] for one in alone]).mean(0) - M).abs().max() < 1e-6


@each_family
def test_invariant_29_layers_that_share_an_input_share_a(tiny: Make, family: str) -> None:
    model = tiny(family, NonprivateEVA())
    shared = shared_inputs(model)
    assert set(shared) == set(layers_of(model.peft_model))
    assert (len(set(shared.values())) < len(shared)) == (family != "gpt2")
    statistic = {name: {"M": packed(M)} for name, M in moments(model).items()}
    config = configure({"adapter.start": "nonprivate-eva", "privacy.mode": "none"}).config
    whole = NonprivateEVA().complete(model, config, None, statistic)  # type: ignore[arg-type]
    made = {layer: NonprivateEVA().from_statistic(held, RANK)["A"] for layer, held in whole.items()}
    for layer, first in shared.items():
        assert torch.equal(made[layer], made[first])
    assert {name: f["M"].shape for name, f in statistic.items()} == {
        name: f["M"] for name, f in NonprivateEVA().layout(model).items()
    }
    # Public EVA weighs tokens by their length and these do not: the directions are near, and the same layers share.
    public = input_moments(model, records_of(model))
    assert set(public) == set(whole)


# --- EVA: the noise ---------------------------------------------------------------------------------------------------
def test_invariant_26_noise_is_symmetric_of_half_the_variance_beside_the_diagonal_and_reaches_its_edge() -> None:
    n, tau = 240, 0.3
    noise = unpacked(packed(tau * draw(n, n, seed=5)))
    assert torch.equal(noise, noise.T)
    above = noise[tuple(torch.triu_indices(n, n, offset=1))]
    assert float(above.var()) == pytest.approx(tau**2 / 2, rel=0.03)
    assert float(noise.diagonal().var()) == pytest.approx(tau**2, rel=0.35)
    assert float(torch.linalg.eigvalsh(noise)[-1]) == pytest.approx(tau * math.sqrt(2 * n), rel=0.04)
    # A spike above τ √(n / 2) is found by the formula's share, and one below is not.
    for times, wanted in ((3.0, 1 - 1 / 9), (0.5, 0.0)):
        spike = times * tau * math.sqrt(n / 2)
        u = torch.nn.functional.normalize(draw(n, seed=6), dim=0)
        top = leading_rows(spike * torch.outer(u, u) + noise, 1)[0]
        assert float(top @ u) ** 2 == pytest.approx(wanted, abs=0.06)


@pytest.mark.parametrize(("size", "noise"), [(240, 0.3), (16, 4e-4), (384, 2.0)])
def test_invariant_28_an_eigenvalue_above_the_edge_is_what_it_was_before_noise_lifted_it(
    size: int, noise: float
) -> None:
    least, edge = noise * math.sqrt(size / 2), noise * math.sqrt(2 * size)
    # Near ``least`` the map is flat: what rounding does to h is all the more in λ.
    values = least * torch.tensor([1.001, 1.01, 1.3, 2.0, 7.0, 1e3], dtype=torch.float64)
    lifted = values + size * noise**2 / (2 * values)
    assert bool((lifted > edge).all())
    found = without_lift(lifted, size, noise)
    assert float((found / values - 1).abs().max()) < 1e-12
    below = edge * torch.tensor([1 - 1e-12, 0.5, 0.0, -0.5, -3.0], dtype=torch.float64)
    assert not without_lift(below, size, noise).any(), "what is below the edge, or negative, is something"
    assert torch.equal(without_lift(lifted, size, 0.0), lifted)
    # Planted: another edge, and the eigenvalues as they are.
    for wrong in (without_lift(lifted, 2 * size, noise), without_lift(lifted, size, noise / 2), lifted):
        assert float((wrong / values - 1).abs().max()) > 1e-2


def test_invariant_28_of_noised_moments_spikes_are_told_by_their_size_and_noise_alone_by_next_to_nothing() -> None:
    n, tau = 240, 0.3
    basis = torch.linalg.qr(draw(n, 3, seed=6))[0]
    spikes = torch.tensor([4.0, 3.0, 2.0], dtype=torch.float64) * tau * math.sqrt(n / 2)
    raw, told, beside = [], [], 0
    for seed in range(24):
        noise = unpacked(packed(tau * draw(n, n, seed=50 + seed)))
        values = torch.linalg.eigvalsh(basis @ torch.diag(spikes) @ basis.T + noise).flip(0)
        found = without_lift(values, n, tau)
        raw.append(values[:3])
        told.append(found[:3])
        assert not found[4:].any(), "more than the largest of noise is taken for a direction"
        beside += int(found[3] > 0)
    # The edge is the limit of large n: Tracy and Widom's law has a sixth above it.
    assert beside <= 24 * (1 / 6 + 4 * math.sqrt(5 / 36 / 24))
    assert float((torch.stack(told).mean(0) / spikes - 1).abs().max()) < 0.04
    assert float((torch.stack(raw).mean(0) / spikes - 1).abs().max()) > 0.15, "noise lifts nothing: nothing is proved"


def test_invariant_28_a_run_says_how_many_directions_stand_out_of_its_noise(
    toy_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"strategy": "ffa-lora", "adapter.start": "dp-eva", "rounds": 1, "start.sample-rate": 1.0}
    own |= {"start.noise-multiplier": 3.0, "privacy.epsilon": 100.0, "privacy.noise-multiplier": 2.0}
    means: list[AdapterState] = []
    real = DPEVA.found

    def found(self: DPEVA, statistic: AdapterState, rank: int, noise: float) -> str:
        means.append(statistic)
        # Two sites of 100 declared records each, with as much noise: σ C / (q n √2).
        assert noise == pytest.approx(3.0 / (100 * math.sqrt(2)), rel=1e-9)
        return real(self, statistic, rank, noise)

    monkeypatch.setattr(DPEVA, "found", found)
    folder = run_in_process({**toy_settings, **own}, 2)
    said = next(line for line in (folder / "run.log").read_text(encoding="utf-8").splitlines() if "edge" in line)
    counts = [int(words.split()[0]) for words in said.partition(": ")[2].split("; ")]
    wanted = []
    for _, held in sorted(means[0].items()):
        values = torch.linalg.eigvalsh(unpacked(held["M"]))
        edge = 3.0 / (100 * math.sqrt(2)) * math.sqrt(2 * len(values))
        wanted.append(min(3, int((values > edge).sum())))
    assert counts[:6] == wanted[:6]
    assert max(wanted), "nothing stands out: nothing is proved"


def test_passes_are_as_small_as_a_records_moments_ask_for(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedveil.common.starts import gradient

    numbers = 2 * (3 * 16 * 16 + 24 * 24)  # of the maps: two layers with three inputs of 16 and one of 24
    monkeypatch.setattr(gradient, "BATCH_BYTES", 10 * 4 * numbers)
    model = tiny("bert", DPEVA())
    with open_moments(model):
        assert model.initial_shapes is not None
        assert model.initial_shapes.most == 10
    assert gradient.initial_shapes(tiny("bert", DPLoRAGA())).most != 10, "gradients are as large: nothing is proved"


def test_the_release_has_the_plans_noise_and_divisor_also_of_no_record(tiny: Make) -> None:
    model, start = tiny("bert", DPEVA()), DPEVA(noise_multiplier=2.0)
    for records in ([], records_of(model)):
        sent = start.privatise(model, records, plan_of(start, clip=1e-3, divisor=4.0))
        numbers = torch.cat([held["M"] for held in sent.values()])
        assert float(numbers.std()) == pytest.approx(2.0 * 1e-3 / 4.0, rel=0.1)


def test_the_rehearsal_passes_the_moments_and_the_sketches_and_finds_what_mixes_records(
    tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedveil.contrib.starts import inputs

    for start in (DPEVA(), DPLoRAGA()):
        model = tiny("bert", start)
        before = {name: p.clone() for name, p in model.module.named_parameters()}
        rehearse_initial(model, start)
        after = dict(model.module.named_parameters())
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    real = inputs.token_weights
    model = tiny("bert", DPEVA())
    monkeypatch.setattr(inputs, "token_weights", lambda batch, tokens: real(batch, tokens).mean(0, keepdim=True))
    with pytest.raises(ModelError, match="depends on the records beside it"):
        rehearse_initial(model, DPEVA())


# --- runs -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("start", "strategy"), [("dp-eva", "ffa-lora"), ("dp-lora-ga", "ffa-lora")])
def test_invariant_27_a_private_run_pays_one_initialisation_and_sends_a_once(
    start: str, strategy: str, toy_settings: dict[str, Any]
) -> None:
    own = {"strategy": strategy, "adapter.start": start, "adapter.alpha": 0.0, "rounds": 2, "privacy.epsilon": 20.0}
    folder = run_in_process({**toy_settings, **own}, 2)
    with Ledger(folder / "ledgers" / "site-0.sqlite") as ledger:
        entries = ledger.entries()
    assert [entry.purpose for entry in entries] == ["initialisation", "training", "training"]
    release = configure({**toy_settings, **own}).origin.release()
    assert release is not None
    assert (entries[0].event, entries[0].count) == (release.event, 1), "another release is charged than the start's own"
    told = [line for line in read_lines(PrivacyLine, folder) if line.spent]
    assert all(line.spent.epsilon_total <= 20.0 for line in told if line.spent)
    lines = read_lines(RoundLine, folder)
    assert [line.round_number for line in lines] == [0, 1, 2]
    assert len(lines[0].participants) == 2
    assert lines[1].bytes_down > lines[2].bytes_down
    exported = load_file(str(folder / "adapter" / "adapter_model.safetensors"))
    rows = [t for name, t in exported.items() if "lora_A" in name]
    for A in rows:
        gram = A.double() @ A.double().T
        assert (gram / gram[0, 0] - torch.eye(len(A))).abs().max() < 1e-5, "A is not orthonormal up to one length"


PAID: dict[str, dict[str, Any]] = {
    "dp-eva": {"strategy": "ffa-lora"},
    "dp-lora-ga": {"strategy": "ffa-lora"},
    "dp-gradient": {"strategy": "fed-sb"},
    "class-means": {"strategy": "fedavg-lora", "adapter.name": "none", "head.metric": "public"},
    "library": {"strategy": "ffa-lora", "start.library": "library", "start.adapters": "letters=1,notes=2"},
    "text-votes": {"strategy": "ffa-lora", "start.text": "imdb"},
    "probe": {"strategy": "fedavg-lora", "adapter.name": "lora-metric", "start.steps": 4},
}
"""Of each, a run that begins with it."""


@pytest.mark.parametrize("start", [name for name, kind in STARTS.items() if issubclass(kind, PaidStart)])
def test_k3_what_a_paid_choice_costs_is_in_the_runs_plan(
    start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dear = {"start.noise-multiplier": 2.0, "privacy.delta": 1e-3, "rounds": 3}
    own = {"start.sample-rate": 0.5} if issubclass(STARTS[start], SampledStart) else {}
    job = configure({**PAID[start], **dear, **own, "adapter.start": start})
    site = Site("only", cast(Any, None), "only", 500, tmp_path / "ledger.sqlite")
    terms, release = Terms(job.config.privacy.epsilon, 1e-3), job.origin.release()
    assert release is not None

    def whole() -> float:
        steps = budget.plan_of(job, site, terms).release(job.config.total_steps)
        return promised([release, steps], 1e-3)[0]

    assert 0.9 * terms.epsilon < whole() <= terms.epsilon
    # Planted: a choice that the plan does not know of.
    monkeypatch.setattr(PaidStart, "release", lambda self, least_noise=0.0: None)
    monkeypatch.setattr(type(job.origin), "release", lambda self, least_noise=0.0: None)
    assert whole() > terms.epsilon


def test_invariant_27_raw_moments_are_refused_in_a_private_run_and_had_in_an_open_one(
    toy_settings: dict[str, Any],
) -> None:
    with pytest.raises(ConfigError, match=r"raw moments of private records.*use 'eva', from public text"):
        configure({"adapter.start": "nonprivate-eva"})
    with pytest.raises(ConfigError, match=r"alone pays for: use 'eva', from public text"):
        configure({"adapter.start": "dp-eva", "privacy.mode": "none"})
    with pytest.raises(ConfigError, match=r"a release of its own.*nobody sees more"):
        configure({"adapter.start": "dp-eva", "privacy.mode": "secure-sum", "privacy.honest-sites": 2})
    with pytest.raises(ConfigError, match=r"'lora-ga' needs start\.data"):
        configure({"adapter.start": "lora-ga"})
    own = {"strategy": "ffa-lora", "adapter.start": "nonprivate-eva", "privacy.mode": "none", "rounds": 1}
    folder = run_in_process({**toy_settings, **own}, 2)
    assert [line.round_number for line in read_lines(RoundLine, folder)] == [0, 1]


# --- calibration ------------------------------------------------------------------------------------------------------
def test_invariant_43_after_calibration_the_median_gradient_is_that_of_random_rows_for_every_start(tiny: Make) -> None:
    model = tiny("bert", STARTS["orthonormal"]())
    records = records_of(model)
    layers = layers_of(model.peft_model)
    single = [mean_gradient(model, [model.batch([record])]) for record in records]
    squares = [sum(RANK / f["G"].shape[1] * float(f["G"].double().square().sum()) for f in G.values()) for G in single]
    wanted = float(torch.tensor(squares).sqrt().median())
    whole = mean_gradient(model, [model.batch(records)])
    statistics: dict[str, AdapterState] = {
        "eva": input_moments(model, records),
        **dict.fromkeys(("dp-eva", "nonprivate-eva"), _spread(model)),
        **dict.fromkeys(("public-gradient", "nonprivate-gradient", "dp-gradient", "lora-ga"), whole),
        "dp-lora-ga": {name: {"S": sketching(name, f["G"].shape[0], RANK).T @ f["G"]} for name, f in whole.items()},
    }
    seen = 0
    for name, kind in STARTS.items():
        if not {"A"} <= {*kind.gives}:
            continue
        held = tiny("bert", kind()).start
        state = {
            layer: {
                **held[layer],
                **({"A": kind().from_statistic(statistics[name][layer], RANK)["A"]} if name in statistics else {}),
            }
            for layer in layers
        }
        made = calibrated(model, {**model.start, **state}, records)
        found = [
            sum(float((f["G"].double() @ made[layer]["A"].double().T).square().sum()) for layer, f in G.items())
            for G in single
        ]
        assert float(torch.tensor(found).sqrt().median()) == pytest.approx(wanted, rel=0.01), name
        seen += 1
    assert seen == sum("A" in kind.gives for kind in STARTS.values())


def test_alpha_of_a_language_model_is_calibrated_on_fedveils_own_phrases_as_completions(
    toy_generation: dict[str, Any],
) -> None:
    own = {"strategy": "ffa-lora", "adapter.start": "kaiming", "adapter.alpha": 0.0}
    server = ServerModel(configure({**toy_generation, **own}))
    twice = {k: {n: 2 * t if n == "A" else t for n, t in f.items()} for k, f in server.start.items()}
    made, again = server.calibrated(server.start), server.calibrated(twice)
    for layer, factors in made.items():
        assert torch.allclose(factors["A"], again[layer]["A"], rtol=1e-5)
        assert not torch.allclose(factors["A"], server.start[layer]["A"], rtol=1e-2)


def _spread(model: FederatedModel) -> AdapterState:
    found = moments(model)
    return {layer: {"M": packed(found[first])} for layer, first in shared_inputs(model).items()}


def test_public_and_paid_eva_agree_where_tokens_have_one_length() -> None:
    X = torch.nn.functional.normalize(draw(50, 11, seed=4), dim=1)
    M = X.T @ X / len(X)
    paid = DPEVA().from_statistic({"M": packed(M)}, RANK)["A"]
    public = EVA().from_statistic({"M": M, "m": X.mean(0)}, RANK)["A"]
    assert torch.allclose(paid, public, atol=1e-6)
    assert not torch.allclose(paid, orthonormal_rows(RANK, 11, torch.Generator().manual_seed(1)), atol=0.1)

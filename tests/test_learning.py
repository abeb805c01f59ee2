"""Statistics of a round whose null is known: invariants T4 to T6, by simulation, in float64 and through whole runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made_run import MadeRun
from torch import Tensor

import common.nulls
from common.accountant import INITIALISATION, TRAINING, Accountant
from common.messages.round import Spending, TrainResult
from common.messages.state import HEAD, AdapterState
from common.nulls import Energy, cross_site_energy, energy_of_sum, least_score, noise_edge
from common.privacy import dpsgd
from common.privacy.plan import PrivacyPlan
from common.privacy.record_level import DPSGD
from common.run_lines import LayerLine, RoundLine, read_lines
from common.strict_json import to_json
from experiments.in_process import run_in_process
from reports import markdown_report, report_of, write_reports
from reports.learning import learning_sentence
from server.aggregation import contributions
from server.learning import layer_lines, statistic_noise, step_noise, with_noises
from server.noise import averaged_noise, exact_noise
from server.terms import paid_plan
from strategies import Contribution, ServerState, Strategy
from strategies.ffa_lora import FFALoRA
from strategies.job import Job, configure

SHARES = (0.4, 0.3, 0.2, 0.1)
NOISES = (2.0, 1.0, 0.5, 0.7)
SHAPE = (96, 8)
FULL = (384, 8)
"""Of B in a layer of the default job."""
DRAWS = 600


def noised(signal: Tensor, draw: torch.Generator, noises: Sequence[float] = NOISES) -> list[Tensor]:
    """Return each site's change of a layer: the same signal, and noise of its own."""
    return [signal + noise * torch.randn(signal.shape, generator=draw, dtype=torch.float64) for noise in noises]


def scores(
    signal: Tensor, draws: int = DRAWS, more: float = 1.0, energy: Callable[..., Energy | None] = cross_site_energy
) -> Tensor:
    """Return cross-site scores of so many draws, where every site adds ``more`` times the noise that it states."""
    draw, found = torch.Generator().manual_seed(1), []
    for _ in range(draws):
        told = energy(SHARES, [x.flatten() for x in noised(signal, draw, [more * n for n in NOISES])], NOISES)
        assert told is not None
        found.append(told.score)
    return torch.tensor(found)


def sum_scores(signal: Tensor, draws: int = DRAWS, more: float = 1.0) -> Tensor:
    draw = torch.Generator().manual_seed(2)
    tau = math.hypot(*(p * n for p, n in zip(SHARES, NOISES, strict=True)))
    found = []
    for _ in range(draws):
        parts = noised(signal, draw, [more * n for n in NOISES])
        found.append(energy_of_sum(sum((p * x for p, x in zip(SHARES, parts, strict=True)), torch.zeros(())), tau))
    return torch.tensor(found)


def test_t4_under_noise_alone_every_statistic_has_the_mean_the_deviation_and_the_false_keeps_it_says() -> None:
    for found in (scores(torch.zeros(SHAPE)), sum_scores(torch.zeros(SHAPE))):
        assert abs(float(found.mean())) < 4 / math.sqrt(DRAWS)
        assert abs(float(found.std()) - 1) < 4 / math.sqrt(2 * DRAWS)
    draw, level = torch.Generator().manual_seed(3), 0.05
    for shape in (SHAPE, SHAPE[::-1], (7, 1), (5, 4)):
        noise = torch.randn((2000, *shape), generator=draw, dtype=torch.float64)
        kept = float((torch.linalg.svdvals(noise)[:, 0] > noise_edge(*shape, level)).double().mean())
        assert abs(kept - level) < 4 * math.sqrt(level / 2000), f"{shape}: {kept:.3f} of noise is kept"


def with_own(shares: Sequence[float], changes: Sequence[Tensor], noises: Sequence[float]) -> Energy:
    """Return the energy with each site's own in it: a planted fault."""
    told = cross_site_energy(shares, changes, noises)
    assert told is not None
    own = sum((p * float(x.norm())) ** 2 for p, x in zip(shares, changes, strict=True))
    return replace(told, value=told.value + own)


def test_t4_a_score_with_a_sites_own_energy_in_it_or_of_equal_shares_is_found_out() -> None:
    def as_equals(shares: Sequence[float], changes: Sequence[Tensor], noises: Sequence[float]) -> Energy:
        told, wrong = (cross_site_energy(p, changes, noises) for p in (shares, [1 / len(shares)] * len(shares)))
        assert told is not None
        assert wrong is not None
        return replace(told, deviation=wrong.deviation)

    assert float(scores(torch.zeros(SHAPE), 100, energy=with_own).mean()) > 3
    assert abs(float(scores(torch.zeros(SHAPE), energy=as_equals).std()) - 1) > 0.2


def test_the_energy_is_the_sum_over_pairs_and_the_agreement_of_equal_changes_is_one() -> None:
    draw = torch.Generator().manual_seed(4)
    changes = [x.flatten() for x in noised(torch.ones(SHAPE, dtype=torch.float64), draw)]
    told = cross_site_energy(SHARES, changes)
    pairs = [(j, k) for j in range(4) for k in range(4) if j != k]
    slow = sum(SHARES[j] * SHARES[k] * float(changes[j] @ changes[k]) for j, k in pairs)
    most = sum(SHARES[j] * SHARES[k] * float(changes[j].norm() * changes[k].norm()) for j, k in pairs)
    assert told is not None
    assert (told.score, told.deviation) == (None, None)
    assert told.value == pytest.approx(slow, rel=1e-12)
    assert told.agreement == pytest.approx(slow / most, rel=1e-12)
    same = cross_site_energy(SHARES, [changes[0]] * 4)
    assert same is not None
    assert same.agreement == pytest.approx(1, rel=1e-12)
    nothing = cross_site_energy(SHARES, [0 * change for change in changes])
    assert nothing is not None
    assert nothing.agreement == 0
    assert cross_site_energy([1.0], changes[:1]) is None


def test_t5_noise_that_is_larger_than_stated_moves_the_sum_form_and_not_the_cross_site_one() -> None:
    """By 1 %: the margin that sites add where rounding is not known to be exact, which they do not state."""
    nothing, within = torch.zeros(FULL), 4 / math.sqrt(DRAWS)
    wanted = (1.01**2 - 1) * math.sqrt(nothing.numel() / 2)
    assert wanted == pytest.approx(0.79, abs=0.005)
    assert abs(float(scores(nothing, more=1.01).mean())) < within
    assert float(sum_scores(nothing, more=1.01).mean()) == pytest.approx(wanted, abs=within)
    # Planted: with a site's own energy in it, the cross-site score is moved by its noise as well.
    stated, larger = (float(scores(nothing, 100, more, with_own).mean()) for more in (1.0, 1.01))
    assert larger - stated > 0.3


def test_t5_sampling_of_records_moves_the_sum_form_and_not_the_cross_site_one() -> None:
    """Sites draw half of 20 records of mean 0 each, and what a draw makes of them has 3 % of the noise's energy."""
    draw, count, numbers = torch.Generator().manual_seed(9), 20, FULL[0] * FULL[1]
    records = []
    for noise in NOISES:
        own = torch.randn(count, numbers, generator=draw, dtype=torch.float64)
        own -= own.mean(0)
        # A number of the sum over a draw has variance Σ x² / 4.
        records.append(own * noise * math.sqrt(0.03 * 4 * numbers) / float(own.norm()))
    tau = math.hypot(*(p * n for p, n in zip(SHARES, NOISES, strict=True)))
    across, planted, of_sum = [], [], []
    for _ in range(DRAWS):
        noise = [x.flatten() for x in noised(torch.zeros(FULL), draw)]
        drawn = [(torch.rand(count, generator=draw) < 0.5).double() @ own for own in records]
        sent = [x + y for x, y in zip(noise, drawn, strict=True)]
        energies = [energy(SHARES, sent, NOISES) for energy in (cross_site_energy, with_own)]
        across.append(energies[0].score if energies[0] else None)
        planted.append(energies[1].score if energies[1] else None)
        of_sum.append(energy_of_sum(sum((p * x for p, x in zip(SHARES, sent, strict=True)), torch.zeros(())), tau))
    wanted, within = 0.03 * math.sqrt(numbers / 2), 4 / math.sqrt(DRAWS)
    assert wanted == pytest.approx(1.18, abs=0.005)
    assert abs(float(torch.tensor(across).mean())) < within
    assert float(torch.tensor(of_sum).mean()) == pytest.approx(wanted, abs=within)
    without = float(scores(torch.zeros(FULL), 100, energy=with_own).mean())
    assert float(torch.tensor(planted).mean()) - without > 0.3, "a site's own energy would go unnoticed"


def test_a_common_signal_is_found_at_the_strength_that_the_formula_says() -> None:
    pairs = sum((SHARES[j] * NOISES[j] * SHARES[k] * NOISES[k]) ** 2 for j in range(4) for k in range(4) if j != k)
    weight = sum(SHARES[j] * SHARES[k] for j in range(4) for k in range(4) if j != k)
    signal = torch.full(SHAPE, 0.1, dtype=torch.float64)
    wanted = weight * float(signal.square().sum()) / math.sqrt(2 * signal.numel() * pairs)
    found = scores(signal)
    assert float(found.mean()) == pytest.approx(wanted, abs=0.3)
    assert least_score(12) == pytest.approx(2.638, abs=1e-3)


def test_the_edge_of_a_wide_matrix_is_the_limit_and_near_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = noise_edge(100, 100, 0.05)
    monkeypatch.setattr(common.nulls, "WIDE", 50)
    assert noise_edge(100, 100, 0.05) == pytest.approx(drawn, rel=2e-3)


# --- of a round's answers ---------------------------------------------------------------------------------------------

SIZES, TOLD = (100, 300, 50), (2.0, 2.0, 5.0)
OUT = {"query": 5, "dense": 9}
RATE, HEAD_RATE, SAMPLED = 0.7, 3.0, 0.5


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def job_of(**more: Any) -> Job:
    own: dict[str, Any] = {
        "rounds": 4,
        "strategy": "ffa-lora",
        "training.optimizer": "sgd",
        "training.learning-rate": RATE,
        "training.local-steps": 1,
        "training.sample-rate": SAMPLED,
        "server.optimizer": "none",
        "privacy.noise-multiplier": 2.0,
        "privacy.epsilon": 500.0,
        "head-rate": HEAD_RATE,
    }
    return configure({**own, **more})


def state_of(trained: tuple[str, ...] = ("B",)) -> ServerState:
    adapter: AdapterState = {x: {"A": drawn(1, 3, 7), "B": drawn(2, out, 3)} for x, out in OUT.items()}
    return ServerState(0, {**adapter, HEAD: {"weight": drawn(3, 2, 4), "bias": drawn(4, 2)}}, trained)


def answers(job: Job, changes: Sequence[AdapterState], state: ServerState, number: int = 1) -> list[TrainResult]:
    """Return what sites of unlike sizes and noises answer that changed what they train by so much."""
    found = []
    for k, (size, noise, change) in enumerate(zip(SIZES, TOLD, changes, strict=True)):
        result = TrainResult("1", number, f"site-{k}", size, change, None)
        event = paid_plan(job, result).event
        event = event.having(noise_multiplier=event.noise_multiplier * noise / TOLD[0])
        kind = TRAINING if number else INITIALISATION
        spent = Spending(kind, event, 1, 4, 1e-5, 0.5, 1.5, 500.0, 498.5, Accountant("pld", "0.6.0"))
        sent = {x: {n: t + (state.adapter[x][n] if number else 0) for n, t in f.items()} for x, f in change.items()}
        found.append(replace(result, contribution=sent, spending=spent))
    return found


def weighed(shares: Sequence[float], parts: Sequence[Tensor]) -> Tensor:
    return torch.stack([share * part for share, part in zip(shares, parts, strict=True)]).sum(0)


def spent_of(result: TrainResult) -> Spending:
    assert result.spending is not None
    return result.spending


def alike(seed: int, lengths: Sequence[float] = (1.0, 0.5, 2.0)) -> list[AdapterState]:
    """Return three sites' changes in one direction of rank one in each tensor, none of them as long as the next."""
    tensors = {x: {"B": torch.outer(drawn(seed, out), drawn(seed + 1, 3))} for x, out in OUT.items()}
    tensors[HEAD] = {"weight": torch.outer(drawn(seed, 2), drawn(seed + 1, 4)), "bias": drawn(seed + 2, 2)}
    return [{x: {n: length * t for n, t in f.items()} for x, f in tensors.items()} for length in lengths]


def told_by_pairs(changes: Sequence[Tensor], shares: Sequence[float], noises: Sequence[float]) -> float:
    """Return a score by the sum over pairs of sites, one after the other."""
    pairs = [(j, k) for j in range(len(changes)) for k in range(len(changes)) if j != k]
    value = math.fsum(shares[j] * shares[k] * float(changes[j] @ changes[k]) for j, k in pairs)
    variance = math.fsum((shares[j] * shares[k] * noises[j] * noises[k]) ** 2 for j, k in pairs)
    return value / math.sqrt(2 * len(changes[0]) * variance)


def test_a_rounds_lines_are_by_the_shares_noises_and_rates_of_its_sites_and_the_edge_is_of_all_its_matrices() -> None:
    job, state = job_of(), state_of()
    # By sizes over variances the second site would have 0.74 of the average, and has half.
    shares = [0.5 * 100 / 108, 0.5, 0.5 * 8 / 108]
    noises = [RATE * noise / (SAMPLED * size) for size, noise in zip(SIZES, TOLD, strict=True)]
    mean = math.hypot(*(p * t for p, t in zip(shares, noises, strict=True)))
    changes, matrices = alike(5), 4
    for x, out in OUT.items():
        # One layer's singular value is just below the edge of four matrices and above that of one, the other's above.
        average = weighed(shares, [change[x]["B"] for change in changes])
        wanted = mean * noise_edge(out, 3, common.nulls.LEVEL / matrices) * (0.97 if x == "query" else 1.03)
        times = wanted / float(torch.linalg.matrix_norm(average, 2))
        changes = [{**change, x: {"B": times * change[x]["B"]}} for change in changes]
    results = answers(job, changes, state)
    averaged = with_noises(job, contributions(job, results, state), results)
    assert all(one.state is result.contribution for one, result in zip(averaged, results, strict=True))
    assert averaged_noise(job, results, averaged) == pytest.approx(mean, rel=1e-12)
    lines = {line.layer: line for line in layer_lines(job, state, averaged, results, summed=False)}
    assert list(lines) == ["dense", HEAD, "query"]
    assert (lines["query"].above, lines["dense"].above) == (0, 1)
    assert lines["query"].change > mean * noise_edge(5, 3, common.nulls.LEVEL), "the level of one matrix says the same"
    for x, line in lines.items():
        flat = [torch.cat([change[x][n].flatten() for n in sorted(change[x])]) for change in changes]
        own = [noise * (HEAD_RATE if x == HEAD else 1.0) for noise in noises]
        assert line.score == pytest.approx(told_by_pairs(flat, shares, own), rel=1e-9)
        assert line.change == pytest.approx(float(weighed(shares, flat).norm()), rel=1e-9)


def test_a_change_that_is_shortened_has_its_noise_shortened_with_it() -> None:
    job, state = job_of(), state_of()
    noises = [RATE * noise / (SAMPLED * size) for size, noise in zip(SIZES, TOLD, strict=True)]
    results = answers(job, alike(5, (0.01, 0.01, 3.0)), state)
    averaged = with_noises(job, contributions(job, results, state), results)
    sent = results[2].contribution["dense"]["B"] - state.adapter["dense"]["B"]
    kept = averaged[2].state["dense"]["B"] - state.adapter["dense"]["B"]
    factor = float(kept.norm() / sent.norm())
    assert factor < 0.9, "nothing is shortened"
    assert [one.noise for one in averaged] == pytest.approx([noises[0], noises[1], factor * noises[2]], rel=1e-9)
    shares = [one.weight / math.fsum(one.weight for one in averaged) for one in averaged]
    wanted = math.hypot(shares[0] * noises[0], shares[1] * noises[1], shares[2] * factor * noises[2])
    assert averaged_noise(job, results, averaged) == pytest.approx(wanted, rel=1e-9)


def test_the_noise_of_a_paid_starts_mean_is_that_of_its_sites_shares_and_of_what_was_shortened() -> None:
    paid = {"strategy": "fed-sb", "adapter.start": "dp-gradient", "start.noise-multiplier": 4.0}
    job, state = job_of(**paid, **{"start.sample-rate": 0.25}), state_of(("R",))
    own = [4.0 * noise / TOLD[0] / (0.25 * size) for size, noise in zip(SIZES, TOLD, strict=True)]
    for lengths in ((0.1, 0.1, 0.1), (0.1, 0.1, 90.0)):
        changes = [{x: {"G": length * drawn(7, out, 7)} for x, out in OUT.items()} for length in lengths]
        results = answers(job, changes, state, 0)
        averaged = contributions(job, results, state)
        parts = [float(a.state["dense"]["G"].norm()) / length for a, length in zip(averaged, lengths, strict=True)]
        shares, factor = [0.5 * 100 / 108, 0.5, 0.5 * 8 / 108], parts[2] / parts[0]
        assert (factor < 0.9) == (lengths[2] > 1)
        wanted = math.hypot(shares[0] * own[0], shares[1] * own[1], shares[2] * factor * own[2])
        assert statistic_noise(job, results, averaged) == pytest.approx(wanted, rel=1e-9)


def test_of_a_sum_the_line_is_of_what_moves_in_the_round_by_the_noise_of_all_sites_together() -> None:
    summed = {"privacy.mode": "secure-sum", "privacy.honest-sites": 2, "privacy.colluders": 1}
    job, state = job_of(strategy="rolora", **summed), state_of(("A", "B"))
    paid = answers(job, alike(5), state)
    results = [replace(one, spending=replace(spent_of(one), event=paid_plan(job, one).event)) for one in paid]
    change = {x: {"B": drawn(8, out, 3)} for x, out in OUT.items()}
    moved = {x: {"A": state.adapter[x]["A"], "B": state.adapter[x]["B"] + change[x]["B"]} for x in OUT}
    averaged = [Contribution("all", 1.0, moved)]
    noise = RATE * 2.0 / math.sqrt(2) * math.sqrt(3) / (SAMPLED * sum(SIZES))
    for line in layer_lines(job, state, averaged, results, summed=True):
        numbers = 3 * OUT[line.layer]
        wanted = (float(change[line.layer]["B"].square().sum()) / noise**2 - numbers) / math.sqrt(2 * numbers)
        assert line.numbers == numbers, "a factor that rests counts as noise"
        assert line.score == pytest.approx(wanted, rel=1e-9)


def test_of_sites_of_unlike_ranks_the_lines_are_of_the_columns_that_all_of_them_train() -> None:
    job, state = job_of(strategy="heterogeneous-ranks"), state_of()
    results = []
    for result, rank in zip(answers(job, alike(5, (0.01, 0.02, 0.03)), state), (2, 3, 1), strict=True):
        own = {x: {"B": result.contribution[x]["B"][:, :rank]} for x in OUT}
        results.append(replace(result, contribution={**own, HEAD: result.contribution[HEAD]}, rank=rank))
    averaged = with_noises(job, contributions(job, results, state), results)
    lines = {line.layer: line for line in layer_lines(job, state, averaged, results, summed=False)}
    assert lines.keys() == {*OUT, HEAD}
    shares = [one.weight / math.fsum(one.weight for one in averaged) for one in averaged]
    for x, out in OUT.items():
        first = [one.state[x]["B"][:, 0] - state.adapter[x]["B"][:, 0] for one in averaged]
        noises = [one.noise or 0.0 for one in averaged]
        assert lines[x].numbers == out
        assert lines[x].score == pytest.approx(told_by_pairs(first, shares, noises), rel=1e-9)


def test_a_trusted_servers_noise_is_alike_in_head_and_layers_whatever_the_heads_rate() -> None:
    central = {"privacy.mode": "client-level", "privacy.unit": "site", "privacy.cohort": 20, "privacy.delta": 1e-3}
    job, state = job_of(**central), state_of()
    (change,) = alike(5, (1.0,))
    moved = {x: {n: state.adapter[x][n] + t for n, t in factors.items()} for x, factors in change.items()}
    for line in layer_lines(job, state, [Contribution("all", 1.0, moved, noise=0.3)], [], summed=True):
        flat = torch.cat([t.flatten() for t in change[line.layer].values()])
        wanted = (float(flat.square().sum()) / 0.3**2 - len(flat)) / math.sqrt(2 * len(flat))
        assert line.score == pytest.approx(wanted, rel=1e-9)


def test_a_trusted_servers_noise_is_what_it_drew_and_without_privacy_there_is_none() -> None:
    central = {"privacy.mode": "client-level", "privacy.unit": "site", "privacy.cohort": 20, "privacy.delta": 1e-3}
    job, drawn, unknown = job_of(**central), Contribution("all", 1.0, {}, noise=0.3), Contribution("all", 1.0, {})
    for usual in (False, True):
        assert averaged_noise(job, [], [drawn], usual=usual) == 0.3
        assert averaged_noise(job, [], [unknown], usual=usual) == 0.0
    assert (exact_noise(job, [], [drawn]), exact_noise(job, [], [unknown])) == (0.3, None)
    results = answers(job_of(), alike(5), state_of())
    free = job_of(**{"privacy.mode": "none"})
    averaged = [Contribution(one.site, 1.0, one.contribution) for one in results]
    for usual in (False, True):
        assert averaged_noise(free, results, averaged, usual=usual) == 0.0
    assert exact_noise(free, results, averaged) == 0.0


class NoisedWhole(PrivacyPlan):
    """Noises what leaves a site, and not its steps."""

    def outgoing(self, contribution: AdapterState, received: AdapterState) -> AdapterState:
        return super().outgoing(contribution, received)


def test_of_a_site_that_noises_what_leaves_it_no_steps_noise_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DPSGD, "plans", NoisedWhole)
    job, state = job_of(), state_of()
    results = answers(job, alike(5), state)
    assert [step_noise(job, result) for result in results] == [None] * 3
    assert exact_noise(job, results, contributions(job, results, state)) is None


def test_what_sites_add_beyond_the_runs_noise_counts_by_what_they_are_known_by_or_not_at_all() -> None:
    """The second states as much as the run, so nobody is counted at more; a shortened change has less of its own."""
    job, state = job_of(), state_of()
    results = answers(job, alike(5, (0.01, 0.01, 0.01)), state)
    parts = with_noises(job, contributions(job, results, state), results)
    halved = [replace(one, noise=0.5 * (one.noise or 0.0)) for one in parts]
    assert averaged_noise(job, results, halved) == pytest.approx(0.5 * averaged_noise(job, results, parts), rel=1e-12)
    shares = [one.weight / math.fsum(one.weight for one in parts) for one in parts]
    wanted = math.hypot(*(p * RATE * 2.0 / (SAMPLED * size) for p, size in zip(shares, SIZES, strict=True)))
    for known in (parts, halved):
        assert averaged_noise(job, results, known, usual=True) == pytest.approx(wanted, rel=1e-12)


def test_layers_have_no_line_in_a_round_in_which_they_rest() -> None:
    job, state = job_of(**{"training.refit": 1}), replace(state_of(), round_number=3)
    results = answers(job, alike(5), state, 4)
    averaged = with_noises(job, contributions(job, results, state), results)
    assert [line.layer for line in layer_lines(job, state, averaged, results, summed=False)] == [HEAD]
    earlier = replace(state, round_number=2)
    assert len(layer_lines(job, earlier, averaged, results, summed=False)) == 3


class Halved(FFALoRA):
    """Sends half of what it trained."""

    name = "halved"

    def uplink(self, trained: AdapterState) -> AdapterState:
        return {x: {n: t / 2 for n, t in factors.items()} for x, factors in trained.items()}


class Centred(FFALoRA):
    """Steps by gradients less their mean."""

    name = "centred"

    def correct(self, gradients: AdapterState, weights: AdapterState, received: AdapterState) -> AdapterState:
        return {x: {n: t - t.mean() for n, t in factors.items()} for x, factors in gradients.items()}


@pytest.mark.parametrize(
    ("more", "strategy"),
    [
        ({"training.local-steps": 2}, None),
        ({"training.optimizer": "adam"}, None),
        ({"training.weight-decay": 0.1}, None),
        ({}, Halved()),
        ({}, Centred()),
    ],
    ids=["steps", "optimizer", "decay", "uplink", "correct"],
)
def test_the_noise_of_a_change_is_known_of_a_plain_step_that_is_sent_as_it_is(
    more: dict[str, Any], strategy: Strategy | None
) -> None:
    state, plain = state_of(), job_of()
    job = job_of(**more)
    job = replace(job, strategy=strategy or job.strategy)
    for held, is_known in ((plain, True), (job, False)):
        results = answers(held, alike(5), state)
        averaged = contributions(held, results, state)
        assert all((step_noise(held, result) is not None) == is_known for result in results)
        assert (exact_noise(held, results, averaged) is not None) == is_known


# --- through whole runs -----------------------------------------------------------------------------------------------

NOISY: dict[str, Any] = {
    "training.optimizer": "sgd",
    "training.learning-rate": 1.0,
    "training.local-steps": 1,
    "server.optimizer": "adam",
    "privacy.noise-multiplier": 60.0,
    "privacy.clip-norm": 0.1,
    "head-rate": 3.0,
}


def learning(folder: Path) -> list[LayerLine]:
    return [line for told in read_lines(RoundLine, folder) for line in told.learning]


def spread(lines: Sequence[LayerLine]) -> float:
    """Return the mean square of all scores, 1 under noise alone."""
    known = [line.score for line in lines if line.score is not None]
    assert len(known) == len(lines)
    return math.fsum(score**2 for score in known) / len(known)


def test_a_private_run_whose_noise_drowns_all_tells_scores_of_noise(
    toy_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run_in_process({**toy_settings, **NOISY, "rounds": 2}, 3)
    lines = learning(folder)
    assert {line.form for line in lines} == {"across sites"}
    assert {line.layer for line in lines} > {"head"}
    # Of 22 scores of mean square 1; a noise that is twice as large as said makes it 16.
    assert 0.3 < spread(lines) < 3
    assert sum(line.above or 0 for line in lines) <= 3
    data = report_of(folder)
    assert [row.layer for row in data.learning] == [line.layer for line in lines[-len(data.learning) :]]
    assert all(len(row.scores) == 2 for row in data.learning)
    assert "costs no privacy" in markdown_report(folder)

    noised = dpsgd.add_private_noise
    monkeypatch.setattr(dpsgd, "add_private_noise", lambda total, std: noised(total, 2 * std))
    planted = learning(run_in_process({**toy_settings, **NOISY, "rounds": 1}, 3, "2"))
    assert spread(planted) > 3, "noise of twice the size that is stated goes unnoticed"


def test_under_a_secure_sum_the_score_is_of_the_sum_and_the_report_says_so(toy_settings: dict[str, Any]) -> None:
    summed = {"privacy.mode": "secure-sum", "privacy.honest-sites": 2, "privacy.epsilon": 40.0}
    folder = run_in_process({**toy_settings, **NOISY, **summed, "rounds": 1}, 4)
    lines = learning(folder)
    assert {(line.form, line.agreement) for line in lines} == {("of the sum", None)}
    assert 0.1 < spread(lines) < 4, "the sum's noise is not the one that its sites share"
    assert "the score is of the sum" in markdown_report(folder)
    assert "The server sees the sum of all sites alone" in (folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "open_or_many",
    [{"privacy.mode": "none"}, {"training.local-steps": 2}, {"training.optimizer": "adam"}],
    ids=lambda changed: "".join(changed),
)
def test_t6_no_score_is_told_where_the_noise_does_not_follow_from_what_is_public(
    open_or_many: dict[str, Any], toy_settings: dict[str, Any]
) -> None:
    folder = run_in_process({**toy_settings, **NOISY, "rounds": 1, **open_or_many}, 2)
    lines = learning(folder)
    assert lines
    assert all(line.score is None and line.above is None for line in lines)
    assert all(-1 <= (line.agreement or 0) <= 1 for line in lines)
    assert "There is no score" in markdown_report(folder)


def test_the_reports_table_counts_rounds_above_the_threshold_and_needs_no_line(tmp_path: Path) -> None:
    def line(layer: str, score: float | None) -> LayerLine:
        return LayerLine(layer, 48, "across sites", 0.1, 0.2, score, 3, 1)

    run = MadeRun(tmp_path / "run", {"rounds": 2}).start().round(1, 0.7).round(2, 0.71)
    assert report_of(run.folder).learning == []
    assert "Which layers learnt" not in markdown_report(run.folder)
    told = run.lines("rounds.jsonl")
    told[0]["learning"] = [to_json(line("a|b", 9.0)), to_json(line("head", None))]
    told[1]["learning"] = [to_json(line("a|b", 1.0)), to_json(line("head", 5.0))]
    (run.folder / "rounds.jsonl").write_text("")
    for value in told:
        run.append("rounds.jsonl", value)
    first, head = report_of(run.folder).learning
    assert (first.learnt, first.scores, first.least) == (1, [(1, 9.0), (2, 1.0)], least_score(2))
    assert (head.learnt, head.above, head.rank) == (1, 1, 3)
    write_reports(run.folder)
    for form in ("md", "html"):
        text = (run.folder / f"report.{form}").read_text(encoding="utf-8")
        assert "Which layers learnt" in text
        assert "9.0, 1.0" in text
    assert "its mean under noise is 0" in learning_sentence([first])

"""Intruder dimensions of a finished run: new directions among the largest of a layer's weights.

Shuttleworth et al., "LoRA vs Full Fine-tuning: An Illusion of Equivalence" (2024): with W0 = U0 S0 V0ᵀ before training
and W = U S V ᵀ after it, the j-th of the ``top`` left singular vectors is an intruder if no absolute cosine with a
column of U0 reaches a bound. Weights are oriented (out, in) first, however a layer keeps them.

Noise makes intruders, too. So each count is beside that of the same run's noise alone: a draw of what every round
would have sent without any record, put through the same strategy, server rule and optimiser of the server. Everything
here is read from what is published already, and costs no privacy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch

from fedveil.common.adapters import Adapter
from fedveil.common.adapters.attach import attach, read_factors
from fedveil.common.adapters.layers import base_weight, layers_of
from fedveil.common.adapters.low_rank import LowRank
from fedveil.common.check import in_range, positive
from fedveil.common.errors import FedVeilError, ModelError
from fedveil.common.messages.columns import narrowed
from fedveil.common.messages.round import Spending, SpendingFigures, TrainResult
from fedveil.common.messages.state import OWN, AdapterState
from fedveil.common.messages.tensors import apply, merge
from fedveil.common.paths import check_adapter
from fedveil.common.run_lines import AdapterFile, PrivacyLine, RoundLine, read_file, read_lines
from fedveil.contrib.adapters.lora_merged import pair_of
from fedveil.contrib.experiments.spectra import Top, count_above, spectrum_of, top_of
from fedveil.experiments.evaluate import about_of, base_of
from fedveil.privacy.accountant import Accountant
from fedveil.server.aggregation import contributions
from fedveil.server.checkpoint import saved_state
from fedveil.server.collect.noise import Noise, ServerNoise
from fedveil.server.model import rule_statistic
from fedveil.server.noise import SumNoise, cohort_noise, noised_at_sites, site_noise, step_noise, sum_noise
from fedveil.server.ruled import round_step
from fedveil.strategies.job import Job, configure
from fedveil.strategies.rules import ServerRule
from fedveil.strategies.state import Contribution, ServerState

TOP, COSINE = 10, 0.5
"""As published: of how many singular vectors, and the cosine that is not reached."""


@dataclass(frozen=True)
class LayerIntruders:
    """One layer's count, beside that of noise alone."""

    layer: str
    top: int
    """Singular vectors that were looked at."""
    intruders: int
    of_noise: int | None
    """Of a draw of the run's noise alone; None where that noise is not known."""
    unknown: str
    """Why it is not, in words; empty where it is."""
    edge: float
    """The smallest of the ``top`` singular values before training: a change below it makes no intruder."""
    largest: float
    """The largest singular value of the change."""
    above: int
    """Singular values above ``edge`` after training; before, there are ``top`` - 1."""


def intruders_of(run: Path, top: int = TOP, cosine: float = COSINE) -> list[LayerIntruders]:
    """Return the count of every adapted layer of a run that has finished a round.

    Args:
        run: the run's folder.
        top: how many of the largest singular vectors are looked at; a smaller layer has fewer.
        cosine: bound above which a direction is an old one, from 0 to 1.

    Raises:
        DataError: the folder has no saved adapter or checkpoint.
        ConfigError: ``top`` or ``cosine`` is out of range.
        ModelError: the base model here is not the run's, or the run has no adapter.
    """
    positive(top=top)
    in_range(0, 1, cosine=cosine)
    check_adapter(run / "adapter")
    about = about_of(run / "adapter")
    job = configure(about.settings)
    adapter = job.adapter
    if not adapter.trained:
        raise ModelError(f"adapter {adapter.name!r} changes no layer: there is nothing to count")
    base = base_of(about, about.base_model, about.base_files)
    if base.fingerprint != about.base_fingerprint:
        raise ModelError(f"the base model {base.name!r} here has other weights than the run's")
    peft_model, state = attach(adapter, base.module, job.config.seed), saved_state(run)
    weights = {name: base_weight(layer) for name, layer in layers_of(peft_model).items()}
    start = merge(read_factors(adapter, peft_model), job.strategy.basis(state))
    # A frozen factor that came after a run had begun is where such a run had it: at its start.
    state = replace(state, adapter=merge(start, state.adapter))
    noise = noise_alone(job, run, start, state)
    rows = []
    for name, weight in weights.items():
        before = spectrum_of(weight)
        count = min(top, len(before.values))
        own = _factors(adapter, state.adapter[name], weight)
        made = top_of(before, *own, count)
        edge = float(before.values[count - 1])
        alone = None if isinstance(noise, str) else top_of(before, *_factors(adapter, noise[name], weight), count)
        rows.append(
            LayerIntruders(
                layer=name,
                top=count,
                intruders=_count(made, cosine),
                of_noise=None if alone is None else _count(alone, cosine),
                unknown=noise if isinstance(noise, str) else "",
                edge=edge,
                largest=_largest(*own),
                above=count_above(before, *own, edge * (1 + 1e-9)),
            )
        )
    return rows


def noise_alone(job: Job, run: Path, start: AdapterState, ended: ServerState) -> AdapterState | str:
    """Return the adapter that a run's noise makes of its start without any record, or why that is not known, in words.

    One draw of a public seed, which goes through all that the server does with what sites send. The noise of a round is
    what its sites have stated, where each took one plain step, or what a trusted server has added.

    Args:
        job: the run's.
        run: its folder.
        start: every factor as before round 1.
        ended: the state that the run ended with.
    """
    draw = torch.Generator().manual_seed(0)
    state = job.start({layer: start[layer] for layer in ended.adapter if layer in start})
    counted = [line for line in read_lines(RoundLine, run) if line.complete and line.round_number]
    by_round = {line.round_number: _results(run, line) for line in sorted(counted, key=lambda line: line.round_number)}
    if why := _unknown(job, by_round):
        return why
    try:
        measured = _measured(job, run, state)
    except FedVeilError as error:
        return str(error)
    for results in by_round.values():
        averaged, noise = _noised(job, state, results, draw)
        step = round_step(job, measured, noise, results[0].round_number)
        state = job.strategy.server_update(state, averaged, step)
    return state.adapter


def _results(run: Path, counted: RoundLine) -> list[TrainResult]:
    """Return what each site that counts has stated in a round, without what it sent: of what it paid for, the last."""
    number = counted.round_number
    lines = {line.site: line for line in read_lines(PrivacyLine, run) if line.round_number == number}
    return [
        TrainResult(str(run), number, site, line.public_size, {}, _spending(line.spent), rank=line.rank)
        for site, line in sorted(lines.items())
        if site in counted.participants
    ]


def _spending(spent: SpendingFigures | None) -> Spending | None:
    if spent is None:
        return None
    figures = {item.name: getattr(spent, item.name) for item in fields(SpendingFigures)}
    return Spending(**figures, accountant=Accountant("pld", ""))


def _unknown(job: Job, by_round: Mapping[int, Sequence[TrainResult]]) -> str:
    """Return why the noise of a run's rounds does not follow from what its folder says; empty if it does."""
    if not all(by_round.values()) or not by_round:
        return "its folder tells of no round"
    if not job.mechanism.claims:
        return "the run adds no noise"
    every = [result for results in by_round.values() for result in results]
    if not job.mechanism.pooled and any(step_noise(job, result) is None for result in every):
        return "its noise follows from public figures only where each site takes one plain step (SGD) a round"
    if not job.derived and set(job.adapter.trained) & set(job.adapter.directions):
        return "its folder does not keep where round 0 let the trained factors begin"
    return ""


def _measured(job: Job, run: Path, state: ServerState) -> AdapterState:
    """Return what the run's rule took from public text; errors as in ``rule_statistic``."""
    if type(job.rule).measure is ServerRule.measure:
        return {}
    labels = tuple(read_file(AdapterFile, run / "adapter").label_names)
    return rule_statistic(job, job.model(labels), state)


def _noised(
    job: Job, state: ServerState, results: Sequence[TrainResult], draw: torch.Generator
) -> tuple[Sequence[Contribution], Noise]:
    """Return what is averaged of sites without any record, of which all that they send is noise, and the noise."""
    if job.mechanism.central:
        (cohort,) = results
        noise = cohort_noise(job, cohort)
        return [Contribution(cohort.site, 1.0, _sent(job, state, 0, noise, draw), noise=noise)], ServerNoise(noise)
    if job.mechanism.summed:
        sent = _sent(job, state, 0, sum_noise(job, results), draw)
        return [Contribution("all", 1.0, sent)], SumNoise(job, results)
    noised = [
        replace(result, contribution=_sent(job, state, result.rank, site_noise(job, result), draw))
        for result in results
    ]
    return noised_at_sites(job, contributions(job, noised, state), noised)


def _sent(job: Job, state: ServerState, rank: int, noise: float, draw: torch.Generator) -> AdapterState:
    """Return what sites train in the round, of the columns that their rank gives, with noise on it."""
    trained = {
        layer: {factor: tensor for factor, tensor in factors.items() if state.trains(layer, factor)}
        for layer, factors in narrowed(state.adapter, job.trained_columns(state, rank)).items()
        if layer not in OWN
    }
    return apply(partial(_with_noise, noise, draw), {k: f for k, f in trained.items() if f})


def _with_noise(std: float, draw: torch.Generator, tensor: torch.Tensor) -> torch.Tensor:
    return tensor + std * torch.randn(tensor.shape, generator=draw)


def _factors(
    adapter: Adapter, factors: Mapping[str, torch.Tensor], weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return B, with the scale in it, and A, float64, whose product is the change of a layer's weight.

    What is no product of two factors is decomposed, which costs as much as the weight's own decomposition.
    """
    if isinstance(adapter, LowRank):
        lora = adapter.as_lora(factors)
        return adapter.scaling * lora["B"].double(), lora["A"].double()
    pair = pair_of(adapter.delta({name: tensor.double() for name, tensor in factors.items()}, weight.double()))
    return pair["B"], pair["A"]


def _largest(B: torch.Tensor, A: torch.Tensor) -> float:
    return float(torch.linalg.svdvals(torch.linalg.qr(B)[1] @ torch.linalg.qr(A.T)[1].T)[0])


def _count(top: Top, cosine: float) -> int:
    return int((top.cosines < cosine).sum())

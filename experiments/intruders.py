"""Intruder dimensions of a finished run: new directions among the largest of a layer's weights.

Shuttleworth et al., "LoRA vs Full Fine-tuning: An Illusion of Equivalence" (2024): with W0 = U0 S0 V0ᵀ before training
and W = U S V ᵀ after it, the j-th of the ``top`` left singular vectors is an intruder if no absolute cosine with a
column of U0 reaches a bound. Weights are oriented (out, in) first, however a layer keeps them.

Noise makes intruders, too. So each count stands beside that of the same run's noise alone: a draw of what every round
would have sent without any record, put through the same strategy and the same optimiser of the server. Everything here
is read from what is published already, and costs no privacy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch

from common.accountant import Accountant
from common.adapters import Adapter
from common.adapters.base import base_weight
from common.adapters.lora_merged import pair_of
from common.adapters.low_rank import LowRank
from common.check import in_range, positive
from common.errors import DataError, ModelError
from common.messages.columns import narrowed
from common.messages.round import Spending, SpendingFigures, TrainResult
from common.messages.state import HEAD, METRIC, AdapterState
from common.messages.tensors import apply, merge
from common.model.base import load_base_model
from common.run_lines import PrivacyLine, RoundLine, read_json, read_lines
from experiments.spectra import Top, count_above, spectrum_of, top_of
from server.aggregation import shares_of
from server.checkpoint import saved_state
from server.learning import step_noise
from server.noise import sum_noise
from server.optimizer import server_step
from server.rates import within_noise
from strategies import Contribution, ServerState, of_turn
from strategies.job import Job, configure

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
    if not (run / "adapter" / "fedveil.json").is_file():
        raise DataError(f"{run} holds no adapter: give the folder of a finished run")
    about = read_json(run / "adapter" / "fedveil.json")
    job = configure(about["settings"])
    adapter = job.adapter
    if not adapter.trained:
        raise ModelError(f"adapter {adapter.name!r} changes no layer: there is nothing to count")
    base = load_base_model(about["base_model"], about["task"], job.config.head.pool, job.config.model.quantise)
    if base.fingerprint != about["base_fingerprint"]:
        raise ModelError(f"the base model {base.name!r} here has other weights than the run's")
    peft_model, state = adapter.attach(base.module, job.config.seed), saved_state(run)
    weights = {name: base_weight(layer) for name, layer in adapter.layers(peft_model).items()}
    noise = noise_alone(job, run, merge(adapter.read(peft_model), job.strategy.basis(state)), state)
    rows = []
    for name, weight in weights.items():
        before = spectrum_of(weight)
        count = min(top, len(before.values))
        own = _factors(adapter, state.adapter[name], weight)
        made = top_of(before, *own, count)
        edge = float(before.values[count - 1])
        alone = None if noise is None else top_of(before, *_factors(adapter, noise[name], weight), count)
        rows.append(
            LayerIntruders(
                layer=name,
                top=count,
                intruders=_count(made, cosine),
                of_noise=None if alone is None else _count(alone, cosine),
                edge=edge,
                largest=_largest(*own),
                above=count_above(before, *own, edge * (1 + 1e-9)),
            )
        )
    return rows


def noise_alone(job: Job, run: Path, start: AdapterState, ended: ServerState) -> AdapterState | None:
    """Return the adapter that a run's noise makes of its start without any record; None if the noise is not known.

    One draw of a public seed. The noise of a round is what its sites have stated, where each took one plain step.

    Args:
        job: the run's.
        run: its folder.
        start: every factor as before round 1.
        ended: the state that the run ended with.
    """
    draw = torch.Generator().manual_seed(0)
    state = job.start({layer: start[layer] for layer in ended.adapter if layer in start})
    counted = {line.round_number for line in read_lines(RoundLine, run) if line.complete and line.round_number}
    by_round = {number: _results(run, number) for number in sorted(counted)}
    if not by_round or job.config.server.rule != "none":  # what a rule took from public text is kept nowhere
        return None
    for results in by_round.values():
        contributions = _noised(job, state, results, draw)
        if contributions is None:
            return None
        step = partial(server_step, within_noise(job, results, contributions))
        state = job.strategy.server_update(state, contributions, step)
    return state.adapter


def _results(run: Path, round_number: int) -> list[TrainResult]:
    """Return what each site has stated in a round, without what it sent; of a release that is told twice, the last."""
    told = {line.site: line for line in read_lines(PrivacyLine, run) if line.round_number == round_number}
    return [
        TrainResult(str(run), round_number, site, line.public_size, {}, _spending(line.spent))
        for site, line in sorted(told.items())
    ]


def _spending(spent: SpendingFigures | None) -> Spending | None:
    if spent is None:
        return None
    held = {item.name: getattr(spent, item.name) for item in fields(SpendingFigures)}
    return Spending(**held, accountant=Accountant("pld", ""))


def _noised(
    job: Job, state: ServerState, results: Sequence[TrainResult], draw: torch.Generator
) -> list[Contribution] | None:
    """Return what sites without any record would have sent; None if that is not known."""
    strategy = job.strategy
    if not results or strategy.ranked:  # a folder does not say which columns each site has trained
        return None
    chosen = strategy.columns(strategy.downlink(state), 0)
    noises: list[float | None]
    if job.mechanism.summed:
        noises, shares, names = [sum_noise(job, results)], [1.0], ["all"]
    else:
        noises, names = [step_noise(job, result) for result in results], [result.site for result in results]
        if any(noise is None for noise in noises):
            return None
        shares = shares_of(job, results)
    made = []
    for name, share, noise in zip(names, shares, noises, strict=True):
        if noise is None:
            return None
        trained = {
            layer: {factor: tensor for factor, tensor in factors.items() if state.trains(layer, factor)}
            for layer, factors in state.adapter.items()
            if layer not in (HEAD, METRIC)
        }
        trained = of_turn({k: f for k, f in trained.items() if f}, strategy.turn(state.round_number + 1))
        trained = trained if chosen is None else narrowed(trained, chosen)
        sent = apply(partial(_with_noise, noise, draw), trained)
        made.append(Contribution(name, share, sent, noise=noise))
    return made


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

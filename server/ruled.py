"""The server's step with a rule around its optimiser (``strategies.rules``), at rates that noise allows.

How far noise alone moves a trained number over a phase (``common.config.phases``) follows from public figures: each
site's stated noise, batch and share of the average, the learning rates, and the rounds. So one setting serves little
noise and much: the rate is the largest up to ``server.learning-rate`` at which noise moves no number by more than
``server.most-noise`` in standard deviation. With a heavy ball a round's noise is passed on 1/(1 - μ)-fold, so over
rounds of rates η_t noise ν a round makes ν √(Σ η_t²) / (1 - μ), or less where the run ends before it is passed on. A
site that states more noise than the run's weighs less by its square, and is counted at the run's own, times as many as
all sites state: where all have trained before they add more, and one that states much lowers no rate.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

from fedveil.common.config.run import RunConfig
from fedveil.common.messages.state import OWN, AdapterState
from fedveil.common.messages.tensors import merge, subtract
from fedveil.server.collect.noise import Noise
from fedveil.server.optimizer import server_step
from fedveil.strategies.job import Job
from fedveil.strategies.rules import NoRule
from fedveil.strategies.rules.base import Known
from fedveil.strategies.state import ServerState, ServerStep


def round_step(job: Job, measured: AdapterState, noise: Noise, number: int) -> ServerStep:
    """Return the server's step of a round: the run's rule around its optimiser, at the rates of the round.

    Args:
        job: the run.
        measured: what the rule took from public text before round 1.
        noise: on the round's average.
        number: of the round.
    """
    return partial(ruled_step, job, within_noise(job.config, noise, number), measured, noise=noise.exact())


def ruled_step(
    job: Job,
    config: RunConfig,
    measured: AdapterState,
    before: ServerState,
    averaged: ServerState,
    noise: float | None = None,
) -> ServerState:
    """Return the state after the server's step, as ``server_step``, with the run's rule before and behind it.

    The head and what sites do not train are as without a rule, and so is a round that does not train the adapter.
    Computed in float64; the result has the adapter's dtype.

    Args:
        job: the run.
        config: its configuration, with the server's rates of this round.
        measured: what the rule took from public text before round 1.
        before: the state that sites started from.
        averaged: what the strategy's average makes of it.
        noise: standard deviation of the noise on one number of the averaged change; 0: none; None: unknown.
    """
    rule, noised = job.rule, noise != 0
    if isinstance(rule, NoRule) or not config.timeline.trains_adapter(before.round_number + 1):
        return server_step(config, before, averaged)
    trained = _layers(before, before)
    whole = {layer: {n: t.double() for n, t in before.adapter[layer].items()} for layer in trained}
    changes = subtract(trained, _layers(before, averaged))
    scaling = job.adapter.scaling
    turned = {layer: rule.change(change, whole[layer], scaling, noised=noised) for layer, change in changes.items()}
    towards = replace(averaged, adapter=_with(averaged.adapter, subtract(trained, turned)))
    after = server_step(config, before, towards)
    frozen = {layer: {n: t for n, t in whole[layer].items() if n not in trained[layer]} for layer in trained}
    known = Known(frozen, None if noise is None else noise * _step_rate(config, before))
    return replace(after, adapter=_with(after.adapter, rule.step(trained, _layers(before, after), measured, known)))


def _step_rate(config: RunConfig, before: ServerState) -> float:
    """Return what the server's step multiplies a change by, where it is a plain one."""
    return 1.0 if config.server.optimizer == "none" else config.server_rate(before.round_number + 1)


def _layers(before: ServerState, state: ServerState) -> AdapterState:
    """Return what sites train of every layer but the head, float64."""
    layers = {
        layer: {name: t.double() for name, t in factors.items() if before.trains(layer, name)}
        for layer, factors in state.adapter.items()
        if layer not in OWN
    }
    return {layer: factors for layer, factors in layers.items() if factors}


def _with(adapter: AdapterState, changed: AdapterState) -> AdapterState:
    cast = {layer: {n: t.to(adapter[layer][n].dtype) for n, t in f.items()} for layer, f in changed.items()}
    return merge(adapter, cast)


def within_noise(config: RunConfig, averaged: Noise, number: int) -> RunConfig:
    """Return the run's configuration, with the server's rates that its bound on noise leaves in a round.

    Args:
        config: the run's.
        averaged: the noise on the round's average.
        number: of the round.
    """
    most = config.server.most_noise
    if not most:
        return config
    noise = averaged.usual()
    first, rounds = config.timeline.span(number)
    # In units of the rate's peak, which is what is lowered.
    shape = replace(config, server=replace(config.server, learning_rate=1.0))
    way = math.hypot(*(shape.server_rate(first + 1 + done) for done in range(rounds))) / (1 - config.server.momentum)
    if not noise * way > 0:
        return config
    peak, head = config.server.learning_rate, config.server.learning_rate * config.head_rate
    rate, head = min(peak, most / (noise * way)), min(head, most / (noise * way))
    return replace(config, server=replace(config.server, learning_rate=rate), head_rate=head / rate)

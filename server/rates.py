"""The server's learning rate, lowered where a phase's noise would carry the model further than is set.

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

from fedveil.common.config.run import RunConfig
from fedveil.server.collect.noise import Noise


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

"""The settings of a run as people write them, where 0 and ``auto`` leave a value open, and what they resolve to.

How many steps a round has, on how large batches, and where Adam is, follows from what a step costs: the mechanism says
it (``Pace``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar

from fedveil.common.check import NOT_NEGATIVE, POSITIVE, Interval, OneOf
from fedveil.common.config.fields import RATIO, Section, Unit
from fedveil.common.config.sections import (
    OPTIMIZERS,
    SCHEDULES,
    SERVER_OPTIMIZERS,
    RunConfig,
    RunTerms,
    Scalar,
    ServerConfig,
    TrainingConfig,
    from_section,
)

LEARNING_RATES = {"sgd": 1.0, "momentum": 1.0, "adam": 0.01, "adamw": 0.01}


@dataclass(frozen=True)
class TrainingSettings(Section):
    """What a site does with one round."""

    prefix: ClassVar[str] = "training."

    local_steps: Annotated[int, NOT_NEGATIVE, Unit("steps")] = 0
    """Optimiser steps of a round. 0: 1 in a private run, else 16."""
    sample_rate: Annotated[float, Interval(0, 1, or_zero=True), Unit("probability")] = 0.0
    """Chance of each record to be in a step's batch (Poisson), so the expected batch over the size. 0: 0.33 in a
    private run, else 0.018."""
    optimizer: Annotated[str, OneOf(("auto", *OPTIMIZERS))] = "auto"
    """``sgd``, ``momentum``, ``adam``, ``adamw``. ``auto``: Adam, or plain SGD where the server has Adam."""
    learning_rate: Annotated[float, NOT_NEGATIVE, RATIO] = 0.0
    """The site's, at the peak of ``schedule``. 0: what suits the optimiser, 0.01 for Adam and else 1."""
    momentum: Annotated[float, Interval(0, 1, low_too=True, high_too=False), RATIO] = 0.9
    """For ``momentum``; also Adam's β₁."""
    beta2: Annotated[float, Interval(0, 1, high_too=False), RATIO] = 0.999
    """Adam's β₂, for ``adam`` and ``adamw``."""
    weight_decay: Annotated[float, NOT_NEGATIVE, RATIO] = 0.0
    """Of the site's optimiser: the part of a weight that a step of rate 1 takes off."""
    batch_tokens: Annotated[int, NOT_NEGATIVE, Unit("tokens")] = 0
    """The size of a forward pass without privacy, padding included. 0: what suits the device. It changes speed and
    memory, not the result. Under privacy shapes are fixed (``common.model.shapes``), and this has no say."""


@dataclass(frozen=True)
class ServerSettings(Section):
    """What the server does with the sites' averaged change."""

    prefix: ClassVar[str] = "server."

    optimizer: Annotated[str, OneOf(("auto", *SERVER_OPTIMIZERS))] = "auto"
    """``none``: the average is the new model. ``adam``: the change is a gradient for the server's Adam (FedAdam).
    ``momentum``: it is one for gradient descent with a heavy ball. ``auto``: what the strategy requires; else ``adam``
    under privacy, and ``none`` without."""
    learning_rate: Annotated[float, POSITIVE, RATIO] = 0.025
    """The server's optimiser's, at the peak of ``schedule``. 0.025 suits Adam."""
    adam_tau: Annotated[float, POSITIVE, RATIO] = 1e-3
    """FedAdam's τ, added to the root of Adam's second moment: changes well below it do not become full steps."""
    momentum: Annotated[float, Interval(0, 1, low_too=True, high_too=False), RATIO] = 0.5
    """For ``momentum``: how much of the last step the next one keeps."""
    rule: str = "none"
    """What stands around the optimiser: a row of ``strategies.rules.RULES``, whose options are set under its name.
    ``lora-pro`` turns the change of A and B before it, ``allora``, ``align-guard`` and ``soft-threshold`` its step."""
    scores: bool = False
    """Whether the server keeps LoRAPrune's score of every output and input of an adapted layer, by which ``python -m
    fedveil.contrib.experiments prune --by`` chooses (docs/guides/serve.md). It asks no site for anything."""
    most_noise: Annotated[float, NOT_NEGATIVE, RATIO] = 0.0
    """For ``momentum``: standard deviation that the noise of a phase may give a trained number: the head first, the
    adapter, the head again. The learning rate is lowered to keep it, of the head and of the rest each for itself
    (``server.rates``). 0: no bound."""


@dataclass(frozen=True, kw_only=True)
class RunSettings(RunTerms):
    """Everything that is asked of a run."""

    schedule: Annotated[str, OneOf(SCHEDULES)] = "linear"
    """Course of the learning rate over the run. ``slanted`` rises in the first tenth of more than ten steps, and
    falls from there on as ``linear`` does. The server's optimiser follows it if there is one, else the sites' do;
    beside a server's optimiser the sites' rate is constant."""
    head_rate: Annotated[float, NOT_NEGATIVE, RATIO] = 0.0
    """The head's learning rate over that of the other tensors, applied once, by whichever optimiser follows
    ``schedule``. 0: 4 in a private run, else 5."""
    training: TrainingSettings = field(default_factory=TrainingSettings)
    server: ServerSettings = field(default_factory=ServerSettings)


def from_mapping(values: Mapping[str, Scalar]) -> RunSettings:
    """Return what flat dotted keys ask of a run; keys left out keep their defaults.

    >>> from_mapping({"adapter.rank": 4}).adapter.rank
    4

    Raises:
        ConfigError: a key is unknown (the nearest known one is named), a value has the wrong type
            or is out of range.
    """
    return from_section(RunSettings, values, "")


def resolve(asked: RunSettings) -> RunConfig:
    """Return what a run does, with every ``auto`` and 0 filled in that has one value for the run.

    Raises:
        ConfigError: the kind of task does not go with the rest.
    """
    pace = asked.privacy.mechanism.pace
    training, server = asked.training, asked.server
    optimizer, at_server = optimizers(asked)
    alone = at_server == "none"  # then the sites' optimiser moves the model
    head_rate = asked.head_rate or pace.head_rate
    return RunConfig(
        **_terms(asked),
        training=TrainingConfig(
            local_steps=training.local_steps or pace.local_steps,
            sample_rate=training.sample_rate or pace.sample_rate,
            optimizer=optimizer,
            learning_rate=training.learning_rate or LEARNING_RATES[optimizer],
            head_rate=head_rate if alone else 1.0,
            schedule=asked.schedule if alone else "constant",
            momentum=training.momentum,
            beta2=training.beta2,
            weight_decay=training.weight_decay,
            batch_tokens=training.batch_tokens,
        ),
        server=ServerConfig(
            optimizer=at_server,
            learning_rate=server.learning_rate,
            adam_tau=server.adam_tau,
            momentum=server.momentum,
            rule=server.rule,
            scores=server.scores,
            head_rate=head_rate,
            schedule=asked.schedule,
            most_noise=server.most_noise,
        ),
    )


def optimizers(asked: RunSettings) -> tuple[str, str]:
    """Return the sites' optimiser and the server's, with ``auto`` filled in.

    >>> optimizers(RunSettings())
    ('sgd', 'adam')
    """
    training, server = asked.training.optimizer, asked.server.optimizer
    at_server = server if server != "auto" else asked.privacy.mechanism.pace.server_optimizer
    return training if training != "auto" else "adam" if at_server == "none" else "sgd", at_server


def as_asked(config: RunConfig) -> RunSettings:
    """Return the settings that leave nothing open and resolve to ``config``: how a run is written down.

    >>> resolve(as_asked(resolve(RunSettings()))) == resolve(RunSettings())
    True
    """
    training, server = config.training, config.server
    return RunSettings(
        **_terms(config),
        schedule=server.schedule,
        head_rate=server.head_rate,
        training=TrainingSettings(**{item.name: getattr(training, item.name) for item in fields(TrainingSettings)}),
        server=ServerSettings(**{item.name: getattr(server, item.name) for item in fields(ServerSettings)}),
    )


def _terms(terms: RunTerms) -> dict[str, Any]:
    return {item.name: getattr(terms, item.name) for item in fields(RunTerms)}

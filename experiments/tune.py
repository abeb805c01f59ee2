"""Choose between the variants of a sweep, all charged to the same ledgers, at a price that is known beforehand.

A choice that looks at private results is a release too. Where only the best of many runs is published, and how many
there are is itself drawn at random, that choice can cost little more than one run (Liu and Talwar 2019,
arXiv:1811.07971; Papernot and Steinke 2022, arXiv:2110.03620). That does not hold here: the server sees every trial's
rounds, so every trial is published. The price is that of all trials, composed in one ledger a site.

The file is a sweep's, with one seed and one ε: that of all trials together.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite, sqrt
from pathlib import Path
from typing import Any

from fedveil.common.config.sections import Scalar
from fedveil.common.errors import ConfigError, PrivacyError, RunFailed
from fedveil.common.files import finite, replace_file
from fedveil.common.run_lines import (
    BaselineFile,
    ResultFile,
    RoundLine,
    TuningFile,
    read_file,
    read_if_there,
    read_lines,
)
from fedveil.common.strict_json import json_of, to_json
from fedveil.common.tasks import TASKS
from fedveil.common.words import decimal_text, percent_text
from fedveil.experiments.in_process import run_in_process, simulated_nodes
from fedveil.experiments.planner.price import paid_before, site_plans
from fedveil.experiments.sweep.file import read_sweep
from fedveil.privacy.accounting import Release
from fedveil.privacy.events import LEAST_NOISE, MOST_NOISE
from fedveil.privacy.privacy_filter import commitment_to, price, promised
from fedveil.reports import write_reports
from fedveil.server.checkpoint import NAME as CHECKPOINT
from fedveil.strategies.job import Job, configure

BUDGET, NOISE = "privacy.epsilon", "privacy.noise-multiplier"
DATA = ("data.name", "data.test", "data.test-size", "data.seed", "data.person", "model.task")
SAME = ("privacy.delta", "privacy.mode", "privacy.unit", *DATA)
"""Settings in which no trial differs: what is paid, and what scores are compared on."""
STATE = "tune.json"
PRECISION = 1e-3
"""Of the noise multiplier, relative: it is at most so much above the least."""


Conduct = Callable[[str, Mapping[str, Scalar]], Path]
"""Run a trial by its name and settings to its end, one that was cut off from where it was, and return its folder."""


@dataclass(frozen=True)
class Tuning:
    """All trials with their price, before any of them."""

    name: str
    """Of the file."""
    sites: int
    trials: Mapping[str, Mapping[str, Scalar]]
    """Each variant's settings, with the noise multiplier that all of them have."""
    alone: Mapping[str, float]
    """What each would cost by itself, ε at ``delta``."""
    epsilon: float
    """Of all of them together: what every site's ledger is charged."""
    budget: float
    """That all of them together keep."""
    delta: float
    noise_multiplier: float


@dataclass(frozen=True)
class Outcome:
    """What a trial came to."""

    trial: str
    folder: Path
    accuracy_before: float
    accuracy: float
    loss: float
    epsilon: float
    """By the ledgers, of everything that was charged by its end: this trial and those before it."""

    def __str__(self) -> str:
        scores = f"{percent_text(self.accuracy)} ({percent_text(self.accuracy_before)} before)"
        return f"{self.trial}: accuracy {scores}, loss {decimal_text(self.loss, 4)}"


def read_tuning(path: Path) -> Tuning:
    """Return the trials of a sweep's file with their price.

    Raises:
        ConfigError: as for ``read_sweep``; or a trial is no private run, or differs in what none may differ in.
        PrivacyError: no noise keeps all trials within the budget.
    """
    sweep = read_sweep(path)
    settings = {cell.variant: dict(cell.settings) for cell in sweep.cells}
    if not 2 <= len(settings) == len(sweep.cells):
        raise ConfigError(f"{path}: a choice is between variants: give two or more, one seed, one ε and no baselines")
    jobs = {name: configure(own) for name, own in settings.items()}
    _check(jobs, [name for name, own in settings.items() if NOISE in own])
    privacy = next(iter(jobs.values())).config.privacy
    if promised([paid for job in jobs.values() for paid in paid_before(job)], privacy.delta)[0] >= privacy.epsilon:
        raise PrivacyError(f"no noise keeps all trials within ε {privacy.epsilon:g}: their starts alone cost more")

    def with_noise(noise: float) -> list[Job]:
        return [configure({**own, NOISE: noise}) for own in settings.values()]

    noise = _least(lambda value: composed(with_noise(value)), privacy.epsilon)
    noised = with_noise(noise)
    return Tuning(
        name=sweep.name,
        sites=sweep.cells[0].sites,
        trials={name: {**own, NOISE: noise} for name, own in settings.items()},
        alone={name: composed([job]) for name, job in zip(settings, noised, strict=True)},
        epsilon=composed(noised),
        budget=privacy.epsilon,
        delta=privacy.delta,
        noise_multiplier=noise,
    )


def _check(jobs: Mapping[str, Job], noisy: Sequence[str]) -> None:
    if noisy:
        raise ConfigError(f"variant {noisy[0]!r} sets {NOISE}, which follows from ε here: leave it out")
    whole = {name: job.settings() for name, job in jobs.items()}
    first, *others = whole
    for name, job in jobs.items():
        if not job.mechanism.charged or job.mechanism.summed:
            raise ConfigError(
                f"variant {name!r} has privacy.mode {job.mechanism.name!r}, whose price is not each site's own: choose "
                "under 'dp-sgd'"
            )
    for name in others:
        if differing := [key for key in SAME if whole[name].get(key) != whole[first].get(key)]:
            raise ConfigError(f"{first!r} and {name!r} differ in {differing[0]}, in which no trial may: set it for all")
        if twin := next((other for other in whole if other != name and whole[other] == whole[name]), ""):
            raise ConfigError(f"variants {twin!r} and {name!r} have the same settings: leave one out, or change one")


def composed(jobs: Sequence[Job]) -> float:
    """Return what these runs cost a site that joins every round, as its ledger prices them in this order."""
    releases: list[list[Release]] = []
    for job in jobs:
        (plan,) = site_plans(job, [1])  # no figure of a release depends on how many records there are
        releases.append([*paid_before(job), plan.release(job.config.total_steps)])
    plan_of_first = commitment_to(releases[0], [])
    return price([release for own in releases for release in own], plan_of_first, jobs[0].config.privacy.delta)[0]


def _least(cost: Callable[[float], float], budget: float) -> float:
    """Return a noise multiplier at which ``cost`` is within ``budget``, at most ``PRECISION`` above the least."""
    low, high = LEAST_NOISE, 1.0
    while cost(high) > budget:
        low, high = high, 2 * high
        if high >= MOST_NOISE:
            raise PrivacyError(f"no noise below {MOST_NOISE:g} keeps all trials within ε {budget:g}: try fewer")
    while high > low * (1 + PRECISION):
        middle = sqrt(low * high)
        low, high = (middle, high) if cost(middle) > budget else (low, middle)
    return high


def tune(tuning: Tuning, output: Path, conduct: Conduct, say: Callable[[str], None]) -> tuple[Outcome, float]:
    """Run every trial that ``output`` lacks, in the file's order; return the best, and what all of them were charged.

    The folder of each is written down as it ends, so the same call goes on where it was cut off.

    Raises:
        ConfigError: ``output`` holds other trials.
        RunFailed: a trial failed.
    """
    place, asked = output / STATE, {name: dict(own) for name, own in tuning.trials.items()}
    state: dict[str, Any] = json_of(place.read_bytes()) if place.is_file() else {"trials": asked, "folders": {}}
    if state["trials"] != asked:
        raise ConfigError(f"{output} holds other trials, which have been paid for: name another folder with --output")
    output.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    for number, (name, settings) in enumerate(tuning.trials.items(), 1):
        if name not in state["folders"]:
            state["folders"][name] = str(conduct(name, settings))
        outcomes.append(_outcome(name, Path(state["folders"][name])))
        replace_file(place, json.dumps(state, indent=2).encode())
        _tell(tuning, outcomes, outcomes[-1:], None)
        say(f"{number}/{len(asked)} {outcomes[-1]}")
    labelled = TASKS[configure(settings).config.model.task].labelled
    # A model that diverged is no trial's best.
    best = min(outcomes, key=lambda o: -o.accuracy if labelled else o.loss if isfinite(o.loss) else inf)
    return best, _tell(tuning, outcomes, outcomes, best)


def _outcome(name: str, folder: Path) -> Outcome:
    result, baseline = read_file(ResultFile, folder), read_file(BaselineFile, folder)
    if result.reached is None or result.status == "failed":
        raise RunFailed(f"trial {name!r} failed ({result.reason or 'no result'}): {folder}")
    losses = [line.loss for line in read_lines(RoundLine, folder) if line.complete and line.loss is not None]
    reached = result.reached
    return Outcome(
        trial=name,
        folder=folder,
        accuracy_before=reached.accuracy_before,
        accuracy=reached.accuracy,
        loss=losses[-1] if losses else baseline.loss,
        epsilon=inf if reached.epsilon is None else reached.epsilon,
    )


def simulated(tuning: Tuning, output: Path) -> Conduct:
    """Return what runs a trial over simulated sites, whose ledgers are the same for all trials."""

    def conduct(name: str, settings: Mapping[str, Scalar]) -> Path:
        place = output.absolute() / name
        begun = next((path.parent for path in place.glob(f"*/{CHECKPOINT}")), None)
        ended = read_if_there(ResultFile, begun) if begun else None
        if begun and ended and ended.status != "failed":
            return begun
        resumed: dict[str, Scalar] = {"resume": str(begun)} if begun else {}
        nodes = simulated_nodes(tuning.sites, output.absolute() / "ledgers")
        return run_in_process({**settings, "output": str(place), **resumed}, nodes, name)

    return conduct


def _tell(tuning: Tuning, paid: Sequence[Outcome], whom: Sequence[Outcome], best: Outcome | None) -> float:
    """Lay the price of all trials beside these, make their reports again, and return it.

    Before the last trial it is what all will cost: a report that is given away meanwhile tells no less.
    """
    together = max(tuning.epsilon, *(outcome.epsilon for outcome in paid))
    for outcome in whom:
        content = TuningFile(len(tuning.trials), None if best is None else outcome is best, together, tuning.delta)
        replace_file(outcome.folder / TuningFile.NAME, json.dumps(finite(to_json(content)), indent=1).encode())
        write_reports(outcome.folder)
    return together

"""Choose between the variants of a sweep, all charged to the same ledgers, at a price that is known beforehand.

A choice that looks at private results is a release too. Where only the best of a random number of runs is published,
that choice can cost little more than one run (Liu and Talwar 2019, arXiv:1811.07971; Papernot and Steinke 2022,
arXiv:2110.03620). That does not hold here: the server sees every trial's rounds, so every trial is published. The price
is that of all trials, composed in one ledger a site. The file is a sweep's, with one seed and one ε for all together.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path
from typing import Any

from fedveil.common.config.flat import Scalar
from fedveil.common.errors import ConfigError, PrivacyError, RunFailed
from fedveil.common.files import finite, replace_file
from fedveil.common.other_runs import TuningFile
from fedveil.common.run_lines import (
    BaselineFile,
    ConfigFile,
    ResultFile,
    RoundLine,
    read_file,
    read_if_there,
    read_lines,
)
from fedveil.common.strict_json import json_of, to_json
from fedveil.common.tasks import TASKS, headline_of
from fedveil.common.words import decimal_text, percent_text
from fedveil.experiments.in_process import run_in_process, simulated_nodes
from fedveil.experiments.planner.price import paid_before, site_plans
from fedveil.experiments.sweep.file import read_sweep
from fedveil.privacy.calibration import least_at
from fedveil.privacy.privacy_filter import commitment_to, price
from fedveil.reports import write_reports
from fedveil.server.checkpoint import NAME as CHECKPOINT
from fedveil.strategies.job import Job, configure

BUDGET, NOISE, STATE = "privacy.epsilon", "privacy.noise-multiplier", "tune.json"
DATA = ("data.name", "data.test", "data.test-size", "data.seed", "data.person", "model.task")
SAME = ("privacy.delta", "privacy.mode", "privacy.unit", *DATA)
"""Settings that all trials share: they decide what is paid, and what scores are compared on."""
Conduct = Callable[[str, Mapping[str, Scalar]], Path]
"""Run a trial by its name and settings to its end, resuming one that was cut off, and return its folder."""


@dataclass(frozen=True)
class Tuning:
    """All trials with their price, before any of them."""

    name: str
    """Of the file."""
    sites: int
    trials: Mapping[str, Mapping[str, Scalar]]
    """Settings of each variant, with the noise multiplier that all of them share."""
    alone: Mapping[str, float]
    """ε at ``delta`` of each variant by itself."""
    epsilon: float
    """ε of all of them together, at most ``budget``: what every site's ledger is charged."""
    budget: float
    delta: float
    noise_multiplier: float


@dataclass(frozen=True)
class Outcome:
    """The result of a trial."""

    trial: str
    folder: Path
    accuracy_before: float
    accuracy: float
    loss: float
    epsilon: float
    """ε that the ledgers were charged by its end, for this trial and those before it."""
    judged_by: str = "accuracy"

    def __str__(self) -> str:
        scores = f"{percent_text(self.accuracy)} ({percent_text(self.accuracy_before)} before)"
        return f"{self.trial}: {self.judged_by} {scores}, loss {decimal_text(self.loss, 4)}"


def read_tuning(path: Path, *, simulated: bool = True) -> Tuning:
    """Return the trials of a sweep's file with their price; ``simulated`` as for ``read_sweep``.

    Raises:
        ConfigError: ``read_sweep`` refuses the file, a trial is not private, or trials differ in one of ``SAME``.
        PrivacyError: no noise keeps all trials within the budget.
    """
    sweep = read_sweep(path, simulated=simulated)
    variants = {cell.variant: dict(cell.settings) for cell in sweep.cells}
    if not 2 <= len(variants) == len(sweep.cells):
        raise ConfigError(f"{path}: a choice is between variants: give two or more, one seed, one ε and no baselines")
    privacy = _checked(variants).config.privacy

    def noised(noise: float) -> dict[str, Job]:
        return {name: configure({**settings, NOISE: noise}) for name, settings in variants.items()}

    noise = least_at(lambda value: composed([*noised(value).values()]), privacy.epsilon)
    if noise is None:
        raise PrivacyError(
            f"no noise keeps all trials, their initialisations included, within ε {privacy.epsilon:g}: try fewer"
        )
    jobs = noised(noise)
    return Tuning(
        name=sweep.name,
        sites=sweep.cells[0].sites,
        trials={name: {**settings, NOISE: noise} for name, settings in variants.items()},
        alone={name: composed([job]) for name, job in jobs.items()},
        epsilon=composed([*jobs.values()]),
        budget=privacy.epsilon,
        delta=privacy.delta,
        noise_multiplier=noise,
    )


def _checked(variants: Mapping[str, Mapping[str, Scalar]]) -> Job:
    """Return the first variant's configuration; ConfigError unless all can be trials of one choice."""
    jobs = {name: configure(settings) for name, settings in variants.items()}
    for name, job in jobs.items():
        if NOISE in variants[name]:
            raise ConfigError(f"variant {name!r} sets {NOISE}, which follows from ε here: leave it out")
        if not job.mechanism.charged or job.mechanism.summed:
            raise ConfigError(
                f"variant {name!r} has privacy.mode {job.mechanism.name!r}, whose price is not each site's own: choose "
                "under 'dp-sgd'"
            )
    complete = {name: job.settings() for name, job in jobs.items()}
    first, *others = complete
    for place, name in enumerate(others):
        if differing := [key for key in SAME if complete[name].get(key) != complete[first].get(key)]:
            raise ConfigError(f"{first!r} and {name!r} differ in {differing[0]}, in which no trial may: set it for all")
        if twin := [other for other in (first, *others[:place]) if complete[other] == complete[name]]:
            raise ConfigError(f"variants {twin[0]!r} and {name!r} have the same settings: leave one out, or change one")
    return jobs[first]


def composed(jobs: Sequence[Job]) -> float:
    """Return what these runs cost a site that joins every round, as its ledger prices them in this order."""
    releases = []
    for job in jobs:
        (plan,) = site_plans(job, [1])  # no figure of a release depends on how many records there are
        releases.append([*paid_before(job), plan.release(job.config.total_steps)])
    first_plan = commitment_to(releases[0], [])
    return price([release for of_run in releases for release in of_run], first_plan, jobs[0].config.privacy.delta)[0]


def tune(tuning: Tuning, output: Path, conduct: Conduct, say: Callable[[str], None]) -> tuple[Outcome, float]:
    """Run every trial that ``output`` lacks, in the file's order; return the best, and what all of them were charged.

    Each trial's folder is recorded as it ends, so the same call continues where it was cut off.

    Raises:
        ConfigError: ``output`` has other trials.
        RunFailed: a trial failed.
    """
    file, trials = output / STATE, {name: dict(settings) for name, settings in tuning.trials.items()}
    state: dict[str, Any] = json_of(file.read_bytes()) if file.is_file() else {"trials": trials, "folders": {}}
    if state["trials"] != trials:
        raise ConfigError(f"{output} holds other trials, which have been paid for: name another folder with --output")
    output.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    for number, (name, settings) in enumerate(trials.items(), 1):
        if name not in state["folders"]:
            state["folders"][name] = str(conduct(name, settings))
        outcomes.append(_outcome(name, Path(state["folders"][name])))
        replace_file(file, json.dumps(state, indent=2).encode())
        _write_price(tuning, outcomes, outcomes[-1:], None)
        say(f"{number}/{len(trials)} {outcomes[-1]}")
    labelled = TASKS[configure(settings).config.model.task].labelled
    # A model that diverged is no trial's best.
    best = min(outcomes, key=lambda o: -o.accuracy if labelled else o.loss if isfinite(o.loss) else inf)
    return best, _write_price(tuning, outcomes, outcomes, best)


def _outcome(name: str, folder: Path) -> Outcome:
    result = read_file(ResultFile, folder)
    reached = result.reached
    if reached is None or result.status == "failed":
        raise RunFailed(f"trial {name!r} failed ({result.reason or 'no result'}): {folder}")
    losses = [read_file(BaselineFile, folder).loss]
    losses += [line.loss for line in read_lines(RoundLine, folder) if line.complete and line.loss is not None]
    epsilon = inf if reached.epsilon is None else reached.epsilon
    judged_by = headline_of(read_file(ConfigFile, folder).settings)
    return Outcome(name, folder, reached.accuracy_before, reached.accuracy, losses[-1], epsilon, judged_by)


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


def _write_price(tuning: Tuning, paid: Sequence[Outcome], trials: Sequence[Outcome], best: Outcome | None) -> float:
    """Write the price of all trials beside these, make their reports again, and return it.

    Before the last trial it is what all will cost: a report that is given away earlier shows no less.
    """
    together = max(tuning.epsilon, *(outcome.epsilon for outcome in paid))
    for outcome in trials:
        content = TuningFile(len(tuning.trials), None if best is None else outcome is best, together, tuning.delta)
        replace_file(outcome.folder / TuningFile.NAME, json.dumps(finite(to_json(content)), indent=1).encode())
        write_reports(outcome.folder)
    return together

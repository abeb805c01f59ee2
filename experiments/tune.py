"""Trials of settings on the same records, every one of them charged in full, with the total known beforehand.

A choice between settings that looks at private results is a release too. Where only the best of many trials is
published, and how many there are is itself drawn at random, that choice can cost little more than one trial (Liu and
Talwar 2019, arXiv:1811.07971; Papernot and Steinke 2022, arXiv:2110.03620). That does not hold here: the server sees
every trial's rounds, so every trial is published. Its price is that of all trials, composed in one ledger a site.

The file::

    base = "job.toml"                     # settings of every trial; beside this file, or an absolute path
    sites = 4                             # simulated sites
    ledger-epsilon = 10.0                 # what a ledger may hold by the end, earlier runs included

    [settings]                            # laid over the base; privacy.epsilon is that of all trials together
    privacy.epsilon = 8.0

    [trials.slow]                         # a row each
    training.learning-rate = 0.5
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, inf, isfinite, log
from pathlib import Path
from typing import Any

from common.check import nearest
from common.config.sections import NO_ADAPTER, Scalar, method_of
from common.config.text import flatten, read_settings_file
from common.errors import ConfigError, DataError, PrivacyError, RunFailed
from common.files import finite, replace_file
from common.paths import RUN_NAME
from common.privacy.accounting import Release
from common.privacy.events import LEAST_NOISE, MOST_NOISE
from common.privacy.privacy_filter import commitment_to, price, promised
from common.run_lines import BaselineFile, ResultFile, RoundLine, TuningFile, read_file, read_lines
from common.strict_json import Endless, Measured, from_json, json_of, to_json
from common.tasks import TASKS
from common.toml import read_toml
from experiments.planner.price import paid_before, site_plans
from experiments.site_count import USUAL
from reports import write_reports
from strategies import STRATEGIES
from strategies.job import Job, configure, with_recipe

LEDGER = "ledger-epsilon"
KEYS = ("base", "sites", LEDGER, "settings", "trials")
NOISE, BUDGET, DELTA, MODE = "privacy.noise-multiplier", "privacy.epsilon", "privacy.delta", "privacy.mode"
OWN = {
    NOISE: "the least that keeps all trials together within privacy.epsilon",
    "output": "the option --output",
    "resume": "the same command again, which goes on",
}
"""Settings that the command gives every trial."""
SAME = (
    BUDGET,
    DELTA,
    MODE,
    "privacy.unit",
    "data.person",
    "data.name",
    "data.test",
    "data.test-size",
    "data.seed",
    "model.task",
)
"""Settings in which no trial may differ: what is paid, and what scores are compared on."""
STATE = "tune.json"
PRECISION = 1e-3
"""Of the noise multiplier, relative: it is at most so much above the least."""

Conduct = Callable[[str, Mapping[str, Scalar]], Path]
"""Run a trial by its name and settings, to its end, and return its folder."""


@dataclass(frozen=True)
class Trial:
    """One row of the file, with the noise that it will have."""

    name: str
    differs: dict[str, Scalar]
    """Its own settings."""
    settings: dict[str, Scalar]
    """All of them as asked, flat."""
    epsilon: float
    """What it would cost alone, at the run's delta."""


@dataclass(frozen=True)
class Tuning:
    """All trials with their price, before any of them."""

    name: str
    """Of the file."""
    sites: int
    trials: tuple[Trial, ...]
    noise_multiplier: float
    """The same in every trial."""
    epsilon: float
    """Of all of them together: what every site's ledger is charged."""
    budget: float
    """That all of them together keep."""
    ledger_epsilon: float
    """What a site's ledger may hold by the end, earlier runs included: every trial's own ``privacy.epsilon``."""
    delta: float
    unit: str


@dataclass(frozen=True)
class Outcome:
    """What a trial came to."""

    trial: str
    folder: str
    accuracy_before: float
    accuracy: float
    loss: Measured
    epsilon: Endless | None
    """By the ledgers, of everything that was charged by its end, this trial and those before it."""


@dataclass(frozen=True)
class State:
    """Content of ``tune.json``: what was asked for, and what has been run and paid for."""

    trials: dict[str, dict[str, Scalar]]
    """Each trial's settings."""
    outcomes: list[Outcome]


@dataclass(frozen=True)
class Tuned:
    """The end of a tuning."""

    outcomes: list[Outcome]
    best: Outcome
    by: str
    """The score that the choice was made by."""


def read_tuning(path: Path) -> Tuning:
    """Return the trials of a file with their price.

    Raises:
        ConfigError: the file cannot be read, has an unknown key, or one of its trials is no private run, or differs
            from the others in what none may differ in.
        PrivacyError: no noise keeps all trials within the budget.
    """
    content = read_toml(path, "the trials")
    try:
        sites, trials, base = _trials(content, path.parent)
        return _priced(path.stem, sites, trials, base, content.get(LEDGER))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _trials(content: Mapping[str, Any], folder: Path) -> tuple[int, dict[str, dict[str, Scalar]], dict[str, Scalar]]:
    for key in content:
        if key not in KEYS:
            raise ConfigError(f"unknown key {key!r}{nearest(key, KEYS)}; trials have {', '.join(KEYS)}")
    sites, named = content.get("sites", USUAL), content.get("base", "")
    if not isinstance(sites, int) or isinstance(sites, bool) or sites < 1:
        raise ConfigError(f"sites must be a whole number above 0, not {sites!r}")
    if not isinstance(named, str):
        raise ConfigError(f"base must be the path of a file with settings, not {named!r}")
    tables = content.get("trials", {})
    if not isinstance(tables, Mapping) or len(tables) < 2:
        raise ConfigError("a choice needs at least two trials: write a table each, [trials.NAME]")
    base = {**(read_settings_file(folder / named) if named else {}), **_flat(content.get("settings", {}), "settings")}
    trials = {name: _flat(table, f"trials.{name}") for name, table in tables.items()}
    for name, own in trials.items():
        if not RUN_NAME.fullmatch(name):
            raise ConfigError(f"trial {name!r} needs a plainer name: at most 64 letters, digits, '.', '_' and '-'")
        for key in own:
            if key in SAME:
                raise ConfigError(f"trials.{name} has {key!r}, which is the same for all: set it under settings")
    for name, own in trials.items():
        if twin := next((other for other in trials if other != name and trials[other] == own), ""):
            raise ConfigError(f"trials {name!r} and {twin!r} have the same settings: leave one out, or change one")
    return sites, trials, base


def _flat(table: Any, name: str) -> dict[str, Scalar]:
    if not isinstance(table, Mapping):
        raise ConfigError(f"{name} must be a table of settings, not {table!r}")
    flat = flatten(table)
    for key in flat:
        if key in OWN:
            raise ConfigError(f"{name} has {key!r}, which is given to every trial: it is {OWN[key]}")
    return flat


def _priced(
    name: str, sites: int, trials: Mapping[str, dict[str, Scalar]], base: Mapping[str, Scalar], asked_limit: Any
) -> Tuning:
    # The recipe is that of what all trials share, so that a trial changes its own settings alone.
    base, _ = with_recipe(base, sites=sites)
    asked = {trial: {**base, **own} for trial, own in trials.items()}
    jobs = {trial: configure(settings) for trial, settings in asked.items()}
    for trial, job in jobs.items():
        if not job.mechanism.charged:
            free = "whose budget is the server's, which trials do not count"
            why = free if job.mechanism.central else "which costs no budget"
            raise ConfigError(f"trial {trial!r} has privacy.mode {job.mechanism.name!r}, {why}")
        if job.mechanism.summed:
            raise ConfigError(
                f"trial {trial!r} has privacy.mode {job.mechanism.name!r}, where what all trials cost counts on honest "
                "sites, trial by trial: choose under 'dp-sgd'"
            )
    privacy, first = next(iter(jobs.values())).config.privacy, next(iter(jobs.values()))

    limit = privacy.epsilon if asked_limit is None else asked_limit
    if not isinstance(limit, int | float) or isinstance(limit, bool) or not privacy.epsilon <= limit < inf:
        raise ConfigError(
            f"{LEDGER} is {limit!r}: it is what a ledger may hold with all trials in it, so a number of at least "
            f"privacy.epsilon, {privacy.epsilon:g}"
        )

    def with_noise(noise: float) -> dict[str, Job]:
        return {trial: configure({**settings, NOISE: noise}) for trial, settings in asked.items()}

    starts = [release for job in jobs.values() for release in paid_before(job)]
    if promised(starts, privacy.delta)[0] >= privacy.epsilon:
        raise PrivacyError(
            f"no noise keeps all trials within privacy.epsilon = {privacy.epsilon:g}: what their starts release costs "
            "more by itself; try fewer, or raise it"
        )
    noise = _least(lambda value: composed(list(with_noise(value).values())), privacy.epsilon)
    held = with_noise(noise)
    return Tuning(
        name=name,
        sites=sites,
        trials=tuple(
            Trial(trial, own, {**asked[trial], NOISE: noise, BUDGET: float(limit)}, composed([held[trial]]))
            for trial, own in trials.items()
        ),
        noise_multiplier=noise,
        epsilon=composed(list(held.values())),
        budget=privacy.epsilon,
        ledger_epsilon=float(limit),
        delta=privacy.delta,
        unit=first.mechanism.claim.per,
    )


def releases_of(job: Job) -> list[Release]:
    """Return everything that one run releases of a site that joins every round, with the start that it pays for."""
    (plan,) = site_plans(job, [1])  # no figure of a release depends on how many records there are
    return [*paid_before(job), plan.release(job.config.total_steps)]


def composed(jobs: Sequence[Job]) -> float:
    """Return what these runs cost a site together, at their common delta: as its ledger prices them in this order."""
    privacy, first = jobs[0].config.privacy, releases_of(jobs[0])
    releases = [release for job in jobs for release in releases_of(job)]
    return price(releases, commitment_to(first, []), privacy.delta)[0]


def _least(cost: Callable[[float], float], budget: float) -> float:
    """Return a noise multiplier at which ``cost`` is within ``budget``, at most ``PRECISION`` above the least.

    Raises:
        PrivacyError: there is none that an honest job has.
    """
    from scipy.optimize import brentq

    low, high = LEAST_NOISE, 1.0
    while cost(high) > budget:
        low, high = high, 2 * high
        if high >= MOST_NOISE:
            raise PrivacyError(
                f"no noise below {MOST_NOISE:g} keeps all trials within privacy.epsilon = {budget:g}: try fewer, or "
                "raise it"
            )
    if cost(low) <= budget:
        return low
    # Both on logarithms, on which a cost is nearly a line.
    root = brentq(lambda x: log(cost(exp(x)) / budget), log(low), log(high), xtol=PRECISION / 8, rtol=1e-9)
    noise = exp(float(root))
    while cost(noise) > budget:
        noise *= 1 + PRECISION / 4
    return noise


def conduct_trials(tuning: Tuning, output: Path, conduct: Conduct, say: Callable[[str], None]) -> Tuned:
    """Run every trial that ``output`` has no outcome of, in the file's order, and return them with the best.

    What has been run is written down after each, so the same call goes on where it was cut off: no trial is paid twice.

    Args:
        tuning: the trials.
        output: folder of the state; made.
        conduct: runs one.
        say: told a line a trial.

    Raises:
        ConfigError: ``output`` holds other trials.
        RunFailed: a trial failed.
        DataError: the report of a trial cannot be written.
    """
    output.mkdir(parents=True, exist_ok=True)
    place, asked = output / STATE, {trial.name: trial.settings for trial in tuning.trials}
    held = _state(place) if place.is_file() else State(asked, [])
    if held.trials != asked:
        raise ConfigError(
            f"{place} is of other trials, which have been paid for: name another folder with --output, and know that "
            "the ledgers of simulated sites begin anew there"
        )
    outcomes = list(held.outcomes)
    if outcomes:
        say(f"{len(outcomes)} of {len(asked)} trials are there already")
    for number, trial in enumerate(tuning.trials, 1):
        if trial.name in {outcome.trial for outcome in outcomes}:
            continue
        outcomes.append(_outcome(trial.name, conduct(trial.name, trial.settings)))
        replace_file(place, (json.dumps(finite(to_json(State(asked, outcomes))), indent=2) + "\n").encode())
        _tell(tuning, outcomes, outcomes[-1:], None)
        say(f"{number}/{len(asked)} {trial.name}: {score_words(outcomes[-1])}")
    labelled = TASKS[configure(tuning.trials[0].settings).config.model.task].labelled
    # A model that diverged is no trial's best.
    key: Callable[[Outcome], float] = (lambda o: -o.accuracy) if labelled else _finite_loss
    best = min(outcomes, key=key)
    _tell(tuning, outcomes, outcomes, best)
    return Tuned(outcomes, best, "accuracy" if labelled else "loss")


def _finite_loss(outcome: Outcome) -> float:
    return outcome.loss if isfinite(outcome.loss) else inf


def _tell(tuning: Tuning, paid: Sequence[Outcome], whom: Sequence[Outcome], best: Outcome | None) -> None:
    """Lay the price of all trials beside these, and make their reports anew.

    Before the last trial it is what all will cost: a report that is given away meanwhile tells no less.
    """
    by_ledgers = [outcome.epsilon for outcome in paid if outcome.epsilon is not None]
    together = max([tuning.epsilon, *by_ledgers])
    for outcome in whom:
        chosen = None if best is None else outcome.trial == best.trial
        told = TuningFile(len(tuning.trials), chosen, together, tuning.delta)
        text = json.dumps(finite(to_json(told)), indent=1) + "\n"
        replace_file(Path(outcome.folder) / TuningFile.NAME, text.encode())
        write_reports(Path(outcome.folder))


def _state(path: Path) -> State:
    try:
        return from_json(State, json_of(path.read_bytes()), str(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({' '.join(str(error).split())}): mend it, or move it away") from error


def score_words(outcome: Outcome) -> str:
    """Return a trial's scores in words."""
    from common.words import decimal_text, percent_text

    return (
        f"accuracy {percent_text(outcome.accuracy)} ({percent_text(outcome.accuracy_before)} before), "
        f"loss {decimal_text(outcome.loss, 4)}"
    )


def _outcome(trial: str, folder: Path) -> Outcome:
    result, baseline = read_file(ResultFile, folder), read_file(BaselineFile, folder)
    if result.reached is None or result.status == "failed":
        raise RunFailed(f"trial {trial!r} failed ({result.reason or 'no result'}): {folder}")
    scored = [line.loss for line in read_lines(RoundLine, folder) if line.complete and line.loss is not None]
    reached = result.reached
    loss = scored[-1] if scored else baseline.loss
    return Outcome(trial, str(folder), reached.accuracy_before, reached.accuracy, loss, reached.epsilon)


def own_folders(trial: str) -> set[str]:
    """Return what the folder of a trial's run may be called: by what it trains, and its own name."""
    return {f"{method_of(strategy, adapter)}-{trial}" for strategy in STRATEGIES for adapter in ("auto", NO_ADAPTER)}


def simulated(tuning: Tuning, output: Path) -> Conduct:
    """Return what runs a trial over simulated sites, whose ledgers are the same for all trials."""
    from experiments.in_process import run_in_process, simulated_nodes
    from server.checkpoint import NAME as CHECKPOINT

    def conduct(trial: str, settings: Mapping[str, Scalar]) -> Path:
        place = (output / "runs").absolute()
        # By the whole name: of trials "fast" and "not-fast" one ends in the other.
        begun = [path.parent for path in place.glob(f"*/{CHECKPOINT}") if path.parent.name in own_folders(trial)]
        if begun and (begun[0] / ResultFile.NAME).is_file() and read_file(ResultFile, begun[0]).status == "completed":
            return begun[0]
        resumed: dict[str, Scalar] = {"resume": str(begun[0])} if begun else {}
        nodes = simulated_nodes(tuning.sites, output.absolute() / "ledgers")
        return run_in_process({**settings, "output": str(place), **resumed}, nodes, trial)

    return conduct


def deployed(server: Path, sites: int, patience: float, say: Callable[[str], None]) -> Conduct:
    """Return what submits a trial to a server's own sites; their ledgers hold all of them together."""
    from deploy.server_folder import open_server
    from deploy.submit import submit

    folder = open_server(server)

    def conduct(_: str, settings: Mapping[str, Scalar]) -> Path:
        return submit(folder, settings, say, sites=sites, patience=patience, once=True)

    return conduct


def spent(output: Path, delta: float) -> dict[str, float]:
    """Return what each simulated site has spent in all, by its ledger."""
    from client.ledger.ledger import Ledger

    found: dict[str, float] = {}
    for path in sorted((output / "ledgers").glob("*.sqlite")):
        with Ledger(path) as ledger:
            for dataset in sorted({entry.dataset for entry in ledger.entries()}):
                found[dataset] = ledger.epsilon(dataset, delta)
    if not found:
        raise DataError(f"{output} holds no ledger: nothing was charged there")
    return found

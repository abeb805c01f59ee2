"""The policy file that ``fedveil site init`` writes."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING

from fedveil.common.config.fields import kebab
from fedveil.common.config.flat import Scalar, options_of, task_of
from fedveil.common.config.run import RunConfig
from fedveil.common.config.sections import DataConfig, ModelConfig
from fedveil.common.config.text import to_toml
from fedveil.common.docstrings import fields_said
from fedveil.common.errors import ConfigError
from fedveil.common.labels import labels_of, labels_text
from fedveil.privacy import MECHANISMS, trusting_the_server
from fedveil.privacy.record_level import DPSGD
from fedveil.privacy.units import PERSON

if TYPE_CHECKING:
    from fedveil.strategies.job import Job

BUDGET_HEAD = """\
# The budget counts all runs on these records, of every server.
"""
HEAD = f"""\
# What the data steward of this site allows. Where a job's figures are laxer, the site takes these; what it forbids
# it refuses before a record is read.
{BUDGET_HEAD}"""
MECHANISMS_HEAD = """\
# How a run must protect the records, as its privacy.mode. A run of any other mechanism is refused.
"""
TRUSTING = """\
# In runs of {names} the server gets what this site computes without noise: no record is protected from it.
"""
PINS_HEAD = """\
# What the records are for. A job that asks for another task, other columns or labels, or longer records is refused.
"""

OTHERS_HEAD = """\
# Every other key, each with an example: take the sign "#" before it away to set it.
"""
EXAMPLES: Mapping[str, Scalar | Sequence[str]] = {
    "unit": PERSON.name,
    "person": "patient",
    "records-per-person": 8,
    "epsilon-person": 8.0,
    "public-size": 1000,
    "min-noise-multiplier": 1.0,
    "sample-rate": 0.33,
    "max-rounds": 100,
    "max-steps": 1000,
    "strategies": ["fedavg-lora"],
    "head-policies": ["trained"],
    "votes": ["library"],
    "models": ["NAME=FINGERPRINT+FILES"],
    "projects": ["stroke"],
    "bundles": ["SHA-256"],
    "line-breaks": True,
    "send-noised-metrics": False,
    "metrics-noise": 30.0,
    "reply-after": 60.0,
    "honest-sites": 2,
    "epsilon-alone": 8.0,
    "peers": "peers.toml",
    "peers-hash": "SHA-256",
    "allow-no-privacy": False,
    "after-no-privacy": False,
}
"""Of keys that ``fedveil site init`` need not write; the pins are those that are not here."""

Pins = Mapping[str, Scalar | Sequence[str]]
"""A policy's pins by their keys."""


def policy_text(
    dataset: str,
    public_size: int,
    epsilon: float,
    delta: float,
    pins: Pins | None = None,
    models: Sequence[str] = (),
    mechanisms: Sequence[str] = (DPSGD.name,),
    person: str = "",
    sums: Mapping[str, Scalar] | None = None,
) -> str:
    """Return a policy's text: the budget of one data set, how it is protected, and what its records are for.

    Args:
        dataset: the ledger's name for the records.
        public_size: declared number of records, or persons; 0 leaves it to the node's settings.
        epsilon, delta: budget over all runs.
        pins: what the records are for; without them they are a part of a public data set.
        models: allowed base models, as ``models_of`` returns them; empty: those that FedVeil knows by hash.
        mechanisms: names of the allowed ones; at least one.
        person: column of the person where persons are protected; empty: records are.
        sums: the policy's keys about secure sums; without them the site joins none.

    Raises:
        ConfigError: a site with this policy would refuse every round.
    """
    from fedveil.client.policy_file import parse_policy  # imports torch: seconds that only this needs

    settings: dict[str, Scalar | Sequence[str]] = {"dataset-id": dataset, "epsilon": epsilon, "delta": delta}
    settings |= {"unit": PERSON.name, "person": person} if person else {}
    settings |= {"public-size": public_size} if public_size else {}
    settings |= {"models": models} if models else {}
    trusting = trusting_the_server(mechanisms)
    protection = MECHANISMS_HEAD + (TRUSTING.format(names=", ".join(trusting)) if trusting else "")
    protection += to_toml({"mechanisms": mechanisms, **(sums or {})})
    pinned = PINS_HEAD + to_toml(pins) if pins else ""
    text = HEAD + to_toml(settings) + protection + pinned + _others({*settings, *(sums or {})})
    parse_policy(text, "that would be written").check_size(public_size or 1)
    return text


def _others(written: Collection[str]) -> str:
    """Return the keys that are not ``written`` as comments: what each says, and an example."""
    from fedveil.client.policy import Policy  # imports torch

    code = re.compile("``([^`]*)``")
    said = {
        kebab(name): code.sub(lambda found: f"'{found[1].replace('_', '-')}'", text)
        for name, text in fields_said(Policy).items()
    }
    lines = [
        line
        for key, example in EXAMPLES.items()
        if key not in written
        for line in (*wrap(said[key], 118, initial_indent="# ", subsequent_indent="# "), f"#{to_toml({key: example})}")
    ]
    return OTHERS_HEAD + "".join(line.rstrip("\n") + "\n" for line in lines)


def pins_of(task: str, columns: Mapping[str, Scalar], labels: str, max_length: int) -> Pins:
    """Return the pins of a task.

    Args:
        task, labels, max_length: as ``model.task``, ``data.labels`` and ``model.max-length``.
        columns: by setting; one that is left out has a job's default. Also the task's options, each by its key.

    Raises:
        ConfigError: the task is unknown, lacks labels, or does not read a given column or labels.
    """
    from fedveil.client.pins import LABELS, MAX_LENGTH, TASK

    ModelConfig(task=task, max_length=max_length)
    kind = task_of({"model.task": task, **{key: value for key, value in columns.items() if "." in key}})
    defaults: Mapping[str, Scalar] = {**DataConfig().columns, **options_of(kind)}
    read = [*(role.setting for role in kind.roles), *options_of(kind)]
    for setting in (*columns, *([LABELS] if labels else ())):
        if setting not in read and not (setting == LABELS and kind.labelled):
            raise ConfigError(f"--{setting} is given, which the task {task!r} does not read: leave it out")
    if kind.labelled and not labels:
        raise ConfigError("--labels is needed: name all labels in the job's order, such as --labels bad,good")
    pins: dict[str, Scalar | Sequence[str]] = {TASK: task}
    pins |= {setting: columns.get(setting, defaults[setting]) for setting in read}
    if kind.labelled:
        pins[LABELS] = list(labels_of(labels))
    return {**pins, MAX_LENGTH: max_length}


def pins_of_job(job: Job) -> Pins:
    """Return the pins with which a site takes part in a job.

    Raises:
        ConfigError: the job says neither its labels nor a data set that FedVeil names.
    """
    from fedveil.common.data.sources import known_labels

    task, config = job.task, job.config
    labels = labels_text(known_labels(config.data)) if task.labelled else ""
    if task.labelled and not labels:
        raise ConfigError(f"the labels of {config.data.name!r} are not known to a policy: name all in data.labels")
    columns = {role.setting: config.data.columns[role.setting] for role in task.roles}
    return pins_of(task.name, {**columns, **options_of(task)}, labels, config.model.max_length)


def mechanisms_of_job(config: RunConfig) -> list[str]:
    """Return the ``mechanisms`` of a policy that lets a job in whose rounds the site's ledger pays; else the usual one.

    So a steward writes down a mechanism that protects nothing from the server.
    """
    mode = config.privacy.mode
    return [mode if MECHANISMS[mode].charged else DPSGD.name]


def models_of(name: str, fingerprint: str) -> list[str]:
    """Return the entry of a policy's ``models`` for a base model; none for one whose files FedVeil knows by hash.

    Raises:
        ConfigError: it is another model, and its fingerprint (FINGERPRINT+FILES) is not given.
    """
    from fedveil.common.model.named import NAMED_MODELS

    if not fingerprint and name not in NAMED_MODELS:
        raise ConfigError(
            f"the fingerprint of the base model {name!r} is needed: the coordinator's 'fedveil doctor' shows it"
        )
    return [f"{name}={fingerprint}"] if fingerprint else []

"""Pins: the one question that a site's records answer, in the steward's own words.

A server that names the columns, the labels or their order asks about records with every job: what it sends back
follows from them, and so does what fails. So a policy pins the kind of task with its options, each column that the
task reads (``common.tasks.roles``), the labels and the longest length, and a job that asks for anything else is
refused before a record is read. Records that belong to no one, those of a data set that FedVeil names, need no pins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedveil.common.check import not_negative, one_of
from fedveil.common.config.flat import Columns, options_of
from fedveil.common.config.run import RunConfig
from fedveil.common.config.sections import ModelConfig
from fedveil.common.data.sources import known_labels
from fedveil.common.errors import ConfigError, PolicyRefusal
from fedveil.common.labels import labels_of, labels_text
from fedveil.common.tasks import TASKS, Task, roles_of_all

if TYPE_CHECKING:
    from fedveil.client.policy import Policy

LABELS, MAX_LENGTH, TASK = "labels", "max-length", "task"


def pin_keys() -> tuple[str, ...]:
    """Return the keys of all pins that a policy can have, in the order in which they are written."""
    options = (key for task in TASKS.values() for key in options_of(task))
    return (TASK, *(role.setting for role in roles_of_all()), LABELS, *options, MAX_LENGTH)


def unpinned_columns() -> Columns:
    """Return the columns, and the options of tasks, of a policy that pins none."""
    return Columns({key: "" for key in pin_keys() if key not in (TASK, LABELS, MAX_LENGTH)})


def keys_of(task: str) -> tuple[str, ...]:
    """Return the pins of a kind of task."""
    labels = (LABELS,) if TASKS[task].labelled else ()
    return (TASK, *(role.setting for role in TASKS[task].roles), *labels, *options_of(TASKS[task]), MAX_LENGTH)


def check_whole(policy: Policy) -> None:
    """Raise ConfigError unless the policy pins all that one kind of task reads, or nothing at all."""
    not_negative(max_length=policy.max_length)
    set_here = [key for key in pin_keys() if _own(policy, key)]
    if not set_here:
        return
    if not policy.task:
        raise ConfigError(f"{set_here[0]} is pinned, but task is not: name the kind of task, {' or '.join(TASKS)}")
    one_of(TASKS, task=policy.task)
    optional = {role.setting for role in TASKS[policy.task].roles if role.optional}
    optional |= {key for key, usual in options_of(TASKS[policy.task]).items() if usual == ""}
    lacking = [key for key in keys_of(policy.task) if key not in (*set_here, *optional)]
    if lacking:
        raise ConfigError(f"task is pinned, but {', '.join(lacking)} is not: a policy pins all that a task reads")
    foreign = [key for key in set_here if key not in keys_of(policy.task)]
    if foreign:
        raise ConfigError(f"{foreign[0]} is pinned, which the task {policy.task!r} does not read: remove it")
    labels = _labels(policy)
    if TASKS[policy.task].labelled and (len(labels) < 2 or len(set(labels)) < len(labels)):
        raise ConfigError(f"labels are {', '.join(labels)}: name at least 2 different ones, in the job's order")


def check_pins(policy: Policy, config: RunConfig, task: Task, *, private: bool, place: str = "POLICY") -> None:
    """Raise PolicyRefusal unless the run asks exactly what the policy pins.

    Args:
        policy: the steward's rules.
        config: the run.
        task: the run's, with its options.
        private: whether the records are anybody's. Then a policy without pins refuses every run.
        place: what the steward's command is to change, for the message.
    """
    if not policy.task:
        if private:
            raise PolicyRefusal(unpinned(place))
        return
    _same(TASK, policy.task, "model.task", config.model.task)
    for role in task.roles:
        own, asked = _own(policy, role.setting), config.data.columns[role.setting]
        _same(role.setting, own, f"data.{role.setting}", asked)
    for key, value in options_of(task).items():
        _same(key, _own(policy, key), key, str(value))
    if task.labelled:
        _same(LABELS, labels_text(_labels(policy)), "data.labels", labels_text(known_labels(config.data)))
    if config.model.max_length > policy.max_length:
        raise refusal(MAX_LENGTH, policy.max_length, f"model.max-length = {config.model.max_length}")


def unpinned(place: str, task: str = "") -> str:
    """Return why a policy without pins governs no private records, with the command that adds them."""
    return (
        "the site's policy does not pin which task, columns and labels its records are for, so that a server could ask "
        f"them anything; pin your own: {pin_command(place, task)}"
    )


def pin_command(place: str, task: str = "") -> str:
    """Return the command that pins a task, with a job's default columns and, as an example, two labels."""
    kind = TASKS[task if task in TASKS else next(iter(TASKS))]
    columns = " ".join(f"--{role.setting} {role.setting}" for role in kind.roles if role.column)
    labels = next((f" --{LABELS} {role.labels.example}" for role in kind.roles if role.labels), "")
    length = ModelConfig().max_length
    return f"fedveil site pin {place} --{TASK} {kind.name} {columns}{labels} --{MAX_LENGTH} {length}"


def spoken(policy: Policy) -> str:
    """Return a policy's pins in words; an empty text if it has none.

    >>> from fedveil.client.policy import Policy
    >>> from fedveil.common.config.sections import Columns
    >>> columns = Columns({"prompt": "question", "completion": "answer"})
    >>> spoken(Policy(task="causal-lm", columns=columns, max_length=64))
    "task 'causal-lm', prompt 'question', completion 'answer', template '', max-length 64"
    """
    if not policy.task:
        return ""
    values = {key: _labels(policy) if key == LABELS else _own(policy, key) for key in keys_of(policy.task)}
    return ", ".join(
        f"{key} {', '.join(map(repr, value)) if isinstance(value, tuple) else repr(value)}"
        for key, value in values.items()
    )


def refusal(rule: str, own: object, asked: str) -> PolicyRefusal:
    """Return the refusal by a rule, with both values."""
    return PolicyRefusal(f"the site's policy has {rule} = {own}; the run asks for {asked}")


def _own(policy: Policy, key: str) -> str | int:
    if key in policy.columns:
        return policy.columns[key]
    value: str | int = getattr(policy, key.replace("-", "_"))
    return value


def _labels(policy: Policy) -> tuple[str, ...]:
    return labels_of(policy.labels)


def _same(rule: str, own: str | int, setting: str, asked: str) -> None:
    if own != asked:
        raise refusal(rule, repr(own), f"{setting} = {asked!r}")

"""The tables of the axes in docs, made from the code; tests keep the pages equal."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from fedveil.common.adapters import ADAPTERS, Adapter
from fedveil.common.config.flat import defaults
from fedveil.common.config.run import RunConfig
from fedveil.common.config.sections import TrainingConfig
from fedveil.common.data.named import DATASETS, UserFile
from fedveil.common.docstrings import said_of
from fedveil.common.errors import ConfigError
from fedveil.common.starts import STARTS, Start
from fedveil.common.tasks import TASKS
from fedveil.demo.packaged import PackagedFile, PackagedTree
from fedveil.privacy import MECHANISMS
from fedveil.strategies import STRATEGIES, Strategy
from fedveil.strategies.base import check_adapter, is_exact
from fedveil.strategies.payload import payload, preset_adapter
from fedveil.strategies.rules import RULES

DEFAULT_SHAPES: Sequence[tuple[int, int]] = ((384, 384),) * 12
"""(m, n) of the plain job's layers: query and value of MiniLM's six blocks."""
DEFAULT_RANK = 8
SHOWN_LABELS = 6
"""Labels of a data set that its table lists."""


def strategy_table() -> str:
    """Return the Markdown table of all strategies, each with the adapter that it takes by default."""
    header = ("strategy", "adapter", "trained", "up, B", "down, B", "exact", "noise in the weights, per step", "modes")
    rows = []
    for strategy in STRATEGIES.values():
        adapter = preset_adapter(strategy, DEFAULT_RANK)
        down, up = payload(strategy(), adapter, DEFAULT_SHAPES)
        exact = "yes" if is_exact(strategy, type(adapter)) else "no"
        names = [f"`{strategy.name}` ({strategy.facts.paper})", f"`{adapter.name}`", ", ".join(adapter.trained)]
        rows.append(
            [*names, f"{up:,}", f"{down:,}", exact, strategy.facts.noise or adapter.traits.noise, modes_of(strategy)]
        )
    return markdown(header, rows)


def modes_of(strategy: type[Strategy]) -> str:
    """Return the values of ``privacy.mode`` whose runs may have a strategy, by its own check, at one plain step."""
    config, modes = RunConfig(training=TrainingConfig(local_steps=1, optimizer="sgd", weight_decay=0.0)), []
    for mechanism in MECHANISMS.values():
        privacy = replace(config.privacy, mode=mechanism.name, unit=mechanism.unit.name)
        with suppress(ConfigError):
            strategy().check(replace(config, privacy=privacy))
            modes.append(mechanism.name)
    return ", ".join(modes)


def adapter_table() -> str:
    """Return the Markdown table of all adapters."""
    header = ("adapter", "trained", "frozen", "linear in what is trained", "noise in the weights, per step")
    rows = []
    for adapter in ADAPTERS.values():
        traits = adapter.traits
        trained, frozen = (", ".join(names) or "none" for names in (adapter.trained, adapter.frozen))
        rows.append([f"`{adapter.name}`", trained, frozen, "yes" if traits.linear else "no", traits.noise])
    return markdown(header, rows)


def pair_table() -> str:
    """Return the Markdown table of every adapter that each strategy takes, its own first."""
    header = ("strategy", "adapter", "trained", "frozen", "averages are exact", "up, B", "down, B")
    rows = []
    for strategy in STRATEGIES.values():
        own = ADAPTERS[strategy.adapters.default]
        for adapter in (own, *(other for other in ADAPTERS.values() if other is not own)):
            if not _takes(strategy, adapter):
                continue
            down, up = payload(strategy(), adapter(DEFAULT_RANK, float(DEFAULT_RANK), ()), DEFAULT_SHAPES)
            said = f"`{adapter.name}`" + (" (its own)" if adapter is own else "")
            factors = [", ".join(adapter.trained), ", ".join(adapter.frozen) or "none"]
            exact = "yes" if is_exact(strategy, adapter) else "no"
            rows.append([f"`{strategy.name}`", said, *factors, exact, f"{up:,}", f"{down:,}"])
    return markdown(header, rows)


def _takes(strategy: type[Strategy], adapter: type[Adapter]) -> bool:
    try:
        check_adapter(strategy, adapter)
    except ConfigError:
        return False
    return True


def start_table() -> str:
    """Return the Markdown table of all starts."""
    header = ("`adapter.start`", "what it is", "made from", "round 0 asks", "gives", "options under `start`")
    return markdown(header, [_start_row(start) for start in STARTS.values()])


def _start_row(start: type[Start]) -> list[str]:
    options = ", ".join(f"`{name} = {_toml(value)}`" for name, value in defaults(start).items())
    cells = [f"`{start.name}`", said_of(start), start.needs, start().asked, _given(start)]
    return [*cells, options or "none"]


def _given(start: type[Start]) -> str:
    asked = start().asked != "nobody"
    return ", ".join(f"{name} (seed)" if asked and name in start.from_seed else name for name in start.gives)


def rule_table() -> str:
    """Return the Markdown table of all rules around the server's optimiser."""
    rows = []
    for name, rule in RULES.items():
        options = ", ".join(f"`{name}.{key} = {_toml(value)}`" for key, value in defaults(rule).items())
        called = f"`{name}`" + (f" ({rule.paper})" if rule.paper else "")
        rows.append([called, said_of(rule), rule.noise, options or "none"])
    return markdown(("`server.rule`", "what it is", "noise of a plain step in the weights", "options"), rows)


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def task_table() -> str:
    """Return the Markdown table of all tasks."""
    header = ("`model.task`", "what it is", "columns it reads (`data.*`)", "labels and a head", "a noised count")
    rows = []
    for task in TASKS.values():
        columns = ", ".join(f"`{role.setting}`" + (" (optional)" if role.optional else "") for role in task.roles)
        flags = ["yes" if flag else "no" for flag in (task.labelled, task.counted)]
        rows.append([f"`{task.name}`", said_of(type(task)), columns, *flags])
    return markdown(header, rows)


def dataset_table() -> str:
    """Return the Markdown table of all data sets that have a name."""
    header = ("`data.name`", "`model.task`", "labels", "package, not imported, or your file")
    rows = []
    for dataset in DATASETS.values():
        file, labels = dataset.file, dataset.label_names
        place = f"`{file.path}`" if isinstance(file, UserFile) else ""
        if isinstance(file, PackagedFile | PackagedTree):
            place = f"`{file.distribution}` {file.version}"
        named = ", ".join(labels[:SHOWN_LABELS]) + (f", … ({len(labels)})" if len(labels) > SHOWN_LABELS else "")
        rows.append([f"`{dataset.name}`", f"`{dataset.task}`", named or "none", place])
    return markdown(header, rows)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table.

    >>> print(markdown(("a", "b"), [("1", "x|y")]))
    | a | b |
    |---|---|
    | 1 | x\\|y |
    """
    lines = [header, *rows]
    shown = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines]
    return "\n".join([shown[0], "|" + "---|" * len(header), *shown[1:]])

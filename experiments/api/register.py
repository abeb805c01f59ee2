"""Registration of a user's own rows, for simulations in this process."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, MutableMapping
from importlib.metadata import entry_points
from typing import Any, TypeVar

from fedveil.common.adapters import ADAPTERS, ALIASES, Adapter
from fedveil.common.check import PLAIN_NAME
from fedveil.common.errors import ConfigError
from fedveil.common.registered import note_registered, registered_rows
from fedveil.common.starts import STARTS, PaidStart, Start
from fedveil.common.tasks import TASKS, Task
from fedveil.common.trackers import NO_TRACKER, TRACKERS, Tracker
from fedveil.strategies import CONTROLS, STRATEGIES, Strategy
from fedveil.strategies.options import known_settings
from fedveil.strategies.recipes import AUTO
from fedveil.strategies.rules import RULES, ServerRule

KINDS: dict[str, tuple[type[Any], MutableMapping[str, Any]]] = {
    "strategy": (Strategy, STRATEGIES),
    "adapter": (Adapter, ADAPTERS),
    "task": (Task, TASKS),
    "start": (Start, STARTS),
    "rule": (ServerRule, RULES),
    "tracker": (Tracker, TRACKERS),
}
"""What can be registered: its base class, and the table that it becomes a row of."""
GROUP = "fedveil.rows"
"""The entry points in which an installed package names rows of its own, for simulations: each row's name and class."""
NAMING = ("strategy", "adapter.name", "model.task", "adapter.start", "server.rule", "tracker")
"""Settings that name a row, one for each of ``KINDS``."""
T = TypeVar("T", bound=type[Any])


def register(row: T) -> T:
    """Make a class of your own a row that settings can name, in simulations of this process; return the class.

    ::

        @fedveil.register
        @dataclass(frozen=True)
        class Halved(Average):
            name = "halved"
            ...


        fedveil.run("reviews.csv", strategy="halved")

    A deployed site or server refuses to go on in a process with such a row: carry it there as a row of ``contrib``.
    What protects records cannot be registered: no mechanism, accountant, source of noise, paid start or public data.

    Args:
        row: a subclass of ``Strategy``, ``Adapter``, ``Task``, ``Start``, ``ServerRule`` or ``Tracker``, of which
            ``help(fedveil.strategies.base.Strategy)`` prints the members. Registered again, as by a cell that is run
            twice, the new class takes the place of the old one.

    Raises:
        ConfigError: it is none of these or not whole, or FedVeil has a row or a setting of its name.
    """
    kind, table = _kind_of(row)
    _check_whole(kind, row)
    name = getattr(row, "name", None)
    if not isinstance(name, str) or not PLAIN_NAME.fullmatch(name) or "." in name:
        raise ConfigError(f"{row.__name__} needs a name of letters, digits, '_' and '-', such as name = 'mine'")
    said = f"{kind} {name!r}"
    if said in registered_rows():
        del table[name]
    _check_free(kind, name, table)
    table[name] = row() if kind == "task" else row
    note_registered(said)
    return row


def register_named(settings: Mapping[str, object]) -> None:
    """Register the rows of other installed packages that a simulation's settings name, and load no other.

    Raises:
        ConfigError: ``register`` refuses one, its class has another name, or a package cannot be loaded.
    """
    named = {settings[key] for key in NAMING if key in settings}
    for point in entry_points(group=GROUP):
        if point.name in named:
            whose = f"the package {point.dist.name if point.dist else point.module!r}"
            try:
                row = point.load()
            except (ImportError, AttributeError) as error:
                raise ConfigError(f"{whose} names a row {point.name!r} that cannot be loaded: {error}") from error
            if getattr(row, "name", None) != point.name:
                raise ConfigError(f"{whose} names a row {point.name!r} whose own name is another: write one in both")
            register(row)


def _not_declared(row: type[Any]) -> set[str]:
    """Return the class attributes that a row's bases declare without a value, and nobody gives one; but the name."""
    declared = {
        name
        for base in row.__mro__
        for name, kind in inspect.get_annotations(base).items()
        if str(kind).startswith(("ClassVar", "typing.ClassVar"))
    }
    return {name for name in declared - {"name"} if not hasattr(row, name)}


def _kind_of(row: object) -> tuple[str, MutableMapping[str, Any]]:
    kinds = ", ".join(base.__name__ for base, _ in KINDS.values())
    if not isinstance(row, type):
        raise ConfigError(f"{row!r} cannot be registered: give a subclass of {kinds}")
    if issubclass(row, PaidStart):
        raise ConfigError(f"{row.__name__} adds noise of its own, and what protects records cannot be registered")
    for kind, (base, table) in KINDS.items():
        if issubclass(row, base):
            return kind, table
    raise ConfigError(f"{row.__name__} cannot be registered: only a subclass of {kinds} can, and nothing that protects")


def _check_whole(kind: str, row: type[Any]) -> None:
    declared = () if kind == "tracker" else _not_declared(row)
    if missing := sorted({*getattr(row, "__abstractmethods__", ()), *declared}):
        base = KINDS[kind][0]
        more = f"help({base.__module__}.{base.__name__}) says what it is"
        raise ConfigError(f"{row.__name__} does not define {', '.join(missing)}: {more}")


def _check_free(kind: str, name: str, table: MutableMapping[str, Any]) -> None:
    taken = {"strategy": {*CONTROLS}, "adapter": {*ALIASES}, "tracker": {NO_TRACKER}}
    sections = {key.partition(".")[0] for key in known_settings()} - {*STRATEGIES, *RULES}
    options = {*STRATEGIES, *CONTROLS, *RULES} if kind in ("strategy", "rule") else set()
    if name in {*table, *taken.get(kind, ()), *sections, *options, AUTO}:
        raise ConfigError(f"{name!r} is a name that FedVeil has: give the {kind} another one")

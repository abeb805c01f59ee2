"""The composition of a run: its checked settings, and the strategy and adapter that they name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from common.adapters import ADAPTERS, ALIASES, Adapter, build_adapter
from common.check import nearest, one_of
from common.config.sections import RunConfig, Scalar, defaults, from_mapping, from_section, to_mapping
from common.errors import ConfigError
from common.messages.state import AdapterState
from strategies import STRATEGIES
from strategies.base import ServerState, Strategy


@dataclass(frozen=True)
class Job:
    """A checked run: its configuration, and the strategy and adapter that it names."""

    config: RunConfig
    strategy: Strategy
    adapter: Adapter

    def start(self, adapter: AdapterState) -> ServerState:
        """Return the server's state before anything is trained, from the adapter's start and the head's."""
        return self.strategy.start(adapter, self.adapter.trained)

    def settings(self) -> dict[str, Scalar]:
        """Return every setting of the run, flat, as written beside its results."""
        return {**to_mapping(self.config), **to_mapping(self.strategy, f"{self.strategy.name}.")}


def known_settings() -> dict[str, Scalar]:
    """Return every setting that exists with its default: the run's, and every strategy's own."""
    known = defaults()
    for name, strategy in STRATEGIES.items():
        known.update({f"{name}.{key}": value for key, value in defaults(strategy).items()})
    return known


def configure(values: Mapping[str, Scalar]) -> Job:
    """Check the flat settings of a run and build its strategy and adapter.

    An adapter called by an alias has its own name in the result.

    Raises:
        ConfigError: a key is unknown (the nearest known one is named), ill-typed or out of range,
            or strategy, adapter and privacy do not fit together.
    """
    known = known_settings()
    for key in values:
        if key not in known:
            raise ConfigError(f"unknown setting {key!r}{nearest(key, known)}")
    sections = tuple(f"{name}." for name in STRATEGIES)
    config = from_mapping({key: value for key, value in values.items() if not key.startswith(sections)})
    asked = config.adapter.name
    config = replace(config, adapter=replace(config.adapter, name=ALIASES.get(asked, asked)))
    one_of(STRATEGIES, strategy=config.strategy)
    strategy = from_section(STRATEGIES[config.strategy], values, f"{config.strategy}.")
    strategy.check(private=config.privacy.on)
    name = strategy.adapter if config.adapter.name == "auto" else config.adapter.name
    one_of(ADAPTERS, adapter__name=name)
    strategy.check_adapter(ADAPTERS[name])
    return Job(config, strategy, build_adapter(name, config.adapter, strategy.adapter_init(config.adapter.init)))

"""The composition of a run: its checked settings, and the strategy, adapter and start that they name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

from fedveil.common.adapters import Adapter, build_adapter
from fedveil.common.check import nearest
from fedveil.common.config.flat import Scalar, defaults, from_section, options_of, task_of, to_mapping, typed
from fedveil.common.config.run import RunConfig
from fedveil.common.data.counts import count_labels, count_records
from fedveil.common.data.sources import known_labels
from fedveil.common.errors import ConfigError
from fedveil.common.messages.columns import Chosen, chosen_factors
from fedveil.common.messages.state import BASIS, HEAD, OWN, STATE, AdapterState, Factors, of_head
from fedveil.common.messages.tensors import merge, start_fingerprint
from fedveil.common.model.files import files_of
from fedveil.common.starts import STARTS, Start
from fedveil.common.tasks import TASKS, Task
from fedveil.privacy import Mechanism, Unit
from fedveil.privacy.accounting import Release
from fedveil.privacy.claim import Claim
from fedveil.privacy.events import Event
from fedveil.privacy.plan import Plan, PrivacyPlan
from fedveil.strategies import ROWS
from fedveil.strategies.base import Strategy
from fedveil.strategies.options import START, declared_settings, is_open, known_settings, tables, unnamed, with_options
from fedveil.strategies.recipes import AUTO
from fedveil.strategies.requirements import REFUSED, REFUSED_STRATEGIES, check_composed, check_run
from fedveil.strategies.resolve import Resolved, resolve
from fedveil.strategies.rules import RULES, ServerRule
from fedveil.strategies.state import ServerState

if TYPE_CHECKING:
    from fedveil.common.messages.blocks import Layout
    from fedveil.common.model.federated import FederatedModel

T = TypeVar("T")
BESIDE = "; a start of contrib has its own options, once adapter.start names it"


@dataclass(frozen=True)
class Job:
    """A checked run: its configuration, every value filled in, and the strategy, adapter and start that it names."""

    config: RunConfig
    strategy: Strategy
    adapter: Adapter
    origin: Start
    """Where the adapter's factors begin."""
    rule: ServerRule
    """What stands around the server's optimiser."""
    task: Task
    """What its records are, with its options."""
    asked: Mapping[str, Scalar] = field(default_factory=dict, compare=False)
    """Every setting of the run as it was asked for, flat: to be printed and stored, and read by nothing else."""

    def model(
        self, label_names: tuple[str, ...], label_phrases: tuple[tuple[str, ...], ...] = (), files: str = ""
    ) -> FederatedModel:
        """Return this process's model of the run, for records of these labels; as ``model_of``.

        Args:
            label_names, label_phrases: of the records.
            files: hash of the base model's files, without which none is opened; empty: whatever they are now.
        """
        from fedveil.common.model.federated import model_of

        config = self.config
        return model_of(
            config=config.model,
            task=self.task,
            adapter=self.adapter,
            head=config.head,
            seed=config.seed,
            label_names=label_names,
            label_phrases=label_phrases,
            device=config.device,
            precision=config.precision,
            files=files or files_of(config.model.name),
        )

    def start(self, adapter: AdapterState) -> ServerState:
        """Return the server's state before anything is trained, from the adapter's start and the head's."""
        return self.strategy.start(adapter, self.adapter.trained)

    def begin(self, adapter: AdapterState, statistic: AdapterState) -> ServerState:
        """Return the state before round 1 from what server and sites derive and the mean statistic of round 0."""
        measured = {
            layer: held if layer in OWN else self._measured(adapter[layer], held) for layer, held in statistic.items()
        }
        return self.start(merge(adapter, measured))

    def renewed(self, state: ServerState, statistic: AdapterState) -> ServerState:
        """Return the state with new factors of every layer that ``statistic`` has, as ``begin`` makes them."""
        made = {layer: self._measured(state.adapter[layer], held) for layer, held in statistic.items()}
        return replace(state, adapter=merge(state.adapter, made))

    def _measured(self, derived: Factors, statistic: Factors) -> Factors:
        """Return every factor of one layer, in the directions that the statistic gives and in those of the seed."""
        of_seed = {n: derived[n] for n in self.origin.from_seed if n in self.adapter.directions and n in derived}
        given = {**of_seed, **self.origin.from_statistic(statistic, self.adapter.rank)}
        begun = self.adapter.begin(given, derived)
        return {name: begun.get(name, tensor) for name, tensor in derived.items()}

    def trained_columns(self, state: ServerState, rank: int = 0) -> Chosen | None:
        """Return the columns that a site of this rank trains in the round after ``state``; None: all."""
        return self.strategy.trained_columns(self.strategy.downlink(state), state.round_number + 1, rank)

    def sent(self, round_number: int, trained: Mapping[str, T]) -> dict[str, T]:
        """Return the layers of ``trained`` that a round trains: a site sends these alone."""
        schedule = self.config.timeline
        head, adapter = schedule.trains_head(round_number), schedule.trains_adapter(round_number)
        return {layer: held for layer, held in trained.items() if (head if layer == HEAD else adapter)}

    def plan(self, total_steps: int, public_size: int, before: Sequence[Release] = ()) -> PrivacyPlan:
        """Return the plan of the party that is charged, of ``total_steps``, as ``Mechanism.plan``."""
        return self.mechanism.plan(self.config.privacy, self.config.training, total_steps, public_size, before)

    def site_plan(self, total_steps: int, public_size: int) -> Plan:
        """Return the plan of a site, as ``Mechanism.site_plan``."""
        return self.mechanism.site_plan(self.config.privacy, self.config.training, total_steps, public_size)

    @property
    def event(self) -> Event:
        """What one release costs, as ``Mechanism.event``."""
        return self.mechanism.event(self.config.privacy, self.config.training)

    @property
    def sample_rate(self) -> float:
        """At which rate a site's step draws, as ``Mechanism.sample_rate``."""
        return self.mechanism.sample_rate(self.config.privacy, self.config.training)

    @property
    def claim(self) -> Claim:
        """What the run promises, in words."""
        return self.mechanism.claim

    @property
    def unit(self) -> Unit:
        """Whom the run's claim speaks of."""
        return self.mechanism.unit

    @property
    def mechanism(self) -> Mechanism:
        """What protects the records."""
        return self.config.privacy.mechanism

    @property
    def calibrated(self) -> bool:
        """Whether the server measures how long gradients are to be (``adapter.alpha = 0``)."""
        return not self.config.adapter.alpha

    @property
    def derived(self) -> bool:
        """Whether server and sites derive the adapter's start; if not, round 0 makes it, and frozen factors travel."""
        return self.origin.asked == "nobody" and not self.calibrated

    def start_fingerprint(self, adapter: AdapterState) -> str:
        """Return what server and sites must agree on: the adapter's start and the public text."""
        return start_fingerprint(adapter, self.origin.fingerprint)

    def basis(self, state: ServerState) -> AdapterState:
        """Server: return the frozen factors that travel once, with the first task that a site gets, and are kept.

        A start that server and sites derive sends none.
        """
        return {} if self.derived else self.strategy.basis(state)

    def lasting(self, round_number: int, state: AdapterState, basis: AdapterState) -> dict[str, AdapterState]:
        """Return what of a task's tensors its site keeps for the next one: all that the round trains at no site.

        Args:
            round_number: of the task; in round 0, or one that the run has not, nothing is kept.
            state, basis: its parts, whole.
        """
        # Under a draw that is secret the size of a task would tell which rounds its site was drawn for.
        if not 0 < round_number <= self.config.rounds or self.config.privacy.site_rate < 1:
            return {}
        chosen = self.strategy.trained_columns(state, round_number, 0)
        moving = self.sent(round_number, chosen_factors(state, chosen))

        def moves(layer: str, name: str) -> bool:
            return name in moving.get(layer, {}) and (layer == HEAD or name in self.adapter.trained)

        still = {layer: {n: t for n, t in factors.items() if not moves(layer, n)} for layer, factors in state.items()}
        return {STATE: {layer: factors for layer, factors in still.items() if factors}, BASIS: basis}

    @property
    def starts_after(self) -> int:
        """The round after which the server makes the adapter's start again, around the trained head; 0: none.

        It is the last one before the adapter is first trained.
        """
        return self.config.timeline.adapter_waits if type(self.origin).around_head is not Start.around_head else 0

    def brought(self, state: ServerState, round_number: int) -> AdapterState:
        """Server: return what of a task is no state: frozen factors, and in round 0 what the start shows.

        Raises:
            DataError: as ``Start.shown``.
        """
        return self.frozen_for(state, round_number) if round_number else self.origin.shown(self.adapter, state.adapter)

    def brought_layout(self, began: AdapterState, state: ServerState, round_number: int) -> Layout:
        """Site: return names and shapes of the same, from the adapter as it derives it and the state that follows."""
        from fedveil.common.messages.blocks import layout_of  # brings Flower, which no command line needs

        return layout_of(self.frozen_for(state, round_number)) if round_number else self.origin.shown_layout(began)

    def frozen_for(self, state: ServerState, round_number: int) -> AdapterState:
        """Return what of ``basis`` a site must have in a round: none that is still to be made again."""
        basis = self.basis(state)
        return of_head(basis) if round_number <= self.starts_after else basis

    def settings(self) -> dict[str, Scalar]:
        """Return every setting of the run with the value that it has, flat: they make the same job again."""
        return _flat(self.config, self.origin, self.strategy, self.rule, self.task)

    def chosen(self) -> list[str]:
        """Return the settings that people set to another value than the default."""
        known = known_settings(self.asked)
        return [key for key, value in self.asked.items() if value != known[key]]


def _flat(config: RunConfig, origin: Start, strategy: Strategy, rule: ServerRule, task: Task) -> dict[str, Scalar]:
    own = {**to_mapping(strategy, f"{strategy.name}."), **to_mapping(rule, f"{rule.name}."), **options_of(task)}
    return {**to_mapping(config), **to_mapping(origin, START), **own}


def configure(values: Mapping[str, Scalar]) -> Job:
    """Check the flat settings of a run, fill in what they leave open, and build strategy, adapter and start.

    An adapter called by an alias has its own name in the result.

    Raises:
        ConfigError: a key is unknown (the nearest known one is named), ill-typed or out of range,
            or strategy, adapter, start and privacy do not fit together.
    """
    values = with_options(values)
    _check_known(values)
    resolved = resolve(values)
    try:
        return _compose(resolved)
    except ConfigError as error:
        if resolved.choice.instead:
            raise ConfigError(f"{error} ({resolved.choice.note})") from error
        raise


def _check_known(values: Mapping[str, Scalar]) -> None:
    """Raise ConfigError unless every key is a setting, and every option of a start has its type."""
    known, declared = known_settings(values), declared_settings(values)
    for key, value in values.items():
        if key not in known:
            if why := REFUSED.get(key.rpartition(".")[2].replace("_", "-")) or unnamed(key, values):
                raise ConfigError(f"{key} cannot be set: {why}")
            row = key.partition(".")[0]
            if row in (values.get("strategy"), values.get("server.rule")) and row not in {*ROWS, *RULES}:
                raise ConfigError(
                    f"{row!r} is no row of FedVeil, and none is registered here: fedveil.register it first"
                )
            raise ConfigError(f"unknown setting {key!r}{nearest(key, known)}{BESIDE if key.startswith(START) else ''}")
        if key.startswith(START) and not (is_open(key) and value == AUTO):
            typed(key, value, type(declared[key]))


def with_recipe(values: Mapping[str, Scalar], *, divided: bool = True, sites: int = 0) -> tuple[dict[str, Scalar], str]:
    """Return settings that name their recipe, and the note on it: where a job is made, a file that is here has labels.

    Every machine that gets the settings then has the same recipe, wherever the file is.

    Args:
        values: as people write them.
        divided: whether sites divide the records of ``data.name``, as simulated ones do. These are counted then, and
            the settings say how many there are (``data.records``). Real sites hold records of their own.
        sites: how many sites there are; 0: not known.

    Raises:
        ConfigError: as for ``configure``.
    """
    values = with_options(values)
    config = configure(values).config
    data, kind = config.data, config.model.task
    labels = count_labels(data, kind) if TASKS[kind].labelled and not known_labels(data) else 0
    choice = resolve(values, labels, sites).choice
    if divided and choice.by_figures and not data.records and (found := count_records(data, kind)):
        values |= {"data.records": found}
        choice = resolve(values, labels, sites).choice
    return {**values, "recipe": choice.recipe}, choice.note


def _compose(resolved: Resolved) -> Job:
    """Return the job of resolved settings; errors as for ``configure``."""
    config, settings, written = resolved.config, resolved.settings, resolved.written
    named = config.adapter.name
    if config.strategy in REFUSED_STRATEGIES:
        raise ConfigError(f"strategy {config.strategy!r} cannot be run: {REFUSED_STRATEGIES[config.strategy]}")
    rows = {"strategy": config.strategy, "adapter.name": named, "adapter.start": config.adapter.start}
    for key, value in {**rows, "server.rule": config.server.rule}.items():
        tables()[key].check(key, value)
    strategy = from_section(ROWS[config.strategy], settings, f"{config.strategy}.")
    as_written = _start(config.adapter.start, settings, written)
    origin = as_written.resolved().within(config.privacy)
    rule = from_section(RULES[config.server.rule], settings, f"{config.server.rule}.")
    task = task_of(settings)
    check_run(config, strategy, origin, rule, task)
    adapter = build_adapter(named, config.adapter, origin)
    check_composed(config, strategy, origin, rule, adapter)
    known = known_settings(written)
    own = {key: written.get(key, known[key]) for key in _flat(config, as_written, strategy, rule, task)}
    return Job(config, strategy, adapter, origin, rule, task, own)


def _start(name: str, settings: Mapping[str, Scalar], given: Mapping[str, Scalar]) -> Start:
    """Return the start called ``name`` with its options.

    Raises:
        ConfigError: an option is out of range, or ``given`` and not one of this start.
    """
    own, declared = {START + key for key in defaults(STARTS[name])}, declared_settings(given)
    for key, value in given.items():
        # A resumed run is given every setting, also those of other starts, as they are declared.
        if key.startswith(START) and key not in own and value not in (declared[key], AUTO):
            owners = [other for other, start in STARTS.core.items() if key in {START + k for k in defaults(start)}]
            raise ConfigError(f"{key} has no effect on adapter.start {name!r}: it is an option of {', '.join(owners)}")
    return from_section(STARTS[name], {key: value for key, value in settings.items() if key in own}, START)

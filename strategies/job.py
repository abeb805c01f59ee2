"""The composition of a run: its checked settings, and the strategy, adapter and start that they name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from fedveil.common.adapters import ADAPTERS, ALIASES, Adapter, build_adapter
from fedveil.common.adapters.none import check_head_alone
from fedveil.common.check import nearest
from fedveil.common.config.asked import RunSettings, as_asked, from_mapping, resolve
from fedveil.common.config.sections import RunConfig, Scalar, defaults, from_section, to_mapping, typed
from fedveil.common.data.sources import count_labels, count_records, known_labels
from fedveil.common.errors import ConfigError
from fedveil.common.messages.columns import Chosen
from fedveil.common.messages.state import HEAD, METRIC, OWN, AdapterState, Factors, of_head
from fedveil.common.messages.tensors import merge, start_fingerprint
from fedveil.common.model.federated import FederatedModel, model_of
from fedveil.common.model.files import files_of
from fedveil.common.observers import NO_OBSERVER
from fedveil.common.starts import STARTS, Start, check_directions
from fedveil.common.tasks import TASKS
from fedveil.privacy import Mechanism, Unit
from fedveil.privacy.accounting import Release
from fedveil.privacy.claim import Claim
from fedveil.privacy.events import Event
from fedveil.privacy.plan import Plan, PrivacyPlan
from fedveil.strategies import ROWS
from fedveil.strategies.base import Strategy, check_adapter, chooses
from fedveil.strategies.options import START, declared_settings, known_settings, tables, unnamed, with_options
from fedveil.strategies.phases import check_phases
from fedveil.strategies.recipes import AUTO, RECIPES, Asked, Recipe, choose, is_open, own_method, without_open
from fedveil.strategies.refused import REFUSED, REFUSED_STRATEGIES
from fedveil.strategies.rules import RULES, ServerRule
from fedveil.strategies.state import ServerState

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
    notes: tuple[str, ...] = field(default=(), compare=False)
    """Lines for whoever wrote the settings, such as on one that has another name now."""
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
        config = self.config
        return model_of(
            config=config.model,
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
        """Return the state with the factors of every layer that a statistic, as of ``begin``, is given of."""
        made = {layer: self._measured(state.adapter[layer], held) for layer, held in statistic.items()}
        return replace(state, adapter=merge(state.adapter, made))

    def _measured(self, derived: Factors, statistic: Factors) -> Factors:
        """Return every factor of one layer, in the directions that the statistic gives and in those of the seed."""
        of_seed = {name: derived[name] for name in self.origin.from_seed if name in self.adapter.directions}
        given = {**of_seed, **self.origin.from_statistic(statistic, self.adapter.rank)}
        return {**derived, **self.adapter.begin(given, derived)}

    def trained_columns(self, state: ServerState, rank: int = 0) -> Chosen | None:
        """Return the columns that a site of this rank trains in the round after ``state``; None: all."""
        return self.strategy.trained_columns(self.strategy.downlink(state), state.round_number + 1, rank)

    def sent(self, round_number: int, trained: Mapping[str, T]) -> dict[str, T]:
        """Return the layers of ``trained`` that a round sends."""
        schedule = self.config.schedule
        head, adapter = schedule.trains_head(round_number), schedule.trains_adapter(round_number)
        return self.mechanism.sent(trained, lambda layer: head if layer == HEAD else adapter)

    def plan(self, total_steps: int, public_size: int, before: Sequence[Release] = ()) -> PrivacyPlan:
        """Return the plan of whoever is charged, of so many steps, as ``Mechanism.plan``."""
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

    @property
    def starts_after(self) -> int:
        """The round after which the server makes the adapter's start again, around the trained head; 0: none.

        It is the last one before the adapter is first trained.
        """
        return self.config.schedule.adapter_waits if type(self.origin).around_head is not Start.around_head else 0

    def frozen_for(self, state: ServerState, round_number: int) -> AdapterState:
        """Return what of ``basis`` a site must have in a round: none that is still to be made again."""
        basis = self.basis(state)
        return of_head(basis) if round_number <= self.starts_after else basis

    def settings(self) -> dict[str, Scalar]:
        """Return every setting of the run with the value that it has, flat: they make the same job again."""
        return _flat(as_asked(self.config), self.origin, self.strategy, self.rule)

    def chosen(self) -> list[str]:
        """Return the settings that were asked for otherwise than by default."""
        known = known_settings(self.asked)
        return [key for key, value in self.asked.items() if value != known[key]]


def _flat(run: RunSettings, origin: Start, strategy: Strategy, rule: ServerRule) -> dict[str, Scalar]:
    own = {**to_mapping(strategy, f"{strategy.name}."), **to_mapping(rule, f"{rule.name}.")}
    return {**to_mapping(run), **to_mapping(origin, START), **own}


def configure(values: Mapping[str, Scalar]) -> Job:
    """Check the flat settings of a run, fill in what they leave open, and build strategy, adapter and start.

    An adapter called by an alias has its own name in the result.

    Raises:
        ConfigError: a key is unknown (the nearest known one is named), ill-typed or out of range,
            or strategy, adapter, start and privacy do not fit together.
    """
    values = with_options(values)
    known, declared = known_settings(values), declared_settings(values)
    for key, value in values.items():
        if key not in known:
            if why := REFUSED.get(key.rpartition(".")[2].replace("_", "-")) or unnamed(key, values):
                raise ConfigError(f"{key} cannot be set: {why}")
            raise ConfigError(f"unknown setting {key!r}{nearest(key, known)}{BESIDE if key.startswith(START) else ''}")
        if key.startswith(START) and not (is_open(key) and value == AUTO):
            typed(key, value, type(declared[key]))
    note = ""
    try:
        filled = _filled(values)
        note = filled.note
        return _compose(filled, values)
    except ConfigError as error:
        if note:
            raise ConfigError(f"{error} ({note})") from error
        raise


@dataclass(frozen=True)
class _Filled:
    """The settings of a run with its recipe under them."""

    settings: Mapping[str, Scalar]
    """Flat; what is open still has its field's default."""
    given: frozenset[str]
    """Keys that are written out."""
    note: str
    """On the recipe."""


def _filled(settings: Mapping[str, Scalar]) -> _Filled:
    told = without_open(settings)
    recipe, note, asked = _recipe(told)
    return _Filled({**recipe.settings(asked), **told, "recipe": recipe.name}, asked.given, note)


def with_recipe(values: Mapping[str, Scalar], *, divided: bool = True, sites: int = 0) -> tuple[dict[str, Scalar], str]:
    """Return settings that name their recipe, and the note on it: where a job is made, a file that is here has labels.

    Whoever gets the settings then finds the same recipe, wherever the file is.

    Args:
        values: as people write them.
        divided: whether sites divide the records of ``data.name``, as simulated ones do. These are counted then, and
            the settings say how many there are (``data.records``). Real sites hold records of their own.
        sites: how many sites there are; 0: not known.

    Raises:
        ConfigError: as of ``configure``.
    """
    values = with_options(values)
    told = without_open(values)
    config = configure(values).config
    data, kind, named = config.data, config.model.task, str(values.get("recipe", AUTO))
    labels = count_labels(data, kind) if named == AUTO and TASKS[kind].labelled and not known_labels(data) else 0
    recipe, note, asked = _recipe(told, labels, sites)
    counts = RECIPES[named].by_records if named != AUTO else not own_method(asked)
    if not (divided and counts and TASKS[kind].wording) or data.records or not (found := count_records(data, kind)):
        return {**values, "recipe": recipe.name}, note
    recipe, note, _ = _recipe({**told, "data.records": found}, labels, sites)
    return {**values, "data.records": found, "recipe": recipe.name}, note


def _recipe(told: Mapping[str, Scalar], labels: int = 0, sites: int = 0) -> tuple[Recipe, str, Asked]:
    """Return the recipe of settings, the note on it and what it was chosen by."""
    run = _run_settings(told)
    asked = Asked(run, frozenset(told), labels, sites)
    if run.recipe == AUTO and not labels and not own_method(asked):
        # A site configures what a server sends: no file that this names is looked at here.
        asked = replace(asked, labels=len(known_labels(run.data)))
    return *choose(run.recipe, asked), asked


def _run_settings(settings: Mapping[str, Scalar]) -> RunSettings:
    sections = (START, *(f"{name}." for name in (*ROWS, *RULES)))
    return from_mapping({key: value for key, value in settings.items() if not key.startswith(sections)})


def _compose(filled: _Filled, given: Mapping[str, Scalar]) -> Job:
    """Return the job of settings, ``given`` as they were written; errors as for ``configure``."""
    settings = _with_required(filled.settings)
    asked = _run_settings(settings)
    named = ALIASES.get(asked.adapter.name, asked.adapter.name)
    asked = replace(asked, adapter=replace(asked.adapter, name=named))
    config = resolve(asked)
    if asked.strategy in REFUSED_STRATEGIES:
        raise ConfigError(f"strategy {asked.strategy!r} cannot be run: {REFUSED_STRATEGIES[asked.strategy]}")
    rows = {"strategy": asked.strategy, "adapter.name": named, "adapter.start": asked.adapter.start}
    for key, value in {**rows, "server.rule": asked.server.rule}.items():
        tables()[key].check(key, value)
    strategy = from_section(ROWS[config.strategy], settings, f"{config.strategy}.")
    _check_unit(config)
    _check_cohort(config)
    if config.privacy.mechanism.claims and not config.shorten_updates:
        raise ConfigError(
            f"shorten-updates is false, and privacy.mode {config.privacy.mode!r} makes a promise, under which no site "
            "may draw the model as far as it likes: set shorten-updates to true"
        )
    config.privacy.mechanism.check_row()
    strategy.check(config)
    config.privacy.mechanism.check_run(config)
    _check_required(strategy, config)
    name = strategy.adapters.default if named == "auto" else named
    check_adapter(type(strategy), ADAPTERS[name])
    if not ADAPTERS[name].trained:
        check_head_alone(config)
    config = replace(config, adapter=replace(config.adapter, name=name))
    asked_start = _start(config.adapter.start, settings, given)
    origin = asked_start.resolved().within(config.privacy)
    check_directions(origin, ADAPTERS[name])
    origin.check(config, ADAPTERS[name])
    if config.model.quantise != "none":
        _check_quantise(config, origin, ADAPTERS[name])
    if config.head.metric == "public" and METRIC not in origin.gives:
        raise ConfigError(
            f"head.metric is 'public', which adapter.start {config.adapter.start!r} does not make: set "
            "adapter.start to 'public-metric', or head.metric to 'none'"
        )
    if config.head.metric == "public" and config.head.policy == "frozen":
        raise ConfigError(
            "head.metric is 'public', behind which the head begins elsewhere, and head.policy 'frozen' sends no head: "
            "set head.policy to 'trained', or head.metric to 'none'"
        )
    check_phases(config, strategy, ADAPTERS[name])
    if config.server.most_noise:
        _check_most_noise(config)
    adapter = build_adapter(name, config.adapter, origin)
    rule = from_section(RULES[config.server.rule], settings, f"{config.server.rule}.")
    if not config.adapter.alpha:
        _check_calibration(config, strategy, origin)
    rule.check(config, strategy, adapter)
    if config.server.scores:
        _check_scores(config, strategy, adapter)
    if config.server.rule != "none" and chooses(type(strategy)):
        raise ConfigError(
            f"strategy {strategy.name!r} chooses what is trained in a round, and server.rule {config.server.rule!r} "
            "would move what rests: set server.rule to 'none'"
        )
    if config.server.most_noise and rule.lengthens:
        raise ConfigError(
            f"server.most-noise bounds what noise does through a plain step, which server.rule {rule.name!r} makes "
            "another: set server.most-noise to 0, or server.rule to 'none'"
        )
    known = known_settings(given)
    own = {k: v if k in filled.given else known[k] for k, v in _flat(asked, asked_start, strategy, rule).items()}
    return Job(config, strategy, adapter, origin, rule, (filled.note,) if filled.note else (), own)


def _check_quantise(config: RunConfig, origin: Start, adapter: type[Adapter]) -> None:
    """Raise ConfigError if the start needs a gradient of weights that are held in low bits: sites pay before it."""
    held = f"of the adapted layers' weights, which model.quantise {config.model.quantise!r} holds in low bits"
    if origin.opens_weights and adapter.directions:
        raise ConfigError(
            f"adapter.start {origin.name!r} needs gradients {held}: set adapter.start to one that needs none, such as "
            "'orthonormal', or model.quantise to 'none'"
        )
    if not config.adapter.alpha:
        raise ConfigError(
            f"adapter.alpha is 0, to be calibrated by gradients {held}: give it a number, or set model.quantise to "
            "'none'"
        )


def _with_required(settings: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Return settings with the values that the strategy requires, where they are left open."""
    name = settings.get("strategy")
    required = ROWS[name].facts.requires if isinstance(name, str) and name in ROWS else {}
    return {**settings, **{key: value for key, value in required.items() if settings.get(key, AUTO) == AUTO}}


def _check_required(strategy: Strategy, config: RunConfig) -> None:
    """Raise ConfigError unless every setting has the value that the strategy requires."""
    values = to_mapping(as_asked(config))
    for key, value in strategy.facts.requires.items():
        if values[key] != value:
            raise ConfigError(
                f"strategy {strategy.name!r} requires {key} {value!r}, and it is {values[key]!r}: set {key} to "
                f"{value!r}, or choose another strategy"
            )


def _check_unit(config: RunConfig) -> None:
    unit = config.privacy.mechanism.unit  # an error if the row does not protect such
    if unit.grouped and not config.data.person:
        raise ConfigError(
            f"privacy.unit is {unit.name!r}, and data.person names no column: name the one that says whose a record "
            "is, or set privacy.unit to 'record'"
        )


def _check_cohort(config: RunConfig) -> None:
    privacy = config.privacy
    given = {"cohort": privacy.cohort, "site-rate": privacy.site_rate < 1, "ledger": privacy.ledger}
    key = next((key for key, value in given.items() if value), "")
    if key and not privacy.mechanism.central:
        raise ConfigError(
            f"privacy.{key} is for a run whose unit is a whole site, and privacy.mode is {privacy.mode!r}: leave it "
            "out, or set privacy.mode to 'client-level' and privacy.unit to 'site'"
        )
    if privacy.site_rate < 1 and config.tracker != NO_OBSERVER:
        raise ConfigError(
            f"tracker {config.tracker!r} notes when each round ended, which may show who was drawn, and at "
            f"privacy.site-rate {privacy.site_rate:g} the price counts on nobody knowing that: set tracker to "
            f"{NO_OBSERVER!r}, or privacy.site-rate to 1"
        )


def _check_most_noise(config: RunConfig) -> None:
    if config.server.optimizer != "momentum" or config.training.optimizer != "sgd" or config.training.weight_decay:
        raise ConfigError(
            "server.most-noise bounds what plain steps pass on: set server.optimizer to 'momentum', training.optimizer "
            "to 'sgd' and training.weight-decay to 0, or server.most-noise to 0"
        )


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


def _check_scores(config: RunConfig, strategy: Strategy, adapter: Adapter) -> None:
    """Raise ConfigError unless an averaged change is a noised gradient of A and B, as LoRAPrune needs it."""
    training = config.training
    if not config.privacy.mechanism.charged:
        raise ConfigError(
            f"server.scores is true, and with privacy.mode {config.privacy.mode!r} the scores are of gradients without "
            "noise: a base model that is pruned by them tells of records. Set server.scores to false, or privacy.mode "
            "to 'dp-sgd'"
        )
    if training.local_steps != 1 or training.optimizer != "sgd" or training.weight_decay:
        raise ConfigError(
            f"server.scores is true, and {training.local_steps} local steps of {training.optimizer} leave no gradient "
            "in a change: set training.local-steps to 1, training.optimizer to 'sgd' and training.weight-decay to 0, "
            "or server.scores to false"
        )
    if chooses(type(strategy)) or adapter.name not in ("lora", "lora-frozen-a", "lora-frozen-b"):
        raise ConfigError(
            f"server.scores is true, and LoRAPrune's criterion is made of changes of all of A or B, which "
            f"strategy {strategy.name!r} with the adapter {adapter.name!r} does not send in every round: set "
            "server.scores to false"
        )


def _check_calibration(config: RunConfig, strategy: Strategy, origin: Start) -> None:
    """Raise ConfigError unless a factor can be calibrated on public phrases, and stays as long as it was made."""
    if getattr(origin, "step", 0.0) or METRIC in origin.gives:
        does = "has a length of its own" if METRIC in origin.gives else "moves the weights by start.step"
        raise ConfigError(
            f"adapter.alpha is 0, to be calibrated, but adapter.start {origin.name!r} {does}: give it a number"
        )
    if strategy.facts.moves_frozen:
        raise ConfigError(
            f"adapter.alpha is 0, to be calibrated, but {strategy.name!r} gives A another length: give it a number"
        )
    task = TASKS[config.model.task]
    if not task.wording:
        raise ConfigError(
            f"adapter.alpha is 0, to be calibrated on public phrases, but model.task {task.name!r} holds no words: "
            "give it a number"
        )

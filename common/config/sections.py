"""The one configuration object: ``[tool.flwr.app.config]`` plus ``-c`` overrides, checked.

Keys are dotted and in kebab-case, as Flower passes them (``"adapter.rank"``); fields are the same
words in snake_case. A key that no field answers to, or a value of another type, is an error that
names the key. Everything in here is public: the server knows it, and so does every site.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar, cast, get_type_hints

from common.check import below, clip_norm, in_range, nearest, not_negative, one_of, positive
from common.config.recipe import fill
from common.errors import ConfigError
from common.privacy import MECHANISMS, Mechanism
from common.tasks import TASKS, roles_of_all

Scalar = str | int | float | bool
Section = TypeVar("Section")

PARTITIONS = ("iid", "dirichlet", "natural")
HEAD_POLICIES = ("trained", "frozen")
HEAD_STARTS = ("zeros", "random", "label-words")
OPTIMIZERS = ("sgd", "momentum", "adam", "adamw")
SCHEDULES = ("constant", "linear", "cosine")
SERVER_OPTIMIZERS = ("auto", "none", "adam")


class Columns(Mapping[str, str]):
    """The column of every role that some task has, by the role's setting; each is a key of its section.

    >>> Columns({"text": "note"})["text"]
    'note'
    """

    def __init__(self, named: Mapping[str, str]) -> None:
        self._named = dict(named)

    def __getitem__(self, setting: str) -> str:
        return self._named[setting]

    def __iter__(self) -> Iterator[str]:
        return iter(self._named)

    def __len__(self) -> int:
        return len(self._named)

    def __hash__(self) -> int:
        return hash(frozenset(self._named.items()))

    def __repr__(self) -> str:
        return f"Columns({self._named})"


def _columns_of_jobs() -> Columns:
    return Columns({role.setting: role.column for role in roles_of_all()})


@dataclass(frozen=True)
class ModelConfig:
    """The frozen base model."""

    name: str = "all-MiniLM-L6-v2"
    """A named model (see ``common.model.base``), a folder, or a hub id."""
    task: str = "classification"
    """A kind of task (see ``common.tasks``): ``classification`` (encoder, mean pool, linear head), ``causal-lm``
    (prompt, completion), ``image-classification`` (vision transformer, linear head)."""
    max_length: int = 128
    """Tokens a record is cut to; or fewer, where the model has no positions for so many and one of padding. An image is
    scaled to the largest square of whole patches that has at most so many."""
    feature_scale: float = 1.0
    """Classification: length that the pooled features are brought to; 0 leaves them as they are."""

    def __post_init__(self) -> None:
        one_of(TASKS, model__task=self.task)
        positive(model__max_length=self.max_length)
        not_negative(model__feature_scale=self.feature_scale)


@dataclass(frozen=True)
class DataConfig:
    """Where records come from and how a simulated federation divides them."""

    name: str = "rotten-tomatoes"
    """A named data set (see ``common.data.sources``), a file or folder, or ``hub:NAME``."""
    test: str = ""
    """The server's public held-out file or hub split; empty: a seeded part of ``name``."""
    test_size: int = 1000
    """Records of the public test part when ``test`` is empty."""
    columns: Columns = field(default_factory=_columns_of_jobs)
    """The column of the source that each role (``common.tasks.roles``) is read from: ``data.text``, ``data.label``."""
    labels: str = ""
    """Label values in order, separated by commas; empty: the sorted distinct values of the file."""
    partition: str = "dirichlet"
    """How simulated sites divide the records: ``iid``, ``dirichlet`` (by label, where there is one), ``natural``
    (by ``key``)."""
    dirichlet_alpha: float = 1.0
    """Concentration of the label-Dirichlet partition: smaller is more uneven."""
    key: str = ""
    """Column of the natural partition, such as an author or a domain."""
    seed: int = 45
    """Seed of the partition and of the test part; fixed, so that runs are comparable. Of seeds 1 to 60 the default
    is the one whose label skew over four sites is the median (total variation 0.22)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", Columns({**_columns_of_jobs(), **self.columns}))
        one_of(PARTITIONS, data__partition=self.partition)
        positive(data__test_size=self.test_size, data__dirichlet_alpha=self.dirichlet_alpha)
        if self.partition == "natural" and not self.key:
            raise ConfigError("data.partition is 'natural' but data.key is empty: name the column to divide by")


@dataclass(frozen=True)
class AdapterConfig:
    """The low-rank adapter."""

    name: str = "auto"
    """``auto``: the strategy's own; any other is refused unless it trains and freezes what the strategy needs."""
    rank: int = 8
    alpha: float = 8.0
    """LoRA's alpha: the product of the factors is scaled by alpha over what ``scale`` says. 0, of a frozen A: as suits
    the start, measured at the server on public phrases (``common.starts.calibration``)."""
    scale: str = "rank"
    """``rank``: the product is scaled by ``alpha / rank`` (LoRA); ``sqrt-rank``: by ``alpha / √rank`` (rsLoRA)."""
    targets: str = "query,value"
    """Names of the adapted layers, separated by commas, as PEFT's ``target_modules``."""
    start: str = "orthonormal"
    """Where the factors begin: a row of ``common.starts.STARTS``, whose options are ``start.*``."""

    def __post_init__(self) -> None:
        positive(adapter__rank=self.rank)
        not_negative(adapter__alpha=self.alpha)
        one_of(("rank", "sqrt-rank"), adapter__scale=self.scale)
        if not self.target_modules:
            raise ConfigError("adapter.targets is empty: name the layers to adapt, such as 'query,value'")

    @property
    def target_modules(self) -> tuple[str, ...]:
        """The names in ``targets``."""
        return tuple(name.strip() for name in self.targets.split(",") if name.strip())


@dataclass(frozen=True)
class HeadConfig:
    """The classification head."""

    policy: str = "trained"
    """``trained`` (averaged, and part of the clipped vector) or ``frozen`` (kept at its start)."""
    start: str = "label-words"
    """``zeros`` (of a trained head only), ``random`` (seeded), or ``label-words``: from public phrases about each
    label."""
    phrases: str = ""
    """For ``label-words``: phrases of one label separated by ``|``, labels by ``;``, in label order."""
    margin: float = 3.0
    """For ``label-words``: logits by which a label leads the others on its own phrases, on average over labels."""

    def __post_init__(self) -> None:
        one_of(HEAD_POLICIES, head__policy=self.policy)
        one_of(HEAD_STARTS, head__start=self.start)
        positive(head__margin=self.margin)


@dataclass(frozen=True)
class TrainingConfig:
    """What a site does with one round."""

    local_steps: int = 0
    """Optimiser steps a round; 0: what suits the privacy mode (see ``common.config.recipe``)."""
    sample_rate: float = 0.0
    """Chance of each record to be in a step's batch (Poisson), so the expected batch over the size; 0 as above."""
    optimizer: str = "auto"
    """``sgd``, ``momentum``, ``adam``, ``adamw``; ``auto``: Adam, or plain SGD where the server has Adam."""
    learning_rate: float = 0.0
    """At the start of the schedule; 0: what suits the optimiser."""
    head_rate: float = 0.0
    """The head's learning rate over that of the other tensors; applied by the server's optimiser if there is one. 0: as
    for ``local-steps``."""
    schedule: str = "linear"
    """Course of the learning rate over the run; of the server's optimiser if there is one, else of the sites'."""
    momentum: float = 0.9
    """For ``momentum``; also Adam's beta1."""
    beta2: float = 0.999
    """For ``adam`` and ``adamw``."""
    weight_decay: float = 0.0
    batch_tokens: int = 0
    """Tokens (with padding) of a forward pass without privacy, 0: what suits the device; changes speed and memory, not
    the result. Under privacy shapes are fixed (``common.model.shapes``), and this has no say."""

    def __post_init__(self) -> None:
        in_range(0, 1, training__beta2=self.beta2)
        if self.sample_rate:
            in_range(0, 1, training__sample_rate=self.sample_rate)
        not_negative(
            training__local_steps=self.local_steps,
            training__head_rate=self.head_rate,
            training__learning_rate=self.learning_rate,
            training__weight_decay=self.weight_decay,
            training__momentum=self.momentum,
            training__batch_tokens=self.batch_tokens,
        )
        below(1, training__beta2=self.beta2, training__momentum=self.momentum)
        one_of(("auto", *OPTIMIZERS), training__optimizer=self.optimizer)
        one_of(SCHEDULES, training__schedule=self.schedule)


@dataclass(frozen=True)
class ServerConfig:
    """What the server does with the sites' averaged change."""

    optimizer: str = "auto"
    """``none``: the average is the new model; ``adam``: the change is a gradient for the server's Adam (FedAdam);
    ``auto``: ``adam`` under privacy, else ``none``."""
    learning_rate: float = 0.025
    epsilon: float = 1e-3
    """Added to the root of Adam's second moment (FedAdam's τ): changes well below it do not become full steps."""

    def __post_init__(self) -> None:
        one_of(SERVER_OPTIMIZERS, server__optimizer=self.optimizer)
        positive(server__learning_rate=self.learning_rate, server__epsilon=self.epsilon)


@dataclass(frozen=True)
class PrivacyConfig:
    """What the run proposes to every site; a site may be stricter, never laxer."""

    mode: str = "dp-sgd"
    """A row of ``common.privacy.MECHANISMS``: ``dp-sgd`` or ``none``. ``none`` makes no privacy claim and says so
    everywhere."""
    epsilon: float = 8.0
    """Budget of a site for the whole run, for the mechanism's unit, add or remove one."""
    delta: float = 1e-5
    clip_norm: float = 1.0
    """L2 bound of one record's gradient over all trained tensors together."""
    noise_multiplier: float = 0.0
    """Noise std over clip norm; 0: the least that keeps every round of the run within ``epsilon``."""

    def __post_init__(self) -> None:
        one_of(MECHANISMS, privacy__mode=self.mode)
        positive(privacy__epsilon=self.epsilon)
        clip_norm(privacy__clip_norm=self.clip_norm)
        in_range(0, 0.5, privacy__delta=self.delta)
        below(0.5, privacy__delta=self.delta)
        not_negative(privacy__noise_multiplier=self.noise_multiplier)

    @property
    def mechanism(self) -> Mechanism:
        """The row that the mode names."""
        return MECHANISMS[self.mode]


@dataclass(frozen=True)
class RunConfig:
    """Everything that defines a run."""

    strategy: str = "fedavg-lora"
    rounds: int = 6
    seed: int = 1
    """Public seed of the adapter's and the head's start and of non-private batch order."""
    device: str = "auto"
    """``auto`` (a GPU where there is one), ``cpu``, ``cuda``, ``cuda:1``."""
    precision: str = "auto"
    """Of the forward pass: ``auto`` (bfloat16 where the device is fast at it), ``float32``, ``bfloat16``."""
    output: str = "runs"
    """Folder that run folders are made in; relative to where the program was started."""
    min_sites: int = 1
    """Replies that a round needs to count."""
    round_timeout: float = 3600.0
    """Seconds that an attempt at a round waits for sites, and then for their replies."""
    round_retries: int = 1
    """Attempts more that a round gets when fewer than ``min-sites`` sites succeeded; then the run stops."""
    evaluate_every: int = 1
    """Rounds from one scoring of the global model to the next; the last round is always scored."""
    max_update_norm: float = 0.0
    """Largest L2 norm of a site's change to what it received; 0: what the run's own settings make plausible."""
    max_size_ratio: float = 100.0
    """Largest public size that a site may declare, over the median of the round's (three sites or more)."""
    max_share: float = 0.5
    """Largest part of a round's average that one of three sites or more may be, whatever size it declares; of two sites
    ``(1 + max-share) / 2``."""
    resume: str = ""
    """Id or folder of a run to go on with after its last complete round; empty: a new run."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)

    def __post_init__(self) -> None:
        training, server = fill(self.training, self.server, self.privacy.mechanism.recipe)
        object.__setattr__(self, "training", training)
        object.__setattr__(self, "server", server)
        positive(
            rounds=self.rounds,
            min_sites=self.min_sites,
            round_timeout=self.round_timeout,
            evaluate_every=self.evaluate_every,
            max_size_ratio=self.max_size_ratio,
        )
        in_range(0, 1, max_share=self.max_share)
        not_negative(round_retries=self.round_retries, max_update_norm=self.max_update_norm)
        one_of(("auto", "float32", "bfloat16"), precision=self.precision)
        TASKS[self.model.task].check(self)

    @property
    def site_training(self) -> TrainingConfig:
        """What sites run: where the server has an optimiser, schedule and head's rate are its own; theirs are flat."""
        if self.server.optimizer == "none":
            return self.training
        return dataclasses.replace(self.training, schedule="constant", head_rate=1.0)

    @property
    def total_steps(self) -> int:
        """Optimiser steps of a site that joins every round."""
        return self.rounds * self.training.local_steps


def defaults(section: type[Any] = RunConfig, prefix: str = "") -> dict[str, Scalar]:
    """Return every key with its default, flat and in kebab-case.

    >>> defaults()["adapter.rank"]
    8
    """
    flat: dict[str, Scalar] = {}
    instance = section()
    for item in dataclasses.fields(section):
        value = getattr(instance, item.name)
        if dataclasses.is_dataclass(value):  # as it is by itself: a RunConfig fills in what waits for the privacy mode
            flat.update(defaults(cast(type[Any], type(value)), _key(item, prefix) + "."))
        else:
            flat.update(_flat(item, value, prefix))
    return flat


def from_mapping(values: Mapping[str, Scalar]) -> RunConfig:
    """Build a RunConfig from flat dotted keys; keys left out keep their defaults.

    Raises:
        ConfigError: a key is unknown (the nearest known one is named), a value has the wrong type
            or is out of range.
    """
    known = defaults()
    for key in values:
        if key not in known:
            raise ConfigError(f"unknown setting {key!r}{nearest(key, known)}")
    return _build(RunConfig, values, "")


def from_section(section: type[Section], values: Mapping[str, Scalar], prefix: str) -> Section:
    """Build one dataclass of settings from the keys that start with ``prefix``; same errors as from_mapping."""
    known = {prefix + key: value for key, value in defaults(section).items()}
    for key in values:
        if key.startswith(prefix) and key not in known:
            raise ConfigError(f"unknown setting {key!r}{nearest(key, known)}")
    return _build(section, values, prefix)


@lru_cache(maxsize=64)
def _hints(section: type[Any]) -> dict[str, Any]:
    return get_type_hints(section)  # dear: it compiles every annotation anew


def _build(section: type[Section], values: Mapping[str, Scalar], prefix: str) -> Section:
    hints = _hints(section)  # type: ignore[arg-type]  # mypy takes no class for hashable
    arguments: dict[str, Any] = {}
    for item in dataclasses.fields(section):  # type: ignore[arg-type]
        key, kind = _key(item, prefix), hints[item.name]
        if kind is Columns:
            keys = {role.setting: prefix + role.setting for role in roles_of_all()}
            named = {setting: typed(key, values[key], str) for setting, key in keys.items() if key in values}
            arguments[item.name] = Columns({setting: str(column) for setting, column in named.items()})
        elif dataclasses.is_dataclass(kind):
            arguments[item.name] = _build(cast(type[Any], kind), values, key + ".")
        elif key in values:
            arguments[item.name] = typed(key, values[key], kind)
    return section(**arguments)


def typed(key: str, value: Scalar, kind: type) -> Scalar:
    """Return the value of a setting in its kind: a whole number serves as a number.

    Raises:
        ConfigError: it is of another kind, or too large.
    """
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ConfigError(f"{key} is too large: a whole number must fit 64 bits")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        wanted = {int: "a whole number", float: "a number", str: "text in quotes", bool: "true or false"}[kind]
        raise ConfigError(f"{key} must be {wanted}, not {value!r}")
    return value


def to_mapping(config: Any, prefix: str = "") -> dict[str, Scalar]:
    """Return the flat, dotted, kebab-case form of ``config``: the inverse of from_mapping."""
    flat: dict[str, Scalar] = {}
    for item in dataclasses.fields(config):
        flat.update(_flat(item, getattr(config, item.name), prefix))
    return flat


def _flat(item: dataclasses.Field[Any], value: Any, prefix: str) -> dict[str, Scalar]:
    if isinstance(value, Columns):
        return {prefix + setting: column for setting, column in value.items()}
    key = _key(item, prefix)
    return to_mapping(value, key + ".") if dataclasses.is_dataclass(value) else {key: value}


def _key(item: dataclasses.Field[Any], prefix: str) -> str:
    return prefix + item.name.replace("_", "-")

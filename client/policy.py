"""The rules of a site's steward: a TOML file that the node key ``policy`` names; it wins over every server.

The server proposes a run. Where figures can be stricter the site takes the stricter one (smaller
epsilon and delta, larger noise); where it is a matter of yes or no it refuses, and names the rule
and both values; what the settings alone decide, before anything that they name is looked at. The file
is read anew for every round.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedveil.client.pins import LABELS, check_pins, check_whole, refusal, unpinned_columns
from fedveil.common.check import at_least, below, in_range, not_negative, one_of, positive
from fedveil.common.config.sections import HEAD_POLICIES, Columns, Scalar, from_section
from fedveil.common.errors import ConfigError, ModelNotLoaded, PolicyRefusal
from fedveil.common.labels import labels_text
from fedveil.common.model.named import NAMED_MODELS
from fedveil.common.toml import toml_of
from fedveil.privacy import MECHANISMS, UNITS, promising, sharing_noise
from fedveil.privacy.accounting import LEAST_DELTA
from fedveil.privacy.events import MOST_NOISE
from fedveil.privacy.figures import most_delta_text
from fedveil.privacy.meaning import MOST_UNITS
from fedveil.privacy.mechanism import Mechanism
from fedveil.privacy.record_level import DPSGD
from fedveil.privacy.units import PERSON, RECORD
from fedveil.strategies import STRATEGIES
from fedveil.strategies.job import Job

UNLIMITED = 2**62
USUAL_MECHANISMS = (DPSGD.name,)
"""What a policy allows that names no mechanisms. It stays as it is when a row is added to the table: a steward who has
not named a mechanism has not allowed it."""
LISTS = ("strategies", "head-policies", "models", "bundles", "mechanisms", LABELS)
MODEL_DIGITS = 32
"""Least hexadecimal digits of fingerprint and files' hash by which a policy may name a base model: with fewer, somebody
could make another one that begins alike."""
SHOWN_DIGITS = 12
"""Digits of a bundle's hash in messages, where nothing is compared."""
NO_BUDGET = (
    "the site's policy has no budget for its records, so that a server would set it: add epsilon, the most that all "
    "runs together may cost, and delta, such as epsilon = 3.0 and delta = 1e-05"
)
HEXADECIMAL = frozenset("0123456789abcdef")
HASH_DIGITS = 64
"""Hexadecimal digits of a bundle's or a roster's hash."""


@dataclass(frozen=True)
class Policy:
    """What a site allows. Every field is public.

    The defaults leave to the server all but runs without privacy or of another unit or mechanism than record-level
    DP-SGD, private records and what they may cost, and base models of its own.
    """

    dataset_id: str = ""
    """What the ledger calls the data; empty: the node configuration's, or the site's name."""
    unit: str = RECORD.name
    """Whom a run must protect, as ``privacy.unit``; the budget is of that, ``public_size`` counts it, and a run of the
    other unit is refused. A run that protects a whole site is let in by ``mechanisms`` alone, and no budget of the
    site's pays for it."""
    person: str = ""
    """Of unit ``person``: the column that says whose a record is, as ``data.person``; a run that names another is
    refused."""
    records_per_person: int = UNLIMITED
    """Of unit ``person``: most records of a person that a run may use. Of unit ``record``: most that a person has, by
    the steward's word."""
    epsilon_person: float = math.inf
    """Of unit ``record``: most that all releases of the data set may cost a person with ``records_per_person``, which
    it needs; a round that would cost more is refused. In a secure sum it counts on ``honest_sites`` as ε does: if the
    others collude, only ``epsilon_alone`` holds, for one record."""
    public_size: int = 0
    """Number of records, or persons, declared as public; 0: the node configuration's."""
    epsilon: float = math.inf
    """Budget of the data set over all runs; stored in the ledger, and needs ``delta``. Without it no run of a mechanism
    that the site pays for gets its own records."""
    delta: float = math.inf
    """At most one over the public size."""
    min_noise_multiplier: float = 0.0
    """Least noise that this site adds in every private step, whatever the run asks for; in a secure sum that is its own
    part. With it no run joins whose noise the server adds."""
    sample_rate: float = 0.0
    """The one sample rate of every private step, and of what a start is made from; a run with another is refused.
    0: any."""
    max_rounds: int = UNLIMITED
    """Most rounds of one run that the site trains; a round that is trained and charged again counts again."""
    max_steps: int = UNLIMITED
    """Most optimiser steps of one run that the site takes."""
    strategies: str = ""
    """Names, separated by commas (in the file: a list); empty: any."""
    head_policies: str = ""
    """The same of ``head.policy``."""
    models: str = ""
    """Base models, each as ``NAME=FINGERPRINT+FILES``: the job's ``model.name``, which is asked before anything is
    looked at; at least the first ``MODEL_DIGITS`` digits of its fingerprint, which is asked once it is loaded; and as
    many of its files' hash, which is asked before one of them is opened. Empty: those that FedVeil knows by hash."""
    bundles: str = ""
    """Hashes of the bundles of code whose runs the site joins, whole; empty: that of the installed version alone.
    Kept by ``fedveil site start``, which runs the installed code whatever is in a bundle."""
    mechanisms: str = ""
    """Mechanisms that promise something and whose runs the site joins, each as ``privacy.mode``; empty:
    ``USUAL_MECHANISMS``. Of those that promise nothing ``allow_no_privacy`` decides."""
    task: str = ""
    """Kind of task that the records are for. This and the keys up to ``max_length`` are the pins: see
    ``client.pins``."""
    columns: Columns = field(default_factory=unpinned_columns)
    """Columns that the task reads, each by the key that a job has under ``data.``; empty: no such column is read."""
    labels: str = ""
    """All labels in the job's order."""
    max_length: int = 0
    """Most tokens that a run may cut a record to."""
    line_breaks: bool = False
    """Whether cells of a CSV file may hold line breaks. Then one record whose quotes nobody doubled takes others into
    its cell, so it is the steward's word that whatever writes the file doubles them. Else a line is a row."""
    send_noised_metrics: bool = False
    """Whether each round's count of correctly classified records may be sent, noised and paid for."""
    metrics_noise: float = 30.0
    """Standard deviation of the noise on that count, in records."""
    reply_after: float = 0.0
    """Seconds after a task at which the site answers, whatever its records are; 0: as soon as it can."""
    honest_sites: int = 0
    """How many sites of the roster the steward takes for honest, at least. A run that counts on more honest sites in a
    sum than are sure to be among its sites is refused. 0: no run with a secure sum. It needs the next three."""
    epsilon_alone: float = math.inf
    """Most that all releases of the data set may cost if no other site adds its noise to a sum."""
    peers: str = ""
    """The roster: a file of the sites whose sums the site joins, each with its public signing key. Handed over outside
    the server; beside the policy, if no folder is named."""
    peers_hash: str = ""
    """The roster's hash, all of it, as ``fedveil site peers`` prints it and the stewards have compared it. Another
    roster in that file is refused."""
    allow_no_privacy: bool = False
    """Whether the site joins runs that promise nothing about any record."""
    after_no_privacy: bool = False
    """Whether it joins private runs on records that such a run has released: their epsilon is infinite."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", Columns({**unpinned_columns(), **self.columns}))
        positive(max_rounds=self.max_rounds, max_steps=self.max_steps, metrics_noise=self.metrics_noise)
        positive(records_per_person=self.records_per_person)
        self._check_unit()
        if self.sample_rate:
            in_range(0, 1, sample_rate=self.sample_rate)
        not_negative(
            public_size=self.public_size,
            min_noise_multiplier=self.min_noise_multiplier,
            reply_after=self.reply_after,
            honest_sites=self.honest_sites,
        )
        # More than any server takes: the site would pay for replies that are dropped.
        below(MOST_NOISE, min_noise_multiplier=self.min_noise_multiplier, metrics_noise=self.metrics_noise)
        if math.isfinite(self.epsilon) != math.isfinite(self.delta) or math.isnan(self.epsilon + self.delta):
            raise ConfigError("epsilon and delta make one budget: set both, or neither")
        if math.isfinite(self.epsilon):
            positive(epsilon=self.epsilon)
            in_range(0, 0.5, delta=self.delta)
            below(0.5, delta=self.delta)
            at_least(LEAST_DELTA, delta=self.delta)
        if not self.epsilon_alone > 0:
            raise ConfigError(f"epsilon-alone must be above 0, not {self.epsilon_alone!r}")
        if self.honest_sites and (not self.peers or not self.peers_hash or math.isinf(self.epsilon_alone)):
            raise ConfigError(
                "honest-sites lets the site join secure sums, for which epsilon-alone, peers and peers-hash are "
                "needed: set all ('fedveil site peers' prints the hash, which the stewards compare)"
            )
        if self.peers_hash and (len(self.peers_hash) != HASH_DIGITS or not set(self.peers_hash) <= HEXADECIMAL):
            raise ConfigError(
                f"peers-hash is {self.peers_hash!r}: give all {HASH_DIGITS} digits (0-9, a-f) that 'fedveil site "
                "peers' prints"
            )
        for name in _names(self.strategies):
            one_of(STRATEGIES, strategies=name)
        for name in _names(self.head_policies):
            one_of(HEAD_POLICIES, head_policies=name)
        for entry, (name, *hashes) in zip(_names(self.models), self._models(), strict=True):
            if not name or any(len(digits) < MODEL_DIGITS or not set(digits) <= HEXADECIMAL for digits in hashes):
                raise ConfigError(
                    f"models names {entry!r}: write NAME=FINGERPRINT+FILES, the job's model.name and at least "
                    f"{MODEL_DIGITS} digits (0-9, a-f) of each hash, as 'fedveil doctor' shows them"
                )
        for name in _names(self.bundles):
            if len(name) != HASH_DIGITS or not set(name) <= HEXADECIMAL:
                raise ConfigError(
                    f"bundles names {name!r}: give all {HASH_DIGITS} digits (0-9, a-f) that 'fedveil bundle' prints"
                )
        for name in _names(self.mechanisms):
            one_of(MECHANISMS, mechanisms=name)
            if name not in promising():
                raise ConfigError(
                    f"mechanisms names {name!r}, which promises nothing about any record: remove it, and set "
                    "allow-no-privacy = true if the site is to join such runs"
                )
        if self.honest_sites and not sharing_noise(_names(self.mechanisms)):
            known = " or ".join(map(repr, sharing_noise()))
            raise ConfigError(f"honest-sites is for secure sums, which mechanisms does not allow: add {known} to it")
        check_whole(self)

    def _check_unit(self) -> None:
        one_of((RECORD.name, PERSON.name), unit=self.unit)
        if UNITS[self.unit].grouped and not self.person:
            raise ConfigError(
                f"unit is {self.unit!r}, and person names no column: say which one tells whose a record is"
            )
        grouped, named = UNITS[self.unit].grouped, self.records_per_person != UNLIMITED
        if not grouped and self.person:
            raise ConfigError(f"person is for unit 'person', and unit is {self.unit!r}: set unit, or remove person")
        if not grouped and named:
            in_range(0, MOST_UNITS, records_per_person=self.records_per_person)
        if not self.epsilon_person > 0:
            raise ConfigError(f"epsilon-person must be above 0, not {self.epsilon_person!r}")
        if math.isfinite(self.epsilon_person) and (grouped or not named):
            raise ConfigError(
                "epsilon-person is for unit 'record' and needs records-per-person, the most that a person has: name "
                "it, or remove epsilon-person"
            )

    def person_terms(self, unit: str) -> tuple[int, float]:
        """Return how many units of a run a person has at most, and the most ε of theirs; 1 and infinite: nobody says.

        Args:
            unit: of the run.
        """
        if unit != RECORD.name or self.records_per_person == UNLIMITED:
            return 1, math.inf
        return self.records_per_person, self.epsilon_person

    def dataset_of(self, node: Mapping[str, Scalar], site: str) -> str:
        """Return the name by which the ledger of a node's site knows its records: the site's own, if none is said."""
        return str(node.get("dataset-id") or self.dataset_id or site)

    def check_size(self, public_size: int) -> None:
        """Raise ConfigError if delta is above one over the public size."""
        if math.isfinite(self.delta) and self.delta > 1 / public_size:
            raise ConfigError(
                f"the policy's delta {self.delta:g} is above 1/{public_size} of the public size: "
                f"set it to {most_delta_text(public_size)} or less"
            )

    def check_job(self, job: Job, *, private: bool, place: str = "POLICY") -> None:
        """Raise PolicyRefusal, naming the rule, unless the run's configuration is allowed; reads nothing.

        Args:
            job: the run.
            private: whether the records are anybody's; then the policy must pin what they are for.
            place: where the policy is, for the command in the message.
        """
        config = job.config
        check_pins(self, config, private=private, place=place)
        self.check_mechanism(job.mechanism)
        # Where the server is trusted, the site's budget, which is of its own unit, pays for nothing.
        if job.mechanism.charged:
            if private and self.lacks_budget:
                raise PolicyRefusal(NO_BUDGET)
            self._check_unit_of(job, private=private)
            self._check_rate(job)
        if config.privacy.honest_sites > self.honest_sites:
            raise refusal("honest-sites", self.honest_sites, f"privacy.honest-sites = {config.privacy.honest_sites}")
        _one_of("strategies", self.strategies, config.strategy)
        _one_of("head-policies", self.head_policies, config.head.policy)
        if self.reply_after >= config.round_timeout:
            # Paid for, and then dropped by the server.
            raise refusal("reply-after", f"{self.reply_after:g}", f"round-timeout = {config.round_timeout:g}")
        self.check_model_name(config.model.name)

    def _check_unit_of(self, job: Job, *, private: bool) -> None:
        """Raise PolicyRefusal unless the run protects whom the steward says, by the steward's own column."""
        asked, unit = job.config.privacy, job.unit
        # A part of a public data set has the size that follows from its division, by either unit.
        if not (private or UNITS[self.unit].grouped):
            return
        if unit.name != self.unit:
            raise refusal("unit", repr(self.unit), f"privacy.unit = {asked.unit!r}")
        if self.person and job.config.data.person != self.person:
            raise refusal("person", repr(self.person), f"data.person = {job.config.data.person!r}")
        if unit.grouped and asked.records_per_person > self.records_per_person:
            own = self.records_per_person
            raise refusal("records-per-person", own, f"privacy.records-per-person = {asked.records_per_person}")

    def _check_rate(self, job: Job) -> None:
        """Raise PolicyRefusal unless steps, and what the start is made from, have the policy's sample rate."""
        if not self.sample_rate:
            return
        paid = job.origin.release()
        asked = {"training.sample-rate": job.sample_rate}
        asked |= {"start.sample-rate": paid.event.sample_rate} if paid else {}
        for setting, rate in asked.items():
            if rate != self.sample_rate:
                raise refusal("sample-rate", f"{self.sample_rate:g}", f"{setting} = {rate:g}")

    def check_mechanism(self, mechanism: Mechanism) -> None:
        """Raise PolicyRefusal unless runs of this mechanism may be joined; one that nobody allowed may not."""
        broken = mechanism.broken_rule(
            self.allowed_mechanisms, without_privacy=self.allow_no_privacy, least_noise=self.min_noise_multiplier
        )
        if broken:
            raise refusal(*broken)

    @property
    def lacks_budget(self) -> bool:
        """Whether a server would say what own records may cost."""
        return math.isinf(self.epsilon)

    @property
    def allowed_mechanisms(self) -> tuple[str, ...]:
        """Names of the mechanisms that are allowed, of those that promise something."""
        return _names(self.mechanisms) or USUAL_MECHANISMS

    def check_model_name(self, name: str) -> None:
        """Raise PolicyRefusal unless a base model of this name may be loaded."""
        if name not in ([named for named, *_ in self._models()] or NAMED_MODELS):
            raise refusal("models", self.allowed_models, f"model.name = {name!r}")

    @property
    def allowed_models(self) -> str:
        """The base models that are allowed, in words."""
        return ", ".join(_names(self.models)) or f"{', '.join(NAMED_MODELS)} (known by their hashes)"

    def check_files(self, name: str, files: str) -> None:
        """Raise ModelNotLoaded unless the files of a base model, none of which was opened yet, have an allowed hash.

        The server hears no more than of a model that is not there: what is in a folder here is nothing of its.
        """
        if self.models and not any(named == name and files.startswith(own) for named, _, own in self._models()):
            raise ModelNotLoaded(
                f"the site's policy has models = {self.allowed_models}; the base model {name!r} here has files of the "
                f"hash {files}, and none of them was opened"
            )

    def check_model(self, name: str, fingerprint: str, files: str) -> None:
        """Raise PolicyRefusal unless the base model that was loaded of these files has the fingerprint beside them."""
        entries = [entry for named, *entry in self._models() if named == name]
        if self.models and not any(fingerprint.startswith(own) and files.startswith(of) for own, of in entries):
            raise refusal(
                "models",
                self.allowed_models,
                f"the base model {name!r} with the fingerprint {fingerprint[:MODEL_DIGITS]}",
            )

    def _models(self) -> list[tuple[str, str, str]]:
        """Return name, fingerprint and files' hash of each entry of ``models``; what it does not name is empty."""
        parts = [(entry.rpartition("=")[0], entry.rpartition("=")[2].partition("+")) for entry in _names(self.models)]
        return [(name, fingerprint, files) for name, (fingerprint, _, files) in parts]

    def allowed_bundles(self, own: str) -> tuple[str, ...]:
        """Return the hashes of the bundles that are allowed, where ``own`` is the installed version's."""
        return _names(self.bundles) or (own,)

    def check_bundle(self, digest: str, own: str) -> None:
        """Raise PolicyRefusal unless a bundle of this hash is allowed; an empty one is of a stranger's files."""
        allowed = self.allowed_bundles(own)
        if digest not in allowed:
            names = ", ".join(name[:SHOWN_DIGITS] for name in allowed)
            raise refusal("bundles", names, f"the bundle {digest[:SHOWN_DIGITS]}" if digest else "one of other files")

    def check_round(self, rounds: int, steps: int) -> None:
        """Raise PolicyRefusal if the run would then have had more ``rounds`` or ``steps`` here than are allowed."""
        if rounds > self.max_rounds:
            raise refusal("max-rounds", self.max_rounds, f"{rounds} rounds so far, this one included")
        if steps > self.max_steps:
            raise refusal("max-steps", self.max_steps, f"{steps} steps so far, this round's included")

    def most_of(self, job: Job) -> tuple[int, int]:
        """Return the most rounds of a run that the site can join, at least 1, and the steps that they have."""
        each = job.config.training.local_steps
        rounds = max(1, min(job.config.rounds, self.max_rounds, self.max_steps // each))
        return rounds, rounds * each


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _one_of(rule: str, allowed: str, asked: str) -> None:
    if _names(allowed) and asked not in _names(allowed):
        raise refusal(rule, ", ".join(_names(allowed)), asked)


def load_policy(path: Path) -> Policy:
    """Read a policy file.

    Raises:
        ConfigError: it is missing, not TOML, has an unknown key (the nearest is named), or a value of
            another type or out of range.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the policy {path} cannot be read: {' '.join(str(error).split())}") from error
    return parse_policy(text, path)


def parse_policy(text: str, path: Path | str) -> Policy:
    """Return the policy of a file's text; ``path`` names it in errors, which are those of load_policy."""
    try:
        values = toml_of(text)
    except tomllib.TOMLDecodeError as error:
        reason = " ".join(str(error).split()).replace(
            "Cannot overwrite a value", "a key stands there for the second time"
        )
        raise ConfigError(f"the policy {path} cannot be read: {reason}") from error
    try:
        return from_section(Policy, {key: _flat(key, value) for key, value in values.items()}, "")
    except ConfigError as error:
        raise ConfigError(f"the policy {path}: {error}") from error


def _flat(key: str, value: object) -> Scalar:
    if key in LISTS:
        if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(v, str) for v in value):
            raise ConfigError(f'{key} must be a list of texts, such as ["{"fed-sb" if key == LISTS[0] else "..."}"]')
        if key == LABELS:
            if not value or not all(label and label == label.strip() for label in value):
                raise ConfigError(f"{key} must name at least one, each without blanks around it; or leave it out")
            return labels_text(value)
        # An empty list would read as "any".
        if not value or not all(_names(v) == (v,) for v in value):
            raise ConfigError(f"{key} must name at least one, and each without commas; or leave it out")
        return ",".join(value)
    if not isinstance(value, str | int | float | bool):
        raise ConfigError(f"{key} must be a text, a number, true or false")
    return value

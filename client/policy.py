"""The rules of a site's steward: a TOML file that the node key ``policy`` names; it wins over every server.

The server proposes a run. Where figures can be stricter the site takes the stricter one (smaller
epsilon and delta, larger noise); where it is a matter of yes or no it refuses, and names the rule
and both values; what the settings alone decide, before anything that they name is looked at. The file
is read again for every round.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from fedveil.client.pins import check_pins, refusal, unpinned_columns
from fedveil.client.policy_values import MODEL_DIGITS, UNLIMITED, check_values, models_in, names_in
from fedveil.common.config.flat import Columns, Scalar
from fedveil.common.errors import ConfigError, ModelNotLoaded, PolicyRefusal
from fedveil.common.model.named import NAMED_MODELS
from fedveil.privacy import UNITS
from fedveil.privacy.figures import most_delta_text
from fedveil.privacy.mechanism import Mechanism
from fedveil.privacy.record_level import DPSGD
from fedveil.privacy.units import RECORD
from fedveil.strategies.job import Job

USUAL_MECHANISMS = (DPSGD.name,)
"""What a policy allows that names no mechanisms. It stays as it is when a row is added to the table: a steward who has
not named a mechanism has not allowed it."""
SHOWN_DIGITS = 12
"""Digits of a bundle's hash in messages, where nothing is compared."""
OTHER_CODE = (
    "run the same version of FedVeil at server and site, or let the steward add what 'fedveil bundle' prints at the "
    "server to bundles in policy.toml"
)
"""What to do where the server's code is not allowed."""
NO_BUDGET = (
    "the site's policy has no budget for its records, so that a server would set it: add epsilon, the most that all "
    "runs together may cost, and delta, such as epsilon = 3.0 and delta = 1e-05"
)


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
    """Strategies whose runs the site joins, separated by commas (in the file: a list); empty: any."""
    head_policies: str = ""
    """Values of ``head.policy`` whose runs the site joins, likewise; empty: any."""
    votes: str = ""
    """Values of ``adapter.start`` by which records may vote before round 1, likewise: one release of noised counts.
    Empty: none."""
    models: str = ""
    """Base models, each as ``NAME=FINGERPRINT+FILES``: the job's ``model.name``, which is asked before anything is
    looked at; at least the first ``MODEL_DIGITS`` digits of its fingerprint, which is asked once it is loaded; and as
    many of its files' hash, which is asked before one of them is opened. Empty: those that FedVeil knows by hash."""
    projects: str = ""
    """Projects whose runs the site joins, each as the job's ``project``, likewise; empty: any. The name is the server's
    word: it says what a run is for, and proves nothing."""
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
    """Columns that the task reads, each by the key that a job has under ``data.``; empty: no such column is read. Of a
    task with options also these, each by a job's own key."""
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
        check_values(self)

    def person_terms(self, unit: str) -> tuple[int, float]:
        """Return how many units of a run a person has at most, and the most ε of theirs; 1 and infinite: unlimited.

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
        check_pins(self, config, job.task, private=private, place=place)
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
        if private and job.origin.votes and job.origin.name not in names_in(self.votes):
            raise refusal("votes", self.votes or "none", f"a vote: adapter.start = {job.origin.name!r}")
        if self.projects and config.project not in names_in(self.projects):
            raise refusal("projects", self.projects, f"project = {config.project!r}")
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
        """Raise PolicyRefusal unless runs of this mechanism may be joined; one that is not allowed may not."""
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
        return names_in(self.mechanisms) or USUAL_MECHANISMS

    def check_model_name(self, name: str) -> None:
        """Raise PolicyRefusal unless a base model of this name may be loaded."""
        if name not in ([named for named, *_ in models_in(self.models)] or NAMED_MODELS):
            raise refusal("models", self.allowed_models, f"model.name = {name!r}")

    @property
    def allowed_models(self) -> str:
        """The base models that are allowed, in words."""
        return ", ".join(names_in(self.models)) or f"{', '.join(NAMED_MODELS)} (known by their hashes)"

    def check_files(self, name: str, files: str) -> None:
        """Raise ModelNotLoaded unless the files of a base model, none of which was opened yet, have an allowed hash.

        The server hears no more than of a model that is not there: what is in a folder here is nothing of its.
        """
        if self.models and not any(named == name and files.startswith(own) for named, _, own in models_in(self.models)):
            raise ModelNotLoaded(
                f"the site's policy has models = {self.allowed_models}; the base model {name!r} here has files of the "
                f"hash {files}, and none of them was opened"
            )

    def check_model(self, name: str, fingerprint: str, files: str) -> None:
        """Raise PolicyRefusal unless the base model that was loaded of these files has the fingerprint beside them."""
        entries = [entry for named, *entry in models_in(self.models) if named == name]
        if self.models and not any(fingerprint.startswith(own) and files.startswith(of) for own, of in entries):
            raise refusal(
                "models",
                self.allowed_models,
                f"the base model {name!r} with the fingerprint {fingerprint[:MODEL_DIGITS]}",
            )

    def allowed_bundles(self, own: str) -> tuple[str, ...]:
        """Return the hashes of the bundles that are allowed, where ``own`` is the installed version's."""
        return names_in(self.bundles) or (own,)

    def check_bundle(self, digest: str, own: str) -> None:
        """Raise PolicyRefusal unless a bundle of this hash is allowed; an empty one is of a stranger's files."""
        allowed = self.allowed_bundles(own)
        if digest not in allowed:
            names = ", ".join(name[:SHOWN_DIGITS] for name in allowed)
            asked = f"the bundle {digest[:SHOWN_DIGITS]}" if digest else "one of other files"
            raise refusal("bundles", names, f"{asked}: {OTHER_CODE}")

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


def _one_of(rule: str, allowed: str, asked: str) -> None:
    if names_in(allowed) and asked not in names_in(allowed):
        raise refusal(rule, ", ".join(names_in(allowed)), asked)

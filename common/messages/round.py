"""The messages of a round, as plain data.

Everything a site sends is listed here, and here only. While privacy is on, ``contribution`` is the only field computed
from records, or the masked ``words`` in its place, and it has passed clip and noise; where the server is trusted, the
clip alone. A site whose policy says so adds a noised count, which its ledger has paid for. The rest follows from
configuration and from the ledger's arithmetic on it, and keys, shares and signatures from nothing at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from fedveil.common.messages.formats import FLOAT32
from fedveil.common.messages.state import AdapterState, Place
from fedveil.common.strict_json import Delta, Epsilon
from fedveil.privacy.accountant import INITIALISATION, TRAINING, Accountant
from fedveil.privacy.events import Event
from fedveil.privacy.secure_sum.attempt import KeyOffer
from fedveil.privacy.secure_sum.recovery import Sharing
from fedveil.privacy.secure_sum.survivors import Agreement

PROTOCOL = 6
"""Version of these messages; both sides must speak the same."""

FINGERPRINT_DIGITS = 32
"""Hexadecimal digits (128 bits) of a fingerprint that travel."""


def same_fingerprint(sent: str, local: str) -> bool:
    """Return whether ``sent``, whole or as it travels, is the beginning of the fingerprint ``local``."""
    return len(sent) >= FINGERPRINT_DIGITS and local.startswith(sent)


@dataclass(frozen=True)
class TrainTask:
    """Server to site: train one round from this state."""

    run: str
    round_number: int
    """1-based; 0 asks for the statistic that the run's start is made from."""
    state: AdapterState
    """What the round starts from, by the strategy; empty in round 0."""
    basis: AdapterState
    """Frozen factors of use in the round that no site derives; in round 0, what the run's start shows; often empty."""
    basis_fingerprint: str
    """Of these tensors; empty where there are none."""
    base_fingerprint: str
    """Of the base model's weights; a site with another base refuses."""
    start_fingerprint: str
    """Of the adapter's seeded start; factors that never travel must be the same everywhere."""
    attempt: int = 0
    """Of a secure sum, from 0; 0 as well without one."""
    offers: tuple[KeyOffer, ...] = ()
    """The keys of all sites of a secure sum, in the order of their names; empty without one."""
    sealed: tuple[bytes, ...] = ()
    """Where sites may be lost from the sum: what each of these sites has sealed for this one; else empty."""
    named: Mapping[Place, bytes] = field(default_factory=dict)
    """The hashes of those tensors that the site has acknowledged in this run: they are named, and not sent."""
    precision: str = FLOAT32
    """``wire.precision``, the format of the tensors, which have been rounded to it."""


@dataclass(frozen=True)
class _OfAttempt:
    run: str
    round_number: int
    """1-based."""
    attempt: int
    """From 0."""


@dataclass(frozen=True)
class _OfSite:
    run: str
    round_number: int
    site: str


class KeyTask(_OfAttempt):
    """Server to site: make a key for one attempt at a round, of whose sum no party sees the parts."""


@dataclass(frozen=True)
class KeyReply(_OfSite):
    """Site to server: its key for the task's attempt. It follows from no record."""

    offer: KeyOffer


@dataclass(frozen=True)
class ShareTask(_OfAttempt):
    """Server to site, where sites may be lost from a sum: share the secrets of your masks out among these sites."""

    offers: tuple[KeyOffer, ...]
    """Keys to seal the shares with, of all sites that gave one, in the order of their names."""


@dataclass(frozen=True)
class ShareReply(_OfSite):
    """Site to server: the key of its masks, and its sealed shares. They follow from no record."""

    sharing: Sharing


@dataclass(frozen=True)
class SurvivorTask(_OfAttempt):
    """Server to site, after the vectors: these sites' have come; sign that the sum is of them and of no others."""

    survivors: tuple[str, ...]
    """In the order of their names."""


@dataclass(frozen=True)
class SurvivorReply(_OfSite):
    """Site to server: its signature."""

    agreement: Agreement


@dataclass(frozen=True)
class UnmaskTask(_OfAttempt):
    """Server to site: these have signed that list; send one share of each site."""

    signatures: tuple[tuple[str, bytes], ...]
    """By site."""


@dataclass(frozen=True)
class UnmaskReply(_OfSite):
    """Site to server: a share of each site of the sum, of its own mask if it survived, else of its key."""

    shares: tuple[bytes, ...]
    """In the order of the sites' names."""


SumTask = KeyTask | ShareTask | SurvivorTask | UnmaskTask
"""Tasks of a secure sum beside the vectors."""
SumReply = KeyReply | ShareReply | SurvivorReply | UnmaskReply
Task = TrainTask | SumTask


SPENDING_PURPOSES = (TRAINING, INITIALISATION)
"""What the releases of a round may be for."""


@dataclass(frozen=True)
class SpendingFigures:
    """What one round cost one site, by its own ledger.

    It follows from settings, policies and what was charged before, also to other data sets that share a record.
    """

    purpose: str
    """One of SPENDING_PURPOSES; ``initialisation`` is a release before round 1."""
    event: Event
    """What each of the round's releases is priced as, as the site says: it may be a kind that has no price here."""
    steps_round: int
    steps_total: int
    delta: Delta
    epsilon_round: float
    """What this round added to the total."""
    epsilon_total: Epsilon
    """Of everything the ledger holds for this data set, over all runs. Infinite, and the only figure that may be,
    if records of it were released without privacy: then no epsilon holds for them."""
    epsilon_budget: float
    epsilon_remaining: float


@dataclass(frozen=True)
class Spending(SpendingFigures):
    """The figures, and what computed them."""

    accountant: Accountant

    def figures(self) -> SpendingFigures:
        """Return the figures alone."""
        return SpendingFigures(**{item.name: getattr(self, item.name) for item in fields(SpendingFigures)})


@dataclass(frozen=True)
class NoisedCount:
    """How many of its own records the received model classifies correctly, noised and paid for."""

    value: float
    """A whole number; the noise can make it negative or larger than the data set."""
    noise_std: float
    """Standard deviation of the Gaussian noise, in records."""


@dataclass(frozen=True)
class TrainResult:
    """Site to server: what one round of training contributes."""

    run: str
    round_number: int
    site: str
    public_size: int
    """Declared by the steward; never counted from the records. 1 where the unit is a whole site."""
    contribution: AdapterState
    """What the round has trained; of a site in another format than float32, its change. Empty in a secure sum."""
    spending: Spending | None
    """None when the run makes no privacy claim."""
    noised_correct: NoisedCount | None = None
    """Only if the site's policy sends it; ``spending`` includes its price."""
    words: bytes = b""
    """In a secure sum, the masked vector: little-endian u32, in the canonical order of the trained tensors."""
    offer: KeyOffer | None = None
    """In a secure sum, the site's key for the first attempt at the next round, if it has a budget for that."""
    rank: int = 0
    """How many columns the site trains, declared by its operator as public; 0 where the strategy does not ask."""
    precision: str = FLOAT32
    """``wire.precision``, the format in which the contribution travels."""


REFUSAL_KINDS = ("budget", "policy", "task", "tensors", "failed")
"""``budget``: spent; ``policy``: the site's rules; ``task``: what the server sent does not fit;
``tensors``: the site lacks some that the task names, and asks for all; ``failed``: something broke."""


@dataclass(frozen=True)
class Refusal:
    """Site to server: this round is not done here, and why. A normal answer, not a crash."""

    run: str
    round_number: int
    site: str
    kind: str
    """One of REFUSAL_KINDS."""
    reason: str
    """One line for people; says nothing about records."""


Reply = TrainResult | Refusal
SumAnswer = SumReply | Refusal

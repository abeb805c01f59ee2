"""The values that a policy may have, whatever a run asks for."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fedveil.client.pins import check_whole
from fedveil.common.check import PlainNames, at_least, below, in_range, not_negative, one_of, positive
from fedveil.common.config.sections import HEAD_POLICIES
from fedveil.common.errors import ConfigError
from fedveil.common.starts import STARTS
from fedveil.privacy import MECHANISMS, UNITS, promising, sharing_noise
from fedveil.privacy.accounting import LEAST_DELTA
from fedveil.privacy.events import MOST_NOISE
from fedveil.privacy.meaning import MOST_UNITS
from fedveil.privacy.units import PERSON, RECORD
from fedveil.strategies import STRATEGIES

if TYPE_CHECKING:
    from fedveil.client.policy import Policy

UNLIMITED = 2**62
MODEL_DIGITS = 32
"""Least hexadecimal digits of fingerprint and files' hash by which a policy may name a base model: with fewer, somebody
could make another one that begins with the same."""
HEXADECIMAL = frozenset("0123456789abcdef")
HASH_DIGITS = 64
"""Hexadecimal digits of a bundle's or a roster's hash."""


def names_in(text: str) -> tuple[str, ...]:
    """Return the names of a list, which are separated by commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def models_in(text: str) -> list[tuple[str, str, str]]:
    """Return name, fingerprint and files' hash of each entry of ``models``; what it does not name is empty."""
    parts = [(entry.rpartition("=")[0], entry.rpartition("=")[2].partition("+")) for entry in names_in(text)]
    return [(name, fingerprint, files) for name, (fingerprint, _, files) in parts]


def check_values(policy: Policy) -> None:
    """Raise ConfigError unless every value is in range and fits the others."""
    positive(
        max_rounds=policy.max_rounds,
        max_steps=policy.max_steps,
        metrics_noise=policy.metrics_noise,
        records_per_person=policy.records_per_person,
    )
    _check_unit(policy)
    if policy.sample_rate:
        in_range(0, 1, sample_rate=policy.sample_rate)
    not_negative(
        public_size=policy.public_size,
        min_noise_multiplier=policy.min_noise_multiplier,
        reply_after=policy.reply_after,
        honest_sites=policy.honest_sites,
    )
    # More than any server takes: the site would pay for replies that are dropped.
    below(MOST_NOISE, min_noise_multiplier=policy.min_noise_multiplier, metrics_noise=policy.metrics_noise)
    _check_budget(policy)
    _check_names(policy)
    _check_sums(policy)
    check_whole(policy)


def _check_unit(policy: Policy) -> None:
    one_of((RECORD.name, PERSON.name), unit=policy.unit)
    grouped, bounded = UNITS[policy.unit].grouped, policy.records_per_person != UNLIMITED
    if grouped and not policy.person:
        raise ConfigError(f"unit is {policy.unit!r}, and person names no column: say which one tells whose a record is")
    if not grouped and policy.person:
        raise ConfigError(f"person is for unit 'person', and unit is {policy.unit!r}: set unit, or remove person")
    if not grouped and bounded:
        in_range(0, MOST_UNITS, records_per_person=policy.records_per_person)
    if not policy.epsilon_person > 0:
        raise ConfigError(f"epsilon-person must be above 0, not {policy.epsilon_person!r}")
    if math.isfinite(policy.epsilon_person) and (grouped or not bounded):
        raise ConfigError(
            "epsilon-person is for unit 'record' and needs records-per-person, the most that a person has: name "
            "it, or remove epsilon-person"
        )


def _check_budget(policy: Policy) -> None:
    if math.isfinite(policy.epsilon) != math.isfinite(policy.delta) or math.isnan(policy.epsilon + policy.delta):
        raise ConfigError("epsilon and delta make one budget: set both, or neither")
    if math.isfinite(policy.epsilon):
        positive(epsilon=policy.epsilon)
        in_range(0, 0.5, delta=policy.delta)
        below(0.5, delta=policy.delta)
        at_least(LEAST_DELTA, delta=policy.delta)
    if not policy.epsilon_alone > 0:
        raise ConfigError(f"epsilon-alone must be above 0, not {policy.epsilon_alone!r}")


def _check_sums(policy: Policy) -> None:
    if policy.honest_sites and (not policy.peers or not policy.peers_hash or math.isinf(policy.epsilon_alone)):
        raise ConfigError(
            "honest-sites lets the site join secure sums, for which epsilon-alone, peers and peers-hash are "
            "needed: set all ('fedveil site peers' prints the hash, which the stewards compare)"
        )
    if policy.peers_hash and not _is_hash(policy.peers_hash):
        raise ConfigError(
            f"peers-hash is {policy.peers_hash!r}: give all {HASH_DIGITS} digits (0-9, a-f) that 'fedveil site "
            "peers' prints"
        )
    if policy.honest_sites and not sharing_noise(names_in(policy.mechanisms)):
        known = " or ".join(map(repr, sharing_noise()))
        raise ConfigError(f"honest-sites is for secure sums, which mechanisms does not allow: add {known} to it")


def _check_names(policy: Policy) -> None:
    for name in names_in(policy.strategies):
        one_of(STRATEGIES, strategies=name)
    for name in names_in(policy.head_policies):
        one_of(HEAD_POLICIES, head_policies=name)
    for name in names_in(policy.votes):
        one_of(STARTS, votes=name)
        if not STARTS[name].votes:
            raise ConfigError(f"votes names {name!r}, by which no record votes: remove it")
    for entry, (name, *hashes) in zip(names_in(policy.models), models_in(policy.models), strict=True):
        if not name or any(len(digits) < MODEL_DIGITS or not set(digits) <= HEXADECIMAL for digits in hashes):
            raise ConfigError(
                f"models names {entry!r}: write NAME=FINGERPRINT+FILES, the job's model.name and at least "
                f"{MODEL_DIGITS} digits (0-9, a-f) of each hash, as 'fedveil doctor' shows them"
            )
    for name in names_in(policy.projects):
        PlainNames(1).check("projects", name)
    for name in names_in(policy.bundles):
        if not _is_hash(name):
            raise ConfigError(
                f"bundles names {name!r}: give all {HASH_DIGITS} digits (0-9, a-f) that 'fedveil bundle' prints"
            )
    for name in names_in(policy.mechanisms):
        one_of(MECHANISMS, mechanisms=name)
        if name not in promising():
            raise ConfigError(
                f"mechanisms names {name!r}, which promises nothing about any record: remove it, and set "
                "allow-no-privacy = true if the site is to join such runs"
            )


def _is_hash(text: str) -> bool:
    return len(text) == HASH_DIGITS and set(text) <= HEXADECIMAL

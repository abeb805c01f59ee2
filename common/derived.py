"""``derived.json``: of which runs a model was made without reading a record, how, and what each of them claims.

What is computed from released adapters and public texts costs no privacy. So every record keeps the promise of its own
run, and a record that was in several of the runs has the sum of theirs (basic composition).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from fedveil.common.files import finite
from fedveil.common.run_lines import Figure, RunFile
from fedveil.common.strict_json import SPARSE, Delta, Epsilon, Measured, from_json, to_json

IN_MODEL = "fedveil_sources"
"""Key of a merged model's ``config.json`` under which the runs are that it was made from."""


@dataclass(frozen=True)
class Source:
    """A run that a model was made from, and what it claims."""

    run: str
    """Its id."""
    method: str
    """What was trained, as its report has it."""
    base: str
    """SHA-256 of its base model (``AdapterFile.base_fingerprint``)."""
    files: dict[str, str]
    """SHA-256 of its adapter's files, by name."""
    claim: str
    """What it promises, in one sentence, or that it promises nothing."""
    epsilon: Epsilon | None
    """The federation's, of all trials where it was tuned; None: it has no claim."""
    delta: Delta | None
    unit: str
    """Whom the claim speaks of."""
    terms: str
    """The claim as a section of a card, in Markdown."""
    weight: float = 1.0
    """Its share of the model."""


@dataclass(frozen=True)
class EarlierFile(RunFile):
    """The earlier runs whose releases a run begins with: its base model's, its start's, its judge's."""

    NAME: ClassVar[str] = "earlier.json"
    sources: list[Source]


@dataclass(frozen=True)
class PublicTexts:
    """Texts that a model was made with, which are public by the word of who made it."""

    name: str
    """A named data set, or the last part of a file's path."""
    sha256: str
    """Of the texts that were used, one a line, hexadecimal."""
    texts: int


@dataclass(frozen=True)
class VotesFile(RunFile):
    """What records voted for in round 0 of a run, noised."""

    NAME: ClassVar[str] = "votes.json"
    shares: list[Measured]
    """Of the votes for each alternative, in order, of the records that sites declare; below 0 by noise."""
    noise_std: float | None
    """Standard deviation of the noise on each; None: it is not known."""


@dataclass(frozen=True)
class DerivedFile(RunFile):
    """How a model was made from finished runs."""

    NAME: ClassVar[str] = "derived.json"
    operation: str
    """The command and what decides its result, such as ``transfer`` or ``compose ties``."""
    base_model: str
    sources: list[Source]
    """Each run once, also where it came through another derived model."""
    epsilon: Epsilon | None
    """For a record that is in all of the runs: the sum of theirs. None: one has no claim, or their units differ."""
    delta: Delta | None
    """Likewise."""
    public: list[PublicTexts] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    """What was measured on public texts."""
    notes: list[str] = field(default_factory=list)
    """What a reader must know of how it was made, a sentence each."""
    local: dict[str, str] = field(default_factory=dict, metadata=SPARSE)
    """Settings that are a path on the machine that made it (``common.paths.PATHS``)."""


def derived(operation: str, base_model: str, sources: Sequence[Source]) -> DerivedFile:
    """Return the file of a model that was made of ``sources``, with the sum of their claims."""
    once = merged(sources)
    return DerivedFile(operation, base_model, once, *together(once))


def merged(sources: Sequence[Source]) -> list[Source]:
    """Return each run once, with the worst of its claims and the sum of its weights.

    An id is printed on cards, so others can write it: only with the same model, files and unit is it the same run.
    """
    found: dict[tuple[str, ...], Source] = {}
    for source in sources:
        key = (source.run, source.base, source.unit.partition(":")[0], *map(str, sorted(source.files.items())))
        found[key] = _worse(found[key], source) if key in found else source
    return list(found.values())


def _worse(one: Source, other: Source) -> Source:
    """Return a run that came twice, as the copy with the larger ε or without one has it."""
    weight = one.weight + other.weight
    if bare := [source for source in (one, other) if source.epsilon is None or source.delta is None]:
        return replace(bare[0], epsilon=None, delta=None, weight=weight)
    larger = max(one, other, key=lambda source: source.epsilon or 0.0)
    return replace(larger, delta=max(one.delta or 0.0, other.delta or 0.0), weight=weight)


def together(sources: Sequence[Source]) -> tuple[float | None, float | None]:
    """Return ε and δ of a record that is in all of the runs; None, None where no sum is a promise."""
    epsilons, deltas = ([getattr(source, name) for source in sources] for name in ("epsilon", "delta"))
    # Behind the colon is what hangs on one record of a task: who is protected is the same.
    if None in [*epsilons, *deltas] or len({source.unit.partition(":")[0] for source in sources}) != 1:
        return None, None
    return math.fsum(epsilons), math.fsum(deltas)


def marks_of(sources: Sequence[Source]) -> list[dict[str, Any]]:
    """Return runs as a model's configuration holds them, without terms."""
    return [finite(to_json(replace(source, terms=""))) for source in sources]


def sources_in(config: Mapping[str, Any]) -> list[Source]:
    """Return the runs that a model says it was made from (``IN_MODEL``); none of a model of somebody else's.

    Raises:
        DataError: what it says is not as it was written.
    """
    marks = config.get(IN_MODEL, [])
    place = f"{IN_MODEL} of the model's configuration"
    return from_json(EarlierFile, {"sources": marks}, place).sources

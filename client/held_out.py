"""Rows that a site holds out of training, by a rule that each row answers by itself, to score models on.

A rule that looked at other rows too, such as "the last hundred", would let one row more move others in or out of
training: then no noise of one row's clip covers it. Three rules are none of that kind: a file of their own, a value of
a column, and a share by a hash under the ledger's secret key, of the person where the policy names a column of persons.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedveil.client.ledger.record_hashes import said
from fedveil.client.policy import Policy
from fedveil.common.config.flat import Scalar
from fedveil.common.errors import ConfigError
from fedveil.common.files import expanded
from fedveil.common.tasks.examples import Dataset, Example
from fedveil.common.tasks.roles import HELD_OUT, Column

FILE, COLUMN, SHARE = KEYS = ("held-out-file", "held-out-column", "held-out-share")
"""The node's settings, of which it has one at most."""
DOMAIN = b"held-out"
"""Keeps the draw apart from the hashes by which the ledger knows records, which have the same key."""


@dataclass(frozen=True)
class HeldOut:
    """The rule by which a site holds rows out; without any it holds out none."""

    file: Path | None = None
    column: str = ""
    value: str = ""
    """Of ``column``: what a row that is held out has there."""
    share: float = 0.0
    by_person: bool = False
    """Whether all rows of a person have the same draw."""

    def __str__(self) -> str:
        """Return the rule in words, as the ledger writes it down; empty: no row is held out."""
        if self.file:
            return f"a file of their own, {self.file.name!r}"
        if self.column:
            return f"rows with {self.value!r} in column {self.column!r}"
        what = "persons" if self.by_person else "rows"
        return f"a share of {self.share:g} of {what}, by hash under the ledger's key" if self.share else ""

    @property
    def columns(self) -> tuple[Column, ...]:
        """What is read of every row for the rule."""
        return (Column(HELD_OUT, self.column),) if self.column else ()

    def split(self, data: Dataset, key: bytes) -> tuple[Dataset, Dataset]:
        """Return the records that may be trained on and those of the same source that are held out, in their order.

        Args:
            data: read with ``columns``.
            key: the ledger's, 32 bytes.
        """
        if not (self.column or self.share):
            return data, dataclasses.replace(data, examples=())
        holds = self._holder(key)
        drawn = [holds(example) for example in data.examples]
        trained, out = (
            dataclasses.replace(data, examples=tuple(e for e, d in zip(data.examples, drawn, strict=True) if d == side))
            for side in (False, True)
        )
        return trained, out

    def _holder(self, key: bytes) -> Callable[[Example], bool]:
        """Return what says of one example, which it looks at alone, whether it is held out."""
        if self.column:
            return lambda example: example.part == self.value
        below = int(self.share * 2**64)

        def drawn(example: Example) -> bool:
            # Of what is said, so that a row and its copy are on one side, with whatever number or label.
            whose = example.person if self.by_person else said(example)
            digest = hashlib.blake2b(whose.encode(), digest_size=8, key=key, person=DOMAIN).digest()
            return int.from_bytes(digest, "big") < below

        return drawn


def held_out_of(node: Mapping[str, Scalar], policy: Policy) -> HeldOut:
    """Return the rule that a node's settings name.

    Raises:
        ConfigError: they name several, one without ``data``, or one that cannot be followed.
    """
    named = [key for key in KEYS if key in node]
    if not named:
        return HeldOut()
    if len(named) > 1:
        raise ConfigError(f"node settings {named[0]!r} and {named[1]!r} are two rules for held-out rows: keep one")
    (key,), value = named, node[named[0]]
    if "data" not in node:
        raise ConfigError(f"node setting {key!r} needs 'data': a part of a job's data has no row of this site's own")
    if key == SHARE:
        return _share(value, policy)
    if not isinstance(value, str) or not value:
        raise ConfigError(f"node setting {key!r} is {value!r}: give a text")
    if key == FILE:
        return HeldOut(file=_apart(expanded(value).absolute(), expanded(str(node["data"])).absolute()))
    column, sign, wanted = (part.strip() for part in value.partition("="))
    if not (column and sign and wanted):
        raise ConfigError(f"node setting {key!r} is {value!r}: write a column and its value, such as 'split=test'")
    return HeldOut(column=column, value=wanted)


def _apart(file: Path, data: Path) -> Path:
    """Return a file of held-out rows; ConfigError if it is among the files that rounds read."""
    if file.resolve().is_relative_to(data.resolve()):
        raise ConfigError(f"node setting {FILE!r} is {str(file)!r}, which rounds read as 'data': put it elsewhere")
    return file


def _share(value: Scalar, policy: Policy) -> HeldOut:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise ConfigError(f"node setting {SHARE!r} is {value!r}: give a share between 0 and 1, such as 0.2")
    # By the policy's column of persons alone: by its own one a run would choose who is held out.
    return HeldOut(share=float(value), by_person=bool(policy.person))

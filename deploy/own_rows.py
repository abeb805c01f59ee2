"""A site's own rows as its steward's commands read them: those that rounds train on, and those that are held out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedveil.common.config.flat import Columns, Scalar
from fedveil.common.config.sections import DataConfig
from fedveil.common.tasks import TASKS
from fedveil.common.tasks.roles import Column

if TYPE_CHECKING:
    from fedveil.client.held_out import HeldOut
    from fedveil.client.policy import Policy
    from fedveil.common.data.sources import Reading


@dataclass(frozen=True)
class OwnRows:
    """What a site's sources hold now."""

    rule: HeldOut
    training: Reading
    """Of the node's ``data``, without the rows that are held out."""
    held_out: Reading
    """Of the file that the rule names, or of ``data``, whose invalid rows are those of ``training``."""


def read_own_rows(settings: Mapping[str, Scalar], policy: Policy, beside: Sequence[Column] = ()) -> OwnRows:
    """Read a site's records, each of which says by itself on which side it is.

    Args:
        settings: the node's, with ``data``.
        policy: the steward's, whose pins say what the records are.
        beside: columns that are read of the held-out rows, too.

    Raises:
        ConfigError: the settings name no rule that can be followed.
        DataError: a source is missing, cannot be opened, or its header lacks a column.
        LedgerError: the ledger cannot be read or made.
    """
    from fedveil.client.held_out import held_out_of  # imports torch, as the two below
    from fedveil.client.ledger.file import key_in
    from fedveil.client.node import ledger_of
    from fedveil.common.data.sources import load_protected

    rule, config = held_out_of(settings, policy), pinned_settings(policy)

    def read(source: str, *columns: Column) -> Reading:
        return load_protected(config, policy.task, source, line_breaks=policy.line_breaks, beside=columns)

    if rule.file:
        return OwnRows(rule, read(str(settings["data"])), read(str(rule.file), *beside))
    reading = read(str(settings["data"]), *rule.columns, *beside)
    sides = rule.split(reading.dataset, key_in(ledger_of(settings)) if rule.share else b"")
    training, held_out = (dataclasses.replace(reading, dataset=side) for side in sides)
    return OwnRows(rule, training, dataclasses.replace(held_out, unfit=()))


def pinned_settings(policy: Policy) -> DataConfig:
    """Return what every job that the policy allows says about the site's own records."""
    columns = Columns({role.setting: policy.columns[role.setting] for role in TASKS[policy.task].roles})
    return DataConfig(partition="iid", labels=policy.labels, columns=columns, person=policy.person)

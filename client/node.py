"""The configuration of a Flower node, and the site that it describes.

A Flower node describes its site in the node configuration (``--node-config``):

=============== =====================================================================
``site``        name in reports; default ``site-<partition-id>``
``data``        file or folder with this site's own records; without it the site plays
                partition ``partition-id`` of ``num-partitions`` of the run's data set,
                which must be one that FedVeil names unless all of it is a simulation
``division``    settings by which those partitions were made when they were handed out; a run
                that divides otherwise is refused (``common.data.partition.division_of``)
``dataset-id``  what the ledger calls the data; default: the site's name
``public-size`` number of records declared as public, or of persons where the policy's ``unit`` is
                ``person``; needed with ``data`` (of a partition it follows)
``ledger``      file of the ledger; it outlives every run; default: the user's one
``policy``      TOML file of the steward's rules (see ``client.policy``); needed with ``data``
``identity``    file of the site's signing key, for secure sums (see ``client.party``)
``rank``        most columns of an adapter that the site trains, declared as public; without it as many as a
                run has. Only strategies that ask for it take a site with fewer
``held-out-*``  which rows are never drawn and never charged: those of another file (``held-out-file``), with a
                value of a column (``held-out-column``, ``split=test``), or a share (``held-out-share``)
``keep-states`` how many of the states that the site is sent it keeps beside its ledger, the last ones; default: 0
=============== =====================================================================
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from fedveil.client.held_out import KEYS as HELD_OUT_KEYS
from fedveil.client.ledger.file import only_ledger
from fedveil.client.ledger.mounts import refuse_network
from fedveil.client.pins import pin_command
from fedveil.client.policy import Policy
from fedveil.client.policy_file import load_policy
from fedveil.common.check import nearest
from fedveil.common.config.flat import Scalar
from fedveil.common.errors import ConfigError
from fedveil.common.files import expanded
from fedveil.privacy import promising

NODE_KEYS = (
    *("site", "data", "dataset-id", "public-size", "ledger", "policy"),
    *("partition-id", "num-partitions", "division"),
    "identity",
    "rank",
    "keep-states",
    *HELD_OUT_KEYS,
)


def check_keys(node: Mapping[str, Scalar]) -> None:
    """Raise ConfigError for a setting that no node has; it names the nearest."""
    for key in node:
        if key not in NODE_KEYS:
            raise ConfigError(f"unknown node setting {key!r}{nearest(key, NODE_KEYS)}")


def name_of(node: Mapping[str, Scalar]) -> str:
    """Return what the site of this node's configuration is called."""
    return str(node.get("site") or f"site-{node.get('partition-id', 0)}")


def policy_of(node: Mapping[str, Scalar]) -> Policy:
    """Return the rules of the steward behind this node's configuration.

    A site without ``data`` that has no policy makes no promise of its own, so it joins runs of every mechanism, also
    without privacy: a simulated one, or a part of a public data set. Any other joins what its policy says.

    Raises:
        ConfigError: there is ``data`` and no policy, or the policy cannot be read, or names what the node
            configuration names as well.
    """
    if "policy" not in node:
        if "data" in node:
            raise ConfigError(
                "a node with 'data' needs a 'policy' that says what its records are for: write one with "
                f"'{pin_command('policy.toml')}', and add policy=\"policy.toml\" to the node's settings"
            )
        return Policy(allow_no_privacy=True, mechanisms=",".join(promising()))
    policy = load_policy(expanded(str(node["policy"])))
    for key, value in (("dataset-id", policy.dataset_id), ("public-size", policy.public_size)):
        if key in node and value:
            raise ConfigError(f"{key!r} stands in the node configuration and in the policy: keep one")
    return policy


def public_size_of(node: Mapping[str, Scalar], policy: Policy) -> int:
    """Return the number of records, or of persons, that a site declares as public; 0: it follows from a division.

    Raises:
        ConfigError: it is no whole number, or none is declared beside ``data``.
    """
    size = node.get("public-size", policy.public_size)
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise ConfigError(f"node setting 'public-size' is {size!r}: give a whole number that you declare public")
    if "data" in node and not size:
        raise ConfigError(
            "node setting 'public-size' is needed beside 'data', here or in the policy: "
            "a whole number that you declare public"
        )
    return size


def part_of(node: Mapping[str, Scalar]) -> tuple[int, int]:
    """Return which part of a job's data a node without ``data`` plays, from 0, and of how many.

    Raises:
        ConfigError: one of both is missing or no whole number, or there is no such part.
    """
    part, parts = node.get("partition-id"), node.get("num-partitions")
    if part is None or parts is None:
        raise ConfigError(
            "this site has no records: give 'data' in the node's settings, or 'partition-id' and 'num-partitions' "
            "in a simulation"
        )
    whole = all(isinstance(value, int) and not isinstance(value, bool) for value in (part, parts))
    if not whole or not 0 <= int(part) < int(parts):
        raise ConfigError(
            f"the node's partition-id is {part!r} and its num-partitions {parts!r}: give a whole number of parts, and "
            "one of them, counted from 0"
        )
    return int(part), int(parts)


def ledger_of(node: Mapping[str, Scalar]) -> Path:
    """Return the file of a ledger that outlives runs: the one that the node names, else the user's.

    Raises:
        LedgerError: none is named, and the user's data folder holds others than the user's one; or the ledger lies on
            a network file system.
    """
    file = expanded(str(node["ledger"])).absolute() if "ledger" in node else only_ledger(user_folder())
    refuse_network(file)
    return file


def rank_of(node: Mapping[str, Scalar]) -> int:
    """Return most columns that a node's site trains; 0: as many as a run has.

    Raises:
        ConfigError: the setting ``rank`` is no whole number above 0.
    """
    rank = node.get("rank", 0)
    if not isinstance(rank, int) or isinstance(rank, bool) or ("rank" in node and rank < 1):
        raise ConfigError(
            f"node setting 'rank' is {rank!r}: give a whole number of columns, at least 1, or leave it out"
        )
    return rank


def user_folder() -> Path:
    """Return the folder of the user's own ledger, the same whichever folder the process is started in.

    The XDG specification has an ``XDG_DATA_HOME`` that is empty or relative count as unset.
    """
    named = Path(os.environ.get("XDG_DATA_HOME", ""))
    return (named if named.is_absolute() else Path.home() / ".local" / "share") / "fedveil"

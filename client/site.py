"""A site: its records, its public size, its ledger.

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
``identity``    file of the site's signing key, for secure sums (see ``client.sums``)
``rank``        most columns of an adapter that the site trains, declared as public; without it as many as a
                run has. Only strategies that ask for it take a site with fewer
=============== =====================================================================
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from fedveil.client.ledger.file import only_ledger, withdrawn_in
from fedveil.client.ledger.holds import WITHDRAWN
from fedveil.client.pins import pin_command
from fedveil.client.policy import Policy, load_policy
from fedveil.common.check import nearest
from fedveil.common.config.sections import Columns, DataConfig, RunConfig, Scalar
from fedveil.common.data.named import DATASETS
from fedveil.common.data.partition import check_division, public_size_of_part, site_part
from fedveil.common.data.sources import (
    Reading,
    is_public,
    known_labels,
    load_dataset,
    load_protected,
    public_names,
    train_and_test,
)
from fedveil.common.errors import ConfigError, PolicyRefusal
from fedveil.common.files import FileState, expanded
from fedveil.common.labels import labels_text
from fedveil.common.log import about
from fedveil.common.messages.columns import FACTOR, Chosen
from fedveil.common.messages.state import AdapterState
from fedveil.common.paths import run_folder
from fedveil.common.tasks import TASKS
from fedveil.common.tasks.examples import Dataset
from fedveil.privacy import promising
from fedveil.strategies.job import Job

NODE_KEYS = (
    *("site", "data", "dataset-id", "public-size", "ledger", "policy"),
    *("partition-id", "num-partitions", "division"),
    "identity",
    "rank",
)
log = logging.getLogger("fedveil.site")
_named: dict[Path, FileState] = {}


@dataclass(frozen=True)
class Site:
    """One site's data and where its ledger is. ``data`` never leaves the process."""

    name: str
    data: Dataset
    dataset_id: str
    public_size: int
    ledger_path: Path
    policy: Policy = field(default_factory=Policy)
    unreadable: str = ""
    """Why the file with the records is no table now, for the site's log and ledger; every round is then noise."""
    rank: int = 0
    """Most columns that the site trains, public; 0: as many as a run has."""
    simulated: bool = False
    """Whether site and server are one machine's own experiment."""

    def trained_columns(self, job: Job, received: AdapterState, round_number: int) -> tuple[Chosen | None, int]:
        """Return the columns that the site trains in a round, and the rank that it declares; 0: none.

        Raises:
            ProtocolError: what was received has a mask that is none.
            PolicyRefusal: the run has the site train more columns than it says that it trains.
        """
        whole = job.config.adapter.rank
        rank = min(self.rank, whole)
        chosen = job.strategy.trained_columns(received, round_number, rank)
        widest = whole
        if chosen is not None:
            widths = [(name, len(columns)) for factors in chosen.values() for name, columns in factors.items()]
            widest = max((width if name == FACTOR else whole for name, width in widths if width), default=0)
        if self.rank and rank < widest:
            raise PolicyRefusal(
                f"this site trains at most {self.rank} columns (its setting 'rank'), and strategy "
                f"{job.config.strategy!r} has every site train {widest}: lower adapter.rank, or choose "
                "'heterogeneous-ranks'"
            )
        return chosen, 0 if chosen is None else rank


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


def check_job(node: Mapping[str, Scalar], job: Job, *, simulated: bool) -> None:
    """Let the steward's rules judge a run before anything that it names is looked at: no record, no model, no folder.

    A simulation is one machine's own: there a node without a policy has nothing to refuse.

    Raises:
        PolicyRefusal: a rule forbids the run; or a deployed node without ``data`` is asked for a part of anything
            but a data set that FedVeil names.
        ConfigError: as for policy_of.
    """
    policy, public = policy_of(node), is_public(job.config.data.name)
    if "policy" not in node and simulated:
        return
    _check_source(node, job.config.data.name, simulated=simulated)
    policy.check_job(job, private="data" in node or not public, place=str(node.get("policy", "")))


def open_site(node: Mapping[str, Scalar], config: RunConfig, run: str, *, simulated: bool) -> Site:
    """Build the site that this node's configuration describes.

    In a simulation each run has ledgers of its own in the run's folder. A deployed site's ledger
    outlives runs; if the steward names no file it is the user's one, whatever the site is called, so
    that forgetting the setting, or another name, never means a fresh budget.

    Raises:
        ConfigError: a node setting is unknown, missing or out of range.
        DataError: the data are not there, or have not the columns of the run.
        PolicyRefusal: the run divides the records otherwise than when this site was given its part, or wants a part
            of a source whose records may be anybody's.
        LedgerError: no ledger is named, and the user's data folder holds others than the user's one.
    """
    for key in node:
        if key not in NODE_KEYS:
            raise ConfigError(f"unknown node setting {key!r}{nearest(key, NODE_KEYS)}")
    name, policy = name_of(node), policy_of(node)
    own_ledger = "ledger" in node or not simulated
    ledger = ledger_of(node) if own_ledger else run_folder(config, run) / "ledgers" / f"{name}.sqlite"
    dataset_id, size = policy.dataset_of(node, name), public_size_of(node, policy)
    if dataset_id in withdrawn_in(ledger):  # before a record is read: nothing of them is to be in memory again
        raise PolicyRefusal(WITHDRAWN.format(dataset_id))
    if "data" in node:
        if TASKS[config.model.task].labelled and not known_labels(config.data):
            raise ConfigError("sites with data of their own need data.labels: every site must number labels alike")
        source, breaks = str(node["data"]), policy.line_breaks
        reading = _own_data(own_settings(config, policy), config.model.task, source, name, breaks)
        data, unreadable = reading.dataset, "; ".join(reading.unreadable)
        if unreadable:
            log.error("no record is read, and rounds cost the same: %s", unreadable, extra=about(run, site=name))
    else:
        unreadable, (part, parts) = "", part_of(node)
        _check_source(node, config.data.name, simulated=simulated)
        if "division" in node:
            check_division(str(node["division"]), config)
        data = _partition(config.data, config.model.task, part, parts, simulated)
        # Anyone can repeat the division, so the size of a part follows from public settings.
        size = size or public_size_of_part(config.privacy.mechanism.unit.count(data))
    policy.check_size(size)
    return Site(name, data, dataset_id, size, ledger, policy, unreadable, rank_of(node), simulated)


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
    """Return the file of a deployed node's ledger: the one that it names, else the user's.

    Raises:
        LedgerError: none is named, and the user's data folder holds others than the user's one.
    """
    if "ledger" in node:
        return expanded(str(node["ledger"])).absolute()
    return only_ledger(user_folder())


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


def own_settings(config: RunConfig, policy: Policy) -> DataConfig:
    """Return what a run may say about a site's own records: what a policy pins, and whose phrases the head starts from.

    Everything else of ``data.*`` is about data sets that are divided. A column of the natural partition, say, that
    was read of these records as well would be one more question about them. The steward's column of persons is read
    in every run, also in one without privacy: by it the ledger knows other rows of the same persons again.
    """
    columns = Columns({role.setting: config.data.columns[role.setting] for role in TASKS[config.model.task].roles})
    name = config.data.name if config.data.name in DATASETS else ""
    person = policy.person or (config.data.person if config.privacy.mechanism.unit.grouped else "")
    # However a job spaces its labels: no second spelling gets the records read again.
    labels = labels_text(known_labels(config.data))
    return DataConfig(name=name, labels=labels, partition="iid", columns=columns, person=person)


def _check_source(node: Mapping[str, Scalar], name: str, *, simulated: bool) -> None:
    """Refuse a deployed node a part of a source that is not known to be public.

    Every division permutes all records, or counts them: one record more would move others from site to site.
    """
    if "data" not in node and not simulated and not is_public(name):
        raise PolicyRefusal(
            f"a deployed site plays parts of {', '.join(public_names())} alone: the division of {name!r} would depend "
            "on all of its records; give each site its own file as 'data', and a 'policy', in the node's settings"
        )


def forget_readings() -> None:
    """Drop the records of sites' own files that this process has read; the next task reads them again."""
    _own_data.cache_clear()
    _named.clear()


def named_files() -> Mapping[Path, FileState]:
    """Return the files that cells of these records name, each as it was before this process first opened it."""
    return _named


@lru_cache(maxsize=16)
def _own_data(config: DataConfig, task: str, source: str, site: str, line_breaks: bool) -> Reading:
    """Read the records, and say once, in the site's own log and nowhere else, what is none; no row is quoted."""
    reading = load_protected(config, task, source, line_breaks=line_breaks)
    for path, state in reading.files.items():
        _named.setdefault(path, state)
    if reading.unfit:
        reasons = Counter(row.reason for row in reading.unfit).most_common()
        spoken = "; ".join(f"{count} × {reason}" for reason, count in reasons)
        log.warning(
            "rows that are no records contribute nothing (%s); `fedveil site check` lists them",
            spoken,
            extra=about(site=site),
        )
    return reading


@lru_cache(maxsize=256)
def _partition(config: DataConfig, task: str, part: int, parts: int, simulated: bool) -> Dataset:
    # The test part is the server's: a deployed site that opened whatever data.test names would tell which files it has.
    whole = simulated or not config.test
    train = train_and_test(config, task)[0] if whole else load_dataset(config, task)
    return site_part(train, config, part, parts)

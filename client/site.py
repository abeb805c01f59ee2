"""A site: its records, its public size, its ledger, as the configuration of its node names them (``client.node``)."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from fedveil.client.held_out import HeldOut, held_out_of
from fedveil.client.ledger.file import key_in, withdrawn_in
from fedveil.client.ledger.holds import WITHDRAWN
from fedveil.client.node import check_keys, ledger_of, name_of, part_of, policy_of, public_size_of, rank_of
from fedveil.client.policy import Policy
from fedveil.common.config.flat import Columns, Scalar
from fedveil.common.config.run import RunConfig
from fedveil.common.config.sections import DataConfig
from fedveil.common.data.named import DATASETS
from fedveil.common.data.partition import _shares, check_division, public_size_of_part, site_part
from fedveil.common.data.sources import (
    Reading,
    is_public,
    known_labels,
    load_dataset,
    load_protected,
    public_names,
    train_and_test,
)
from fedveil.common.data.split import _test_records
from fedveil.common.errors import ConfigError, PolicyRefusal
from fedveil.common.files import FileState
from fedveil.common.labels import labels_text
from fedveil.common.log import about
from fedveil.common.messages.columns import FACTOR, Chosen
from fedveil.common.messages.state import AdapterState
from fedveil.common.paths import run_folder
from fedveil.common.tasks import TASKS
from fedveil.common.tasks.examples import Dataset
from fedveil.strategies.job import Job

log = logging.getLogger("fedveil.site")
_named: dict[Path, FileState] = {}
NOTHING = HeldOut()


@dataclass(frozen=True)
class Site:
    """One site's data and where its ledger is. ``data`` never leaves the process."""

    name: str
    data: Dataset
    dataset_id: str
    public_size: int
    ledger_path: Path
    policy: Policy = field(default_factory=Policy)
    held_out: str = ""
    """The rule by which rows were left out of ``data``, in words; empty: there is none."""
    unreadable: str = ""
    """Why the file with the records is no table now, for the site's log and ledger; every round is then noise."""
    rank: int = 0
    """Most columns that the site trains, public; 0: as many as a run has."""
    simulated: bool = False
    """Whether site and server are one machine's own experiment."""
    apart: Callable[[], AbstractContextManager[None]] = nullcontext
    """Makes the context of what takes its time whatever the records are: prices, and waiting for a ledger's lock."""

    def trained_columns(self, job: Job, received: AdapterState, round_number: int) -> tuple[Chosen | None, int]:
        """Return the columns that the site trains in a round, and the rank that it declares; 0: none.

        Raises:
            ProtocolError: what was received has an invalid mask.
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


def check_job(node: Mapping[str, Scalar], job: Job, *, simulated: bool) -> None:
    """Let the steward's rules judge a run before anything that it names is looked at: no record, no model, no folder.

    A simulation is one machine's own: there a node without a policy has nothing to refuse.

    Raises:
        PolicyRefusal: a rule forbids the run, or it names other sites; or a deployed node without ``data`` is to play
            a part of anything but a data set that FedVeil names.
        ConfigError: as for policy_of.
    """
    policy, public = policy_of(node), is_public(job.config.data.name)
    if job.config.site_names and name_of(node) not in job.config.site_names:
        raise PolicyRefusal(f"the run names the sites that it is for, and {name_of(node)!r} is none of them")
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
    check_keys(node)
    name, policy = name_of(node), policy_of(node)
    own_ledger = "ledger" in node or not simulated
    ledger = ledger_of(node) if own_ledger else run_folder(config, run) / "ledgers" / f"{name}.sqlite"
    dataset_id, size, held_out = policy.dataset_of(node, name), public_size_of(node, policy), held_out_of(node, policy)
    if dataset_id in withdrawn_in(ledger):  # before a record is read: nothing of them is to be in memory again
        raise PolicyRefusal(WITHDRAWN.format(dataset_id))
    if "data" in node:
        if TASKS[config.model.task].labelled and not known_labels(config.data):
            raise ConfigError("sites with data of their own need data.labels: every site must number labels alike")
        source, breaks = str(node["data"]), policy.line_breaks
        key = key_in(ledger) if held_out.share else b""
        reading = _own_data(own_settings(config, policy), config.model.task, source, name, breaks, held_out, key)
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
    return Site(name, data, dataset_id, size, ledger, policy, str(held_out), unreadable, rank_of(node), simulated)


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


def forget_divided() -> None:
    """Drop the records that this process's simulated sites divide, and the server's test part of them."""
    for made in (_partition, train_and_test, _shares, _test_records):
        made.cache_clear()


def named_files() -> Mapping[Path, FileState]:
    """Return the files that cells of these records name, each as it was before this process first opened it."""
    return _named


@lru_cache(maxsize=16)
def _own_data(
    config: DataConfig,
    task: str,
    source: str,
    site: str,
    line_breaks: bool,
    held_out: HeldOut = NOTHING,
    key: bytes = b"",
) -> Reading:
    """Read the records, and log once, at the site alone, how many rows are no records and why; no row is quoted.

    What is held out is in memory no longer than the reading takes.
    """
    reading = load_protected(config, task, source, line_breaks=line_breaks, beside=held_out.columns)
    reading = replace(reading, dataset=held_out.split(reading.dataset, key)[0])
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

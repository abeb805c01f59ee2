"""The division of a data set among simulated sites."""

from __future__ import annotations

import dataclasses
from collections import Counter
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from urllib.parse import parse_qsl, urlencode

from fedveil.common.check import nearest, positive
from fedveil.common.config.flat import Scalar, to_mapping
from fedveil.common.config.run import RunConfig
from fedveil.common.config.sections import DataConfig, ModelConfig
from fedveil.common.errors import ConfigError, DataError, PolicyRefusal
from fedveil.common.later import np, torch
from fedveil.common.tasks import TASKS
from fedveil.common.tasks.examples import Dataset
from fedveil.privacy.randomness import stream

DRAWS = 11
"""Draws of Dirichlet shares after which a division is given up."""
NO_LABEL = (
    "data.partition is 'dirichlet', but the records have no label: set it to 'iid', or to 'natural' with data.key"
)


def check_partition(config: RunConfig) -> None:
    """Raise ConfigError if simulated sites cannot divide records as configured, or the test part is all of them.

    No record is read.

    Only a simulation asks: sites with data of their own divide nothing, whatever ``data.partition`` says.
    """
    if not TASKS[config.model.task].labelled and config.data.partition == "dirichlet":
        raise ConfigError(NO_LABEL)
    data = config.data
    if data.test and (data.test == data.name or _same_file(data.test, data.name)):
        raise ConfigError(
            "data.test is data.name itself, whose records simulated sites train on, so that a score would be of those: "
            "leave data.test empty, which holds a part of data.name out, or name other records"
        )


def _same_file(one: str, other: str) -> bool:
    return Path(one).is_file() and Path(other).is_file() and Path(one).samefile(other)


def division_of(config: RunConfig) -> str:
    """Return every setting that decides which records a site's part holds, as the node setting ``division``.

    One word without blanks or quotes, so that Flower's ``--node-config`` takes it.
    """
    return urlencode(_dividing(config.data, config.model))


def check_division(fixed: str, config: RunConfig) -> None:
    """Raise PolicyRefusal, naming the setting, if a run divides the records otherwise than ``fixed`` says.

    Args:
        fixed: what ``division_of`` returned when the part was handed out; a setting that it lacks had its default.
        config: the run.

    Raises:
        ConfigError: ``fixed`` is no such text, or names an unknown setting.
    """
    try:
        handed_out = dict(parse_qsl(fixed, keep_blank_values=True, strict_parsing=True))
    except ValueError as error:
        raise ConfigError(
            f"the node setting 'division' cannot be read ({error}): write name=value&name=value"
        ) from error
    defaults, of_run = _dividing(DataConfig(), ModelConfig()), _dividing(config.data, config.model)
    for key in handed_out:
        if key not in defaults:
            raise ConfigError(f"the node setting 'division' names {key!r}{nearest(key, defaults)}")
    for key, value in {**defaults, **handed_out}.items():
        if of_run[key] != value:
            raise PolicyRefusal(
                f"this site's part of the records was handed out with {key} = {value!r}; the run asks for "
                f"{of_run[key]!r}, which would divide them anew"
            )


def _dividing(data: DataConfig, model: ModelConfig) -> dict[str, str]:
    # Columns, labels and task decide as well: which rows are records, and which of them have equal texts.
    deciding: dict[str, Scalar] = {"model.task": model.task, **to_mapping(data, "data.")}
    return {key: str(value) for key, value in deciding.items()}


def site_part(train: Dataset, config: DataConfig, partition_id: int, num_partitions: int) -> Dataset:
    """Return the records of one simulated site; the sites' parts are disjoint and cover ``train``.

    The division follows from the records, ``data.partition``, ``data.seed`` and the number of sites,
    and is computed once per process. ``iid`` gives equal sizes but for one record; ``dirichlet`` draws
    each label's shares from Dirichlet(``data.dirichlet-alpha``); ``natural`` deals whole keys, largest
    first, each to the site with the fewest records so far. Where ``data.person`` is read persons are divided so, each
    with all their records, by the first of them.

    Args:
        train: records of all sites.
        config: how to divide them.
        partition_id: the site, from 0 up to ``num_partitions - 1``.
        num_partitions: number of sites.

    Raises:
        ConfigError: ``partition_id`` is out of range, or ``dirichlet`` is set for records without labels.
        DataError: fewer records, persons or keys than sites, or no Dirichlet draw gave every site a record, or a person
            has records of several keys.
    """
    positive(num_partitions=num_partitions)
    if not 0 <= partition_id < num_partitions:
        raise ConfigError(f"partition-id must be from 0 to {num_partitions - 1}, not {partition_id}")
    if len(train.examples) < num_partitions:
        raise DataError(f"{train.name} has {len(train.examples)} training records, too few for {num_partitions} sites")
    records = _shares(train, config, num_partitions)[partition_id]
    return dataclasses.replace(
        train,
        name=f"{train.name}[{partition_id}/{num_partitions}]",
        examples=tuple(train.examples[i] for i in records),
    )


@lru_cache(maxsize=8)
def _shares(train: Dataset, config: DataConfig, num_partitions: int) -> tuple[tuple[int, ...], ...]:
    """Return the indices into ``train`` that each site has."""
    if any(example.person for example in train.examples):
        return _shares_of_persons(train, config, num_partitions)
    # Mixed beforehand: equal shares, and those of a label, are runs of the order given.
    order = torch.randperm(len(train.examples), generator=stream(config.seed, "partition")).tolist()
    if config.partition == "natural":
        sites = _sites_of_keys(train, config, num_partitions)
        return tuple(tuple(i for i in order if sites[i] == site) for site in range(num_partitions))
    if config.partition == "iid":
        size, more = divmod(len(order), num_partitions)
        ends = [size * k + min(k, more) for k in range(num_partitions + 1)]
        return tuple(tuple(order[begin:end]) for begin, end in pairwise(ends))
    labels = [train.examples[i].stratum for i in order]
    if None in labels:
        raise ConfigError(NO_LABEL)
    parts = _dirichlet_parts(np.array(labels), num_partitions, config)
    if parts is None:
        advice = _many_labels(train) or "raise alpha, or use fewer sites"
        raise DataError(
            f"no division of {len(train.examples)} records with data.dirichlet-alpha {config.dirichlet_alpha} "
            f"gave each of {num_partitions} sites a record: {advice}"
        )
    return tuple(tuple(order[i] for i in part) for part in parts)


def _dirichlet_parts(labels: np.ndarray, num_partitions: int, config: DataConfig) -> list[list[int]] | None:
    """Return the places in ``labels`` that each site has, or None where no draw gave every site one.

    Each label's places are cut by one draw of shares (Hsu et al. 2019), and a site's then shuffled. Draws are those of
    ``DirichletPartitioner`` of flwr-datasets without its balance, whose import takes seconds.
    """
    draws = np.random.default_rng(config.seed)
    for _ in range(DRAWS):
        parts: list[list[int]] = [[] for _ in range(num_partitions)]
        for label in sorted(set(labels.tolist())):
            places = np.nonzero(labels == label)[0]
            shares = draws.dirichlet(np.full(num_partitions, config.dirichlet_alpha))
            cuts = (np.cumsum(shares) * len(places)).astype(int)[:-1]
            for part, more in zip(parts, np.split(places, cuts), strict=True):
                part.extend(more.tolist())
        if all(parts):
            for part in parts:
                draws.shuffle(part)
            return parts
    return None


def _many_labels(train: Dataset) -> str:
    """Return what to look at where nearly every record has a label of its own, as a name or a number has."""
    few = len(train.label_names) <= len(train.examples) / 2
    return "" if few else f"there are {len(train.label_names)} labels, so data.label may name a column that is none"


def _shares_of_persons(train: Dataset, config: DataConfig, num_partitions: int) -> tuple[tuple[int, ...], ...]:
    """Return the same where persons are divided, each by the first of their records, which all the others follow."""
    records_of: dict[str, list[int]] = {}
    for i, example in enumerate(train.examples):
        records_of.setdefault(example.person, []).append(i)
    if len(records_of) < num_partitions:
        raise DataError(
            f"{train.name} has {len(records_of)} different values of data.person {config.person!r}, too few for "
            f"{num_partitions} sites: use at most {len(records_of)}"
        )
    if config.partition == "natural":
        for records in records_of.values():
            if len({train.examples[i].key for i in records}) > 1:
                raise DataError(
                    f"a person of {train.name} (data.person {config.person!r}) has records with several values of "
                    f"data.key {config.key!r}, which would divide them: choose another data.partition"
                )
    persons = list(records_of.values())
    firsts = tuple(dataclasses.replace(train.examples[records[0]], person="") for records in persons)
    parts = _shares(dataclasses.replace(train, examples=firsts), config, num_partitions)
    return tuple(tuple(i for number in part for i in persons[number]) for part in parts)


def _sites_of_keys(train: Dataset, config: DataConfig, num_partitions: int) -> list[int]:
    """Return each record's site: whole keys, largest first, dealt to the site with the fewest records."""
    sizes = Counter(example.key for example in train.examples)
    if len(sizes) < num_partitions:
        raise DataError(
            f"{train.name} has {len(sizes)} different values of data.key {config.key!r}, too few for "
            f"{num_partitions} sites: use at most {len(sizes)}, or another data.partition"
        )
    load = [0] * num_partitions
    site_of: dict[str, int] = {}
    for key, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        site_of[key] = min(range(num_partitions), key=lambda site: (load[site], site))
        load[site_of[key]] += size
    return [site_of[example.key] for example in train.examples]


def public_size_of_part(count: int) -> int:
    """Return the public size of a site that plays a partition: the count, cut to two significant digits.

    It is a plain function of the count and protects none: 1900 and 1899 records have different ones. It may
    be declared because the partition follows from public settings: a public data set, its seed, the
    number of sites. A steward of private records names a number of his own. Never below 1.

    >>> public_size_of_part(1883), public_size_of_part(57)
    (1800, 57)
    """
    step: int = 10 ** max(0, len(str(count)) - 2)
    return max(1, count // step * step)

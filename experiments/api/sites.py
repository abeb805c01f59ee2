"""The simulated sites of a run from Python: their names, their nodes, and ledgers that several runs share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from fedveil.common.check import PLAIN_NAME
from fedveil.common.config.flat import Scalar
from fedveil.common.config.run import RunConfig
from fedveil.common.data.partition import site_part
from fedveil.common.data.sources import train_and_test
from fedveil.common.errors import ConfigError
from fedveil.common.files import replace_file
from fedveil.common.tasks.examples import Dataset

DIVISION = "records.json"
"""In a folder of ledgers, whose records each is of, as hashes."""


def usual_names(sites: int) -> list[str]:
    """Return what simulated sites are called that have no names of their own."""
    return [f"site-{i}" for i in range(sites)]


def sites_of_records(config: RunConfig, wanted: int) -> list[str]:
    """Return the names of the sites that divide a run's records: those of the keys where each site has one alone.

    Args:
        config: of the run.
        wanted: number of sites; 0: as many as there are keys, of a division by keys.

    Raises:
        DataError: the records are too few for the sites.
    """
    train, _ = train_and_test(config.data, config.model.task)
    keys = {example.key for example in train.examples}
    parts = wanted or len(keys)
    if config.data.partition != "natural" or len(keys) != parts:
        return usual_names(parts)
    names = [site_part(train, config.data, i, parts).examples[0].key for i in range(parts)]
    return names if all(map(PLAIN_NAME.fullmatch, names)) else usual_names(parts)


def nodes_of(names: Sequence[str], ledgers: Path | None) -> list[dict[str, Scalar]]:
    """Return the nodes of simulated sites, with a ledger each in ``ledgers``; None: in the run's own folder."""
    nodes: list[dict[str, Scalar]] = [
        {"partition-id": i, "num-partitions": len(names), "site": name} for i, name in enumerate(names)
    ]
    for node in nodes if ledgers else ():
        node["ledger"] = str(ledgers.absolute() / f"{node['site']}.sqlite") if ledgers else ""
    return nodes


def same_records(ledgers: Path, config: RunConfig, names: Sequence[str]) -> None:
    """Write down which records the sites of shared ledgers have, or compare them with those of the runs before.

    A record that came to another site would have that site's budget, which knows nothing of what was spent on it.

    Raises:
        ConfigError: a site had other records then, or the folder has ledgers and does not say whose.
    """
    train, _ = train_and_test(config.data, config.model.task)
    parts = [site_part(train, config.data, i, len(names)) for i in range(len(names))]
    now = {name: _digest(part) for name, part in zip(names, parts, strict=True)}
    file = ledgers / DIVISION
    if not file.is_file():
        if any(ledgers.glob("*.sqlite")):
            raise ConfigError(f"ledger: {ledgers} has ledgers and no {DIVISION}: put it back, or name another folder")
        ledgers.mkdir(parents=True, exist_ok=True)
        replace_file(file, (json.dumps(now, indent=1) + "\n").encode())
    elif json.loads(file.read_bytes()) != now:
        raise ConfigError(
            f"ledger: the sites of {ledgers} had other records than now, so that what was spent on a record may be "
            "unknown to its site: hold out and divide the same records as then, or begin a budget in another folder"
        )


def _digest(part: Dataset) -> str:
    rows = sorted(example.row or example.canonical(str(example.label)).encode() for example in part.examples)
    return hashlib.sha256(b"".join(hashlib.sha256(row).digest() for row in rows)).hexdigest()

"""The simulated sites of a run from Python: their names, their nodes, and ledgers that several runs share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from fedveil.client.ledger.ledger import Ledger
from fedveil.client.ledger.mounts import refuse_network
from fedveil.common.check import PLAIN_NAME
from fedveil.common.config.flat import Scalar
from fedveil.common.config.run import RunConfig
from fedveil.common.config.sections import PrivacyConfig
from fedveil.common.data.partition import site_part
from fedveil.common.data.sources import train_and_test
from fedveil.common.errors import ConfigError, RunFailed
from fedveil.common.files import replace_file
from fedveil.common.tasks.examples import Dataset
from fedveil.privacy.figures import epsilon_text
from fedveil.privacy.privacy_filter import FRESH, History, price_after

LEDGERS = "ledgers"
"""In a run's folder, the ledgers of its simulated sites."""
DIVISION = "records.json"
"""In a folder of ledgers, whose records each is of, as hashes."""
LEAST_LEFT = 0.1
"""The part of its ε that a run must find in shared ledgers: the noise of less drowns what could be learnt."""


def usual_names(sites: int) -> list[str]:
    """Return what simulated sites are called that have no names of their own."""
    return [f"site-{i}" for i in range(sites)]


def sites_of_records(config: RunConfig, wanted: int, *, named: bool = True) -> tuple[list[str], str]:
    """Return the names of the sites that divide a run's records, and a line on sites that could not keep theirs.

    A site that has the records of one key alone is called by the key.

    Args:
        config: of the run.
        wanted: number of sites; 0: as many as there are keys, of a division by keys.
        named: whether they can be called otherwise than usual.

    Raises:
        DataError: the records are too few for the sites.
    """
    train, _ = train_and_test(config.data, config.model.task)
    keys = {example.key for example in train.examples}
    parts = wanted or len(keys)
    usual = usual_names(parts)
    if config.data.partition != "natural" or len(keys) != parts:
        return usual, ""
    names = [site_part(train, config.data, i, parts).examples[0].key for i in range(parts)]
    plain = all(map(PLAIN_NAME.fullmatch, names))
    if named and plain:
        return names, ""
    called = ", ".join(f"{new} is {name!r}" for new, name in zip(usual, names, strict=True))
    return usual, called + ": a site's name has letters, digits, '.', '_' and '-' alone" * (not plain)


def nodes_of(names: Sequence[str], ledgers: Path | None) -> list[dict[str, Scalar]]:
    """Return the nodes of simulated sites, with a ledger each in ``ledgers``; None: in the run's own folder."""
    nodes: list[dict[str, Scalar]] = [
        {"partition-id": i, "num-partitions": len(names), "site": name} for i, name in enumerate(names)
    ]
    for node in nodes if ledgers else ():
        node["ledger"] = str(ledgers.absolute() / f"{node['site']}.sqlite") if ledgers else ""
    return nodes


def same_records(ledgers: Path, config: RunConfig, names: Sequence[str], *, write: bool = True) -> None:
    """Write down which records the sites of these ledgers have, or compare them with those that they had.

    Without ``write`` they are compared alone.

    A record that came to another site would have that site's budget, which knows nothing of what was spent on it; and
    a run goes on with the records that it began with.

    Raises:
        ConfigError: a site had other records then, or the folder has ledgers and does not say whose.
        LedgerError: it lies on a network file system.
    """
    train, _ = train_and_test(config.data, config.model.task)
    parts = [site_part(train, config.data, i, len(names)) for i in range(len(names))]
    now = {name: _digest(part) for name, part in zip(names, parts, strict=True)}
    file = ledgers / DIVISION
    refuse_network(file)
    if not file.is_file():
        if any(ledgers.glob("*.sqlite")):
            raise ConfigError(f"ledger: {ledgers} has ledgers and no {DIVISION}: put it back, or name another folder")
        if not write:
            return
        ledgers.mkdir(parents=True, exist_ok=True)
        replace_file(file, (json.dumps(now, indent=1) + "\n").encode())
    elif json.loads(file.read_bytes()) != now and config.resume:
        raise ConfigError("resume: the run began with other records: give the same data, site and test as then")
    elif json.loads(file.read_bytes()) != now:
        raise ConfigError(
            f"ledger: the sites of {ledgers} had other records than now, so that what was spent on a record may be "
            "unknown to its site: hold out and divide the same records as then, or begin a budget in another folder"
        )


def left_of(ledgers: Path, privacy: PrivacyConfig) -> str:
    """Return a line on what earlier runs have spent of a shared budget; empty if they have spent nothing.

    Raises:
        RunFailed: less than LEAST_LEFT of the budget is left at a site.
    """
    spent = {file.stem: _spent(file, privacy.delta) for file in sorted(ledgers.glob("*.sqlite"))}
    if not any(spent.values()):
        return ""
    site = max(spent, key=lambda name: spent[name])
    line = f"ledger: earlier runs have spent ε {epsilon_text(spent[site])} of {privacy.epsilon:g} at {site}"
    if privacy.epsilon - spent[site] < LEAST_LEFT * privacy.epsilon:
        raise RunFailed(f"{line}, and too little is left for a run: raise epsilon, or begin a budget in another folder")
    return f"{line}: the noise of this run is that of what is left"


def _spent(file: Path, delta: float) -> float:
    with Ledger(file) as ledger:
        return max((ledger.epsilon(name, delta) for name in {entry.dataset for entry in ledger.entries()}), default=0.0)


def most_spent(ledgers: Path, delta: float) -> History:
    """Return what the site has spent, in a folder of ledgers, that has spent most."""
    histories = [FRESH]
    for file in ledgers.glob("*.sqlite"):
        with Ledger(file) as ledger:
            histories += [ledger.history(name, "") for name in {entry.dataset for entry in ledger.entries()}]
    return max(histories, key=lambda history: price_after(history, (), delta)[0])


def _digest(part: Dataset) -> str:
    rows = sorted(example.row or example.canonical(str(example.answer())).encode() for example in part.examples)
    return hashlib.sha256(b"".join(hashlib.sha256(row).digest() for row in rows)).hexdigest()

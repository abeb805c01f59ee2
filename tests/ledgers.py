"""Charges to small ledgers, and records to charge for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedveil.client.ledger.ledger import Ledger
from fedveil.client.ledger.record_hashes import record_hashes
from fedveil.client.ledger.rows import Charge, Receipt
from fedveil.common.tasks.examples import Dataset
from fedveil.common.tasks.text import TextExample
from fedveil.privacy.accounting import Release, gaussian_release
from fedveil.privacy.privacy_filter import promised

DELTA = 1e-5
ROUND = gaussian_release(noise_multiplier=1.0, sample_rate=0.1, count=5)
WHISPER = gaussian_release(noise_multiplier=20.0, sample_rate=0.01, count=1)
"""Cheap in privacy and quick to price."""


def charge(ledger: Ledger, round_number: int = 1, release: Release = ROUND, **overrides: Any) -> Receipt:
    terms = {"dataset": "ward", "run": "run-1", "delta": DELTA, "max_epsilon": 8.0, "unit": "record", "planned": ()}
    terms |= {"round_number": round_number, "releases": (release,)}
    charge = Charge(**{name: overrides.pop(name, value) for name, value in terms.items()})
    return ledger.charge(charge, **overrides)


def epsilon(releases: list[Release], delta: float) -> float:
    return promised(releases, delta)[0]


def cost_of(rounds: int) -> float:
    return epsilon([Release(ROUND.event, rounds * ROUND.count)], DELTA)


def texts(*numbers: int, column: str = "record") -> Dataset:
    """Return records of which a run read the column ``column``; a number's whole row is the same in any."""
    examples = (TextExample(text=f"{column} {n}", label=n % 2, row=f"row {n}".encode()) for n in numbers)
    return Dataset("any", tuple(examples), ("no", "yes"))


def charge_for(path: Path, dataset: str, data: Dataset, release: Release = WHISPER, **terms: Any) -> Receipt:
    with Ledger(path) as ledger:
        return charge(ledger, 1, release, dataset=dataset, records=record_hashes(data, ledger.key), **terms)


def charged(path: Path) -> list[tuple[str, str, int]]:
    with Ledger(path) as ledger:
        return [(entry.dataset, entry.run, entry.round_number) for entry in ledger.entries()]


@contextmanager
def no_special_rights() -> Iterator[None]:
    """Be somebody who may write nothing of root's, where the tests run as root."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)

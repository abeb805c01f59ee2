"""Two processes charge one data set at the same time, again and again: together they never pass its budget.

    .venv/bin/python -m audits.concurrent --bouts 20

In a bout two processes open one ledger, start at one signal and charge until they are refused. Then the
ledger must hold exactly the charges that were paid for, within the budget, and have had no room for one more.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from audits.faults import SOUND, Fault
from audits.finding import judged
from audits.forked import Child, Send, fork
from audits.shell import run_alone
from fedveil.client.ledger.ledger import Ledger
from fedveil.client.ledger.rows import Charge
from fedveil.common.errors import BudgetExhausted
from fedveil.common.findings import Finding
from fedveil.privacy.accounting import Release, gaussian_release
from fedveil.privacy.privacy_filter import promised

ROUND = gaussian_release(2.0, 0.25, 2)
DELTA = 1e-3
PROCESSES = 2
PAUSE_SECONDS = 0.01


def cost_of(rounds: int) -> float:
    """Return the epsilon of so many charges of ``ROUND``."""
    return promised([Release(ROUND.event, ROUND.count * rounds)], DELTA)[0]


def charge_to_the_end(path: Path, budget: float, signal: Path, send: Send) -> None:
    """Wait for ``signal``, charge until refused, and say how often that went well."""
    paid = 0
    with Ledger(path) as ledger:
        send("ready")
        while not signal.exists():
            pass
        try:
            while True:
                ledger.charge(Charge("ward", "1", paid + 1, (ROUND,), DELTA, budget))
                paid += 1
                # SQLite lets whoever waits sleep longer each time; without a pause one process pays it all.
                time.sleep(random.uniform(0.0, PAUSE_SECONDS))
        except BudgetExhausted:
            send(str(paid))


def bout(folder: Path, number: int, rounds: int) -> tuple[list[int], list[str]]:
    """Let the processes charge one fresh ledger; return what each paid and what must not be."""
    budget, path, signal = cost_of(rounds) + 1e-9, folder / f"{number}.sqlite", folder / f"{number}.start"

    def work(send: Send) -> None:
        charge_to_the_end(path, budget, signal, send)

    children: list[Child] = [fork(work) for _ in range(PROCESSES)]
    for child in children:
        child.line()
    signal.touch()
    said = [child.line() for child in children]
    for child in children:
        child.kill()
    if not all(line.isdigit() for line in said):
        return [], [f"bout {number}: a process ended without a refusal"]
    paid = [int(line) for line in said]
    with Ledger(path) as ledger:
        shown, rows = ledger.epsilon("ward", DELTA), len(ledger.entries())
    wrong = []
    if shown > budget:
        wrong.append(f"bout {number}: epsilon {shown:.4f} is charged, the budget is {budget:.4f}")
    if rows != sum(paid):
        wrong.append(f"bout {number}: {sum(paid)} charges were paid for, {rows} are in the ledger")
    if sum(paid) < rounds:
        wrong.append(f"bout {number}: only {sum(paid)} of {rounds} charges were let through")
    return paid, wrong


def charge_at_once(folder: Path, bouts: int, rounds: int = 12, fault: Fault = SOUND) -> Finding:
    """Hold ``bouts`` bouts over budgets of ``rounds`` charges each, in an empty folder, with ``fault`` built in."""
    for number in range(1, rounds + 2):  # the processes inherit these prices, and meet at the file
        cost_of(number)
    paid, violations, contested = 0, list[str](), 0
    with fault.plant():
        for number in range(bouts):
            shares, wrong = bout(folder, number, rounds)
            paid += sum(shares)
            violations += wrong
            contested += all(shares)
    return judged(
        "two processes at once",
        fault.name,
        bool(violations),
        {
            "bouts": bouts,
            "charges that fit": bouts * rounds,
            "charges paid": paid,
            "bouts in which both paid": contested,
            "violations": len(violations),
            **({"first violation": violations[0]} if violations else {}),
        },
    )


@contextmanager
def unlocked() -> Iterator[None]:
    """Decide by what was read before the lock, and never look whether it still is what the ledger holds.

    It shows for certain where one charge fits: both read the whole budget, and both pay. Where an even number fits,
    two processes in step pay it in pairs and end at the budget to the charge, wrong as they are.
    """
    priced = Ledger._prices

    def slowly(ledger: Ledger, *terms: Any) -> Any:
        prices = priced(ledger, *terms)
        time.sleep(0.3)  # longer than all else in a charge, so that both processes read the same remainder
        return prices

    with patch.object(Ledger, "_prices", slowly), patch.object(Ledger, "_version", lambda _: 0):
        yield


UNLOCKED = Fault("decided before the lock", unlocked)


def bouts_of_all(folder: Path, bouts: int) -> list[Finding]:
    """Hold ``bouts`` bouts with the code as it is and five with the fault built in; ``folder`` must be empty."""
    for name in ("sound", "unlocked"):
        (folder / name).mkdir()
    return [charge_at_once(folder / "sound", bouts), charge_at_once(folder / "unlocked", 5, 1, UNLOCKED)]


if __name__ == "__main__":
    run_alone(__doc__, "bouts", 20, bouts_of_all)

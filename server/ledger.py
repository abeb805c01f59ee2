"""The server's ledger, of a mechanism whose noise a trusted server adds: what the sites' sum has paid, over all runs.

A charge is priced on top of all that the file holds, and is on disk before a task is sent, and so before any noise is
drawn. The file is replaced in one step under a lock: a killed server leaves the old one or the new one, and two servers
that share it never spend the same remainder. Charges are only ever added. A round that is repeated, after a crash or in
a resumed run, releases again and is charged again.

The one who starts a run may choose its noise, rate and rounds by what runs before it have shown. So with the first
charge its run's whole plan is written down, and all charges are priced by it (``privacy.privacy_filter``).

What no file can know: one that is restored from an old copy, or deleted, forgets. A run that goes on refuses a ledger
that lacks the rounds which it has done. A ledger in the run's own folder is copied and restored along with it, and then
lacks none: never resume a copied or restored folder whose ledger is its own; name ``privacy.ledger``.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from fedveil.common.config.flat import Scalar
from fedveil.common.errors import BudgetExhausted, ConfigError, DataError, LedgerError
from fedveil.common.files import expanded, replace_file
from fedveil.common.messages.round import Spending
from fedveil.common.strict_json import from_json, to_json
from fedveil.privacy import trusting_the_server
from fedveil.privacy.accountant import AT_RATE_1, DEPARTED, TRAINING
from fedveil.privacy.accounting import Release
from fedveil.privacy.events import Event
from fedveil.privacy.figures import epsilon_text
from fedveil.privacy.privacy_filter import FRESH, Commitment, History, commitment_to, price
from fedveil.server.lock import locked

FORMAT = 2
"""The number goes on and never restarts."""
"""That command, in a checkout of FedVeil's repository."""
DEARER = {
    DEPARTED: ", more because the ledger's first run planned something else",
    AT_RATE_1: ", more because rates count as 1: the ledger's first run planned to ask all sites",
}
"""Why a charge costs more than if everything had been planned together."""
NAME = "sites-ledger.json"
"""Of the ledger that all runs of one server share."""
PATIENCE = 60.0
"""Seconds that another server's lock is waited for."""


@dataclass(frozen=True)
class Charge:
    """One release that was charged."""

    run: str
    round_number: int
    """1-based."""
    event: Event
    delta: float
    charged_at: str
    """UTC, ISO 8601."""

    @property
    def release(self) -> Release:
        """What was charged for."""
        return Release(self.event, 1)


@dataclass(frozen=True)
class LedgerContent:
    """All that the file holds."""

    format: int
    unit: str
    """What one neighbour is, in one word."""
    charges: list[Charge]
    """Oldest first."""
    first_plan: list[Release]
    """All that the first run planned, before anything was released; empty only where nothing is charged."""

    @property
    def commitment(self) -> Commitment:
        """The plan by which everything is priced."""
        return Commitment(tuple(self.first_plan))


def with_ledger(settings: Mapping[str, Scalar], folder: Path | None = None) -> dict[str, Scalar]:
    """Return a run's settings with its ledger by an absolute path, since Flower starts the server elsewhere.

    Args:
        settings: of the run, flat.
        folder: where the ledger of all runs lies that name none; None: such a run has one of its own.
    """
    named = str(settings.get("privacy.ledger", ""))
    if named:
        return {**settings, "privacy.ledger": str(expanded(named).absolute())}
    mode = str(settings.get("privacy.mode", ""))
    if folder is None or not trusting_the_server([mode]):
        return dict(settings)
    return {**settings, "privacy.ledger": str(folder / NAME)}


class ServerLedger:
    """The ledger in the file ``path``; made, with its folder, by the first charge.

    Args:
        path: the file.
        unit: what one neighbour is, in one word; a file of another unit is refused.
        patience: seconds that a lock is waited for.
    """

    def __init__(self, path: Path, unit: str, *, patience: float = PATIENCE) -> None:
        self.path, self._unit, self._patience = path, unit, patience
        self._seen = 0

    def charges(self) -> list[Charge]:
        """Return every charge, oldest first.

        Raises:
            LedgerError: the file cannot be read, is damaged, of another format or unit, or has lost charges.
        """
        return self._content().charges

    def rounds_of(self, run: str) -> int:
        """Return how many rounds of a run were charged, a repeated one counted once; errors as for ``charges``."""
        return len({charge.round_number for charge in self.charges() if charge.run == run})

    def history(self, run: str) -> History:
        """Return what was spent before a run's first charge, all of it where it has none; errors as for ``charges``."""
        content = self._content()
        before = list(itertools.takewhile(lambda charge: charge.run != run, content.charges))
        delta = min((charge.delta for charge in content.charges), default=math.inf)
        commitment = content.commitment if before else FRESH.commitment
        return History(tuple(charge.release for charge in before), commitment, delta)

    def first_event(self, run: str) -> Event | None:
        """Return what a run's first charge was for; None where it has none; errors as for ``charges``."""
        return next((charge.event for charge in self.charges() if charge.run == run), None)

    def charge(
        self,
        run: str,
        round_number: int,
        event: Event,
        delta: float,
        max_epsilon: float,
        planned: Sequence[Release] = (),
    ) -> Spending:
        """Write down durably that a round is about to release a noised sum.

        Guarantees: when this returns, the charge is on disk; when it raises, nothing was written. All that the file
        holds is composed at the smallest δ that any of it was charged at, and priced by what the first run planned.

        Args:
            run, round_number, event, delta, max_epsilon: of the round, numbered from 1, and of the run's budget.
            planned: everything that the run is to release; it is written down with a file's first charge alone.

        Raises:
            BudgetExhausted: the release would pass ``max_epsilon``.
            LedgerError: the file cannot be read or written, or was locked for too long.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked():
                before = self._content()
                now = datetime.now(UTC).isoformat(timespec="seconds")
                added = Charge(run, round_number, event, min([delta, *(one.delta for one in before.charges)]), now)
                plan = before.commitment if before.charges else commitment_to(planned, [added.release])
                spending = _price(before.charges, added, plan, max_epsilon)
                if not spending.epsilon_total <= max_epsilon:
                    raise BudgetExhausted(_exhausted(added, spending))
                content = LedgerContent(FORMAT, self._unit, [*before.charges, added], list(plan.releases))
                replace_file(self.path, (json.dumps(to_json(content), indent=1) + "\n").encode())
        except OSError as error:
            raise LedgerError(
                f"the ledger {self.path} cannot be written ({error.strerror}): name a local file that may be"
            ) from error
        self._seen = len(content.charges)
        return spending

    def _content(self) -> LedgerContent:
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            text = ""
        except (OSError, UnicodeDecodeError) as error:
            raise LedgerError(f"the ledger {self.path} cannot be read: check permissions and the disk") from error
        content = self._read(text) if text or self.path.exists() else LedgerContent(FORMAT, self._unit, [], [])
        if len(content.charges) < self._seen:
            raise LedgerError(
                f"the ledger {self.path} has {len(content.charges)} charges, and had {self._seen}: put back the file "
                "that was there"
            )
        self._seen = len(content.charges)
        return content

    def _read(self, text: str) -> LedgerContent:
        try:
            found = json.loads(text)
            number = found.get("format", FORMAT) if isinstance(found, dict) else FORMAT
            if number != FORMAT:
                raise LedgerError(
                    f"the ledger {self.path} has format {number}, this FedVeil reads format {FORMAT} alone: install "
                    "the FedVeil that wrote it"
                )
            content = from_json(LedgerContent, found, "the ledger")
            for charge in content.charges:
                charge.event.check()
            if bool(content.first_plan) != bool(content.charges):
                raise DataError("its plan is missing" if content.charges else "it has a plan, and no charge")
        except (ValueError, DataError, ConfigError) as error:
            reason = " ".join(str(error).split())
            raise LedgerError(f"the ledger {self.path} is damaged ({reason}): do not train, ask for help") from error
        if content.unit != self._unit:
            raise LedgerError(
                f"the ledger {self.path} is of the unit {content.unit!r}, not {self._unit!r}: name another file"
            )
        return content

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Be the only one that charges, until the block ends; the lock ends with the process, however that ends."""
        lock = os.open(self.path.with_name(f".{self.path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
        taken = LedgerError(f"the ledger {self.path} was in use by another server for too long: try again")
        with locked(lock, self._patience, taken):
            yield


def _exhausted(charge: Charge, spending: Spending) -> str:
    detour = spending.accountant.detour
    return (
        f"round {charge.round_number} of run {charge.run!r} would make the sites' epsilon "
        f"{epsilon_text(spending.epsilon_total, decimals=4)}, the budget is {spending.epsilon_budget:g} at delta "
        f"{charge.delta:g}{DEARER.get(detour.reason, '') if detour else ''}: train on other sites, or agree on a "
        "larger budget"
    )


def _price(charges: Sequence[Charge], added: Charge, plan: Commitment, max_epsilon: float) -> Spending:
    before = [charge.release for charge in charges]
    total, accountant = price([*before, added.release], plan, added.delta)
    return Spending(
        purpose=TRAINING,
        event=added.event,
        steps_round=1,
        steps_total=len(charges) + 1,
        delta=added.delta,
        epsilon_round=max(0.0, total - price(before, plan, added.delta)[0]),
        epsilon_total=total,
        epsilon_budget=max_epsilon,
        epsilon_remaining=max(0.0, max_epsilon - total),
        accountant=accountant,
    )
